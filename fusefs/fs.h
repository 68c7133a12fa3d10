/*
 * What the parts of the filesystem share: the mounted filesystem, and the two tables of functions
 * by which dispatch.c reaches the kinds of node (live, frozen, the directory of snapshots) without
 * knowing them. All functions here return 0 or -errno and are thread-safe; none replies to FUSE.
 */
#ifndef FF_FS_H
#define FF_FS_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/stat.h>
#include <sys/types.h>

#include "ff_store.h"

struct fuse_conn_info_opts;
struct fuse_session;
struct handle;
struct node;
struct node_table;
struct options;

/* Largest read and write, bytes. */
#define FS_MAX_IO (1u << 20)

/* st_ino of the directory of snapshots: high, so that no inode of a source is likely to have it. */
#define FS_SNAPDIR_INO ((ino_t)0x7ffffffffffffff1)

/* The same of what .fleecefs holds, and of .fleecefs itself. */
#define FS_CONTROL_INO (FS_SNAPDIR_INO + 1)
enum { FS_CONTROL_FILES = 2 };

/* How long the kernel may trust names and attributes, seconds. */
#define FS_LIVE_TIMEOUT   1.0
#define FS_FROZEN_TIMEOUT 3600.0

/* Constant once the mount is made, except where a comment says otherwise. */
struct fs {
	struct ff_store *store;
	struct fuse_session *se;
	struct fuse_conn_info_opts *conn_opts; /* what the user wants of the connection */
	int source_fd;
	int highest_fd;      /* of a live node: those beyond are kept for handles and the engine */
	bool uncached;       /* files of SOURCE may change behind the mount: the kernel is to
	                        trust nothing that it was told of the live tree before */
	const char *snapdir; /* name of the directory of snapshots in the root */
	struct node_table *nodes;
	struct node *root;
	struct node *snaps;
	struct node *control[FS_CONTROL_FILES + 1]; /* its files, and the directory .fleecefs */
	const struct options *options;
	const char *source, *mountpoint;       /* absolute */
	struct timespec started, started_boot; /* by the clock, and CLOCK_BOOTTIME */
	atomic_llong complained; /* when the log was told that descriptors are scarce, seconds */

	bool as_caller;           /* we may take on a caller's ids and keep our capabilities */
	pthread_key_t thread_key; /* struct fs_thread of each thread, made when first needed */

	pthread_mutex_t handles_lock;
	struct handle *handles; /* handles_lock; every open handle, for the teardown */

	pthread_mutex_t tasks_lock;
	pthread_cond_t tasks_done; /* tasks became 0 */
	unsigned tasks; /* tasks_lock; threads that make, drop or change a snapshot, or read for
	                   long */

	pthread_mutex_t snapdir_lock;
	struct stat snapdir_attr; /* snapdir_lock; mode and owner */
	char *ephemeral;          /* snapdir_lock; the snapshot to drop at the end, or NULL */
};

/* Who asks. UMASK is meaningful where something is made. IN_GROUP: is GID one of the caller's
 * groups? It takes a look at /proc, so it is a function; ASK is its argument. */
struct caller {
	uid_t uid;
	gid_t gid;
	pid_t thread; /* 0: of another pid namespace */
	mode_t umask;
	bool (*in_group)(void *ask, gid_t gid);
	void *ask;
};

/* A name that was found or made: NODE carries one more lookup, to be handed to the kernel. */
struct entry {
	struct node *node;
	struct stat st;
	double timeout;
};

/* What setattr is to set: which is a mask of FUSE_SET_ATTR_*, st has the values. */
struct attr_change {
	int which;
	struct stat st;
};

/* One kind of node. A function that is missing answers with DENIED (changes) or -ENOSYS-like
 * defaults, chosen in dispatch.c. HANDLE may be NULL. DIR is a node of this kind. */
struct node_ops {
	int denied; /* -errno of changes that this kind has no function for */

	int (*lookup)(struct fs *fs, struct node *dir, const char *name, struct entry *out);
	int (*getattr)(struct fs *fs, struct node *node, struct handle *handle, struct stat *out);
	int (*setattr)(struct fs *fs, struct node *node, struct handle *handle,
	               const struct attr_change *change);
	int (*readlink)(struct fs *fs, struct node *node, char *buf, size_t size);
	int (*statfs_fd)(struct fs *fs, struct node *node);

	int (*mknod)(struct fs *fs, struct node *dir, const char *name, mode_t mode, dev_t rdev,
	             const struct caller *who);
	int (*mkdir)(struct fs *fs, struct node *dir, const char *name, mode_t mode,
	             const struct caller *who);
	int (*symlink)(struct fs *fs, struct node *dir, const char *name, const char *target,
	               const struct caller *who, struct entry *out);
	int (*link)(struct fs *fs, struct node *node, struct node *dir, const char *name);
	int (*unlink)(struct fs *fs, struct node *dir, const char *name);
	int (*rmdir)(struct fs *fs, struct node *dir, const char *name);
	/* Both directories are of this kind. */
	int (*rename)(struct fs *fs, struct node *dir, const char *name, struct node *new_dir,
	              const char *new_name, unsigned flags);

