/*
 * The budget of the fleecing images: a limit of our own, and room to leave on their filesystem.
 *
 * Images charge what they are about to allocate and give back what they freed. Free space is asked
 * for again after every 64 MiB of growth or when the last answer would not suffice, so most charges
 * are an addition under a lock. The lock is not held while storage is asked: it may hang, and then
 * who needs no new answer goes on with the last one. What others charge meanwhile is taken off the
 * answer, as if it did not know of that; if it then does not suffice, storage is asked once more.
 * -ENOSPC means that the policy for failed saves applies. What must be written so that more can be
 * given back is not refused, and may exceed the limit for that while: in each image two pages for
 * each 126 MiB of its disk (with clusters of 4 KiB) and one more. Nor is what was said of zeros
 * (qcow2_said.c), for who copies what was frozen frees storage the sooner.
 *
 * How fast they grow is an average over about the last minute: bytes allocated and seconds passed
 * are summed up, and whenever that is done (each second while there are snapshots, and by who
 * looks) both sums are first made smaller, by a 60th for a second. What is freed does not count,
 * nor what new images begin with: a drop is not a rate, and neither is a freeze.
 *
 * A warning is given once when 80 % of what may be used is, and once at 95 %; again after use has
 * been below 70 %.
 */
#include <errno.h>
#include <sys/statvfs.h>
#include <time.h>

#include "cow/engine.h"
#include "cow/io.h"
#include "cow/late.h"
#include "ff_log.h"
#include "ff_util.h"

enum {
	RECHECK_BYTES = 64 << 20,
	ASK_MOST = 16,
	GROWTH_SECONDS = 60,
	ANSWER_SECONDS = 1,
	WARN_FIRST = 80, /* per cent */
	WARN_LAST = 95,
	WARN_ANEW = 70,
};

void space_adopt_link(struct link *l)
{
	struct ff_store *s = l->disk->store;

	FF_GUARD(&s->space_lock);
	s->space_used += ff_image_allocated(l->img);
	l->charged = true;
}

static int64_t available(const struct statvfs *v)
{
	return (int64_t)((uint64_t)v->f_bavail * v->f_frsize);
}

/* Lets go of space_lock meanwhile: storage that hangs holds up who asks, and nobody else. */
static void ask_for_headroom(struct ff_store *s)
{
	uint64_t charged = s->space_charged;
	struct statvfs v;
	int64_t left = 0;

	s->space_unchecked = 0;
	pthread_mutex_unlock(&s->space_lock);
	if (io_fstatvfs(s->fleece_fd, &v) == 0)
		left = available(&v) - (int64_t)s->cfg.fleece_reserve;
	pthread_mutex_lock(&s->space_lock);
	/* Of what was charged in between the answer may not know yet. */
	s->space_headroom = left - (int64_t)(s->space_charged - charged);
}

/* Is there room for so much, with what is to stay free? Lock: space_lock held, but not all the
 * time. */
static bool has_room(struct ff_store *s, int64_t bytes)
{
	uint64_t charged;

	/* Who asks for the sake of RECHECK_BYTES has set the count to 0, so that only one does. */
	if (s->space_unchecked > RECHECK_BYTES)
		ask_for_headroom(s);
	for (int i = 0; i < ASK_MOST && s->space_headroom < bytes; i++) {
		charged = s->space_charged;
		ask_for_headroom(s);
		if (charged == s->space_charged) /* then the answer is exact */
			break;
	}
	return s->space_headroom >= bytes;
}

static int charge(struct ff_store *s, int64_t bytes, bool grows, bool must)
{
	FF_GUARD(&s->space_lock);
	if (bytes <= 0) {
		s->space_used -= FF_MIN(s->space_used, (uint64_t)-bytes);
		return 0;
	}
	if (!must && s->cfg.fleece_reserve && !has_room(s, bytes))
		return -ENOSPC;
	if (!must && s->cfg.fleece_limit && s->space_used + (uint64_t)bytes > s->cfg.fleece_limit)
		return -ENOSPC;
	if (s->cfg.fleece_reserve) {
		s->space_headroom -= bytes;
		s->space_unchecked += (uint64_t)bytes;
		s->space_charged += (uint64_t)bytes;
	}
	s->space_used += (uint64_t)bytes;
	s->space_grown += grows ? (uint64_t)bytes : 0;
	return 0;
}

