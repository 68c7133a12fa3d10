/*
 * The chain of one disk: oldest link … newest link, then the live source.
 *
 * A cluster of a view is held by the first link, from the view's own towards newer ones, whose
 * image marks it; if none does, by the source. One rule more: a cluster that lies beyond the end of
 * the next newer link's disk is zeros, for the disk was shorter when that link was frozen, and what
 * was not zeros was saved when it shrank. It is also what any qcow2 reader makes of the chain.
 *
 * Readers walk `newer` without a lock: a link is published whole, with release, and freed only when
 * the barrier `reads` has shown that nobody stands on it. `older` is for those who change chains or
 * break views.
 *
 * A link is: visible (snap set) → hidden (its snapshot was dropped, an older one needs it) → taken
 * out. Its snapshot may become a checkpoint, whose views are never read again: see needs.c.
 * Independently a view may become broken, for good: first in memory, so that no reader goes on
 * after, then on storage (see lost.c), and only then may the guest's write proceed. So neither a
 * running nor a restarted daemon shows what the write destroyed.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <xxhash.h>

#include "cow/changes.h"
#include "cow/engine.h"
#include "cow/io.h"
#include "cow/names.h"
#include "cow/reasons.h"
#include "ff_log.h"
#include "ff_util.h"

struct link *link_new(struct ff_disk *d, struct fleece_dir *dir, struct ff_snap *snap,
                      struct ff_image *img)
{
	struct link *l = calloc(1, sizeof *l);

	if (!l)
		return NULL;
	disk_ref(d);
	l->disk = d;
	l->dir = dir;
	dir->links++;
	l->snap = snap;
	l->img = img;
	l->clusters = ff_image_clusters(img);
	if (ff_image_is_broken(img)) {
		atomic_init(&l->why, reason_text(ff_image_desc(img)->why));
		atomic_init(&l->torn, ff_image_desc(img)->torn);
		atomic_init(&l->broken, true);
		atomic_init(&l->recorded, true);
	}
	if (ff_image_is_broken(img) || ff_image_preserved(img) > 0 || ff_image_has_ledger(img))
		stats_notable(l);
	ff_image_set_budget(img, space_charge, d->store);
	return l;
}

void link_free(struct link *l)
{
	zeros_forget(l);
	ff_image_free(l->img);
	l->dir->links--;
	disk_unref(l->disk);
	free(atomic_load(&l->stats));
	free(l);
}

uint64_t chain_resolve(struct link *link, uint64_t first, uint64_t max, struct owner *out)
{
	struct link *l = link;

	out->link = NULL;
	for (;;) {
		struct link *newer;
		bool marked;

		max = ff_image_run(l->img, first, max, &marked);
		if (marked) {
			out->kind = OWNER_LINK;
			out->link = l;
			return max;
		}
		newer = atomic_load_explicit(&l->newer, memory_order_acquire);
		if (!newer) {
			out->kind = OWNER_LIVE;
			return max;
		}
		if (first >= newer->clusters) {
			out->kind = OWNER_ZERO;
			return max;
		}
		max = FF_MIN(max, newer->clusters - first);
		l = newer;
	}
}

/* Gives the clusters whose bits are set in BITS and in LEFT an owner, and takes them out of LEFT.
 * False: none is left. */
static bool settle(uint64_t *left, const uint64_t *bits, unsigned count, struct owner owner,
                   struct owner *out)
{
	uint64_t any = 0;

	for (unsigned w = 0; w * 64 < count; w++) {
		for (uint64_t hit = left[w] & bits[w]; hit; hit &= hit - 1)
			out[w * 64 + (unsigned)__builtin_ctzll(hit)] = owner;
		left[w] &= ~bits[w];
		any |= left[w];
	}
	return any != 0;
}

/* The bits of the clusters [from, count). */
static void bits_from(uint64_t from, unsigned count, uint64_t *bits)
{
	for (unsigned w = 0; w * 64 < count; w++)
		bits[w] = from >= w * 64 + 64 ? 0
		          : from <= w * 64    ? ~UINT64_C(0)
		                              : ~UINT64_C(0) << (from - w * 64);
	if (count % 64)
		bits[count / 64] &= (UINT64_C(1) << (count % 64)) - 1;
}

