/*
 * States: open (closing = 0), closing (1, holders remain), closed (1, no holders).
 *
 * A thread first counts itself in (sequentially consistent), then looks at `closing`; the closer
 * first sets `closing`, then looks at the counts. Whichever order these take, one of the two sees
 * the other: either the closer waits for the thread, or the thread backs out and waits. The mutex
 * guards sleeping only. What the closer writes while closed is seen by later holders through
 * `closing`, what holders wrote is seen by the closer through the counts.
 */
#include "cow/barrier.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>

#include "ff_util.h"

enum { SHARDS = 64, LINE = 64 };

struct shard {
	_Alignas(LINE) atomic_long holders;
};

struct barrier {
	struct shard shards[SHARDS];
	_Alignas(LINE) atomic_int closing;
	pthread_mutex_t lock; /* for the two conditions */
	pthread_cond_t empty; /* the closer waits: a count fell to zero */
	pthread_cond_t open;  /* newcomers wait: closing fell to zero */
};

int barrier_new(struct barrier **out)
{
	struct barrier *b = aligned_alloc(LINE, sizeof *b);
	pthread_condattr_t attr;

	if (!b)
		return -ENOMEM;
	for (unsigned i = 0; i < SHARDS; i++)
		atomic_init(&b->shards[i].holders, 0);
	atomic_init(&b->closing, 0);
	pthread_mutex_init(&b->lock, NULL);
	pthread_condattr_init(&attr);
	pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
	pthread_cond_init(&b->empty, &attr);
	pthread_cond_init(&b->open, &attr);
	pthread_condattr_destroy(&attr);
	*out = b;
	return 0;
}

void barrier_free(struct barrier *b)
{
	if (!b)
		return;
	pthread_cond_destroy(&b->empty);
	pthread_cond_destroy(&b->open);
	pthread_mutex_destroy(&b->lock);
	free(b);
}

/* The shard of the calling thread: threads' control blocks lie at least a page apart. */
static unsigned my_shard(void)
{
	uint64_t id = (uint64_t)pthread_self();

	return (unsigned)((id * UINT64_C(0x9e3779b97f4a7c15)) >> 58);
}

static void count_out(struct barrier *b, unsigned token)
{
	if (atomic_fetch_sub(&b->shards[token].holders, 1) == 1 && atomic_load(&b->closing)) {
		FF_GUARD(&b->lock);
		pthread_cond_signal(&b->empty);
	}
}

unsigned barrier_enter(struct barrier *b)
{
	unsigned token = my_shard();

	for (;;) {
		atomic_fetch_add(&b->shards[token].holders, 1);
		if (!atomic_load(&b->closing))
			return token;
		count_out(b, token);
		FF_GUARD(&b->lock);
		while (atomic_load(&b->closing))
			pthread_cond_wait(&b->open, &b->lock);
	}
}

void barrier_exit(struct barrier *b, unsigned token)
{
	count_out(b, token);
}

static bool has_holders(struct barrier *b)
{
	for (unsigned i = 0; i < SHARDS; i++)
		if (atomic_load(&b->shards[i].holders))
			return true;
	return false;
}

int barrier_close(struct barrier *b, unsigned timeout_ms)
{
	struct timespec until;
	bool held;
	int r = 0;

	clock_gettime(CLOCK_MONOTONIC, &until);
	until.tv_sec += timeout_ms / 1000;
	until.tv_nsec += (long)(timeout_ms % 1000) * 1000000;
	if (until.tv_nsec >= 1000000000) {
		until.tv_sec++;
		until.tv_nsec -= 1000000000;
	}
	FF_GUARD(&b->lock);
	atomic_store(&b->closing, 1);
	/* One look is enough, and a second would see newcomers that count themselves in only to
	 * back out again. */
	while ((held = has_holders(b)) && !r)
		r = pthread_cond_timedwait(&b->empty, &b->lock, &until);
	if (!held)
		return 0;
	atomic_store(&b->closing, 0);
	pthread_cond_broadcast(&b->open);
	return -ETIMEDOUT;
}

void barrier_open(struct barrier *b)
{
	FF_GUARD(&b->lock);
	atomic_store(&b->closing, 0);
	pthread_cond_broadcast(&b->open);
}
