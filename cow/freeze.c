/*
 * The freeze: mkdir snapshots/NAME.
 *
 *   1. Walk SOURCE while everything goes on, and make an empty fleecing image for each disk: the
 *      long part, of which no guest notices anything.
 *   2. Hold names and metadata still (writes to open disks go on), raise the epoch, walk again, and
 *      adopt the images that still fit; make those that are missing.
 *   3. Let the newest image of each chain name the new one as its backing file: it is empty, so
 *      whoever reads the chain reads the same as before.
 *   4. Close the barrier: no change of any source is under way. Look again at the disks that were
 *      changed since the epoch rose (size, times), and put each new link on top of its chain. Open.
 *   5. Write the manifest, atomically. With it the snapshot exists; a daemon killed before that
 *      leaves a directory without one, which the next mount treats as a dropped snapshot, since
 *      older ones may need what was saved there after step 4.
 *
 * Where a view was promised to survive power loss, storage must never hold a chain that leads to an
 * image which it does not hold, nor lack an image that a write relied on: so the filesystem is
 * synced after step 1 (the long time, while everything goes on), before and after step 3, and when
 * step 4 had to make an image anew. What a view leaves in its source must not be lost either: so
 * SOURCE's filesystem is synced before step 5.
 *
 * The pause of a writer is step 4: two pointer writes for each disk, one fstat for each disk that
 * was being written. It does not depend on sizes.
 */
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "cow/device.h"
#include "cow/engine.h"
#include "cow/io.h"
#include "cow/manifest.h"
#include "cow/names.h"
#include "ff_log.h"
#include "ff_util.h"

enum { QUIET_MS = 10000, PLACEHOLDER_MAX = 1023 };

/* An image made in step 1, until it is adopted. */
struct spare {
	ino_t ino;
	uint64_t size;
	struct ff_image *img;
};

struct freeze {
	struct ff_store *store;
	struct ff_snap *snap;
	struct spare *spares; /* sorted by ino */
	size_t spare_count;
	bool durable; /* some disk of it has views that are to survive power loss, or will have */
};

/* Makes the directories that lead to PATH below DIRFD. */
static int make_parents(int dirfd, const char *path)
{
	ff_autofree char *copy = strdup(path);

	if (!copy)
		return -ENOMEM;
	for (char *p = strchr(copy, '/'); p; p = strchr(p + 1, '/')) {
		int r;

		*p = '\0';
		r = io_mkdirat(dirfd, copy, 0700);
		if (r && r != -EEXIST)
			return r;
		*p = '/';
	}
	return 0;
}

/* What was done so far is to outlive a loss of power, if anything is. */
static int make_durable(struct freeze *f)
{
	int r = f->durable ? io_syncfs(f->store->fleece_fd) : 0;

	if (r)
		ff_error("%s: cannot be made durable: %s", f->store->fleece_path, strerror(-r));
	return r;
}

static int image_desc(struct freeze *f, const struct ff_frozen *inode, struct ff_image_desc *desc)
{
	struct identity id = {f->store->source_dev, inode->st.st_ino, inode->btime_sec,
	                      inode->btime_nsec};
	uint32_t cluster = f->store->cfg.cluster_size, fits;
	struct ff_disk *d;
	struct link *top;
	bool chained, durable = f->store->cfg.durable;
	int r;

	/* One chain, one cluster size: links are compared cluster by cluster. */
	chained = disk_find(f->store, &id, false, &d) == 0;
	if (chained) {
		top = atomic_load(&d->top);
		chained = top != NULL;
		if (top)
			cluster = ff_image_desc(top->img)->cluster_size;
		durable |= top && atomic_load(&d->durable);
		disk_unref(d);
	}
	r = ff_image_cluster_size((uint64_t)inode->st.st_size, cluster, &fits);
	if (!r && chained && fits != cluster)
		r = -EFBIG;
	*desc = (struct ff_image_desc){
	    .seq = f->snap->seq,
	    .size = (uint64_t)inode->st.st_size,
	    .disk_ino = inode->st.st_ino,
	    .disk_btime_sec = inode->btime_sec,
	    .disk_btime_nsec = inode->btime_nsec,
	    .cluster_size = fits,
	    .durable = durable,
	};
	f->durable |= durable;
	if (r)
		ff_error(
		    "%s: too large for a fleecing image with clusters of %u bytes; drop the older "
		    "snapshots of it, or exclude it",
		    inode->path, cluster);
	return r;
}

