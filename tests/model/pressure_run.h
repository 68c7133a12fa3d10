/*
 * One run of the pressure test: what its threads share. Those that change things are in pressure.c,
 * those that look in pressure_makers.c.
 *
 * What has no lock and is not atomic is set before the threads start, or is one thread's own.
 */
#ifndef TESTS_MODEL_PRESSURE_RUN_H
#define TESTS_MODEL_PRESSURE_RUN_H

#include "pressure.h"

enum { MAX_SNAPSHOTS = 64, MAKERS = 4, FILES = MAX_DISKS + ODD_FILES };

/* For one snapshot. Belongs to the maker that holds the lock. */
struct place {
	pthread_mutex_t lock;
	bool made;
	char name[40];
	uint64_t sum[FILES]; /* of each file's bytes, as first read; 0: there was none */
	bool in_b[MAX_DISKS];
};

struct pressure;

struct writer {
	struct pressure *p;
	unsigned number;
	pthread_t thread;
	_Atomic uint64_t started, returned;
};

/* A thread that makes, reads and drops snapshots. */
struct maker {
	struct pressure *p;
	pthread_t thread;
	struct rng rng;
	uint8_t *disks[MAX_DISKS];
	unsigned long made, read;
};

struct pressure {
	char root[64], source[80], fleece[80];
	int source_fd;
	struct ff_store_config config;
	struct ff_store *store;
	struct shape shape;
	unsigned snapshots, seconds;
	uint64_t seed;
	int fds[MAX_DISKS];
	struct ff_disk *disks[MAX_DISKS];
	struct odd odd;
	pthread_t odd_thread, pulse_thread;
	struct writer writers[MAX_WRITERS];
	struct maker makers[MAKERS];
	struct place places[MAX_SNAPSHOTS];
	atomic_uint names; /* given to snapshots so far */
	atomic_bool stop, failed;
};

/* Says it, and ends the run. ERROR, for the caller to return. */
int fail(struct pressure *p, const char *what, const char *name, int error);

/* --- pressure_makers.c --- */

/* A maker's thread. */
void *make_and_drop(void *maker);
/* Reads all of a snapshot, or some, again. 0 or -errno, said by fail(), as the next. */
int check_again(struct maker *m, struct place *pl, bool all);
int drop_snapshot(struct maker *m, struct place *pl);

#endif
