/*
 * What a snapshot leaves behind when it is dropped, or becomes a checkpoint: links that no view is
 * of any more, which older views may read, or nobody.
 *
 *   1. Links with no older one leave their chains, and so do newer hidden ones that they kept
 *      alive. The rest become hidden: what an older view reads before it comes to them is marked
 *      (never save that here) and given up; if nothing is left, and no older disk was longer (its
 *      end is what says "zeros" for older views), they leave the chain as well. Where views need
 *      less than all, needs.c says what is given up.
 *   2. The backing names of what stayed are put right, and the images that left deleted. Where a
 *      view was promised to survive power loss, the names are made durable in between.
 *
 * A daemon killed anywhere in it leaves links that the next mount loads as hidden ones, and
 * collects again.
 *
 * Links leave a chain while names are held, the barrier is closed and the chain lock is held. A
 * writer may still be saving to such a link (it has it pinned): it finds another newest link
 * afterwards and saves there, before it changes the source. A reader of an older view may stand on
 * it: the barrier `reads` is closed once before it is freed.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "cow/engine.h"
#include "cow/io.h"
#include "cow/needs.h"
#include "cow/save.h"
#include "ff_log.h"
#include "ff_util.h"

enum { QUIET_MS = 200, QUIET_TRIES = 150, LEAVE_TRIES = 100, KINDS = 512 };

struct collect {
	struct ff_store *store;
	struct link **links; /* hidden, or about to be */
	size_t count, room;
	uint64_t *saves;        /* per link: saves when it was found empty, or NOT_EMPTY */
	struct ff_disk **disks; /* of the links, each with a reference: a link may go before it */
	struct link *gone;      /* taken out, by `older` */
};

#define NOT_EMPTY UINT64_MAX

/* Holds names, closes the barrier, takes the chain lock. A write that hangs must not hang the
 * others: the barrier is tried for a short time, again and again. */
static bool stop_writers(struct ff_store *s)
{
	for (int i = 0; i < QUIET_TRIES; i++) {
		pthread_rwlock_wrlock(&s->names);
		if (barrier_close(s->writes, QUIET_MS) == 0) {
			pthread_mutex_lock(&s->chain);
			return true;
		}
		pthread_rwlock_unlock(&s->names);
		nanosleep(&(struct timespec){.tv_nsec = QUIET_MS * 1000000L}, NULL);
	}
	ff_warning(
	    "a write to a disk does not end: images of dropped snapshots stay until the next "
	    "drop or mount");
	return false;
}

static void let_writers(struct ff_store *s)
{
	pthread_mutex_unlock(&s->chain);
	barrier_open(s->writes);
	pthread_rwlock_unlock(&s->names);
}

/* Takes L out of its chain. Writers are stopped. */
static void take_out(struct collect *c, struct link *l)
{
	struct link *newer = atomic_load(&l->newer), *older = l->older;

	if (newer)
		newer->older = older;
	else
		atomic_store(&l->disk->top, older);
	if (older)
		atomic_store_explicit(&older->newer, newer, memory_order_release);
	l->older = c->gone;
	l->out = true;
	c->gone = l;
}

/* Step 1, first part: of the hidden links, those that are the oldest leave. */
static void hide(struct collect *c)
{
	for (size_t i = 0; i < c->count; i++) {
		struct link *l = c->links[i];

		if (l->out || l->older)
			continue;
		while (l && !l->snap) {
			struct link *newer = atomic_load(&l->newer);

			take_out(c, l);
			l = newer;
		}
	}
}

/* Nobody reads the clusters [first, first+count) in L any more. */
static int give_up(struct link *l, uint64_t first, uint64_t count)
{
	int r = ff_image_skip(l->img, first, count);

	if (r)
		return r;
	/* No save begins there any more; those that had begun write entries of the same tables. */
	save_settle(l->disk, first, count);
	return ff_image_release(l->img, first, count);
}

static int give_up_marked(struct link *l, struct link *older)
{
	uint64_t end = FF_MIN(l->clusters, older->clusters);
	int r = 0;

	for (uint64_t at = 0, n; at < end && !r; at += n) {
		bool marked;

		n = ff_image_run(older->img, at, end - at, &marked);
		if (marked)
			r = give_up(l, at, n);
	}
	return r;
}

