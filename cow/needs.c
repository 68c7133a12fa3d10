/*
 * Who still needs old data.
 *
 * A view needs a cluster that it may have to read: it is shown, not broken (or storage does not
 * know of that yet, so that a later mount would read it), not that of a checkpoint, and has not
 * given the cluster up. It needs it from the first link, from its own on,
 * that marks it; so what link L holds of a cluster, or would hold if it saved it, is needed if some
 * view from L's to the oldest is such a one, and no link from that view's up to L's neighbour marks
 * the cluster. Views older than one that begins beyond the end of the next newer link's disk read
 * zeros there, and need nothing either.
 *
 * All of that only ever goes one way: a view that needs a cluster no more never does again, not
 * after a restart either, for what it rests on stands on storage before it is acted upon. New views
 * are newer. So an answer "not needed" stays right, and one that is late costs a save at most.
 *
 * Most chains are plain: every view of theirs needs all. disk.lean says that a chain is not, and is
 * all that a plain one pays.
 *
 * A sweep goes through a lean chain after one of its views has come to need less. What is not
 * needed any more becomes a bit (qcow2_ledger.c): of a view that is shown in its own ledger, of a
 * hidden link, which nobody asks for changes, in the next older one's. Bits first, then (where
 * views are to survive a loss of power) a flush, then the data goes. Killed in between, the next
 * mount sweeps again. No budget refuses these bits. Where storage itself has no room for them, an
 * image that nobody reads any more gives up its data first, and keeps its table entries, which say
 * as much.
 *
 * What changed between a view and a newer one is the union of the marks in between; a sweep never
 * takes away from that.
 */
#include "cow/needs.h"
#include "cow/save.h"

#include <errno.h>
#include <string.h>

#include "ff_log.h"
#include "ff_util.h"

enum { SETTLE_BYTES = 64 << 20 };

/* The first COUNT bits. */
static void first_bits(uint64_t count, uint64_t *bits)
{
	for (unsigned w = 0; w < NEEDS_WORDS; w++)
		bits[w] = count >= w * 64 + 64 ? ~UINT64_C(0)
		          : count <= w * 64    ? 0
		                               : (UINT64_C(1) << (count - w * 64)) - 1;
}

/* May its view be read? LATER: by another mount, too, which does not know of a loss that storage
 * was not told of. (A guest's change that goes on for want of a reader waits in lost_settled().)
 * Lock: chain, or admin held. */
static bool is_read(const struct link *l, bool later)
{
	return l->snap && !atomic_load(&l->checkpoint) &&
	       !atomic_load(later ? &l->recorded : &l->broken);
}

static void needed_by(struct link *l, bool later, uint64_t first, unsigned count, uint64_t *needed)
{
	uint64_t left[NEEDS_WORDS], bits[NEEDS_WORDS], there[NEEDS_WORDS], any = 1;

	memset(needed, 0, NEEDS_WORDS * sizeof *needed);
	first_bits(count, left);
	FF_GUARD(&l->disk->store->chain);
	for (struct link *o = l; o && any; o = o->older) {
		/* what lies beyond its end is nothing to it, nor to older ones through it */
		first_bits(o->clusters > first ? FF_MIN(count, o->clusters - first) : 0, there);
		any = 0;
		ff_image_released_bits(o->img, first, count, bits);
		for (unsigned w = 0; w * 64 < count; w++) {
			left[w] &= there[w];
			if (is_read(o, later))
				needed[w] |= left[w] & ~bits[w];
		}
		if (o->older)
			ff_image_marks(o->older->img, first, count, bits);
		for (unsigned w = 0; w * 64 < count; w++) {
			left[w] &= ~bits[w] & ~needed[w];
			any |= left[w];
		}
	}
}

void needs_of(struct link *l, uint64_t first, unsigned count, uint64_t *needed)
{
	needed_by(l, false, first, count, needed);
}

unsigned needs_run(const uint64_t *needed, unsigned at, unsigned count, bool *set)
{
	unsigned n = 0;

	*set = needed[at / 64] >> at % 64 & 1;
	while (at + n < count && (needed[(at + n) / 64] >> (at + n) % 64 & 1) == *set)
		n++;
	return n;
}

/* Does some view need anything at all of what L has? Locks: admin. */
static bool is_needed(struct link *l)
{
	FF_GUARD(&l->disk->store->chain);
	while (l && !is_read(l, true))
		l = l->older;
	return l != NULL;
}

/* A save that was begun before its cluster came to be needed no more ends before this returns. */
static void settle(struct link *l)
{
	uint64_t piece = FF_MAX(SETTLE_BYTES / ff_image_desc(l->img)->cluster_size, 1);

	for (uint64_t at = 0; at < l->clusters; at += piece)
		save_settle(l->disk, at, piece);
}

