/*
 * At mount: what FLEECE_DIR holds becomes snapshots and chains again.
 *
 *   1. Tell what is ours (recover_list.c), and read each directory of it: a snapshot; or an
 *      interrupted mkdir, which becomes .dropped-N; .dropped-N holds hidden images. A manifest that
 *      cannot be used, or is lost, makes a damaged snapshot: listed, EIO, removable, and its images
 *      still serve older ones. One that the last mount did not have (known.c) is listed as well,
 *      and its images are left out.
 *   2. Load the images. One that is missing or invalid is a hole in its disk's chain: every older
 *      view of that disk may have needed it and is broken.
 *   3. Sort them by disk and age into chains, and find each disk's inode in SOURCE
 *      (recover_find.c).
 *   4. Judge by how the last mount ended: changed behind the mount's back, torn by a power loss, or
 *      L2 entries that are not those of a clean end, breaks views, in the images' headers. What has
 *      no image gets a note (lost.c), lest it be taken for whole when the image comes back.
 *   5. Publish; begin the new session; collect what no snapshot needs; put backing names right.
 *      Not before: what is done here changes the disks that step 4 judges (their ctime).
 *
 * Nothing here trusts what it reads: a bad file costs its own snapshot or disk, with a line naming
 * it, and the rest mounts.
 */
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "cow/changes.h"
#include "cow/device.h"
#include "cow/io.h"
#include "cow/reasons.h"
#include "cow/needs.h"
#include "cow/recovery.h"
#include "ff_log.h"
#include "ff_util.h"

static int by_disk_and_age(const void *a, const void *b)
{
	const struct found *x = a, *y = b;
	int r = FF_ORDER(x->ino, y->ino);

	if (!r)
		r = FF_ORDER(x->btime_sec, y->btime_sec);
	if (!r)
		r = FF_ORDER(x->btime_nsec, y->btime_nsec);
	return r ? r : FF_ORDER(x->seq, y->seq);
}

/* The number of the image that follows in the chain according to the header of this one; 0: none
 * does, the source comes next. */
static uint64_t next_named(const struct found *f)
{
	const char *name = ff_image_backing(f->img), *base = strrchr(name, '/'), *at = NULL;
	char target[PATH_MAX];
	size_t n = strlen(name);

	if (!ff_image_backing_is_image(f->img))
		return 0;
	if (n > 8 && strcmp(name + n - 8, ".backing") == 0) { /* a symlink: see chain.c */
		if (io_readlinkat(f->dir->fd, base ? base + 1 : name, target, sizeof target))
			target[0] = '\0';
		name = target;
	}
	for (const char *p = name; (p = strstr(p, "-fleece-")); p++)
		at = p;
	return at ? strtoull(at + strlen("-fleece-"), NULL, 10) : UINT64_MAX;
}

/* Does the image name a next one that is not there? Its clusters are lost, then, to this view and
 * to all older ones, whatever else says that it is well. */
static bool names_a_lost_one(const struct found *f, size_t n, size_t i)
{
	uint64_t seq = next_named(&f[i]);

	for (size_t k = 0; k < n && seq; k++)
		if (f[k].img && f[k].seq == seq)
			return false;
	if (seq)
		ff_error("%s/%s: its backing file, the fleecing image %s, is lost", f[i].dir->name,
		         ff_image_path(f[i].img), ff_image_backing(f[i].img));
	return seq != 0;
}

/* Does the image not say any more what it said at a clean end? */
static bool is_damaged(struct recovery *rc, const struct ff_disk *d, const struct found *f)
{
	if (!f->img || rc->ending != ENDED_CLEAN ||
	    !session_entries_changed(rc->record, &d->id, f->seq, ff_image_loaded_hash(f->img)))
		return false;
	ff_error("%s/%s/%s: its L2 tables are not what they were when fleecefs ended: drop the "
	         "snapshot to get rid of the image",
	         rc->store->fleece_path, f->dir->name, ff_image_path(f->img));
	return true;
}

/* Was the image of a view not in its chain at a clean end, so that it knows nothing of what was
 * changed then? */
static bool is_stale(struct recovery *rc, const struct ff_disk *d, const struct found *f)
{
	/* A broken one is believed by nobody anyhow; older versions did not list it. */
	if (!f->snap || !f->img || ff_image_is_broken(f->img) || rc->ending != ENDED_CLEAN ||
	    session_image_known(rc->record, &d->id, f->seq))
		return false;
	ff_error("%s/%s/%s: it was not there when fleecefs ended, and lacks what was changed then",
	         rc->store->fleece_path, f->dir->name, ff_image_path(f->img));
	return true;
}

/* An image joins its chain, and a drop takes it out, by the name that the next older one bears.
 * What a drop has taken out, and had no time to delete, may name others that it did delete: that is
 * nobody's loss. */
static void tell_apart(struct found *f, size_t n)
{
	const struct found *last = NULL;

	for (size_t i = 0; i < n; i++) {
		f[i].apart = !f[i].snap && last && last->img && next_named(last) != f[i].seq;
		if (!f[i].apart)
			last = &f[i];
	}
}