/* Where the disk is, as struct ff_disk has it. */
static const char *disk_path(const struct ff_frozen *inode)
{
	return inode->device ? device_path(inode->device) : inode->path;
}

static int make_image(struct freeze *f, const struct ff_frozen *inode, const char *path,
                      struct ff_image **out)
{
	ff_autofree char *backing = NULL;
	mode_t mode = inode->st.st_mode & 0600;
	struct ff_image_desc desc;
	int r = image_desc(f, inode, &desc);

	if (r)
		return r;
	backing = source_path(f->store, disk_path(inode));
	if (!backing)
		return -ENOMEM;
	if (geteuid() != 0)
		mode = 0600; /* we must open it again ourselves */
	/* A name too long for the header is put right by link_set_backing(). */
	r = ff_image_create(f->snap->dir->fd, path, mode, &desc,
	                    strlen(backing) <= PLACEHOLDER_MAX ? backing : "/", "raw", out);
	if (r == -ENOENT || r == -ENOTDIR) {
		r = make_parents(f->snap->dir->fd, path);
		if (!r)
			r = ff_image_create(f->snap->dir->fd, path, mode, &desc,
			                    strlen(backing) <= PLACEHOLDER_MAX ? backing : "/",
			                    "raw", out);
	}
	if (r)
		ff_error("%s/%s/%s: cannot make the fleecing image: %s", f->store->fleece_path,
		         f->snap->dir->name, path, strerror(-r));
	else
		ff_image_park(*out); /* a tree may have more files than we may have descriptors */
	return r;
}

static int by_ino(const void *a, const void *b)
{
	ino_t x = ((const struct spare *)a)->ino, y = ((const struct spare *)b)->ino;

	return x < y ? -1 : x > y;
}

static int walk(struct freeze *f, bool xattrs, struct tree **out)
{
	struct ff_store *s = f->store;
	struct tree_walk how = {
	    .source_fd = s->source_fd,
	    .dev = s->source_dev,
	    .hide_dev = s->fleece_dev,
	    .hide_ino = s->fleece_ino,
	    .hide_name = FF_HIDDEN_NAME,
	    .exclude = s->exclude,
	    .exclude_count = s->cfg.exclude_count,
	    .xattrs = xattrs,
	    .link = s->devices ? device_freeze_link : NULL,
	    .link_ctx = s,
	    .longest =
	        strlen(s->source_path) + 2 < PATH_MAX ? PATH_MAX - strlen(s->source_path) - 2 : 1,
	};

	return tree_walk(&how, out);
}

/* Step 1. */
static int make_spares(struct freeze *f)
{
	struct tree *t;
	int r = walk(f, false, &t);

	if (r)
		return r;
	f->spares = calloc(t->disk_count + 1, sizeof *f->spares);
	if (!f->spares)
		r = -ENOMEM;
	for (uint32_t i = 0; i < t->disk_count && !r; i++) {
		struct ff_frozen *inode = &t->inodes[t->disks[i]];
		struct spare *spare = &f->spares[f->spare_count];
		ff_autofree char *path = names_image(inode->path, f->snap->seq);

		r = path ? make_image(f, inode, path, &spare->img) : -ENOMEM;
		if (!r) {
			spare->ino = inode->st.st_ino;
			spare->size = (uint64_t)inode->st.st_size;
			f->spare_count++;
		}
	}
	if (f->spare_count)
		qsort(f->spares, f->spare_count, sizeof *f->spares, by_ino);
	tree_free(t);
	return r;
}