void chain_owners(struct link *link, uint64_t first, unsigned count, struct owner *out)
{
	uint64_t left[OWNERS_MAX / 64], bits[OWNERS_MAX / 64];
	struct link *l = link, *newer;

	bits_from(0, count, left);
	for (;; l = newer) {
		ff_image_marks(l->img, first, count, bits);
		if (!settle(left, bits, count, (struct owner){OWNER_LINK, l}, out))
			return;
		newer = atomic_load_explicit(&l->newer, memory_order_acquire);
		if (!newer)
			break;
		if (first + count <= newer->clusters)
			continue;
		bits_from(newer->clusters > first ? newer->clusters - first : 0, count, bits);
		if (!settle(left, bits, count, (struct owner){OWNER_ZERO, NULL}, out))
			return;
	}
	settle(left, left, count, (struct owner){OWNER_LIVE, NULL}, out);
}

/* Is some cluster of [first, first+count) needed from beyond L by the view of L, that is, is it
 * unmarked in every link from L to the newest, none of which is too short to have it? */
static bool view_needs(struct link *l, uint64_t first, uint64_t count)
{
	uint64_t end = FF_MIN(first + count, l->clusters);

	while (first < end) {
		struct owner o;
		uint64_t n = chain_resolve(l, first, end - first, &o);

		if (o.kind == OWNER_LIVE)
			return true;
		first += n;
	}
	return false;
}

/* What is lost: clusters that could not be saved, or ALL. */
struct loss {
	uint64_t first, count;
	bool all;
	bool untracked; /* nor recorded as changed */
	const char *why;
};

/* A hidden link has no view: nobody reads it for itself. */
static bool breaks(struct link *l, const struct loss *loss)
{
	if (!l->snap || atomic_load(&l->broken))
		return false;
	if (loss->all)
		return true;
	if (!loss->untracked && atomic_load(&l->checkpoint))
		return false;
	if (loss->untracked || !ff_image_has_ledger(l->img))
		return view_needs(l, loss->first, loss->count);
	/* what the view has given up it does not need */
	for (uint64_t at = loss->first, end = at + loss->count, n; at < end; at += n) {
		bool released;

		n = ff_image_released_run(l->img, at, end - at, &released);
		if (!released && view_needs(l, at, n))
			return true;
	}
	return false;
}

/* Marks views in memory, pins their links and announces that they are being recorded. Lock: chain.
 */
static size_t mark_broken(struct link *top, const struct loss *loss, struct link **out, size_t room)
{
	size_t n = 0;

	for (struct link *l = top; l && n < room; l = l->older)
		if (breaks(l, loss)) {
			atomic_fetch_add(&l->pins, 1);
			out[n++] = l;
		}
	if (n) {
		FF_GUARD(&out[0]->disk->claim_lock);
		out[0]->disk->recording += (unsigned)n;
	}
	for (size_t i = 0; i < n; i++) {
		atomic_store(&out[i]->why, loss->why);
		atomic_store(&out[i]->broken, true);
		stats_notable(out[i]);
	}
	if (n)
		chain_recount(out[0]->disk);
	return n;
}

/* Records that these views are broken. */
static int record_all(struct link *const *links, size_t n, bool hangs, const char *why)
{
	int r = 0;

	for (size_t i = 0; i < n; i++) {
		struct link *l = links[i];
		char dir[NAME_MAX + 1];
		int e;

		link_dir_name(l, dir);
		ff_error("%s/%s/%s: the frozen view is lost: %s; reading it gives EIO, rmdir of "
		         "the snapshot frees its space",
		         l->disk->store->fleece_path, dir, ff_image_path(l->img), why);
		e = lost_record(l, hangs);
		r = r ? r : e;
		atomic_fetch_sub(&l->pins, 1);
	}
	return r;
}

/* TOP NULL: from the newest. */
static int break_views(struct ff_disk *d, struct link *top, const struct loss *loss, bool hangs)
{
	struct link *links[32];
	size_t n;
	int r = 0, e;

	do {
		pthread_mutex_lock(&d->store->chain);
		/* A link that was taken out meanwhile has no neighbours any more. */
		n = top && top->out ? 0
		                    : mark_broken(top ? top : atomic_load(&d->top), loss, links,
		                                  FF_ARRAY_SIZE(links));
		pthread_mutex_unlock(&d->store->chain);
		e = record_all(links, n, hangs, loss->why);
		r = r ? r : e;
	} while (n == FF_ARRAY_SIZE(links));
	return r;
}

int chain_break_one(struct link *l, const char *why)
{
	const struct loss loss = {.all = true, .why = why};
	size_t n;

	pthread_mutex_lock(&l->disk->store->chain);
	n = breaks(l, &loss) ? mark_broken(l, &loss, &l, 1) : 0;
	pthread_mutex_unlock(&l->disk->store->chain);
	return record_all(&l, n, false, why);
}

