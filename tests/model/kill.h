/*
 * The kill test: four writers, up to eight snapshots, and a daemon that is killed again and again.
 *
 * The writers' records and files are those of the prefix test (prefix.h). Besides, the main thread
 * makes, renames, replaces and deletes a few small disks, the extras.
 */
#ifndef TESTS_MODEL_KILL_H
#define TESTS_MODEL_KILL_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "mount.h"
#include "prefix.h"
#include "rng.h"

enum { WRITERS = 4, VIEWS = 8, EXTRAS = 4, EXTRA_SIZE = 20000 };

struct view {
	bool made;
	bool read; /* files[] holds what the first reading gave */
	char name[16];
	uint64_t before[MAX_THREADS], after[MAX_THREADS];
	uint8_t *files[NFILES];
	uint64_t sizes[NFILES];
	unsigned extras[EXTRAS]; /* the generation of each, 0: not there */
};

struct kill_test;

struct writer {
	struct kill_test *kt;
	unsigned number;
	pthread_t thread;
	/* Written by the thread alone, release order around each write. */
	_Atomic uint64_t started, returned;
};

/* What the main thread was doing when the daemon went. */
enum doing { NOTHING, MAKING, DROPPING, RENAMING, CHANGING_EXTRAS };

struct kill_test {
	struct mnt mnt;
	struct layout layout;
	struct rng rng; /* the main thread's */
	uint64_t seed;
	unsigned kills, done;
	bool keep;
	atomic_bool stop; /* the daemon is gone, or about to */
	struct writer writers[WRITERS];
	struct view views[VIEWS];
	uint8_t *again[NFILES];
	unsigned extras[EXTRAS], next_extra;
	enum doing doing;
	struct view *subject;
	char new_name[16];           /* RENAMING */
	unsigned old_extras[EXTRAS]; /* CHANGING_EXTRAS: before */
	unsigned maybe_partial;      /* and the generation that may be there in part */
	unsigned long made, dropped, finished, undone, leaks;
};

/* --- kill_check.c: 0, or -EIO after a line on stderr --- */

void extra_fill(uint8_t *buf, unsigned generation);
void view_path(const struct kill_test *kt, const struct view *v, const char *below,
               char path[1024]);
/* Reads the view for the first time, and checks it, or sees that it is as it was. */
int check_view(struct kill_test *kt, struct view *v);
/* After a kill: the live files hold all writes that returned, of one that did not any part. */
int check_live(struct kill_test *kt);
/* The same of the extras, which are as before or as after; they are made whole again. */
int settle_extras(struct kill_test *kt);
/* The set of snapshots is what it must be; the one that was being made, dropped or renamed is there
 * or not there. */
int check_names(struct kill_test *kt);
/* qemu-img check of every image. MOUNTED: with the chain below it. */
int check_images(struct kill_test *kt, bool mounted);
/* No image and no disk aside is left. */
int check_empty(struct kill_test *kt);

#endif