static void drop_image(struct ff_image *img)
{
	ff_image_unlink(img);
	ff_image_free(img);
}

/* The spare made for this inode if it still fits, its own to keep, else NULL. */
static struct ff_image *adopt(struct freeze *f, const struct ff_frozen *inode)
{
	struct spare key = {.ino = inode->st.st_ino}, *spare = NULL;
	const struct ff_image_desc *desc;

	if (f->spare_count)
		spare = bsearch(&key, f->spares, f->spare_count, sizeof key, by_ino);
	if (!spare || !spare->img)
		return NULL;
	desc = ff_image_desc(spare->img);
	if (spare->size == (uint64_t)inode->st.st_size &&
	    desc->disk_btime_sec == inode->btime_sec &&
	    desc->disk_btime_nsec == inode->btime_nsec &&
	    strcmp(ff_image_path(spare->img), inode->image) == 0)
		return ff_take_ptr(&spare->img);
	return NULL;
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
	int r = img ? 0 : make_image(f, inode, inode->image, &img);

	if (r)
		return r;
	r = disk_find(f->store, &id, true, &d);
	if (r) {
		drop_image(img);
		return r;
	}
	l = link_new(d, snap->dir, snap, img);
	disk_unref(d); /* the link has its own reference */
	if (!l) {
		drop_image(img);
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
		r = set_path(l->disk, disk_path(inode));
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

/* Takes the spares that fit, and removes the others before images are made where they stand. */
static int adopt_all(struct freeze *f, struct ff_image **images)
{
	struct tree *t = f->snap->tree;

	for (uint32_t i = 0; i < t->disk_count; i++) {
		struct ff_frozen *inode = &t->inodes[t->disks[i]];

		inode->image = names_image(inode->path, f->snap->seq);
		if (!inode->image)
			return -ENOMEM;
		images[i] = adopt(f, inode);
	}
	for (size_t i = 0; i < f->spare_count; i++)
		if (f->spares[i].img)
			drop_image(ff_take_ptr(&f->spares[i].img));
	return 0;
}

/* Steps 2 and 3; names are held. */
static int prepare(struct freeze *f, unsigned *epoch)
{
	ff_autofree struct ff_image **images = NULL;
	struct ff_snap *snap = f->snap;
	int r;

	disk_forget_none(f->store);
	*epoch = atomic_fetch_add(&f->store->epoch, 1) + 1;
	r = walk(f, true, &snap->tree);
	if (r)
		return r;
	snap->links = calloc((size_t)snap->tree->disk_count + 1, sizeof(struct link *));
	images = calloc((size_t)snap->tree->disk_count + 1, sizeof *images);
	if (!snap->links || !images)
		return -ENOMEM;
	snap->link_count = snap->tree->disk_count;
	r = adopt_all(f, images);
	for (uint32_t i = 0; i < snap->tree->disk_count; i++) {
		if (!r)
			r = prepare_disk(f, i, images[i]);
		else if (images[i])
			drop_image(images[i]);
	}
	return r ? r : extend_chains(f);
}

/* The disk was changed after the walk looked at it. The barrier is closed. */
static int look_again(struct freeze *f, uint32_t number)
{
	struct ff_snap *snap = f->snap;
	struct ff_frozen *inode = &snap->tree->inodes[snap->tree->disks[number]];
	struct link *l = snap->links[number], *top;
	struct ff_image *img;
	struct stat st;
	int r = disk_stat(l->disk, &st);

	if (r)
		return r;
	inode->st.st_size = st.st_size;
	inode->st.st_blocks = st.st_blocks;
	inode->st.st_mtim = st.st_mtim;
	inode->st.st_ctim = st.st_ctim;
	inode->st.st_mode = st.st_mode;
	if ((uint64_t)st.st_size == ff_image_desc(l->img)->size)
		return 0;
	/* Nothing may name an image that is not there, should we be killed here. */
	top = atomic_load(&l->disk->top);
	if (top)
		r = link_set_backing(top, NULL);
	if (!r && top)
		r = make_durable(f);
	if (r)
		return r;
	space_release_link(l);
	ff_image_unlink(l->img);
	r = make_image(f, inode, inode->image, &img);
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

/* Step 4. */
static int flip(struct freeze *f, unsigned epoch)
{
	struct ff_snap *snap = f->snap;
	uint32_t count = snap->tree->disk_count;
	int r = barrier_close(f->store->writes, QUIET_MS);

	if (r) {
		ff_error("%s: not made: a write to a disk has not ended for %d s", snap->name,
		         QUIET_MS / 1000);
		return r;
	}
	for (uint32_t i = 0; i < count && !r; i++)
		if (atomic_load(&snap->links[i]->disk->touched) == epoch) {
			disk_use(snap->links[i]->disk);
			r = look_again(f, i);
			disk_unuse(snap->links[i]->disk);
		}
	if (!r) {
		FF_GUARD(&f->store->chain);
		for (uint32_t i = 0; i < count; i++) {
			struct link *l = snap->links[i], *top = atomic_load(&l->disk->top);

			l->older = top;
			if (top)
				atomic_store_explicit(&top->newer, l, memory_order_release);
			atomic_store(&l->disk->top, l);
			atomic_store(&l->disk->wanted, true);
		}
	}
	barrier_open(f->store->writes);
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

	for (size_t i = 0; i < f->spare_count; i++)
		if (f->spares[i].img)
			drop_image(ff_take_ptr(&f->spares[i].img));
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
	if (any)
		fleece_dir_leave(f->store, ff_take_ptr(&snap->dir));
	else
		fleece_dir_release(f->store, ff_take_ptr(&snap->dir));
	snap_free_memory(snap);
}

static int make_dir(struct ff_store *s, const char *name, struct fleece_dir **out)
{
	struct fleece_dir *dir = calloc(1, sizeof *dir);
	int r = -ENOMEM;

	if (!dir || !(dir->name = strdup(name)))
		goto fail;
	r = io_mkdirat(s->fleece_fd, name, 0700);
	if (!r) {
		r = io_openat(s->fleece_fd, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW, 0, &dir->fd);
		if (!r) {
			*out = dir;
			return 0;
		}
		io_unlinkat(s->fleece_fd, name, AT_REMOVEDIR);
	}
	ff_error("%s/%s: cannot make the directory: %s%s", s->fleece_path, name, strerror(-r),
	         r == -EEXIST ? "; it belongs to no snapshot, move it away" : "");
fail:
	if (dir)
		free(dir->name);
	free(dir);
	return r;
}

static int publish(struct freeze *f, unsigned flags)
{
	struct ff_snap *snap = f->snap;
	struct manifest m = {
	    .seq = snap->seq,
	    .ephemeral = flags & FF_FREEZE_EPHEMERAL,
	    .durable = f->store->cfg.durable,
	    .tree = snap->tree,
	};
	int r = f->durable ? io_syncfs(f->store->source_fd) : 0;

	if (r) {
		ff_error("%s: cannot be made durable: %s", f->store->source_path, strerror(-r));
		return r;
	}
	snap->ephemeral = m.ephemeral;
	snap->durable = m.durable;
	r = manifest_write(snap->dir->fd, &m, m.durable);
	if (!r && m.durable)
		r = io_fsync(snap->dir->fd);
	if (r)
		ff_error("%s/%s: cannot write the manifest: %s", f->store->fleece_path, snap->name,
		         strerror(-r));
	return r;
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
	r = make_dir(store, name, &f.snap->dir);
	if (r) {
		snap_free_memory(f.snap);
		return r;
	}
	store->next_seq++;
	r = make_spares(&f);
	if (!r)
		r = make_durable(&f);
	if (!r) {
		pthread_rwlock_wrlock(&store->names);
		r = prepare(&f, &epoch);
		if (!r)
			r = flip(&f, epoch);
		pthread_rwlock_unlock(&store->names);
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
