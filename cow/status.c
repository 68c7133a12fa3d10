/*
 * Looks at snapshots and disks while everything goes on.
 *
 * A look holds its snapshot (snap.looks), so that it cannot be dropped: a drop waits, for looks are
 * short, unlike readers, which make it fail. So snap.dir, the links and the tree stay. Of a disk in
 * it a look reads atomics and what is constant; it takes snap.lock and snaps_lock, for a moment
 * each, and no lock that a writer takes. Who looks must not hold anything that a drop of the
 * snapshot waits for; the functions that are called by a look may block, and then the drop does.
 *
 * What was not touched since it was made is not looked at one by one: see stats.c. It adds to the
 * sums what status_prepare() found.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cow/engine.h"
#include "cow/io.h"
#include "cow/manifest.h"
#include "cow/reasons.h"
#include "ff_log.h"
#include "ff_util.h"

static const char lost_image[] = "its fleecing image is lost or damaged";
static const char out_of_reach[] = "it could not be frozen: its path is too long, or it is on a "
                                   "filesystem that is mounted below SOURCE, or a subvolume; "
                                   "exclude it";
static const char lost_manifest[] = "its manifest is lost or damaged";

/* When the snapshot was made: its manifest was written then, and never again. Where that cannot be
 * told: now. */
static struct timespec made_at(const struct ff_snap *snap)
{
	struct timespec now;
	struct statx sx;

	if (snap->dir && (io_statx(snap->dir->fd, MANIFEST_NAME, &sx) == 0 ||
	                  io_statx(snap->dir->fd, "", &sx) == 0))
		return (struct timespec){sx.stx_mtime.tv_sec, sx.stx_mtime.tv_nsec};
	clock_gettime(CLOCK_REALTIME, &now);
	return now;
}

void status_prepare(struct ff_snap *snap)
{
	const struct tree *t = snap->tree;

	snap->created = made_at(snap);
	for (uint32_t i = 0; i < t->count; i++) {
		snap->unfrozen += t->inodes[i].disk == TREE_UNFROZEN;
		if (S_ISREG(t->inodes[i].st.st_mode)) {
			snap->files++;
			snap->frozen_bytes += (uint64_t)t->inodes[i].st.st_size;
		}
	}
	for (size_t i = 0; i < snap->link_count; i++)
		if (snap->links[i])
			snap->first_allocated += ff_image_first_allocated(snap->links[i]->img);
		else
			snap->missing++;
}

/* --- paths --- */

/* The name that DIR has for an inode, or NULL. */
static const char *name_in(const struct ff_frozen *dir, uint32_t inode)
{
	for (uint32_t i = 0; i < dir->entry_count; i++)
		if (dir->entries[i].inode == inode)
			return dir->entries[i].name;
	return NULL;
}

/* NAME in DIR as a path below the root; malloc'd. */
static char *path_from(const struct tree *t, uint32_t dir, const char *name)
{
	char *path = strdup(name);

	while (path && dir != 0) {
		uint32_t parent = t->inodes[dir].parent;
		const char *dir_name = name_in(&t->inodes[parent], dir);
		ff_autofree char *rest = path;

		if (asprintf(&path, "%s/%s", dir_name ? dir_name : "?", rest) < 0)
			path = NULL;
		dir = parent;
	}
	return path;
}

char *status_path_in(const struct tree *t, const struct ff_frozen *dir, const struct ff_frozen *f)
{
	const char *name = name_in(dir, (uint32_t)(f - t->inodes));

	return path_from(t, (uint32_t)(dir - t->inodes), name ? name : "?");
}

/* By looking through all directories; malloc'd. */
static char *search_path(const struct tree *t, uint32_t inode)
{
	for (uint32_t i = 0; i < t->count; i++) {
		const char *name = name_in(&t->inodes[i], inode);

		if (name)
			return path_from(t, i, name);
	}
	return strdup("?");
}

/* A path of a disk: that of the walk, or the one that its image is named after, where it is not a
 * hash; malloc'd. */
static char *disk_path(const struct tree *t, uint32_t inode)
{
	const struct ff_frozen *f = &t->inodes[inode];
	const char *end = NULL;

	if (f->path)
		return strdup(f->path);
	for (const char *p = f->image; p && (p = strstr(p, "-fleece-")); p++)
		end = p;
	if (!end || strchr(f->image, '~'))
		return search_path(t, inode);
	return strndup(f->image, (size_t)(end - f->image));
}

