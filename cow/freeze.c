/*
 * The freeze: mkdir snapshots/NAME.
 *
 *   0. Make the directory, with the mark that a snapshot is being made in it (making.c).
 *   1. Walk SOURCE while everything goes on, and make an empty fleecing image for each disk: the
 *      long part, of which no guest notices anything.
 *   2. Hold names and metadata still (writes to open disks go on), raise the epoch, walk again, and
 *      adopt the images that still fit; make those that are missing.
 *   3. Let the newest image of each chain name the new one as its backing file: it is empty, so
 *      whoever reads the chain reads the same as before.
 *   4. Close the barrier: no change of any source is under way. Look again at the disks that were
 *      changed since the epoch rose (size, times), and put each new link on top of its chain. Open.
 *      Where one has another size than its image, open without having flipped, make that image
 *      anew, and begin this step again: guests do not wait for fleece storage. At the last try, for
 *      a disk that grows all the time, it is made within, and not waited for beyond cbw-timeout.
 *   5. Write the manifest, atomically. With it the snapshot exists. Then the mark goes.
 *
 * A daemon killed before step 5 leaves a directory with the mark and without a manifest, which the
 * next mount treats as a dropped snapshot, since older ones may need what was saved there after
 * step 4.
 *
 * Where a view was promised to survive power loss, storage must never hold a chain that leads to an
 * image which it does not hold, nor lack an image that a write relied on: so the filesystem is
 * synced after step 1 (the long time, while everything goes on), before and after step 3, and when
 * step 4 has to make an image anew. What a view leaves in its source must not be lost either: so
 * SOURCE's filesystem is synced before step 5.
 *
 * The pause of a writer is step 4: two pointer writes for each disk, one fstat for each disk that
 * was being written. It does not depend on sizes.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "cow/freeze.h"
#include "cow/io.h"
#include "cow/late.h"
#include "cow/manifest.h"
#include "ff_log.h"
#include "ff_util.h"

enum { QUIET_MS = 10000, TRIES = 4 };

/* What was done so far is to outlive a loss of power, if anything is. */
static int make_durable(struct freeze *f)
{
	int r = f->durable ? io_syncfs(f->store->fleece_fd) : 0;

	if (r)
		ff_error("%s: cannot be made durable: %s", f->store->fleece_path, strerror(-r));
	return r;
}

/* Names a disk's place, for backing file names. */
static int set_path(struct ff_disk *d, const char *path)
{
	char *copy = strdup(path);

	if (!copy)
		return -ENOMEM;
	FF_GUARD(&d->store->paths);
	free(d->path);
	d->path = copy;
	return 0;
}

/* A disk's part of step 2. IMG: the spare that was adopted, or NULL; ours to keep. */
static int prepare_disk(struct freeze *f, uint32_t number, struct ff_image *img)
{
	struct ff_snap *snap = f->snap;
	struct ff_frozen *inode = &snap->tree->inodes[snap->tree->disks[number]];
	struct identity id = {f->store->source_dev, inode->st.st_ino, inode->btime_sec,
	                      inode->btime_nsec};
	struct ff_disk *d;
	struct link *l;
	int r = img ? 0 : freeze_make_image(f, inode, inode->image, &img);

	if (r)
		return r;
	r = disk_find(f->store, &id, true, &d);
	if (r) {
		freeze_drop_image(img);
		return r;
	}
	l = link_new(d, snap->dir, snap, img);
	disk_unref(d); /* the link has its own reference */
	if (!l) {
		freeze_drop_image(img);
		return -ENOMEM;
	}
	l->number = number;
	snap->links[number] = l;
	/* From here on the disk stays in the table. Who wrote to it and closed it before that,
	 * after the walk, has left no trace but this. */
	if (disk_was_forgotten(l->disk))
		atomic_store(&l->disk->touched, atomic_load(&f->store->epoch));
	if (f->store->cfg.durable)
		atomic_store(&l->disk->durable, true);
	if (atomic_load(&l->disk->has_aside))
		inode->st.st_nlink--;
	r = space_charge_link(l);
	if (!r)
		r = set_path(l->disk, freeze_disk_path(inode));
	if (!r)
		r = link_set_backing(l, NULL);
	ff_image_park(l->img);
	return r;
}

/* Step 3. */
static int extend_chains(struct freeze *f)
{
	int r = make_durable(f);

	for (size_t i = 0; i < f->snap->link_count && !r; i++) {
		struct link *l = f->snap->links[i], *top = atomic_load(&l->disk->top);

		if (top)
			r = link_set_backing(top, l);
	}
	return r ? r : make_durable(f);
}

