/*
 * Counting, without a lock and without a price where nothing happens.
 *
 * A link has counters only once something was saved to it or read of it: of many disks and many
 * snapshots most have neither. That is also when the link is put on its directory's list of notable
 * ones (as when its view breaks, or when it is found to hold something at the mount), so that a
 * look at a snapshot costs as much as has happened in it, whatever the number of its disks. A link
 * is put there once and stays. The list is looked at while its snapshot cannot be dropped, and only
 * links of dropped snapshots are freed: one that a late writer adds after that is looked at by
 * nobody.
 *
 * Saves are rare and slow, so each adds to counters of its link; those of the whole store are in
 * parts, one for some of the processors. A second write to a cluster comes by none of this.
 *
 * Waits are kept as a histogram with four buckets to each doubling, the first of 4 us, the last
 * without an end: 80 counters know 6 s from 7.
 */
#include "cow/stats.h"

#include <sched.h>
#include <stdlib.h>

#include "cow/engine.h"
#include "ff_util.h"

enum { UNIT_US = 4 };

unsigned stats_bucket(uint64_t us)
{
	uint64_t v = us / UNIT_US;
	unsigned octave;

	if (v < 4)
		return (unsigned)v;
	octave = 63 - (unsigned)__builtin_clzll(v);
	if (octave > WAIT_BUCKETS / 4)
		return WAIT_BUCKETS - 1;
	return (octave - 1) * 4 + (unsigned)(v >> (octave - 2) & 3);
}

uint64_t stats_bucket_end(unsigned bucket)
{
	if (bucket == WAIT_BUCKETS - 1)
		return UINT64_MAX;
	if (bucket < 4)
		return (bucket + 1) * UNIT_US - 1;
	return ((UINT64_C(5) + bucket % 4) << (bucket / 4 - 1)) * UNIT_US - 1;
}

void stats_sum(struct wait_sum *sum, struct wait_stats *w)
{
	uint64_t longest = atomic_load_explicit(&w->longest_us, memory_order_relaxed);

	sum->saves += atomic_load_explicit(&w->saves, memory_order_relaxed);
	sum->longest_us = FF_MAX(sum->longest_us, longest);
	for (unsigned i = 0; i < WAIT_BUCKETS; i++)
		sum->buckets[i] += atomic_load_explicit(&w->buckets[i], memory_order_relaxed);
}

void stats_add(struct wait_sum *sum, const struct wait_sum *more)
{
	sum->saves += more->saves;
	sum->longest_us = FF_MAX(sum->longest_us, more->longest_us);
	for (unsigned i = 0; i < WAIT_BUCKETS; i++)
		sum->buckets[i] += more->buckets[i];
}

uint64_t stats_p99(const struct wait_sum *sum)
{
	uint64_t all = 0, seen = 0;

	for (unsigned i = 0; i < WAIT_BUCKETS; i++)
		all += sum->buckets[i];
	for (unsigned i = 0; i < WAIT_BUCKETS; i++) {
		seen += sum->buckets[i];
		if (seen > 0 && seen >= all - all / 100)
			return FF_MIN(stats_bucket_end(i), sum->longest_us);
	}
	return 0;
}

static void add(atomic_uint_fast64_t *to, uint64_t n)
{
	atomic_fetch_add_explicit(to, n, memory_order_relaxed);
}

static void add_wait(struct wait_stats *w, uint64_t us)
{
	uint_fast64_t longest = atomic_load_explicit(&w->longest_us, memory_order_relaxed);

	add(&w->saves, 1);
	atomic_fetch_add_explicit(&w->buckets[stats_bucket(us)], 1, memory_order_relaxed);
	while (us > longest &&
	       !atomic_compare_exchange_weak_explicit(&w->longest_us, &longest, us,
	                                              memory_order_relaxed, memory_order_relaxed))
		;
}

void stats_notable(struct link *l)
{
	struct link *head;

	if (atomic_load_explicit(&l->notable, memory_order_relaxed) ||
	    atomic_exchange(&l->notable, true))
		return;
	head = atomic_load(&l->dir->notable);
	do
		l->next_notable = head;
	while (!atomic_compare_exchange_weak(&l->dir->notable, &head, l));
}

/* NULL without memory: then it is not counted. */
static struct link_stats *link_stats(struct link *l)
{
	struct link_stats *mine, *s = atomic_load_explicit(&l->stats, memory_order_acquire);

	if (s)
		return s;
	mine = calloc(1, sizeof *mine);
	if (!mine)
		return NULL;
	if (!atomic_compare_exchange_strong(&l->stats, &s, mine)) {
		free(mine);
		return s;
	}
	stats_notable(l);
	return mine;
}

static struct store_stats *shard(struct ff_store *s)
{
	int cpu = sched_getcpu();

	return &s->stats[cpu < 0 ? 0 : (unsigned)cpu % STATS_SHARDS];
}

void stats_wait(struct link *l, uint64_t us, bool broke)
{
	struct store_stats *all = shard(l->disk->store);
	struct link_stats *s = link_stats(l);

	if (s)
		add_wait(&s->waits, us);
	add_wait(&all->waits, us);
	if (broke)
		add(&all->failed, 1);
}

void stats_saved(struct link *l, uint64_t bytes)
{
	stats_notable(l);
	add(&shard(l->disk->store)->saved_bytes, bytes);
}

void stats_read(struct link *l, uint64_t bytes)
{
	struct link_stats *s = bytes ? link_stats(l) : NULL;

	if (s)
		add(&s->read_bytes, bytes);
}
