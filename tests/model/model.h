/*
 * The model test: the state of a tree and of its snapshots in memory, beside a real one.
 *
 * Each operation is made on the real tree and on the model; reads of the real one are then compared
 * with the model. The whole program runs on one thread (but for the one that kills the daemon), so
 * nothing here is locked. A difference ends the program through fail().
 */
#ifndef TESTS_MODEL_MODEL_H
#define TESTS_MODEL_MODEL_H

#include "content.h"
#include "mount.h"
#include "rng.h"

#include <sys/stat.h>

#define MAX_SNAPS  8
#define MAX_FDS    8
#define MAX_FROZEN 4  /* frozen files held open */
#define MAX_FILES  14 /* names of regular files */
#define NXATTR     3
#define XATTR_LEN  24
#define NAME_LEN   40
#define PATH_LEN   1024
#define BUF_LEN    (4u << 20)
#define HIST       24
#define HIST_LEN   256

enum itype { I_REG = 1, I_DIR = 2, I_LNK = 4 };

struct ent {
	char name[NAME_LEN];
	struct inode *ino;
};

/* An inode, of the live tree or of a snapshot. A reference for each name, and for each open fd. */
struct inode {
	unsigned refs;
	uint64_t id; /* the same for the live one and its frozen copies */
	enum itype type;
	bool big;       /* several GiB, mostly holes */
	unsigned nlink; /* of regular files */
	unsigned mode;
	struct content data;
	char *target;
	char xattr[NXATTR][XATTR_LEN]; /* user.k0 …; empty: not set */
	struct ent *ents;
	unsigned nents;
	struct inode *parent;        /* of directories; NULL for the root */
	struct inode *clone;         /* only while a snapshot is made */
	struct stat st;              /* of frozen ones: what SOURCE showed just before the freeze */
	struct timespec mtime_after; /* of the frozen root: and just after it */
};

struct snap {
	char name[NAME_LEN];
	struct inode *root;
	bool checked;  /* has been compared whole */
	bool given_up; /* it is a checkpoint */
	bool consumed; /* it may have given up parts: a read of it may be an error */
};

struct open_file {
	int fd; /* -1: free */
	struct inode *ino;
	struct snap *snap; /* of frozen ones */
};

/* st_ino as first seen for a snapshot's name and an inode. */
struct known_ino {
	uint64_t id;
	ino_t ino;
	char name[NAME_LEN];
};

struct model {
	struct mnt mnt;
	struct rng rng;
	char live[PATH_LEN];  /* the live tree */
	char below[PATH_LEN]; /* the same, underneath fleecefs (the same directory when plain) */
	uint64_t seed;
	unsigned long op, ops;
	unsigned long kill_one_in; /* kill the daemon once in so many operations; 0: never */
	unsigned qemu_every;       /* look at all images with qemu-img each so many snapshots */
	uint32_t cluster;
	uint64_t file_max, big_max;
	bool plain, verbose, failing;
	bool eio_ok; /* what is read has given up parts */
	struct inode *root;
	uint64_t next_id;
	struct open_file fds[MAX_FDS], frozen[MAX_FROZEN];
	struct snap *snaps[MAX_SNAPS];
	unsigned nsnaps;
	struct known_ino *known;
	size_t nknown, known_cap;
	uint8_t *buf, *buf2; /* BUF_LEN each, page-aligned */
	char hist[HIST][HIST_LEN];
	/* what was done, for the summary */
	unsigned long snaps_made, checkpoints, released, remounts, kills, images_checked, images,
	    no_mmap, full_compares;
	uint64_t bytes_read;
};

/* --- model.c --- */