static bool holds_nothing(struct link *l)
{
	uint8_t kinds[KINDS];

	for (uint64_t at = 0, n; at < l->clusters; at += n) {
		bool marked;

		n = FF_MIN(ff_image_run(l->img, at, l->clusters - at, &marked), KINDS);
		if (!marked)
			continue;
		if (ff_image_kinds(l->img, at, n, kinds))
			return false;
		for (uint64_t i = 0; i < n; i++)
			if (kinds[i] != FF_KIND_NONE)
				return false;
	}
	return true;
}

/* Step 1, second part, with writers and readers going on: shrinks hidden L to what the views older
 * than it need. Returns its count of saves if it may leave, else NOT_EMPTY. */
static uint64_t shrink(struct link *l)
{
	uint64_t saves = atomic_load(&l->saves), end = l->clusters, longest = 0;
	bool lean = atomic_load(&l->disk->lean);
	int r = lean ? needs_sweep_link(l) : 0;

	for (struct link *o = l->older; o && !r; o = o->older) {
		r = lean ? 0 : give_up_marked(l, o);
		end = FF_MIN(end, o->clusters);
		longest = FF_MAX(longest, o->clusters);
		if (o->snap)
			break;
	}
	if (!r && !lean && end < l->clusters)
		r = give_up(l, end, l->clusters - end);
	if (r) {
		ff_warning("%s: cannot be made smaller: %s", ff_image_path(l->img), strerror(-r));
		return NOT_EMPTY;
	}
	return longest <= l->clusters && holds_nothing(l) ? saves : NOT_EMPTY;
}

/* Writers are stopped, but a save is outside the barrier: it may have marked a cluster and not been
 * counted yet, and another writer may have relied on the mark. */
static bool is_saving(struct ff_disk *d)
{
	FF_GUARD(&d->claim_lock);
	return d->claims != NULL;
}

/* Takes out what is still empty. True: some could not be told, for saves were under way. */
static bool leave_if_empty(struct collect *c)
{
	bool again = false;

	for (size_t i = 0; i < c->count; i++) {
		if (c->saves[i] == NOT_EMPTY || c->links[i]->out)
			continue;
		if (is_saving(c->links[i]->disk))
			again = true;
		else if (atomic_load(&c->links[i]->saves) == c->saves[i])
			take_out(c, c->links[i]);
	}
	return again;
}

/* Step 2 for one disk. An error: some image still names one that has left. */
static int settle(struct ff_disk *d)
{
	struct link *l = atomic_load(&d->top), *newer = NULL;
	int r = 0;

	if (!l) {
		aside_release(d);
		atomic_store(&d->durable, false);
	}
	for (; l; newer = l, l = l->older) {
		int e = link_set_backing(l, newer);

		r = r ? r : e;
	}
	return r;
}

/* The images of D, NULL: of all disks, that have left stay on storage until the next mount, which
 * takes an image that is named but not there for lost. They are empty, and harmless. */
static void keep_gone(struct collect *c, const struct ff_disk *d)
{
	for (struct link *l = c->gone; l; l = l->older)
		if (!d || l->disk == d)
			l->dir->kept = l->kept = true;
}

static void free_gone(struct collect *c)
{
	struct ff_store *s = c->store;

	if (!c->gone)
		return;
	for (struct link *l = c->gone; l; l = l->older)
		while (atomic_load(&l->pins) > 0)
			nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
	pthread_mutex_lock(&s->reads_closing);
	while (barrier_close(s->reads, 1000))
		; /* reads that hang are waited for; they delay nobody but other reads */
	barrier_open(s->reads);
	pthread_mutex_unlock(&s->reads_closing);
	while (c->gone) {
		struct link *l = c->gone;
		int r = l->kept ? 0 : ff_image_unlink(l->img);

		if (r && r != -ENOENT)
			ff_warning("%s/%s/%s: cannot delete: %s", s->fleece_path, l->dir->name,
			           ff_image_path(l->img), strerror(-r));
		space_release_link(l);
		lost_forget(l);
		c->gone = l->older;
		link_free(l);
	}
}

static int collect_one(struct collect *c, struct link *l)
{
	if (l->collecting)
		return 0;
	if (c->count == c->room) {
		size_t room = c->room ? c->room * 2 : 64;
		void *p = realloc(c->links, room * sizeof(struct link *));

		if (!p)
			return -ENOMEM;
		c->links = p;
		c->room = room;
	}
	l->collecting = true;
	c->links[c->count++] = l;
	return 0;
}