int chain_break(struct link *top, uint64_t first, uint64_t count, bool untracked, int error)
{
	bool hangs = error == -ETIMEDOUT;
	const struct loss loss = {
	    .first = first,
	    .count = count,
	    .untracked = untracked,
	    .why = hangs ? WHY_TIMEOUT : reason_of_error(error),
	};

	return break_views(top->disk, top, &loss, hangs);
}

int chain_break_all(struct ff_disk *d, const char *why)
{
	const struct loss loss = {.all = true, .why = why};

	return break_views(d, NULL, &loss, false);
}

bool chain_wanted(struct ff_disk *d)
{
	return atomic_load(&d->wanted);
}

void chain_recount(struct ff_disk *d)
{
	bool wanted = false, lean = false;

	for (struct link *l = atomic_load(&d->top); l; l = l->older) {
		wanted |= l->snap && !atomic_load(&l->broken);
		lean |= l->snap && (atomic_load(&l->checkpoint) || ff_image_has_ledger(l->img));
	}
	atomic_store(&d->wanted, wanted);
	atomic_store(&d->lean, lean);
}

/* A symlink beside the snapshot's images, for a name that a qcow2 header has no room for. */
static int backing_by_symlink(struct link *l, const char *target, const char *format)
{
	char link_name[32], name[1024];
	const char *path = ff_image_path(l->img);
	size_t used = 0;
	int r;

	snprintf(link_name, sizeof link_name, "~%016llx.backing",
	         (unsigned long long)XXH3_64bits(path, strlen(path)));
	r = io_unlinkat(l->dir->fd, link_name, 0);
	if (r && r != -ENOENT)
		return r;
	r = io_symlinkat(target, l->dir->fd, link_name);
	if (r)
		return r;
	for (const char *p = path; *p; p++)
		if (*p == '/') {
			if (used + 4 + sizeof link_name > sizeof name)
				return -ENAMETOOLONG;
			used += (size_t)sprintf(name + used, "../");
		}
	snprintf(name + used, sizeof name - used, "%s", link_name);
	return ff_image_set_backing(l->img, name, format);
}

char *source_path(const struct ff_store *s, const char *path)
{
	char *out;

	if (path[0] == '/')
		return strdup(path);
	return asprintf(&out, "%s/%s", s->source_path, path) < 0 ? NULL : out;
}

/* The absolute path of what follows L in the chain; malloc'd. */
static char *absolute_target(struct link *l, struct link *newer, const char *path)
{
	struct ff_store *s = l->disk->store;
	char *out;
	int n;

	if (newer)
		n = asprintf(&out, "%s/%s/%s", s->fleece_path, newer->dir->name,
		             ff_image_path(newer->img));
	else
		return source_path(s, path);
	return n < 0 ? NULL : out;
}

static int set_backing(struct link *l, struct link *newer, const char *path)
{
	ff_autofree char *target = absolute_target(l, newer, path), *relative = NULL;
	const char *format = newer ? "qcow2" : "raw", *name = target;
	int r;

	if (newer) {
		relative = names_backing_image(ff_image_path(l->img), newer->dir->name,
		                               ff_image_path(newer->img));
		name = relative;
	}
	if (!target || !name)
		return -ENOMEM;
	r = ff_image_set_backing(l->img, name, format);
	if (r == -ENAMETOOLONG)
		r = backing_by_symlink(l, target, format);
	if (r) {
		char dir[NAME_MAX + 1];

		link_dir_name(l, dir);
		ff_error("%s/%s/%s: cannot record its backing file: %s",
		         l->disk->store->fleece_path, dir, ff_image_path(l->img), strerror(-r));
	}
	return r;
}

void link_dir_name(const struct link *l, char out[NAME_MAX + 1])
{
	FF_GUARD(&l->disk->store->snaps_lock);
	snprintf(out, NAME_MAX + 1, "%s", l->dir->name);
}

void link_pin(struct link *l)
{
	FF_GUARD(&l->disk->store->chain);
	atomic_fetch_add(&l->pins, 1);
}

int link_set_backing(struct link *l, struct link *newer)
{
	struct ff_disk *d = l->disk;
	int r = 0;

	disk_use(d);
	link_pin(l);
	if (newer) {
		r = set_backing(l, newer, NULL);
	} else {
		FF_GUARD(&d->store->paths);
		if (d->path)
			r = set_backing(l, NULL, d->path);
	}
	atomic_fetch_sub(&l->pins, 1);
	disk_unuse(d);
	return r;
}

void disk_repath(struct ff_disk *d)
{
	struct link *top = atomic_load(&d->top);

	if (!top || !d->path)
		return;
	disk_use(d);
	set_backing(top, NULL, d->path);
	disk_unuse(d);
}
