/*
 * A look at one entry of SOURCE, for the walk. Without state; by any thread.
 */
#ifndef FF_COW_TREE_LOOK_H
#define FF_COW_TREE_LOOK_H

#include "cow/tree.h"

struct statx;

/* What the entry NAME is, whose path below SOURCE is PATH: metadata, a symlink's target, a
 * directory's descriptor in *FD. All of one inode, though somebody may put others in its place
 * meanwhile: a flip of names must neither lead us elsewhere nor cost the snapshot. -ENOENT: it is
 * gone, or hidden. */
int tree_look(const struct tree_walk *how, const char *path, int dirfd, const char *name,
              struct ff_frozen *f, int *fd);
void tree_take_statx(const struct statx *sx, struct ff_frozen *f);
/* The xattrs of DIRFD/NAME, or with NAME NULL of DIRFD, into F. */
int tree_read_xattrs(int dirfd, const char *name, struct ff_frozen *f);

#endif
