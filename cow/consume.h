/*
 * Reading that gives up what it leaves behind: see consume.c.
 */
#ifndef FF_COW_CONSUME_H
#define FF_COW_CONSUME_H

#include "cow/engine.h"

enum { CONSUME_AHEAD = 64 };

/* One open reader of a link, and how far it has come. */
struct consumer {
	struct link *link;     /* constant */
	struct consumer *next; /* lock: snap.lock; of link->consumers */
	pthread_mutex_t lock;  /* the following; taken before snap.lock, and with no other held */
	uint64_t begin, end;   /* the run that it reads, bytes: all of it was read, or is a hole */
	uint64_t released;     /* up to there it was given up */
	struct consume_piece {
		uint64_t from, to;
	} ahead[CONSUME_AHEAD]; /* read beyond the end of the run, not right behind it */
	unsigned ahead_count;
	uint64_t from, left; /* lock: snap.lock; in between it has read all, and left it behind */
};

/* The caller has snap->lock. */
void consumer_add(struct consumer *c, struct link *l);
void consumer_remove(struct consumer *c, struct ff_snap *snap);

#endif
