/*
 * What is counted: how long guests waited for saves, and what frozen readers were given. See
 * stats.c.
 */
#ifndef FF_COW_STATS_H
#define FF_COW_STATS_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

struct ff_store;
struct link;

enum { WAIT_BUCKETS = 80, STATS_SHARDS = 8 };

/* All relaxed: each is right by itself, and none decides anything. */
struct wait_stats {
	atomic_uint_fast64_t saves;
	atomic_uint_fast64_t longest_us;
	atomic_uint buckets[WAIT_BUCKETS];
};

struct link_stats {
	struct wait_stats waits;
	atomic_uint_fast64_t read_bytes;
};

/* Of the whole store, since it was opened; in parts, so that processors do not share them. */
struct store_stats {
	struct wait_stats waits;
	atomic_uint_fast64_t saved_bytes;
	atomic_uint_fast64_t failed;
} __attribute__((aligned(64)));

/* A sum of them, for reading. */
struct wait_sum {
	uint64_t saves, longest_us;
	uint64_t buckets[WAIT_BUCKETS];
};

/* The bucket of a wait, and the longest wait that it has; microseconds. */
unsigned stats_bucket(uint64_t us);
uint64_t stats_bucket_end(unsigned bucket);
void stats_sum(struct wait_sum *sum, struct wait_stats *w);
void stats_add(struct wait_sum *sum, const struct wait_sum *more);
/* The wait that 99 of 100 were not longer than: at most a quarter too long. 0: there was none. */
uint64_t stats_p99(const struct wait_sum *sum);

/* A guest's operation had to save to L, or wait for another's save there, which took US; BROKE: it
 * could not be saved. */
void stats_wait(struct link *l, uint64_t us, bool broke);
void stats_saved(struct link *l, uint64_t bytes);
void stats_read(struct link *l, uint64_t bytes);

/* There is something to tell of L: so it is one that a look at its snapshot comes upon. */
void stats_notable(struct link *l);

#endif
