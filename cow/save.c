/*
 * Phase 1 of copy-before-write (see preserve.c): what a change is about to destroy is saved in the
 * newest link of the disk, or known to need no saving.
 *
 * Why leaving equal bytes unsaved is right: an unmarked cluster of the newest link reads the same
 * in the source as at the freeze. Writing what is there keeps that true; and should another thread
 * save and change the cluster before the write of the equal bytes lands, it is marked by then.
 *
 * Claims keep two threads from saving one cluster: a list per disk, as long as the number of
 * threads in phase 1 on that disk. A thread holds one claim at a time and waits for another's while
 * it holds none, so there is no cycle.
 *
 * Why a save never takes what is newer than its link: a link that is still the newest once the
 * claim is held has the source's bytes in its unmarked clusters, for a change that a newer link
 * allows needs a claim first. One that is not may have lost them; the newer links have them then,
 * or the source still does, and phase 1 begins anew with the newest.
 *
 * Where some view needs less than all (disk.lean, see needs.c), what no view needs is not saved:
 * that it changes is noted, and with that it is marked as well, so the rest is the same.
 *
 * When a save fails (the fleece storage is full or broken, the old data cannot be read), the policy
 * decides: the views that needed the clusters break, for good, and the guest goes on; or the
 * guest's change fails with the error and the views stay right.
 */
#include "cow/save.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "cow/device.h"
#include "cow/io.h"
#include "cow/late.h"
#include "cow/needs.h"
#include "cow/qcow2_format.h"
#include "ff_log.h"
#include "ff_util.h"

enum {
	SAVE_BYTES = 1 << 20,   /* saved at a time, or one cluster if that is more */
	STACK_BYTES = 64 << 10, /* old data of smaller saves is kept on the stack */
	DIRECT_ALIGN = 4096,
	/* what a save says if it did not fail, as bits */
	OVERTAKEN = SAVE_OVERTAKEN,
	WAITED = 2, /* something was saved, or broke, by this thread or one that it waited for */
	BROKE = 4,  /* something could not be saved */
};

static bool all_zero(const char *p, size_t n)
{
	return n == 0 || (p[0] == 0 && memcmp(p, p + 1, n - 1) == 0);
}

/* Does the effect alter the cluster whose old bytes, from offset AT on, are OLD? */
static bool alters(const struct effect *e, uint64_t at, const char *old, size_t size)
{
	uint64_t from = FF_MAX(e->off, at), to = FF_MIN(e->end, at + size);

	if (e->unknown)
		return true;
	if (e->bytes)
		return memcmp(old + (from - at), e->bytes + (from - e->off), to - from) != 0;
	return !all_zero(old + (from - at), to - from);
}

/* Waits until no claim overlaps the first cluster, and claims as many of COUNT as are free. */
static void claim(const struct link *l, struct claim *mine, uint64_t first, uint64_t count)
{
	struct ff_disk *d = l->disk;

	FF_GUARD(&d->claim_lock);
	mine->link = l;
again:
	mine->first = first;
	mine->count = count;
	for (struct claim *c = d->claims; c; c = c->next) {
		if (first >= c->first && first < c->first + c->count) {
			pthread_cond_wait(&d->claim_freed, &d->claim_lock);
			goto again;
		}
		if (c->first > first)
			mine->count = FF_MIN(mine->count, c->first - first);
	}
	mine->next = d->claims;
	d->claims = mine;
}

static void unclaim(struct ff_disk *d, struct claim *mine)
{
	struct claim **at = &d->claims;

	FF_GUARD(&d->claim_lock);
	while (*at != mine)
		at = &(*at)->next;
	*at = mine->next;
	pthread_cond_broadcast(&d->claim_freed);
}

void save_settle(struct ff_disk *d, uint64_t first, uint64_t count)
{
	struct claim *c;

	FF_GUARD(&d->claim_lock);
	do {
		for (c = d->claims; c; c = c->next)
			if (c->first < first + count && first < c->first + c->count)
				break;
		if (c)
			pthread_cond_wait(&d->claim_freed, &d->claim_lock);
	} while (c);
}

bool save_is_before(const struct link *l)
{
	uint64_t seq = ff_image_desc(l->img)->seq;

	FF_GUARD(&l->disk->claim_lock);
	for (const struct claim *c = l->disk->claims; c; c = c->next)
		if (ff_image_desc(c->link->img)->seq < seq)
			return true;
	return false;
}

