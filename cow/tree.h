/*
 * A directory tree as of one moment: names, metadata, xattrs, symlinks, and for each regular file
 * which fleecing image holds it. Walked from SOURCE at a freeze, or decoded from a manifest; never
 * changed once a snapshot shows it.
 */
#ifndef FF_COW_TREE_H
#define FF_COW_TREE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/stat.h>
#include <time.h>

#define TREE_NO_DISK UINT32_MAX
/* A regular file or directory that cannot be frozen, and must not be missing: its path is longer
 * than paths may be, or it is on a filesystem that is mounted below SOURCE, or a subvolume there.
 * It is listed, and what it holds reads as EIO. */
#define TREE_UNFROZEN (UINT32_MAX - 1)

struct device;

struct tree_entry {
	char *name;
	uint32_t inode;
};

/* One inode. The type is opaque outside cow/ under the name struct ff_frozen. */
struct ff_frozen {
	struct stat st; /* st_dev 0, st_ino of the source */
	int64_t btime_sec;
	uint32_t btime_nsec;
	uint32_t parent; /* of a directory; the root's is itself */
	uint32_t disk;   /* of a regular file: index among the disks, else TREE_NO_DISK; of both
	                    and directories: TREE_UNFROZEN */
	struct tree_entry *entries; /* of a directory, in the order of their bytes */
	uint32_t entry_count;
	uint32_t xattr_len;
	char *xattrs;          /* name NUL be32-length value, repeated */
	char *target;          /* of a symlink */
	char *image;           /* of a disk: path of the fleecing image below its snapshot */
	char *path;            /* of a disk, while freezing: one path below SOURCE; else NULL */
	struct device *device; /* of a block device's disk, while freezing; else NULL */
};

struct tree {
	struct ff_frozen *inodes; /* 0 is the root */
	uint32_t count, room;
	uint32_t *disks; /* inode of each disk */
	uint32_t disk_count, disk_room;
};

struct tree_walk {
	int source_fd;
	dev_t dev;      /* what is on another filesystem is TREE_UNFROZEN */
	dev_t hide_dev; /* FLEECE_DIR, should it lie below SOURCE */
	ino_t hide_ino;
	const char *hide_name; /* a name in the root to leave out */
	char *const *exclude;
	size_t exclude_count;
	bool xattrs;
	bool tells; /* logs what is TREE_UNFROZEN */
	/* What is done about each symlink, if anything: F is of it, and FD (O_PATH) too. It may
	 * become a regular file's. An error ends the walk. */
	int (*link)(void *ctx, int fd, const char *path, struct ff_frozen *f);
	void *link_ctx;
	size_t longest; /* path below SOURCE that can be used, bytes; 0: what the kernel takes */
};

/* Walks SOURCE. -ENOMEM, or the error of a directory that cannot be read (logged). */
int tree_walk(const struct tree_walk *how, struct tree **out);
void tree_free(struct tree *t);
/* What F points to. */
void tree_free_inode(struct ff_frozen *f);

/* Building, for the walk and the manifest. Pointers into t->inodes die with each addition. On
 * error what the inode points to stays the caller's. */
int tree_add(struct tree *t, const struct ff_frozen *inode, uint32_t *index);
int tree_add_disk(struct tree *t, uint32_t inode);

#endif