/* Breaks what the ending of the last mount says, and what a lost image says. Newest first. */
static int judge(struct recovery *rc, struct ff_disk *d, struct found *f, size_t n, bool there,
                 const struct stat *st)
{
	bool torn = false, lost = false;
	int r = 0;

	tell_apart(f, n);
	if (!there)
		return chain_break_all(d, disk_is_device(d) ? WHY_NO_DEVICE : WHY_GONE);
	if (rc->ending == ENDED_CLEAN ? !session_unchanged(rc->record, &d->id, st)
	                              : st->st_ctim.tv_sec > rc->alive_until)
		return chain_break_all(d, WHY_CHANGED);
	for (size_t i = n; i-- > 0 && !r;) {
		torn |= !f[i].durable && rc->ending != ENDED_CLEAN && rc->ending != ENDED_KILLED;
		lost |= !f[i].img || is_stale(rc, d, &f[i]) ||
		        (!f[i].apart && (names_a_lost_one(f, n, i) || is_damaged(rc, d, &f[i])));
		if (!f[i].img || !(torn || lost))
			continue;
		for (struct link *l = atomic_load(&d->top); l; l = l->older)
			if (l->img == f[i].img && l->snap) {
				if (torn && !atomic_load(&l->broken)) {
					atomic_store(&l->torn, true);
					ff_image_set_torn(l->img);
				}
				r = chain_break_one(l, !torn                        ? WHY_LOST
				                       : rc->ending == ENDED_FAILED ? WHY_UNMOUNTED
				                                                    : WHY_POWER);
			}
	}
	return r;
}

/* Takes the image away if it cannot be on top of this one. */
static int does_not_fit(struct recovery *rc, struct link *top, struct found *f)
{
	const struct ff_image_desc *below = ff_image_desc(top->img), *desc = ff_image_desc(f->img);

	if (below->seq != desc->seq && below->cluster_size == desc->cluster_size)
		return 0;
	ff_error("%s/%s/%s does not fit its chain", rc->store->fleece_path, f->dir->name,
	         ff_image_path(f->img));
	ff_image_free(ff_take_ptr(&f->img));
	/* Which of the two has what was changed lately, nobody knows. */
	return below->seq == f->seq ? chain_break_one(top, WHY_TWICE) : 0;
}

/* Puts one image on top of its disk's chain. */
static int push(struct recovery *rc, struct ff_disk *d, struct found *f)
{
	struct link *top = atomic_load(&d->top), *l;
	int r = top ? does_not_fit(rc, top, f) : 0;

	if (r || !f->img)
		return r;
	l = link_new(d, f->dir, f->snap, f->img);
	if (!l)
		return -ENOMEM;
	f->linked = true;
	l->number = (uint32_t)f->number;
	l->older = top;
	if (top)
		atomic_store(&top->newer, l);
	atomic_store(&d->top, l);
	if (f->snap && f->snap->checkpoint)
		atomic_store(&l->checkpoint, true);
	chain_recount(d);
	space_adopt_link(l);
	if (f->durable)
		atomic_store(&d->durable, true);
	ff_image_park(l->img);
	if (f->snap)
		f->snap->links[f->number] = l;
	else
		rc->hidden[rc->hidden_count++] = l;
	return 0;
}

/* All the images of one disk, oldest first. */
static int take_disk(struct recovery *rc, struct found *f, size_t n)
{
	struct ff_store *s = rc->store;
	struct identity id = {s->source_dev, f->ino, f->btime_sec, f->btime_nsec};
	struct ff_image *newest = NULL;
	struct ff_disk *d;
	struct stat st, same;
	char kept[PATH_MAX];
	char *path;
	bool aside = false;
	int r;

	for (size_t i = 0; i < n; i++)
		newest = f[i].img ? f[i].img : newest;
	if (!newest)
		return 0; /* nothing of it is left: every view of it gives EIO */
	r = recovery_find_source(rc, newest, &id, &st, &path);
	if (r)
		return r;
	r = disk_find(s, &id, true, &d);
	if (r) {
		free(path);
		return r;
	}
	/* It may have a name aside and others as well. */
	if (path && aside_path(s, &id, kept, sizeof kept) == 0)
		r = recovery_is_at(s, kept, &id, &same, &aside);
	for (size_t i = 0; i < n && !r; i++)
		if (f[i].img)
			r = push(rc, d, &f[i]);
	pthread_mutex_lock(&s->paths);
	d->path = path;
	if (aside)
		aside_adopt(d);
	pthread_mutex_unlock(&s->paths);
	if (!r)
		r = judge(rc, d, f, n, path != NULL, &st);
	disk_unref(d);
	return r;
}

static int take_disks(struct recovery *rc)
{
	size_t first = 0, i;
	int r = 0;

	rc->hidden = calloc(rc->count + 1, sizeof(struct link *));
	if (!rc->hidden)
		return -ENOMEM;
	if (rc->count)
		qsort(rc->found, rc->count, sizeof *rc->found, by_disk_and_age);
	for (i = 1; i <= rc->count && !r; i++) {
		struct found *a = &rc->found[first], *b = &rc->found[i];

		rc->store->next_seq = FF_MAX(rc->store->next_seq, b[-1].seq + 1);
		if (i < rc->count && a->ino == b->ino && a->btime_sec == b->btime_sec &&
		    a->btime_nsec == b->btime_nsec)
			continue;
		r = take_disk(rc, a, i - first);
		first = i;
	}
	return r;
}

