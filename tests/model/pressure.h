/*
 * The pressure test: what its threads write, and what a view of that must be.
 *
 * Write number N (from 1) of writer T is one record, on one disk, at one slot, all functions of T
 * and N. Every 32 bytes of it say its disk, place, writer and N. So a view tells for each writer
 * how many of its writes it holds, P; what all its slots, on all disks, must then hold follows from
 * P alone. That is the prefix rule, checked to the byte.
 *
 * Besides, one thread changes names, sizes and holes. Its change number G leads from one known
 * state to the next; a view must be one of the states between those at the beginning and the end of
 * the freeze.
 */
#ifndef TESTS_MODEL_PRESSURE_H
#define TESTS_MODEL_PRESSURE_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "ff_store.h"
#include "rng.h"

enum {
	MAX_WRITERS = 64,
	MAX_DISKS = 64,
	SLOTS = 3, /* of each writer on each disk */
	RECORD_MAX = 6144,
	ODD_FILES = 4, /* files of the thread that changes names */
	ODD_BLOCKS = 48,
	ODD_BLOCK = 512,
	HISTORY = 8192,
};

struct shape {
	unsigned writers, disks;
};

static inline uint32_t record_size(unsigned disk)
{
	static const uint32_t sizes[] = {512, 1536, 4096, RECORD_MAX};

	return sizes[disk % 4];
}

static inline unsigned record_disk(const struct shape *s, unsigned t, uint64_t n)
{
	return (unsigned)((n + t * 7) % s->disks);
}

static inline unsigned record_slot(const struct shape *s, uint64_t n)
{
	return (unsigned)(n / s->disks % SLOTS);
}

static inline uint64_t record_offset(const struct shape *s, unsigned t, unsigned disk,
                                     unsigned slot)
{
	return ((uint64_t)slot * s->writers + t) * record_size(disk);
}

static inline uint64_t disk_size(const struct shape *s, unsigned disk)
{
	return (uint64_t)SLOTS * s->writers * record_size(disk);
}

/* BUF: record_size(disk) bytes. */
void record_fill(const struct shape *s, unsigned t, uint64_t n, uint8_t *buf);

/* DISKS[k]: the bytes of disk k in one view. BEFORE and AFTER: for each writer, the writes that had
 * returned when the freeze began, and that had begun when it ended. 0, or -EIO with WHY. */
int view_check(const struct shape *s, uint8_t *const *disks, const uint64_t *before,
               const uint64_t *after, char *why, size_t why_len);

/* Spoils a right view in every way that matters: each must be found. 0 or -EIO, said on stderr. */
int view_check_test(void);

/* One of the files whose names and sizes change. Generations of blocks; 0: zeros. */
struct odd_file {
	uint64_t there;
	uint64_t size; /* a multiple of ODD_BLOCK */
	uint64_t gen[ODD_BLOCKS];
};

struct odd_state {
	uint64_t in_b[MAX_DISKS]; /* disk k lies in directory b, else in a */
	struct odd_file files[ODD_FILES];
};

struct odd {
	struct ff_store *store;
	int source_fd;
	struct shape shape;
	struct rng rng;
	struct odd_state now;               /* of the thread that makes the changes */
	_Atomic uint64_t started, returned; /* changes */
	pthread_mutex_t lock;               /* history */
	struct odd_state *history;          /* [g % HISTORY]: after g changes */
};

/* Makes change number odd->returned + 1. 0 or -errno, said on stderr. */
int odd_change(struct odd *odd);
/* Was STATE, which a view shows, the state after BEFORE changes, or AFTER, or any in between? */
int odd_check(struct odd *odd, const struct odd_state *state, uint64_t before, uint64_t after);
/* What LEN bytes of a file say of their generations. -EIO: a block that is none of ours. */
int odd_decode(const uint8_t *buf, size_t len, struct odd_file *out);

/* --- what is done with the store, for the parts of the test --- */

/* The path of disk K, in directory a or b. */
void disk_path(unsigned k, bool in_b, char out[32]);

#endif