/* --- looks --- */

static int look_begin(struct ff_snap *snap, unsigned *open_files, bool *checkpoint)
{
	FF_GUARD(&snap->lock);
	if (snap->dropped)
		return -ENOENT;
	snap->looks++;
	*open_files = snap->readers;
	*checkpoint = snap->checkpoint;
	return 0;
}

static void look_end(struct ff_snap *snap)
{
	FF_GUARD(&snap->lock);
	if (--snap->looks == 0)
		pthread_cond_broadcast(&snap->idle);
}

static void take_waits(const struct wait_sum *sum, struct ff_waits *out)
{
	*out = (struct ff_waits){sum->saves, sum->longest_us, stats_p99(sum)};
}

/* All but the path; adds the waits to ALL. */
static void disk_status(struct link *l, struct wait_sum *all, struct ff_disk_status *out)
{
	struct link_stats *s = atomic_load_explicit(&l->stats, memory_order_acquire);
	struct wait_sum own = {0};

	*out = (struct ff_disk_status){
	    .frozen_bytes = ff_image_desc(l->img)->size,
	    .preserved_bytes = ff_image_preserved(l->img),
	    .released_bytes = ff_image_released(l->img),
	    .allocated_bytes = ff_image_allocated(l->img),
	};
	if (s) {
		stats_sum(&own, &s->waits);
		if (all)
			stats_add(all, &own);
		out->read_bytes = atomic_load_explicit(&s->read_bytes, memory_order_relaxed);
		take_waits(&own, &out->waits);
	}
	if (atomic_load(&l->checkpoint))
		out->state = FF_VIEW_CHECKPOINT;
	if (atomic_load(&l->broken)) {
		out->state = atomic_load(&l->torn) ? FF_VIEW_TORN : FF_VIEW_BROKEN;
		out->reason = atomic_load(&l->why);
	}
}

struct look {
	struct ff_snap *snap;
	const struct ff_status_visitor *v;
	struct ff_snap_status sum;
	struct wait_sum waits;
};

/* Gives one disk away, and the snapshot what it is worst in. */
static int tell(struct look *k, uint32_t inode, struct ff_disk_status *st)
{
	ff_autofree char *path = NULL;

	if (st->state > k->sum.state) {
		k->sum.state = st->state;
		k->sum.reason = st->reason;
	}
	if (!k->v->disk)
		return 0;
	path = k->snap->tree->inodes[inode].disk == TREE_UNFROZEN
	           ? search_path(k->snap->tree, inode)
	           : disk_path(k->snap->tree, inode);
	if (!path)
		return -ENOMEM;
	st->path = path;
	return k->v->disk(k->v->ctx, st);
}

static int tell_notable(struct look *k)
{
	const struct tree *t = k->snap->tree;
	int r = 0;

	for (struct link *l = atomic_load(&k->snap->dir->notable); l && !r; l = l->next_notable) {
		struct ff_disk_status st;

		disk_status(l, &k->waits, &st);
		k->sum.read_bytes += st.read_bytes;
		k->sum.preserved_bytes += st.preserved_bytes;
		k->sum.released_bytes += st.released_bytes;
		k->sum.allocated_bytes += st.allocated_bytes - ff_image_first_allocated(l->img);
		/* of a damaged snapshot nothing else is known than what its images say */
		if (l->number < t->disk_count)
			r = tell(k, t->disks[l->number], &st);
	}
	return r;
}

static const char *why_missing(const struct ff_snap *snap)
{
	return snap->absent ? WHY_ABSENT : lost_image;
}

/* What has no image. */
static int tell_missing(struct look *k)
{
	const struct tree *t = k->snap->tree;
	size_t missing = k->snap->missing, unfrozen = k->snap->unfrozen;
	int r = 0;

	for (uint32_t i = 0; i < t->disk_count && missing && !r; i++)
		if (!k->snap->links[i]) {
			struct ff_disk_status st = {
			    .state = FF_VIEW_BROKEN,
			    .reason = why_missing(k->snap),
			    .frozen_bytes = (uint64_t)t->inodes[t->disks[i]].st.st_size};

			missing--;
			r = tell(k, t->disks[i], &st);
		}
	for (uint32_t i = 0; i < t->count && unfrozen && !r; i++)
		if (t->inodes[i].disk == TREE_UNFROZEN) {
			struct ff_disk_status st = {.state = FF_VIEW_BROKEN,
			                            .reason = out_of_reach};

			if (S_ISREG(t->inodes[i].st.st_mode))
				st.frozen_bytes = (uint64_t)t->inodes[i].st.st_size;
			unfrozen--;
			r = tell(k, i, &st);
		}
	return r;
}