/* Steps 2 and 3; names are held. */
static int prepare(struct freeze *f, unsigned *epoch)
{
	ff_autofree struct ff_image **images = NULL;
	struct ff_snap *snap = f->snap;
	int r;

	disk_forget_none(f->store);
	*epoch = atomic_fetch_add(&f->store->epoch, 1) + 1;
	r = freeze_walk(f, true, &snap->tree);
	if (r)
		return r;
	snap->links = calloc((size_t)snap->tree->disk_count + 1, sizeof(struct link *));
	images = calloc((size_t)snap->tree->disk_count + 1, sizeof *images);
	if (!snap->links || !images)
		return -ENOMEM;
	snap->link_count = snap->tree->disk_count;
	r = freeze_adopt(f, images);
	for (uint32_t i = 0; i < snap->tree->disk_count; i++) {
		if (!r)
			r = prepare_disk(f, i, images[i]);
		else if (images[i])
			freeze_drop_image(images[i]);
	}
	return r ? r : extend_chains(f);
}

/* The disk was changed after the walk looked at it. The barrier is closed. */
static int look_again(struct freeze *f, uint32_t number)
{
	struct ff_snap *snap = f->snap;
	struct ff_frozen *inode = &snap->tree->inodes[snap->tree->disks[number]];
	struct stat st;
	int r;

	disk_use(snap->links[number]->disk);
	r = disk_stat(snap->links[number]->disk, &st);
	disk_unuse(snap->links[number]->disk);
	if (r)
		return r;
	inode->st.st_size = st.st_size;
	inode->st.st_blocks = st.st_blocks;
	inode->st.st_mtim = st.st_mtim;
	inode->st.st_ctim = st.st_ctim;
	inode->st.st_mode = st.st_mode;
	return 0;
}

/* Has the disk another size than its image? */
static bool is_outgrown(const struct freeze *f, uint32_t number)
{
	const struct tree *t = f->snap->tree;

	return (uint64_t)t->inodes[t->disks[number]].st.st_size !=
	       ff_image_desc(f->snap->links[number]->img)->size;
}

/* Makes the image of a disk that has outgrown it anew. */
static int remake(struct freeze *f, uint32_t number)
{
	struct ff_snap *snap = f->snap;
	struct ff_frozen *inode = &snap->tree->inodes[snap->tree->disks[number]];
	struct link *l = snap->links[number], *top = atomic_load(&l->disk->top);
	struct ff_image *img;
	int r = 0;

	/* Nothing may name an image that is not there, should we be killed here. */
	if (top)
		r = link_set_backing(top, NULL);
	if (!r && top)
		r = make_durable(f);
	if (r)
		return r;
	space_release_link(l);
	ff_image_unlink(l->img);
	r = freeze_make_image(f, inode, inode->image, &img);
	if (r)
		return r;
	ff_image_free(l->img);
	l->img = img;
	l->clusters = ff_image_clusters(img);
	ff_image_set_budget(img, space_charge, f->store);
	r = space_charge_link(l);
	if (!r)
		r = link_set_backing(l, NULL);
	if (!r)
		r = make_durable(f);
	if (!r && top) {
		r = link_set_backing(top, l);
		if (!r)
			r = make_durable(f);
	}
	return r;
}

static int remake_outgrown(void *ctx)
{
	struct freeze *f = ctx;
	int r = 0;

	for (uint32_t i = 0; i < f->snap->tree->disk_count && !r; i++)
		if (is_outgrown(f, i)) {
			disk_use(f->snap->links[i]->disk);
			r = remake(f, i);
			disk_unuse(f->snap->links[i]->disk);
		}
	return r;
}

/* The same while guests wait: if it takes too long, they go on without the snapshot. */
static int remake_in_time(struct freeze *f)
{
	unsigned limit = f->store->cfg.cbw_timeout;
	int r;

	limit = limit ? limit : QUIET_MS / 1000;
	r = late_run(remake_outgrown, f, limit, &f->late);
	if (r == -EAGAIN)
		return remake_outgrown(f);
	if (r == -ETIMEDOUT)
		ff_error("%s: not made: a disk goes on growing, and %s has not answered for %u s "
		         "while guests waited",
		         f->snap->name, f->store->fleece_path, limit);
	return r;
}

/* What remake_in_time() has left running is waited for by nobody but us. */
static void settle(struct freeze *f)
{
	while (atomic_load(&f->late) > 0)
		nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
}

static void put_on_top(struct freeze *f)
{
	struct ff_snap *snap = f->snap;

	FF_GUARD(&f->store->chain);
	for (uint32_t i = 0; i < snap->tree->disk_count; i++) {
		struct link *l = snap->links[i], *top = atomic_load(&l->disk->top);

		l->older = top;
		if (top)
			atomic_store_explicit(&top->newer, l, memory_order_release);
		atomic_store(&l->disk->top, l);
		atomic_store(&l->disk->wanted, true);
	}
}

/* Within the closed barrier. LAST: no disk may stay outgrown. */
static int flip_closed(struct freeze *f, unsigned epoch, bool last, bool *outgrown)
{
	int r = 0;

	*outgrown = false;
	for (uint32_t i = 0; i < f->snap->tree->disk_count && !r; i++)
		if (atomic_load(&f->snap->links[i]->disk->touched) == epoch) {
			r = look_again(f, i);
			*outgrown |= is_outgrown(f, i);
		}
	if (!r && *outgrown && last) {
		r = remake_in_time(f);
		*outgrown = false;
	}
	if (!r && !*outgrown)
		put_on_top(f);
	return r;
}