/* Is this the image of a visible snapshot that is in no chain? rc->found is in order. */
static bool is_missing(void *ctx, const struct identity *id, uint64_t seq)
{
	const struct recovery *rc = ctx;
	const struct found key = {id->ino, id->btime_sec, id->btime_nsec, seq};
	const struct found *f = rc->found, *end = f + rc->count;

	if (rc->count)
		f = bsearch(&key, f, rc->count, sizeof key, by_disk_and_age);
	while (f && f > rc->found && by_disk_and_age(f - 1, &key) == 0)
		f--;
	for (; f && f < end && by_disk_and_age(f, &key) == 0; f++)
		if (f->snap && !f->linked)
			return true;
	return false;
}

/* Images that are in no chain do not see what happens from here on: see lost.c. */
static int note_missing(struct recovery *rc)
{
	struct ff_store *s = rc->store;

	for (size_t i = 0; i < rc->count; i++) {
		const struct found *f = &rc->found[i];
		struct identity id = {s->source_dev, f->ino, f->btime_sec, f->btime_nsec};
		int r = f->snap && !f->linked ? lost_note(s, &id, f->seq, f->snap->durable) : 0;

		if (r) {
			ff_error("%s/%s: that the view of a disk (inode %llu) is lost can be "
			         "recorded neither there nor in %s/%s (%s): make the latter "
			         "writable, or move the former away",
			         s->fleece_path, f->dir->name, (unsigned long long)f->ino,
			         s->source_path, s->aside_path, strerror(-r));
			return r;
		}
	}
	return 0;
}

static int set_backings(struct ff_disk *d, void *ctx)
{
	struct link *newer = NULL;

	for (struct link *l = atomic_load(&d->top); l; newer = l, l = l->older)
		link_set_backing(l, newer);
	return 0;
}

/* What a checkpoint or a drop that was cut short did not come to: nobody asks what was said of the
 * zeros of a view that cannot be read. */
static int forget_zeros(struct ff_disk *d, void *ctx)
{
	for (struct link *l = atomic_load(&d->top); l; l = l->older)
		if (!l->snap || atomic_load(&l->checkpoint))
			zeros_drop(l);
	return 0;
}

/* The same of a checkpoint's data. */
static int sweep(struct ff_disk *d, void *ctx)
{
	needs_sweep(d);
	return 0;
}

/* Snapshots made by an option of a mount that was killed. */
static void drop_ephemeral(struct ff_store *s)
{
	for (;;) {
		struct ff_snap *snap;

		for (snap = s->snaps; snap && !snap->ephemeral; snap = snap->next)
			;
		if (!snap)
			return;
		ff_info("snapshot %s was to go with its mount, which was killed: dropped",
		        snap->name);
		if (drop_snap(snap))
			return;
	}
}

static bool has_snapshots(const struct names *names)
{
	for (size_t i = 0; i < names->count; i++)
		if (names->list[i].kind == DIR_SNAPSHOT)
			return true;
	return false;
}

int recover(struct ff_store *s)
{
	struct recovery rc = {.store = s};
	struct names names = {0};
	int r;

	FF_GUARD(&s->admin);
	r = recovery_list(s, &names);
	if (!r)
		r = session_check_source(s, has_snapshots(&names));
	if (!r)
		r = known_load(s, &rc.known);
	if (!r)
		r = recovery_load(&rc, &names);
	if (!r)
		r = session_ending(s, &rc.ending, &rc.record);
	if (!r)
		r = pulse_last(s, &rc.alive_until);
	for (struct ff_snap *snap = s->snaps; snap; snap = snap->next)
		s->next_seq = FF_MAX(s->next_seq, snap->seq + 1);
	if (!r)
		r = take_disks(&rc);
	if (!r)
		r = note_missing(&rc);
	if (!r)
		r = lost_recall(s, is_missing, &rc);
	if (!r)
		r = known_begin(s);
	if (!r)
		r = session_begin(s);
	if (!r) {
		disk_each(s, forget_zeros, NULL);
		drop_collect(s, rc.hidden, rc.hidden_count);
		disk_each(s, sweep, NULL);
		disk_each(s, set_backings, NULL);
		drop_ephemeral(s);
		aside_sweep(s);
	}
	for (struct ff_snap *snap = s->snaps; !r && snap; snap = snap->next)
		status_prepare(snap);
	for (size_t i = 0; i < rc.count; i++)
		if (rc.found[i].img && !rc.found[i].linked)
			ff_image_free(rc.found[i].img);
	for (size_t i = 0; i < names.count; i++)
		free(names.list[i].name);
	free(names.list);
	session_record_free(rc.record);
	known_free(rc.known);
	tree_free(rc.source);
	free(rc.hidden);
	free(rc.found);
	return r;
}