/* A hidden link hands down to older ones what must not be forgotten: see needs.c. */
static int newest_first(const void *a, const void *b)
{
	uint64_t x = ff_image_desc((*(struct link *const *)a)->img)->seq;
	uint64_t y = ff_image_desc((*(struct link *const *)b)->img)->seq;

	return FF_ORDER(y, x);
}

/* Hides the links, and adds the hidden ones whose data may be needed no more: those beside them,
 * and, where views need less than all, those beyond newer views, which need nothing of them. */
static int begin(struct collect *c, struct link *const *links, size_t count)
{
	int r = 0;

	FF_GUARD(&c->store->chain);
	for (size_t i = 0; i < count; i++)
		if (links[i]) {
			links[i]->snap = NULL; /* whatever else fails: it is about to be freed */
			chain_recount(links[i]->disk);
		}
	for (size_t i = 0; i < count && !r; i++) {
		struct link *l = links[i];
		bool lean = l && atomic_load(&l->disk->lean);

		if (!l)
			continue;
		r = collect_one(c, l);
		for (l = atomic_load(&links[i]->newer); !r && l && (lean || !l->snap);
		     l = atomic_load(&l->newer))
			r = l->snap ? 0 : collect_one(c, l);
		for (l = links[i]->older; !r && l && !l->snap; l = l->older)
			r = collect_one(c, l);
	}
	if (c->count)
		qsort(c->links, c->count, sizeof(struct link *), newest_first);
	c->saves = calloc(c->count + 1, sizeof *c->saves);
	c->disks = calloc(c->count + 1, sizeof *c->disks);
	if (!c->saves || !c->disks)
		return -ENOMEM;
	for (size_t i = 0; i < c->count; i++) {
		disk_ref(c->links[i]->disk);
		disk_use(c->links[i]->disk);
		c->disks[i] = c->links[i]->disk;
	}
	return r;
}

static void let_go(struct collect *c)
{
	for (size_t i = 0; i < c->count; i++)
		c->links[i]->collecting = false;
}

static void finish(struct collect *c)
{
	for (size_t i = 0; c->disks && i < c->count; i++)
		if (c->disks[i]) {
			disk_unuse(c->disks[i]);
			disk_unref(c->disks[i]);
		}
	free(c->links);
	free(c->saves);
	free(c->disks);
}

/* The second part of step 1 and all of step 2. */
static void shrink_and_leave(struct collect *c)
{
	size_t candidates = 0;
	bool durable = false;
	int r;

	for (size_t i = 0; i < c->count; i++) {
		link_pin(c->links[i]);
		c->saves[i] = c->links[i]->out ? NOT_EMPTY : shrink(c->links[i]);
		atomic_fetch_sub(&c->links[i]->pins, 1);
		candidates += c->saves[i] != NOT_EMPTY;
		disk_make_room(c->store, c->links[i]->disk);
	}
	/* what newer checkpoints hold may have been for a view that went */
	for (size_t i = 0; i < c->count; i++)
		needs_sweep(c->disks[i]);
	for (int i = 0; candidates && i < LEAVE_TRIES && stop_writers(c->store); i++) {
		bool again = leave_if_empty(c);

		let_writers(c->store);
		if (!again)
			break;
		nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
	}
	let_go(c);
	for (size_t i = 0; i < c->count; i++) {
		if (settle(c->disks[i]))
			keep_gone(c, c->disks[i]);
		durable |= atomic_load(&c->disks[i]->durable);
	}
	/* No chain on storage may name an image that is gone from there. */
	r = durable && c->gone ? io_syncfs(c->store->fleece_fd) : 0;
	if (r) {
		ff_warning("%s: cannot be made durable: %s", c->store->fleece_path, strerror(-r));
		keep_gone(c, NULL);
	}
	free_gone(c);
}

void drop_collect(struct ff_store *s, struct link *const *links, size_t count)
{
	struct collect c = {.store = s};

	if (begin(&c, links, count)) {
		ff_warning("no memory: images of dropped snapshots stay until the next mount");
		let_go(&c);
	} else if (stop_writers(s)) {
		hide(&c);
		let_writers(s);
		shrink_and_leave(&c);
	} else {
		let_go(&c);
	}
	finish(&c);
	for (struct fleece_dir *dir = s->hidden, *next; dir; dir = next) {
		next = dir->next_hidden;
		if (dir->links == 0)
			fleece_dir_release(s, dir);
	}
}