static int look(struct ff_snap *snap, const char *name, unsigned open_files, bool checkpoint,
                const struct ff_status_visitor *v)
{
	struct look k = {
	    .snap = snap,
	    .v = v,
	    .sum =
	        {
	            .name = name,
	            .created = snap->created,
	            .durable = snap->durable,
	            .state = checkpoint ? FF_VIEW_CHECKPOINT : FF_VIEW_OK,
	            .open_files = open_files,
	            .files = snap->files,
	            .frozen_bytes = snap->frozen_bytes,
	            .allocated_bytes = snap->first_allocated,
	        },
	};
	int r;

	if (snap->damaged) {
		k.sum.state = FF_VIEW_BROKEN;
		k.sum.reason = lost_manifest;
	}
	r = tell_notable(&k);
	if (!r)
		r = tell_missing(&k);
	take_waits(&k.waits, &k.sum.waits);
	return r ? r : v->snap(v->ctx, &k.sum);
}

int ff_snap_visit(struct ff_snap *snap, const struct ff_status_visitor *v)
{
	ff_autofree char *name = NULL;
	unsigned open_files;
	bool checkpoint;
	int r = look_begin(snap, &open_files, &checkpoint);

	if (r)
		return r;
	pthread_mutex_lock(&snap->store->snaps_lock);
	name = strdup(snap->name);
	pthread_mutex_unlock(&snap->store->snaps_lock);
	r = name ? look(snap, name, open_files, checkpoint, v) : -ENOMEM;
	look_end(snap);
	return r;
}

/* References to all snapshots that there are, oldest first. */
static int all_snaps(struct ff_store *s, struct ff_snap ***out, size_t *count)
{
	size_t n = 0;

	FF_GUARD(&s->snaps_lock);
	for (struct ff_snap *snap = s->snaps; snap; snap = snap->next)
		n++;
	*out = calloc(n + 1, sizeof(struct ff_snap *));
	if (!*out)
		return -ENOMEM;
	*count = 0;
	for (struct ff_snap *snap = s->snaps; snap; snap = snap->next)
		(*out)[(*count)++] = ff_snap_ref(snap);
	return 0;
}

int ff_store_visit(struct ff_store *store, const struct ff_status_visitor *v)
{
	ff_autofree struct ff_snap **snaps = NULL;
	size_t count = 0;
	int r = all_snaps(store, &snaps, &count);

	for (size_t i = 0; i < count; i++) {
		int e = r ? r : ff_snap_visit(snaps[i], v);

		r = r ? r : e == -ENOENT ? 0 : e;
		ff_snap_put(snaps[i]);
	}
	return r;
}

struct timespec ff_snap_created(const struct ff_snap *snap)
{
	return snap->created;
}

int ff_frozen_status(struct ff_snap *snap, const struct ff_frozen *f, struct ff_disk_status *out)
{
	unsigned open_files;
	bool checkpoint;
	struct link *l;
	int r;

	if (!S_ISREG(f->st.st_mode))
		return -EINVAL;
	r = look_begin(snap, &open_files, &checkpoint);
	if (r)
		return r;
	l = f->disk < snap->link_count ? snap->links[f->disk] : NULL;
	*out = (struct ff_disk_status){.state = FF_VIEW_BROKEN,
	                               .reason = f->disk == TREE_UNFROZEN ? out_of_reach
	                                                                  : why_missing(snap),
	                               .frozen_bytes = (uint64_t)f->st.st_size};
	if (l)
		disk_status(l, NULL, out);
	look_end(snap);
	return 0;
}

void ff_store_status(struct ff_store *store, struct ff_store_status *out)
{
	struct wait_sum waits = {0};

	*out = (struct ff_store_status){.fleece_path = store->fleece_path};
	space_look(store, out);
	for (unsigned i = 0; i < STATS_SHARDS; i++) {
		struct store_stats *st = &store->stats[i];

		stats_sum(&waits, &st->waits);
		out->saved_bytes += atomic_load_explicit(&st->saved_bytes, memory_order_relaxed);
		out->failed += atomic_load_explicit(&st->failed, memory_order_relaxed);
	}
	take_waits(&waits, &out->waits);
}
