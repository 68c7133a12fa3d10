/*
 * What the three parts of the live tree share: live.c (names and metadata), live_file.c (open
 * files), live_dir.c (open directories).
 */
#ifndef FF_LIVE_H
#define FF_LIVE_H

#include <stdio.h>

#include "fusefs/fs.h"

/* The path by which an O_PATH descriptor is used where a system call wants a path. It leads to the
 * inode itself, also for a symlink. */
struct live_path {
	char s[32];
};

static inline struct live_path live_path(int fd)
{
	struct live_path p;

	snprintf(p.s, sizeof p.s, "/proc/self/fd/%d", fd);
	return p;
}

/* --- live.c --- */
/* Enters the inode behind the O_PATH descriptor FD, which is taken over also on failure. -ENOENT:
 * it is one the mount does not show. */
int live_entry(struct fs *fs, int fd, struct entry *out);
int live_lookup(struct fs *fs, struct node *dir, const char *name, struct entry *out);
int live_stat(struct fs *fs, struct node *node, struct stat *out);
/* Owner, mode and times. */
int live_set_metadata(struct fs *fs, struct node *node, const struct attr_change *change);
/* WHO changed the node (its bytes, or an ACL if ACL is set): takes the set-id bits away that the
 * kernel did not see to. */
void live_drop_setid(struct fs *fs, struct node *node, const struct caller *who, bool acl);
/* May NAME be made in DIR, or (MAKE false) taken away? */
int live_may_change(struct fs *fs, const struct node *dir, const char *name, bool make);

/* --- live_file.c --- */
int live_open(struct fs *fs, struct node *node, int flags, struct handle **out);
int live_create(struct fs *fs, struct node *dir, const char *name, mode_t mode, int flags,
                const struct caller *who, struct entry *entry, struct handle **out);
int live_tmpfile(struct fs *fs, struct node *dir, mode_t mode, int flags, const struct caller *who,
                 struct entry *entry, struct handle **out);
int live_truncate(struct fs *fs, struct node *node, struct handle *handle, off_t size);

/* --- live_device.c --- */
/* Enters the device that the symlink LINK_FD leads to, if it is one to be served. -ENOENT. */
int live_device_entry(struct fs *fs, int link_fd, struct entry *out);
/* The same for a listing: false, and OUT is left alone. */
bool live_device_item(struct fs *fs, int dir_fd, const char *name, struct dir_item *out);
/* A descriptor of the device. */
int live_device_open(struct fs *fs, struct node *node, int flags);
extern const struct node_ops device_node_ops;

/* --- live_dir.c --- */
int live_opendir(struct fs *fs, struct node *node, struct handle **out);

#endif
