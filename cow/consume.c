/*
 * Space given back while a view is read.
 *
 * A cluster that a view has given up (released) is never read for it again: reading it is -EIO,
 * whatever it holds elsewhere. What was saved for it goes, if no older view needs it, and nothing
 * more is saved for it; that it changes is noted all the same, so what is told of changes since the
 * snapshot stays whole.
 *
 *   1. The bits "released" are written to the ledger of the view's image (and flushed, where views
 *      are to survive a loss of power), then set in memory: from here on reads fail.
 *   2. Frozen reads that have not seen the bits come to their end: the barrier `reads` is closed
 *      once. They would take the data's going for damage.
 *   3. The range is swept (needs.c): data that nobody needs becomes a bit "changed", and goes.
 *
 * Step 1 alone is what was asked for; should 2 or 3 have to wait for a freeze or a drop, it is left
 * to the next release of the view, or the next mount.
 *
 * Who asks for it: a user, of a range (ff_reader_release); or, where it was switched on for a file
 * (link.consume, as long as the mount stands), each read by ff_reader_passed(). A reader is taken
 * for a sequential one as far as it is: a run is what it has read without a gap, not counting holes
 * that it skips, and requests that overtake each other on the way here. A read elsewhere begins a
 * new run, and what the old one had not given up by then is kept. What lies more than BEHIND before
 * the end of its run a reader has left behind. Only what all who have the file open have read so,
 * and left behind, is given up: the slowest decides, and one that has not begun to read keeps
 * everything.
 *
 * The order of locks: consumer.lock, then (in turn, not at once) snap.lock, and what step 1 and 3
 * take; admin only if it is free.
 */
#include "cow/consume.h"

#include <errno.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "cow/needs.h"
#include "ff_log.h"
#include "ff_util.h"

#define BEHIND (UINT64_C(64) << 20)
#define STEP   (UINT64_C(8) << 20)  /* given up at a time, so that it costs little */
#define WINDOW (UINT64_C(32) << 20) /* requests overtake each other by less */

enum { READS_WAIT_MS = 100 };

void consumer_add(struct consumer *c, struct link *l)
{
	c->link = l;
	pthread_mutex_init(&c->lock, NULL);
	c->next = l->consumers;
	l->consumers = c;
}

void consumer_remove(struct consumer *c, struct ff_snap *snap)
{
	struct consumer **at = &c->link->consumers;

	pthread_mutex_lock(&snap->lock);
	while (*at != c)
		at = &(*at)->next;
	*at = c->next;
	pthread_mutex_unlock(&snap->lock);
	pthread_mutex_destroy(&c->lock);
}

/* --- giving up ---------------------------------------------------------------------------------
 */

/* Step 2. */
static bool reads_have_ended(struct ff_store *s)
{
	bool ended;

	if (pthread_mutex_trylock(&s->reads_closing))
		return false;
	ended = barrier_close(s->reads, READS_WAIT_MS) == 0;
	if (ended)
		barrier_open(s->reads);
	pthread_mutex_unlock(&s->reads_closing);
	return ended;
}

/* Steps 2 and 3, or they are left to the next time. */
static void give_back(struct link *l, struct ff_snap *snap, uint64_t first, uint64_t end)
{
	struct ff_store *s = l->disk->store;
	int r = -EAGAIN;

	pthread_mutex_lock(&snap->lock);
	if (l->unswept_end > l->unswept) {
		first = FF_MIN(first, l->unswept);
		end = FF_MAX(end, l->unswept_end);
	}
	l->unswept = first;
	l->unswept_end = end;
	pthread_mutex_unlock(&snap->lock);
	if (pthread_mutex_trylock(&s->admin))
		return;
	if (reads_have_ended(s))
		r = needs_sweep_range(l, first, end - first);
	pthread_mutex_unlock(&s->admin);
	if (r && r != -EAGAIN)
		ff_warning("%s/%s: what was given up of it cannot be given back: %s",
		           s->fleece_path, ff_image_path(l->img), strerror(-r));
	pthread_mutex_lock(&snap->lock);
	if (!r && l->unswept == first && l->unswept_end == end)
		l->unswept_end = l->unswept;
	pthread_mutex_unlock(&snap->lock);
}

/* The link is kept in its chain, by a reader of it. */
static int release(struct link *l, struct ff_snap *snap, uint64_t first, uint64_t end)
{
	struct ff_disk *d = l->disk;
	int r;

	end = FF_MIN(end, l->clusters);
	if (first >= end)
		return 0;
	link_pin(l);
	r = ff_image_give_up(l->img, first, end - first, atomic_load(&d->durable));
	if (!r) {
		stats_notable(l);
		pthread_mutex_lock(&d->store->chain);
		chain_recount(d);
		pthread_mutex_unlock(&d->store->chain);
		give_back(l, snap, first, end);
	}
	atomic_fetch_sub(&l->pins, 1);
	return r;
}

int ff_reader_release(struct ff_reader *rd, off_t off, off_t len)
{
	struct ff_snap *snap;
	struct consumer *c = reader_consumer(rd, &snap);
	uint64_t size = ff_image_desc(c->link->img)->cluster_size;
	uint64_t bytes = ff_image_desc(c->link->img)->size, end;

	if (off < 0 || len <= 0)
		return -EINVAL;
	if (ff_add_u64((uint64_t)off, (uint64_t)len, &end) || end >= bytes)
		end = ff_round_up(bytes, size); /* the last cluster may be a part only */
	return release(c->link, snap, ff_div_up((uint64_t)off, size), end / size);
}

