/*
 * What a snapshot shows besides its frozen tree: directories and files that are made up from it,
 * read only, under names that its root finds but never lists. A frozen inode of such a name wins:
 * the frozen tree is shown as it was.
 *
 * To add one: a line in the table of derived.c, whose function enters the node (derived_enter()); a
 * struct node_ops with .denied = -EROFS and .lasting = true; and handles that begin with a struct
 * derived_file, so that an open one keeps the snapshot.
 */
#ifndef FF_DERIVED_H
#define FF_DERIVED_H

#include "fusefs/fs.h"
#include "fusefs/inode.h"

/* Looks NAME up in the root of SNAP, where no frozen inode has that name. -ENOENT: it is not one
 * of ours either. */
int derived_lookup(struct fs *fs, struct ff_snap *snap, const char *name, struct entry *out);

/* Enters the node of kind OPS that KEY tells from the others of this kind in all snapshots: two
 * addresses, of which the snapshot or MADE keeps each from being used again. A reference to SNAP
 * is taken. MADE, which may be NULL, is node->made from then on; it is freed by MADE_FREE with the
 * node, or at once when the node was there already or this fails. out->st is the caller's to fill
 * before: only out->node and out->timeout are set. */
int derived_enter(struct fs *fs, const struct node_ops *ops, struct ff_snap *snap,
                  const struct ff_frozen *f, const uint64_t key[2], void *made,
                  void (*made_free)(void *made), struct entry *out);

/* The attributes of one that is made from F: F's owner, group and permissions (a file's without
 * those to execute), a number of its own, which SALT tells from those of others that are made from
 * F, the time of the freeze. Size and blocks are 0. */
void derived_stat(const struct ff_snap *snap, const struct ff_frozen *f, uint64_t salt,
                  struct stat *out);

/* The st_ino of the above. */
ino_t derived_ino(const struct ff_snap *snap, const struct ff_frozen *f, uint64_t salt);

/* What an open file of these kinds begins with. */
struct derived_file {
	struct handle h;
	struct ff_hold *hold; /* constant */
};

/* Checks FLAGS, holds the snapshot, makes the handle. On error nothing is to be undone. */
int derived_file_init(struct derived_file *file, const struct handle_ops *ops, struct fs *fs,
                      struct node *node, int flags);
/* For the end of ops->free, before the memory is freed. */
void derived_file_fini(struct derived_file *file);

/* For tables of ops. */
void derived_flush(struct handle *h);
int derived_nothing_to_sync(struct handle *h, bool data_only);
/* Opens a directory whose handle is nothing but a struct handle with OPS. */
int derived_opendir(struct fs *fs, struct node *node, const struct handle_ops *ops,
                    struct handle **out);
/* Frees such a handle. */
void derived_dir_free(struct handle *h);

/* What of F's extended attributes says who may read it: access control lists. Nothing else of them
 * is shown. */
int derived_getxattr(struct fs *fs, struct node *node, const char *name, void *buf, size_t size,
                     size_t *len);
int derived_listxattr(struct fs *fs, struct node *node, char *buf, size_t size, size_t *len);

/* Copies what there is of [OFF, OFF+SIZE) in the LEN bytes at CONTENT; for read. */
size_t derived_copy(const char *content, size_t len, void *buf, size_t size, off_t off);

/* --- checkpoint.c --- */
int checkpoint_enter(struct fs *fs, struct ff_snap *snap, struct entry *out);

/* --- digests.c --- */
int digests_enter(struct fs *fs, struct ff_snap *snap, struct entry *out);

/* --- since.c --- */
int since_enter(struct fs *fs, struct ff_snap *snap, struct entry *out);

/* --- raw.c --- */
int raw_enter(struct fs *fs, struct ff_snap *snap, struct entry *out);

#endif