int space_charge(void *store, int64_t bytes, bool must)
{
	return charge(store, bytes, true, must);
}

int space_charge_link(struct link *l)
{
	struct ff_store *s = l->disk->store;
	int r = charge(s, (int64_t)ff_image_allocated(l->img), false, false);

	l->charged = r == 0;
	if (r)
		ff_error("%s: no room for another fleecing image within fleece-limit (%llu MiB, 0: "
		         "none) and fleece-reserve (%llu MiB stay free): drop snapshots, or change "
		         "these",
		         s->fleece_path, (unsigned long long)s->cfg.fleece_limit >> 20,
		         (unsigned long long)s->cfg.fleece_reserve >> 20);
	return r;
}

void space_release_link(struct link *l)
{
	if (l->charged)
		space_charge(l->disk->store, -(int64_t)ff_image_allocated(l->img), true);
	l->charged = false;
}

/* --- looking --- */

static int ask_available(void *ctx)
{
	struct ff_store *s = ctx;
	struct statvfs v;
	int r = io_fstatvfs(s->fleece_fd, &v);

	pthread_mutex_lock(&s->space_lock);
	s->space_avail = r ? 0 : available(&v);
	pthread_mutex_unlock(&s->space_lock);
	atomic_store(&s->space_asking, false);
	return r;
}

/* Lock: space_lock held. */
static void measure_growth(struct ff_store *s)
{
	struct timespec now;
	double passed;

	clock_gettime(CLOCK_MONOTONIC, &now);
	passed = (double)(now.tv_sec - s->growth_time.tv_sec) +
	         (double)(now.tv_nsec - s->growth_time.tv_nsec) / 1e9;
	if (s->growth_time.tv_sec || s->growth_time.tv_nsec) {
		double keep = GROWTH_SECONDS / (GROWTH_SECONDS + passed);

		s->growth_bytes =
		    s->growth_bytes * keep + (double)(s->space_grown - s->growth_seen);
		s->growth_seconds = s->growth_seconds * keep + passed;
	}
	s->growth_seen = s->space_grown;
	s->growth_time = now;
}

/* What may still be allocated. Lock: space_lock held. */
static uint64_t still_free(const struct ff_store *s)
{
	int64_t left = s->space_avail - (int64_t)s->cfg.fleece_reserve;
	uint64_t bytes = left > 0 ? (uint64_t)left : 0;

	if (!s->cfg.fleece_limit)
		return bytes;
	return FF_MIN(bytes, s->cfg.fleece_limit - FF_MIN(s->cfg.fleece_limit, s->space_used));
}

void space_begin(struct ff_store *s)
{
	FF_GUARD(&s->space_lock);
	measure_growth(s);
}

void space_look(struct ff_store *s, struct ff_store_status *out)
{
	if (!atomic_exchange(&s->space_asking, true) &&
	    late_run(ask_available, s, ANSWER_SECONDS, &s->asking) == -EAGAIN)
		ask_available(s);
	FF_GUARD(&s->space_lock);
	measure_growth(s);
	out->used_bytes = s->space_used;
	out->free_bytes = still_free(s);
	if (s->growth_seconds > 0)
		out->growth = s->growth_bytes / s->growth_seconds;
}

void space_pulse(struct ff_store *s)
{
	uint64_t used, left;
	unsigned percent;

	if (!atomic_exchange(&s->space_asking, true))
		ask_available(s);
	pthread_mutex_lock(&s->space_lock);
	measure_growth(s);
	used = s->space_used;
	left = still_free(s);
	pthread_mutex_unlock(&s->space_lock);
	percent = used ? (unsigned)(100.0 * (double)used / ((double)used + (double)left)) : 0;
	if (percent < WARN_ANEW) {
		s->space_warned = 0;
		return;
	}
	percent = percent >= WARN_LAST ? WARN_LAST : percent >= WARN_FIRST ? WARN_FIRST : 0;
	if (percent <= s->space_warned)
		return;
	s->space_warned = percent;
	ff_warning(
	    "%s: fleecing images take more than %u %% of what they may: %llu MiB, %llu MiB are "
	    "left; at the end, %s",
	    s->fleece_path, percent, (unsigned long long)used >> 20, (unsigned long long)left >> 20,
	    s->cfg.policy == FF_BREAK_SNAPSHOT
	        ? "snapshots break: drop some, or raise fleece-limit"
	        : "guests' writes fail: drop snapshots, or raise fleece-limit");
}