/* Saves what the effect alters of COUNT claimed clusters, with room for their bytes at BUF. */
static int save_into(struct link *top, const struct effect *e, uint64_t first, uint64_t count,
                     char *buf, uint8_t *wanted)
{
	const struct ff_image_desc *desc = ff_image_desc(top->img);
	size_t size = desc->cluster_size, len = (size_t)count * size, got;
	uint64_t at = first * size, saves = 0;
	int r = old_data_read(top->disk, e->direct, buf, len, at, &got);

	if (r)
		return r;
	if (at + got > desc->size)
		got = (size_t)(desc->size - at);
	if (disk_is_device(top->disk) && got < FF_MIN(len, desc->size - at))
		return -EIO; /* it has become smaller: that is no hole, as in a file, but a loss */
	memset(buf + got, 0, len - got);
	for (uint64_t i = 0; i < count; i++) {
		wanted[i] = alters(e, at + i * size, buf + i * size, size);
		saves += wanted[i];
	}
	if (!saves)
		return 0;
	r = ff_image_save(top->img, first, count, buf, wanted,
	                  top->disk->store->cfg.durable || atomic_load(&top->disk->durable));
	if (r)
		return r;
	atomic_fetch_add(&top->saves, saves);
	stats_saved(top, saves * size);
	return WAITED;
}

/* Which clusters could not be saved. */
struct failure {
	uint64_t first, count;
	bool untracked; /* nor could it be recorded that they change */
};

/* 0, WAITED, or an error. */
static int save_claimed(struct link *top, const struct effect *e, uint64_t first, uint64_t count)
{
	struct ff_store *s = top->disk->store;
	size_t len = (size_t)count * ff_image_desc(top->img)->cluster_size;
	char small[STACK_BYTES] __attribute__((aligned(DIRECT_ALIGN)));
	uint8_t wanted[SAVE_BYTES / 4096];
	void *large;
	int r;

	if (len <= sizeof small)
		return save_into(top, e, first, count, small, wanted);
	large = old_data_buffer(s);
	if (!large)
		return -ENOMEM;
	r = save_into(top, e, first, count, large, wanted);
	old_data_buffer_back(s, large);
	return r;
}

/* The same where some views need less than all: what none needs is only noted as changed. The old
 * bytes are not read for that, so it is noted, too, when the change makes no difference. */
static int save_lean(struct link *top, const struct effect *e, uint64_t first, uint64_t count,
                     bool *untracked)
{
	bool durable = top->disk->store->cfg.durable || atomic_load(&top->disk->durable);
	uint64_t needed[NEEDS_WORDS];
	int r = 0, told = 0;
	unsigned n;

	needs_of(top, first, (unsigned)count, needed);
	for (unsigned at = 0; r >= 0 && at < count; at += n) {
		bool set;

		n = needs_run(needed, at, (unsigned)count, &set);
		if (set) {
			r = save_claimed(top, e, first + at, n);
			told |= FF_MAX(r, 0);
			continue;
		}
		r = ff_image_note(top->img, first + at, n, durable);
		*untracked = r != 0;
		if (!r)
			atomic_fetch_add(&top->saves, n);
	}
	return r < 0 ? r : told;
}

_Static_assert(SAVE_BYTES / 4096 <= NEEDS_MAX, "a run of the smallest clusters");
_Static_assert((int)SAVE_BYTES <= (int)OLD_DATA_BYTES,
               "a run of clusters fits into a buffer for old data");
_Static_assert(QCOW2_CLUSTER_MAX <= (unsigned)OLD_DATA_BYTES, "and so does a cluster");

/* Where the change makes zeros, holes of the source need no saving: the first cluster from FIRST
 * on, below END, that has data. */
static uint64_t skip_hole(struct link *top, uint64_t first, uint64_t end)
{
	size_t size = ff_image_desc(top->img)->cluster_size;
	uint64_t data;
	int r = disk_seek(top->disk, first * size, SEEK_DATA, &data);

	if (r == -ENXIO)
		return end;
	return r ? first : FF_MIN(FF_MAX(first, data / size), end);
}

/* For the clusters [first, end) of the newest link, which the caller has pinned; OVERTAKEN,
 * WAITED. On error *F says which clusters could not be saved. */
static int save(struct link *top, const struct effect *e, uint64_t first, uint64_t end,
                struct failure *f)
{
	size_t size = ff_image_desc(top->img)->cluster_size;
	uint64_t most = FF_MAX(1, SAVE_BYTES / size);
	bool zeros = !e->bytes && !e->unknown;
	int r = 0, told = 0;