/* Says what went wrong, with the seed and the last operations, and ends the program. */
void fail(struct model *m, const char *fmt, ...) __attribute__((noreturn, format(printf, 2, 3)));
/* Notes what is about to be done. */
void note(struct model *m, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

/* --- tree.c --- */

struct inode *inode_new(struct model *m, enum itype type);
void inode_put(struct inode *ino);
void dir_add(struct inode *dir, const char *name, struct inode *ino); /* takes a reference */
struct ent *dir_find(struct inode *dir, const char *name);
void dir_remove(struct inode *dir, const char *name); /* gives the reference back */
bool is_below(const struct inode *dir, const struct inode *top);

/* The path of NAME in DIR below BASE; NAME may be NULL: of DIR itself. */
void path_of(const char *base, const struct inode *dir, const char *name, char path[PATH_LEN]);

/* A name somewhere below ROOT whose inode is of one of TYPES, at random; false if there is none. */
bool tree_pick(struct model *m, struct inode *root, unsigned types, struct inode **dir,
               struct ent **ent);
/* Names of inodes of TYPES below ROOT. */
unsigned tree_count(const struct inode *root, unsigned types);
/* The big file below ROOT, or NULL. */
struct inode *tree_big(const struct inode *root);
/* A copy of the live tree, with all contents, as one snapshot sees it. */
struct inode *tree_freeze(struct model *m);

void snap_path(const struct model *m, const char *name, char path[PATH_LEN]);

/* --- ops: each returns false where it has nothing to work on --- */

bool op_write(struct model *m);
bool op_write_same(struct model *m);
bool op_write_zeros(struct model *m);
bool op_write_direct(struct model *m);
bool op_append(struct model *m);
bool op_open_trunc(struct model *m);
bool op_truncate(struct model *m);
bool op_punch(struct model *m);
bool op_zero_range(struct model *m);
bool op_fallocate(struct model *m);
bool op_copy_range(struct model *m);
bool op_mmap_write(struct model *m);
bool op_fsync(struct model *m);
bool op_open(struct model *m);
bool op_close(struct model *m);
void close_all(struct model *m);

bool op_create(struct model *m);
bool op_unlink(struct model *m);
bool op_recreate(struct model *m);
bool op_rename(struct model *m);
bool op_rename_over(struct model *m);
bool op_exchange(struct model *m);
bool op_link(struct model *m);
bool op_symlink(struct model *m);
bool op_mkdir(struct model *m);
bool op_rmdir(struct model *m);
bool op_chmod(struct model *m);
bool op_utimens(struct model *m);
bool op_xattr(struct model *m);

bool op_snap_make(struct model *m);
bool op_snap_drop(struct model *m);
bool op_snap_rename(struct model *m);
bool op_snap_checkpoint(struct model *m);
bool op_snap_consume(struct model *m);
bool op_frozen_open(struct model *m);
bool op_frozen_close(struct model *m);
bool op_frozen_change(struct model *m);
bool op_remount(struct model *m);
bool op_kill(struct model *m);
/* A name that no snapshot has. */
const char *free_snap_name(struct model *m);
void frozen_close_all(struct model *m, const struct snap *of);

/* A range to work on: its ends are often near borders of clusters. */
void pick_range(struct model *m, const struct inode *ino, uint64_t limit, uint64_t max_len,
                uint64_t *off, uint64_t *len);

/* --- verify.c, verify_tree.c, qemu.c --- */

enum how { BY_READ, BY_DIRECT, BY_MMAP };

/* Compares LEN bytes at OFF of FD. */
void check_range(struct model *m, int fd, enum how how, const struct content *c, uint64_t off,
                 uint64_t len, const char *what);
/* Compares the whole of the file at PATH: size, bytes, holes. */
void check_file(struct model *m, const char *path, const struct content *c, const char *what);
/* PATH, in a checkpoint, cannot be opened. */
void check_given_up(struct model *m, const char *path);
/* Is the snapshot a checkpoint, by its attribute? */
bool is_given_up(struct model *m, const struct snap *s);
/* One read somewhere, live or frozen. */
void check_somewhere(struct model *m);
/* Compares everything. */
void check_all(struct model *m);
void check_snap(struct model *m, struct snap *s);
void check_live(struct model *m);
/* Names and metadata of the frozen tree S; names the difference. */
void check_tree_frozen(struct model *m, struct snap *s);
void check_tree_live(struct model *m);
void check_snap_list(struct model *m);
/* Records what SOURCE shows of each inode of the frozen tree. */
void record_stats(struct model *m, struct inode *root);
/* Lets qemu-img check every fleecing image, and read some. */
void check_images(struct model *m);

#endif