	int (*open)(struct fs *fs, struct node *node, int flags, struct handle **out);
	/* Instead of open(), for a kind to whose files it matters who opens them. */
	int (*open_as)(struct fs *fs, struct node *node, int flags, const struct caller *who,
	               struct handle **out);
	int (*create)(struct fs *fs, struct node *dir, const char *name, mode_t mode, int flags,
	              const struct caller *who, struct entry *entry, struct handle **out);
	int (*tmpfile)(struct fs *fs, struct node *dir, mode_t mode, int flags,
	               const struct caller *who, struct entry *entry, struct handle **out);
	int (*opendir)(struct fs *fs, struct node *node, struct handle **out);

	int (*getxattr)(struct fs *fs, struct node *node, const char *name, void *buf, size_t size,
	                size_t *len);
	int (*listxattr)(struct fs *fs, struct node *node, char *buf, size_t size, size_t *len);
	int (*setxattr)(struct fs *fs, struct node *node, const char *name, const void *value,
	                size_t size, int flags, const struct caller *who);
	int (*removexattr)(struct fs *fs, struct node *node, const char *name);

	/* getattr() tells more than a lookup, and may take seconds, as may the seek() of an open
	 * file: they have threads of their own. */
	bool costly;
	bool lasting; /* nothing of a node changes but by the renaming of its snapshot */
	bool slow; /* mkdir, rmdir and setxattr may take seconds: dispatch.c gives them a thread of
	            * their own */
};

/* One directory entry; NAME is valid until the next call on the handle. */
struct dir_item {
	const char *name;
	ino_t ino;
	mode_t type; /* S_IFMT bits, or 0 */
	off_t next;  /* offset of the entry after this one */
};

/* One kind of open file. */
struct handle_ops {
	/* -EINPROGRESS: read_long() has to prepare something first. */
	int (*read)(struct handle *h, void *buf, size_t size, off_t off, size_t *got);
	/* May take as long as it likes, in a thread of its own; asks STOP now and then whether to
	 * give up, with -EINTR. */
	int (*read_long)(struct handle *h, void *buf, size_t size, off_t off, size_t *got,
	                 bool (*stop)(void *ctx), void *ctx);
	/* FLAGS: those of the open file now. WHO: NULL for the page cache's own writing back. */
	int (*write)(struct handle *h, const void *buf, size_t size, off_t off, int flags,
	             const struct caller *who, size_t *done);
	int (*seek)(struct handle *h, off_t off, int whence, off_t *out);
	int (*fallocate)(struct handle *h, int mode, off_t off, off_t len,
	                 const struct caller *who);
	int (*copy)(struct handle *in, off_t in_off, struct handle *out, off_t off, size_t len,
	            size_t *done);
	int (*sync)(struct handle *h, bool data_only);
	void (*flush)(struct handle *h);
	/* The entry at offset OFF (0: the first), -ENOENT at the end. One thread at a time. */
	int (*item)(struct handle *h, off_t off, struct dir_item *out);
	void (*free)(struct handle *h);
};

struct handle {
	const struct handle_ops *ops;
	struct fs *fs;
	struct node *node;           /* a reference */
	unsigned open_flags;         /* FOPEN_*: what the kernel is told at open */
	pthread_mutex_t dir_lock;    /* held around item() by dispatch.c */
	struct handle *next, **prev; /* fs->handles_lock */
};

/* What a thread that serves requests keeps. */
struct fs_thread {
	void *buf;      /* FS_MAX_IO bytes, aligned for O_DIRECT */
	bool own_umask; /* umask(2) changes this thread alone */
};

/* --- fs.c --- */
int fs_init(struct fs *fs);
/* Gives back every handle and node; no other thread may be left. */
void fs_destroy(struct fs *fs);
/* This thread's state, or NULL when there is no memory. */
struct fs_thread *fs_thread(struct fs *fs);

void handle_init(struct handle *h, const struct handle_ops *ops, struct fs *fs, struct node *node);
void handle_free(struct handle *h);

/* --- one table for each kind --- */
extern const struct node_ops live_node_ops;
extern const struct node_ops frozen_node_ops;
extern const struct node_ops snapdir_node_ops;
extern const struct node_ops control_node_ops;

/* --- control.c --- */
/* Makes the nodes of .fleecefs. */
int control_enter(struct fs *fs);

/* --- snapdir.c --- */
/* May WHO make and drop snapshots? */
bool snapdir_allows(struct fs *fs, const struct caller *who);

/* Found in the root of a snapshot that is a checkpoint; to make it makes one: see checkpoint.c. */
#define CHECKPOINT_NAME ".checkpoint"

/* --- frozen.c --- */
/* Enters the inode F of SNAP, whose reference is taken over also when it fails. */
int frozen_entry(struct fs *fs, struct ff_snap *snap, const struct ff_frozen *f, struct entry *out);

#endif