	while (first < end) {
		struct claim mine;
		bool marked, untracked = false;
		uint64_t n = ff_image_run(top->img, first, end - first, &marked);

		if (!marked && zeros && n > most) {
			uint64_t data = skip_hole(top, first, first + n);

			if (data > first) {
				first = data;
				continue;
			}
		}
		if (!marked) {
			claim(top, &mine, first, FF_MIN(n, most));
			/* Someone may have saved them before they became ours. */
			n = ff_image_run(top->img, first, mine.count, &marked);
			if (marked)
				r = WAITED;
			else if (atomic_load(&top->disk->top) != top)
				r = OVERTAKEN;
			else if (atomic_load(&top->disk->lean))
				r = save_lean(top, e, first, n, &untracked);
			else
				r = save_claimed(top, e, first, n);
			unclaim(top->disk, &mine);
		}
		if (r < 0) {
			*f = (struct failure){first, n, untracked};
			return r;
		}
		told |= r;
		if (r & OVERTAKEN)
			return told;
		r = 0;
		first += n;
	}
	return told;
}

/* A save that is not waited for longer than cbw-timeout; owns what it points to. */
struct timed_save {
	struct link *top; /* pinned */
	struct effect effect;
	uint64_t first, end;
	struct failure failure;
	char bytes[];
};

static int run_timed(void *ctx)
{
	struct timed_save *t = ctx;
	int r = save(t->top, &t->effect, t->first, t->end, &t->failure);

	atomic_fetch_sub(&t->top->pins, 1);
	free(t);
	return r;
}

/* What was saved after the time was up is as right as what was saved before; what failed, and what
 * took too long, is all that was asked for: the policy is applied to the whole. */
static int save_timed(struct link *top, const struct effect *e, uint64_t first, uint64_t end)
{
	struct ff_store *s = top->disk->store;
	size_t len = e->bytes ? (size_t)(e->end - e->off) : 0;
	struct timed_save *t = malloc(sizeof *t + len);
	int r;

	if (!t)
		return -ENOMEM;
	*t = (struct timed_save){.top = top, .effect = *e, .first = first, .end = end};
	if (len)
		t->effect.bytes = memcpy(t->bytes, e->bytes, len);
	atomic_fetch_add(&top->pins, 1);
	r = late_run(run_timed, t, s->cfg.cbw_timeout, &s->late);
	if (r == -EAGAIN) {
		atomic_fetch_sub(&top->pins, 1);
		free(t);
	}
	return r;
}

/* With the policy for failures; OVERTAKEN, WAITED, BROKE. An error only if the guest is to
 * have it. */
static int save_or_break(struct link *top, const struct effect *e, uint64_t first, uint64_t end)
{
	struct ff_disk *d = top->disk;
	int r, told = 0;

	for (;;) {
		struct failure f = {first, end - first, true};

		r = d->store->cfg.cbw_timeout ? save_timed(top, e, first, end)
		                              : save(top, e, first, end, &f);
		if (r >= 0)
			return r | told;
		told |= WAITED | BROKE;
		if (d->store->cfg.policy == FF_BREAK_GUEST_WRITE) {
			ff_error("%s: old data cannot be saved, the guest's write fails: %s",
			         ff_image_path(top->img), strerror(-r));
			return r;
		}
		r = chain_break(top, f.first, f.count, f.untracked, r);
		if (r)
			return r;
		if (!chain_wanted(d))
			return told;
		/* Nobody needs them now, but that they change is to be recorded. */
		first = !f.untracked && atomic_load(&d->lean) ? f.first : f.first + f.count;
	}
}

int save_old(struct link *top, const struct effect *e, uint64_t first, uint64_t end)
{
	struct ff_disk *d = top->disk;
	struct timespec from, to;
	int told, r = 0;

	clock_gettime(CLOCK_MONOTONIC, &from);
	told = chain_wanted(d) ? save_or_break(top, e, first, end) : 0;
	if (told < 0)
		r = told;
	else if (told & OVERTAKEN)
		r = SAVE_OVERTAKEN;
	else
		r = lost_settled(d); /* what we did not save another thread may break */
	if (told < 0 || told & WAITED) {
		clock_gettime(CLOCK_MONOTONIC, &to);
		stats_wait(top,
		           (uint64_t)((to.tv_sec - from.tv_sec) * 1000000 +
		                      (to.tv_nsec - from.tv_nsec) / 1000),
		           told < 0 || told & BROKE);
	}
	return r;
}
