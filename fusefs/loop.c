/*
 * The threads that read requests and have them served.
 *
 * It differs from libfuse's own loop in one thing: where a request lands. The headers of a WRITE
 * take 80 bytes; each buffer here begins 80 bytes before a page, so that the data begin with the
 * page, and can be written to a source that is open with O_DIRECT as they are, without a copy.
 *
 * A worker is: idle (it waits for a request, and may be cancelled), serving, or gone. The worker
 * that takes a request as the last idle one first starts another, so that somebody always listens,
 * up to the greatest number; one that becomes idle while enough others are goes. FORGETs, which
 * come in floods and are served at once, change nothing.
 *
 * The end: the kernel reports an unmount to all who read, and the first ends the session;
 * otherwise the caller of loop_run() is interrupted in its sleep and finds that the session was
 * ended. It cancels the workers that wait for requests, and joins all.
 *
 * One mutex, `lock`, guards all of struct loop and the links of workers. It is never held while a
 * request is read or served.
 */
#include "fusefs/loop.h"

#include <errno.h>
#include <linux/fuse.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "ff_log.h"
#include "ff_util.h"
#include "fusefs/fs.h"
#include "fusefs/fuse_api.h"

enum {
	PAGE = 4096,
	WRITE_HEADERS = sizeof(struct fuse_in_header) + sizeof(struct fuse_write_in),
	/* libfuse reads at most a page more than the largest write. */
	BUFFER_BYTES = PAGE + FS_MAX_IO + PAGE,
};

struct loop {
	struct fuse_session *se;
	unsigned max, max_idle; /* constant */
	sem_t ended;            /* posted by each worker that sees the end */
	pthread_mutex_t lock;
	struct worker *workers;
	unsigned count, idle;
	bool ending; /* nobody goes any more but by being joined */
	int error;
};

struct worker {
	struct loop *loop;
	pthread_t thread;
	char *buffer; /* constant */
	struct worker *next, **prev;
};

static void *work(void *arg);

static void worker_free(struct worker *w)
{
	free(w->buffer);
	free(w);
}

/* Lock held. A failure leaves the work to those that there are. */
static int start(struct loop *l)
{
	struct worker *w = calloc(1, sizeof *w);
	int r;

	if (!w)
		return -ENOMEM;
	w->loop = l;
	w->buffer = aligned_alloc(PAGE, BUFFER_BYTES);
	r = w->buffer ? -pthread_create(&w->thread, NULL, work, w) : -ENOMEM;
	if (r < 0) {
		worker_free(w);
		return r;
	}
	w->next = l->workers;
	w->prev = &l->workers;
	if (w->next)
		w->next->prev = &w->next;
	l->workers = w;
	l->count++;
	l->idle++;
	return 0;
}

/* A thread that is cancelled leaves frames without their ends, where AddressSanitizer would tidy up
 * after them: they are not to be instrumented. */
#define CANCELLED __attribute__((no_sanitize_address))

/* Waits for a request: its length, 0 at the end of the session, or -errno. */
CANCELLED static int receive(struct worker *w, struct fuse_buf *buf)
{
	int r;

	*buf = (struct fuse_buf){.mem = w->buffer + PAGE - WRITE_HEADERS};
	pthread_setcancelstate(PTHREAD_CANCEL_ENABLE, NULL);
	r = fuse_session_receive_buf(w->loop->se, buf);
	pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, NULL);
	return r;
}

static bool is_forget(const struct fuse_buf *buf)
{
	uint32_t opcode = ((const struct fuse_in_header *)buf->mem)->opcode;

	return opcode == FUSE_FORGET || opcode == FUSE_BATCH_FORGET;
}

static void became_busy(struct loop *l)
{
	FF_GUARD(&l->lock);
	if (--l->idle == 0 && l->count < l->max && !l->ending)
		start(l);
}

/* False: there are enough, this one is to go, and belongs to nobody any more. */
static bool became_idle(struct loop *l, struct worker *w)
{
	FF_GUARD(&l->lock);
	if (l->idle < l->max_idle || l->ending) {
		l->idle++;
		return true;
	}
	*w->prev = w->next;
	if (w->next)
		w->next->prev = w->prev;
	l->count--;
	pthread_detach(w->thread);
	return false;
}

CANCELLED static void *work(void *arg)
{
	struct worker *w = arg;
	struct loop *l = w->loop;
	int r = 0;

	pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, NULL);
	while (!fuse_session_exited(l->se)) {
		struct fuse_buf buf;
		bool forget;

		r = receive(w, &buf);
		if (r == -EINTR || r == -EAGAIN)
			continue;
		if (r <= 0)
			break;
		forget = is_forget(&buf);
		if (!forget)
			became_busy(l);
		fuse_session_process_buf(l->se, &buf);
		if (!forget && !became_idle(l, w)) {
			worker_free(w);
			return NULL;
		}
	}
	if (r < 0 && r != -EINTR && r != -EAGAIN) {
		FF_GUARD(&l->lock);
		l->error = r;
		fuse_session_exit(l->se);
	}
	sem_post(&l->ended);
	return NULL;
}

static void end_all(struct loop *l)
{
	struct worker *w;

	pthread_mutex_lock(&l->lock);
	l->ending = true;
	for (w = l->workers; w; w = w->next)
		pthread_cancel(w->thread);
	pthread_mutex_unlock(&l->lock);
	while ((w = l->workers)) {
		l->workers = w->next;
		pthread_join(w->thread, NULL);
		worker_free(w);
	}
}

int loop_run(struct fuse_session *se, unsigned max, unsigned max_idle)
{
	struct loop l = {.se = se, .max = max, .max_idle = FF_MAX(max_idle, 1)};
	int r;

	sem_init(&l.ended, 0, 0);
	pthread_mutex_init(&l.lock, NULL);
	pthread_mutex_lock(&l.lock);
	r = start(&l);
	pthread_mutex_unlock(&l.lock);
	while (r == 0 && !fuse_session_exited(se))
		sem_wait(&l.ended);
	end_all(&l);
	pthread_mutex_destroy(&l.lock);
	sem_destroy(&l.ended);
	return r ? r : l.error;
}
