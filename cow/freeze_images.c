/*
 * The images of a freeze: made beforehand, as spares, and adopted once names are held still.
 *
 * A spare belongs to one inode of one size, whose path its name follows from. Where one of these is
 * another by the time that names are held, it does not fit, and is removed before an image is made
 * that may have to stand where it stands.
 */
#include "cow/freeze.h"

#include <errno.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "cow/device.h"
#include "cow/io.h"
#include "cow/names.h"
#include "ff_log.h"
#include "ff_util.h"

enum { PLACEHOLDER_MAX = 1023 };

/* An image made in step 1, until it is adopted. */
struct spare {
	ino_t ino;
	uint64_t size;
	struct ff_image *img;
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

const char *freeze_disk_path(const struct ff_frozen *inode)
{
	return inode->device ? device_path(inode->device) : inode->path;
}

int freeze_make_image(struct freeze *f, const struct ff_frozen *inode, const char *path,
                      struct ff_image **out)
{
	ff_autofree char *backing = NULL;
	mode_t mode = inode->st.st_mode & 0600;
	struct ff_image_desc desc;
	int r = image_desc(f, inode, &desc);

	if (r)
		return r;
	backing = source_path(f->store, freeze_disk_path(inode));
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

	return FF_ORDER(x, y);
}

int freeze_walk(struct freeze *f, bool xattrs, struct tree **out)
{
	struct ff_store *s = f->store;
	struct tree_walk how = source_walk(s);

	how.xattrs = how.tells = xattrs;
	how.link = s->devices ? device_freeze_link : NULL;
	how.link_ctx = s;
	how.longest =
	    strlen(s->source_path) + 2 < PATH_MAX ? PATH_MAX - strlen(s->source_path) - 2 : 1;
	return tree_walk(&how, out);
}

int freeze_make_spares(struct freeze *f)
{
	struct tree *t;
	int r = freeze_walk(f, false, &t);

	if (r)
		return r;
	f->spares = calloc(t->disk_count + 1, sizeof *f->spares);
	if (!f->spares)
		r = -ENOMEM;
	for (uint32_t i = 0; i < t->disk_count && !r; i++) {
		struct ff_frozen *inode = &t->inodes[t->disks[i]];
		struct spare *spare = &f->spares[f->spare_count];
		ff_autofree char *path = names_image(inode->path, f->snap->seq);

		r = path ? freeze_make_image(f, inode, path, &spare->img) : -ENOMEM;
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

void freeze_drop_image(struct ff_image *img)
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

void freeze_drop_spares(struct freeze *f)
{
	for (size_t i = 0; i < f->spare_count; i++)
		if (f->spares[i].img)
			freeze_drop_image(ff_take_ptr(&f->spares[i].img));
}

int freeze_adopt(struct freeze *f, struct ff_image **images)
{
	struct tree *t = f->snap->tree;

	for (uint32_t i = 0; i < t->disk_count; i++) {
		struct ff_frozen *inode = &t->inodes[t->disks[i]];

		inode->image = names_image(inode->path, f->snap->seq);
		if (!inode->image)
			return -ENOMEM;
		images[i] = adopt(f, inode);
	}
	freeze_drop_spares(f);
	return 0;
}