/* --- how far a reader has come -----------------------------------------------------------------
 */

/* Is there nothing but a hole up to OFF? */
static bool skips_hole(struct ff_reader *rd, const struct consumer *c, uint64_t off)
{
	off_t data;

	return reader_seek_below(rd, c->end, off, SEEK_DATA, &data) == -ENXIO;
}

/* Of what was read ahead of the run, the piece that begins first. There is one. */
static unsigned first_ahead(const struct consumer *c)
{
	unsigned first = 0;

	for (unsigned i = 1; i < c->ahead_count; i++)
		if (c->ahead[i].from < c->ahead[first].from)
			first = i;
	return first;
}

static void remove_ahead(struct consumer *c, unsigned i)
{
	c->ahead[i] = c->ahead[--c->ahead_count];
}

/* Lock: c->lock. Takes in what was read ahead of the run and is not any more, for there is nothing
 * between, or a hole. */
static void take_ahead(struct ff_reader *rd, struct consumer *c)
{
	while (c->ahead_count) {
		unsigned i = first_ahead(c);
		struct consume_piece p = c->ahead[i];

		if (p.from > c->end && !skips_hole(rd, c, p.from))
			return;
		remove_ahead(c, i);
		c->end = FF_MAX(c->end, p.to);
	}
}

static bool put_ahead(struct consumer *c, uint64_t from, uint64_t to)
{
	if (c->ahead_count == CONSUME_AHEAD)
		return false;
	c->ahead[c->ahead_count++] = (struct consume_piece){from, to};
	return true;
}

/* The gap behind the run is not going to be read: the run goes on with the first piece beyond. */
static void skip_gap(struct ff_reader *rd, struct consumer *c)
{
	unsigned i = first_ahead(c);
	struct consume_piece p = c->ahead[i];

	remove_ahead(c, i);
	c->begin = c->released = p.from;
	c->end = p.to;
	take_ahead(rd, c);
}

/* Takes the read of [off, end) in. Lock: c->lock. */
static void take_run(struct ff_reader *rd, struct consumer *c, uint64_t off, uint64_t end)
{
	uint64_t begin = c->begin, was = c->end;
	bool none = c->end == c->begin;

	while (!none && off > c->end && c->ahead_count &&
	       (off - c->end > WINDOW || c->ahead_count == CONSUME_AHEAD))
		skip_gap(rd, c);
	if (!none && off >= c->begin && off <= c->end) {
		c->end = FF_MAX(c->end, end);
	} else if (!none && off > c->end && skips_hole(rd, c, off)) {
		c->end = end;
	} else if (!none && off > c->end && off - c->end <= WINDOW && put_ahead(c, off, end)) {
		return;
	} else {
		/* what it began with may only have come too early */
		bool early = !none && off < c->begin && c->end - off <= WINDOW &&
		             put_ahead(c, c->begin, c->end);

		c->ahead_count = early ? c->ahead_count : 0;
		c->begin = c->released = off;
		c->end = end;
	}
	if (c->begin != begin || c->end != was) /* else what was asked for is as it was */
		take_ahead(rd, c);
}

/* Tells the others how far C is, and learns what all who have it open have read and left behind:
 * [*from, *to). Lock: c->lock. */
static void left_by_all(struct consumer *c, struct ff_snap *snap, uint64_t *from, uint64_t *to)
{
	FF_GUARD(&snap->lock);
	c->from = c->begin;
	c->left = c->end > BEHIND ? c->end - BEHIND : 0;
	*from = 0;
	*to = UINT64_MAX;
	for (struct consumer *o = c->link->consumers; o; o = o->next) {
		*from = FF_MAX(*from, o->from);
		*to = FF_MIN(*to, o->left);
	}
}

void ff_reader_passed(struct ff_reader *rd, off_t off, size_t len)
{
	struct ff_snap *snap;
	struct consumer *c = reader_consumer(rd, &snap);
	struct link *l = c->link;
	uint64_t size, from, to;
	int r = 0;

	if (!len || !atomic_load_explicit(&l->consume, memory_order_relaxed))
		return;
	size = ff_image_desc(l->img)->cluster_size;
	pthread_mutex_lock(&c->lock);
	take_run(rd, c, (uint64_t)off, (uint64_t)off + len);
	left_by_all(c, snap, &from, &to);
	from = ff_div_up(FF_MAX(from, c->released), size);
	to /= size;
	if (to > from && (to - from) * size >= STEP)
		c->released = to * size;
	else
		to = from;
	pthread_mutex_unlock(&c->lock);
	if (to > from)
		r = release(l, snap, from, to);
	if (r)
		ff_warning("%s/%s: what was read of it cannot be given up: %s",
		           l->disk->store->fleece_path, ff_image_path(l->img), strerror(-r));
}

/* --- switching it on ---------------------------------------------------------------------------
 */

int ff_snap_consume(struct ff_snap *snap, const struct ff_frozen *f, bool on)
{
	FF_GUARD(&snap->lock);
	if (snap->dropped)
		return -ENOENT;
	if (snap->checkpoint || snap->damaged)
		return -EIO;
	for (size_t i = 0; i < snap->link_count; i++)
		if (snap->links[i] && (!f || f->disk == i))
			atomic_store(&snap->links[i]->consume, on);
	return 0;
}

bool ff_frozen_consumes(struct ff_snap *snap, const struct ff_frozen *f)
{
	FF_GUARD(&snap->lock);
	if (snap->dropped || f->disk >= snap->link_count || !snap->links[f->disk])
		return false;
	return atomic_load(&snap->links[f->disk]->consume);
}
