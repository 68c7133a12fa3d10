/* What emu_disk.c (noting) and emu_loss.c (losing) share. Lock: emu.lock for all of it. */
#ifndef FF_TEST_EMU_PRIVATE_H
#define FF_TEST_EMU_PRIVATE_H

#include <pthread.h>
#include <sys/types.h>

#include "emu_disk.h"

enum { EMU_BUCKETS = 256, EMU_SECTOR = 512, EMU_HEAD = 4096 };

struct emu_op {
	uint64_t seq;
	const void *by; /* the thread */
	enum emu_kind kind;
	uint64_t off, len; /* EMU_SIZE: off is the size */
	struct emu_op *next;
	uint8_t data[];
};

struct emu_inode {
	unsigned number;
	int fs; /* 0: source's, 1: fleece's */
	mode_t mode;
	char *target; /* of a symlink */
	char *name;   /* the latest */
	ino_t real;   /* what it is in the real directory */
	dev_t dev;
	uint8_t *data; /* durable */
	uint64_t size, room;
	struct timespec mtime, ctime, durable_mtime, durable_ctime;
	struct emu_op *ops, **tail; /* not durable */
	struct emu_inode *next, *next_real;
	bool built; /* while what remains is built */
};

struct emu_setting {
	struct emu_inode *dir;
	char *name;
	struct emu_inode *to;
};

struct emu_change {
	uint64_t seq;
	int fs;
	bool durable, keep;
	struct emu_setting set[2];
};

struct emu {
	pthread_mutex_t lock;
	char root[200], boot_id[240];
	enum emu_names names;
	bool one;
	unsigned sync_us, boots, last_number, order_violations;
	uint64_t seq;
	_Atomic bool cut; /* changes under the lock, read without */
	unsigned countdown;
	void (*on_cut)(void *ctx);
	void *ctx;
	struct emu_counts counts;
	struct emu_inode *inodes, *roots[2];
	struct emu_inode *buckets[EMU_BUCKETS];
	struct emu_change *changes;
	size_t change_count, change_room;
};

extern struct emu emu;

struct emu_inode *emu_find(const struct stat *st);
struct emu_inode *emu_make(const struct stat *st, int fs, const char *name);
void emu_bind(struct emu_inode *in, const struct stat *st);
/* Applies the change to the durable bytes; RNG: in those sectors only that a number below 100 which
 * is below PERCENT says, else in all. */
void emu_apply(struct emu_inode *in, const struct emu_op *op, struct emu_rng *rng,
               unsigned percent);

#endif