/* Step 4. */
static int flip(struct freeze *f, unsigned epoch)
{
	bool outgrown = true;
	int r = 0;

	for (int tries = 1; !r && outgrown; tries++) {
		r = barrier_close(f->store->writes, QUIET_MS);
		if (r) {
			ff_error("%s: not made: a write to a disk has not ended for %d s",
			         f->snap->name, QUIET_MS / 1000);
			return r;
		}
		r = flip_closed(f, epoch, tries == TRIES, &outgrown);
		barrier_open(f->store->writes);
		if (!r && outgrown)
			r = remake_outgrown(f);
	}
	return r;
}

/* The image that an older one goes on naming, because its header cannot be written: taken away, the
 * next mount would take the older one's views for lost. It is empty, and leads to the source. So it
 * stays, and its directory is a dropped snapshot's. */
static bool must_stay(struct link *l)
{
	struct link *top = atomic_load(&l->disk->top);

	return top && link_set_backing(top, NULL) != 0;
}

/* Nothing was flipped: as if nothing had been. */
static void undo(struct freeze *f)
{
	struct ff_snap *snap = f->snap;
	ff_autofree bool *stays = calloc(snap->link_count + 1, sizeof *stays);
	bool any = false;

	freeze_drop_spares(f);
	for (size_t i = 0; i < snap->link_count; i++)
		if (snap->links[i] && must_stay(snap->links[i])) {
			any = true;
			if (stays)
				stays[i] = true;
		}
	any |= make_durable(f) != 0;
	for (size_t i = 0; i < snap->link_count; i++) {
		struct link *l = snap->links[i];

		if (!l)
			continue;
		space_release_link(l);
		if (!any || (stays && !stays[i] && !f->durable))
			ff_image_unlink(l->img);
		link_free(l);
	}
	fleece_dir_leave(f->store, ff_take_ptr(&snap->dir), any);
	snap_free_memory(snap);
}

static int publish(struct freeze *f, unsigned flags)
{
	struct ff_snap *snap = f->snap;
	struct manifest m = {
	    .seq = snap->seq,
	    .made = f->store->mount,
	    .ephemeral = flags & FF_FREEZE_EPHEMERAL,
	    .durable = f->store->cfg.durable,
	    .tree = snap->tree,
	};
	int r = f->durable ? io_syncfs(f->store->source_fd) : 0;

	if (r) {
		ff_error("%s: cannot be made durable: %s", f->store->source_path, strerror(-r));
		return r;
	}
	snap->made = m.made;
	snap->ephemeral = m.ephemeral;
	snap->durable = m.durable;
	r = manifest_write(snap->dir->fd, &m, m.durable);
	if (!r && m.durable)
		r = io_fsync(snap->dir->fd);
	if (r)
		ff_error("%s/%s: cannot write the manifest: %s", f->store->fleece_path, snap->name,
		         strerror(-r));
	return r ? r : making_done(f->store, snap->dir);
}

int ff_store_freeze(struct ff_store *store, const char *name, unsigned flags)
{
	struct freeze f = {.store = store};
	struct ff_snap *other;
	unsigned epoch;
	int r;

	if (!snap_name_valid(name))
		return -EINVAL;
	FF_GUARD(&store->admin);
	disk_make_room(store, NULL);
	guard_sweep(store);
	if (ff_snap_get(store, name, &other) == 0) {
		ff_snap_put(other);
		return -EEXIST;
	}
	f.snap = snap_new(store, name, store->next_seq);
	if (!f.snap)
		return -ENOMEM;
	r = making_begin(store, name, &f.snap->dir);
	if (r) {
		snap_free_memory(f.snap);
		return r;
	}
	store->next_seq++;
	r = freeze_make_spares(&f);
	if (!r)
		r = make_durable(&f);
	if (!r) {
		pthread_rwlock_wrlock(&store->names);
		r = prepare(&f, &epoch);
		if (!r)
			r = flip(&f, epoch);
		pthread_rwlock_unlock(&store->names);
		settle(&f);
	}
	if (r == -EMFILE)
		ff_error(
		    "%s: not made: raise the limit of open files (ulimit -n, or LimitNOFILE= of a "
		    "service)",
		    name);
	if (r) {
		undo(&f);
		free(f.spares);
		return r;
	}
	free(f.spares);
	r = publish(&f, flags);
	if (r && drop_unpublished(f.snap))
		return r;
	if (r)
		ff_error("%s/%s: was not made whole and cannot be removed either: it stays, and "
		         "takes space, until it is removed with rmdir",
		         store->fleece_path, name);
	status_prepare(f.snap);
	snap_publish(f.snap);
	return r;
}
