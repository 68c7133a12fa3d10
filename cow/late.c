/*
 * A job is shared by the thread that runs it and the one that waits; whoever lets go of it last
 * frees it. A thread for each job costs some 20 µs, on the path of a first write only and only with
 * cbw-timeout; a pool would have to grow without bound as well when the storage hangs.
 */
#include "cow/late.h"

#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <time.h>

struct job {
	int (*fn)(void *ctx);
	void *ctx;
	atomic_uint *running;
	pthread_mutex_t lock; /* the following */
	pthread_cond_t ended;
	bool has_ended, left; /* left: one of the two has let go */
	int result;
};

static void let_go(struct job *job)
{
	bool last = job->left;

	job->left = true;
	pthread_mutex_unlock(&job->lock);
	if (!last)
		return;
	pthread_mutex_destroy(&job->lock);
	pthread_cond_destroy(&job->ended);
	free(job);
}

static void *run(void *arg)
{
	struct job *job = arg;
	atomic_uint *running = job->running;
	int r = job->fn(job->ctx);

	pthread_mutex_lock(&job->lock);
	job->result = r;
	job->has_ended = true;
	pthread_cond_signal(&job->ended);
	let_go(job);
	atomic_fetch_sub(running, 1);
	return NULL;
}

int late_run(int (*fn)(void *ctx), void *ctx, unsigned seconds, atomic_uint *running)
{
	struct job *job = calloc(1, sizeof *job);
	pthread_condattr_t clock;
	pthread_attr_t attr;
	struct timespec until;
	pthread_t thread;
	int r, started;

	if (!job)
		return -EAGAIN;
	job->fn = fn;
	job->ctx = ctx;
	job->running = running;
	pthread_mutex_init(&job->lock, NULL);
	pthread_condattr_init(&clock);
	pthread_condattr_setclock(&clock, CLOCK_MONOTONIC);
	pthread_cond_init(&job->ended, &clock);
	pthread_condattr_destroy(&clock);
	pthread_attr_init(&attr);
	pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
	clock_gettime(CLOCK_MONOTONIC, &until);
	until.tv_sec += seconds;
	pthread_mutex_lock(&job->lock);
	atomic_fetch_add(running, 1);
	started = pthread_create(&thread, &attr, run, job) == 0;
	pthread_attr_destroy(&attr);
	if (!started) {
		atomic_fetch_sub(running, 1);
		job->left = true;
		let_go(job);
		return -EAGAIN;
	}
	r = 0;
	while (!job->has_ended && r != ETIMEDOUT)
		r = seconds ? pthread_cond_timedwait(&job->ended, &job->lock, &until) : ETIMEDOUT;
	r = job->has_ended ? job->result : -ETIMEDOUT;
	let_go(job);
	return r;
}