/* Notes in OLDER what is marked in L, by [at, at + n), and not there. */
static int hand_down(struct link *older, uint64_t at, uint64_t n)
{
	uint64_t end = FF_MIN(at + n, older->clusters);
	int r = 0;

	while (!r && at < end) {
		bool marked;

		n = ff_image_run(older->img, at, end - at, &marked);
		if (!marked) {
			r = ff_image_make_ledger(older->img, atomic_load(&older->disk->durable));
			if (!r)
				r = ff_image_take_over(older->img, at, n);
			if (!r)
				atomic_fetch_add(&older->saves, n);
		}
		at += n;
	}
	return r;
}

/* One piece of a marked run: what is not needed of it. */
static int record(struct link *l, struct link *older, uint64_t first, unsigned count)
{
	uint64_t needed[NEEDS_WORDS];
	unsigned n;
	int r = 0;

	needed_by(l, true, first, count, needed);
	for (unsigned at = 0; !r && at < count; at += n) {
		bool set;

		n = needs_run(needed, at, count, &set);
		if (set)
			continue;
		r = ff_image_make_ledger(l->img, atomic_load(&l->disk->durable));
		if (!r)
			r = ff_image_record(l->img, first + at, n);
		if (!r && older)
			r = hand_down(older, first + at, n);
	}
	return r;
}

static int record_all(struct link *l, struct link *older, uint64_t first, uint64_t end)
{
	int r = 0;

	end = FF_MIN(end, l->clusters);
	for (uint64_t at = first, n; !r && at < end; at += n) {
		bool marked;

		n = ff_image_run(l->img, at, end - at, &marked);
		if (!marked)
			continue;
		n = FF_MIN(n, NEEDS_MAX);
		r = record(l, older, at, (unsigned)n);
	}
	return r;
}

static int flush_if_durable(struct link *l)
{
	return atomic_load(&l->disk->durable) ? ff_image_flush(l->img) : 0;
}

int needs_sweep_link(struct link *l)
{
	struct link *older = NULL;
	bool needed = is_needed(l);
	int r = 0;

	/* a hidden one that leaves must leave nothing behind that is known here alone */
	if (!l->snap && l->older) {
		older = l->older;
		link_pin(older);
	}
	if (!needed)
		settle(l);
	r = record_all(l, older, 0, l->clusters);
	if (!needed && (r == -ENOSPC || r == -EDQUOT)) {
		/* storage is full of that which is to go: it makes room for the record of it */
		r = ff_image_hollow(l->img, 0, l->clusters);
		if (!r)
			r = record_all(l, older, 0, l->clusters);
	}
	if (!r && older)
		r = flush_if_durable(older);
	if (!r)
		r = flush_if_durable(l);
	if (older)
		atomic_fetch_sub(&older->pins, 1);
	if (r)
		return r;
	return needed ? ff_image_drop_recorded(l->img, 0, l->clusters)
	              : ff_image_clear(l->img, atomic_load(&l->disk->durable));
}

static bool keeps_all(const struct link *l)
{
	return is_read(l, true) && !ff_image_has_ledger(l->img);
}

/* Of one link. A hidden one keeps its bits until it is swept as a whole. */
static int sweep_range(struct link *l, uint64_t first, uint64_t count)
{
	int r;

	link_pin(l);
	r = record_all(l, NULL, first, first + count);
	if (!r)
		r = flush_if_durable(l);
	if (!r && first < l->clusters)
		r = ff_image_drop_recorded(l->img, first, FF_MIN(count, l->clusters - first));
	atomic_fetch_sub(&l->pins, 1);
	return r;
}

int needs_sweep_range(struct link *l, uint64_t first, uint64_t count)
{
	int r = 0;

	/* What it read from newer links, too, up to one that needs all that it has: what that does
	 * not mark comes from beyond it for both. */
	for (struct link *m = l; m && !r && (m == l || !keeps_all(m)); m = atomic_load(&m->newer))
		r = sweep_range(m, first, count);
	return r;
}

void needs_sweep(struct ff_disk *d)
{
	struct link *l;

	if (!atomic_load(&d->lean))
		return;
	disk_use(d);
	for (l = atomic_load(&d->top); l; l = l->older) {
		int r;

		if (!l->snap || keeps_all(l))
			continue;
		link_pin(l);
		r = needs_sweep_link(l);
		atomic_fetch_sub(&l->pins, 1);
		if (r)
			ff_warning("%s/%s/%s: what nobody needs of it cannot be given back: %s",
			           d->store->fleece_path, l->dir->name, ff_image_path(l->img),
			           strerror(-r));
	}
	disk_unuse(d);
}
