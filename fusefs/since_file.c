/*
 * The files of snapshots/NEW/.since/OLD/: images, and the changed ranges as sparse files.
 *
 * MADE of a node is a struct made_file, constant once made but for the list of what is open. An
 * open file keeps both snapshots (ff_since_open()).
 *
 * An increment leads to the image of its name in the directory beside its own that is called like
 * OLD: in a chain of copies the older one, but here, in .since/OLD/, itself. A reader of images
 * that is given it where it lies opens it as its own backing file, again and again, until it has no
 * descriptors left, which takes QEMU minutes. So one thread may have an image open a number of
 * times that only such a reader reaches, and then gets ELOOP, which says what is the matter.
 */
#include <fcntl.h>
#include <linux/fuse.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "ff_log.h"
#include "ff_util.h"
#include "fusefs/since.h"

enum { SALT_RANGES = 3, MOST_OF_A_THREAD = 16 };

static const struct node_ops since_image_ops, since_ranges_ops;

/* Node of a file. */
struct made_file {
	struct since_pair *pair; /* a reference */
	struct ff_since *since;
	uint64_t salt;
	off_t size;
	blkcnt_t blocks;
	pthread_mutex_t lock;      /* innermost */
	struct since_file *opened; /* lock; of an increment, those of known threads */
};

/* An open one. */
struct since_file {
	struct handle h;
	struct ff_since_file *file;
	pid_t thread;                    /* that opened it; 0: not known, or not of interest */
	struct since_file *next, **prev; /* made_file.lock */
};

static void made_free(void *p)
{
	struct made_file *m = p;

	since_pair_put(m->pair);
	if (m->since)
		ff_since_free(m->since);
	pthread_mutex_destroy(&m->lock);
	free(m);
}

static int file_getattr(struct fs *fs, struct node *node, struct handle *handle, struct stat *out)
{
	const struct made_file *m = node->made;

	derived_stat(node->snap, node->frozen, m->salt, out);
	out->st_size = m->size;
	out->st_blocks = m->blocks;
	return 0;
}

/* Where the disk was in OLD, for who keeps a chain of copies under names of his own; not listed. */
static int image_getxattr(struct fs *fs, struct node *node, const char *name, void *buf,
                          size_t size, size_t *len)
{
	const struct made_file *m = node->made;
	const char *path = ff_since_old_path(m->since);

	if (strcmp(name, "user.fleecefs.old_path") != 0)
		return derived_getxattr(fs, node, name, buf, size, len);
	if (!path)
		return -ENODATA;
	*len = strlen(path);
	if (size > 0 && *len > size)
		return -ERANGE;
	if (size > 0)
		memcpy(buf, path, *len);
	return 0;
}

uint64_t since_file_salt(const struct node *dir, const char *name, bool image)
{
	const struct since_pair *pair = dir->made;
	struct stat st;

	ff_frozen_stat(dir->snap, dir->frozen, &st);
	return since_hash(pair->salt + st.st_ino + (image ? 0 : SALT_RANGES), name);
}

static int make_file(struct fs *fs, struct node *dir, const struct since_found *what,
                     struct made_file **out)
{
	struct since_pair *pair = dir->made;
	struct ff_since_pair engine = since_engine_pair(fs, dir->snap, pair);
	struct made_file *m = calloc(1, sizeof *m);
	struct stat st;
	uint64_t space;
	int r;

	if (!m)
		return -ENOMEM;
	pthread_mutex_init(&m->lock, NULL);
	m->pair = since_pair_ref(pair);
	m->salt = since_file_salt(dir, what->name, what->image);
	r = ff_since_make(&engine, dir->frozen, what->stored, what->f, &m->since);
	if (r < 0) {
		made_free(m);
		return r == -ESTALE ? -ENOENT : r;
	}
	ff_frozen_stat(dir->snap, what->f, &st);
	m->size = what->image ? (off_t)ff_since_image_size(m->since) : st.st_size;
	space = what->image ? (uint64_t)m->size : ff_since_changed(m->since);
	m->blocks = (blkcnt_t)ff_div_up(space, 512);
	*out = m;
	return 0;
}

int since_file_enter(struct fs *fs, struct node *dir, const struct since_found *what,
                     struct entry *out)
{
	const struct node_ops *ops = what->image ? &since_image_ops : &since_ranges_ops;
	const struct since_pair *pair = dir->made;
	const uint64_t key[2] = {(uintptr_t)what->stored, pair->naming};
	struct made_file *m;
	int r = 0;

	out->timeout = FS_FROZEN_TIMEOUT;
	if (!node_find(fs->nodes, ops, key, &out->node)) {
		r = make_file(fs, dir, what, &m);
		if (r == 0)
			r = derived_enter(fs, ops, dir->snap, what->f, key, m, made_free, out);
	}
	return r < 0 ? r : file_getattr(fs, out->node, NULL, &out->st);
}

static struct since_file *file_of(struct handle *h)
{
	return FF_CONTAINER(h, struct since_file, h);
}

/* Adds F to what its thread has open, unless that is too much. */
static int list_opened(struct made_file *m, struct since_file *f)
{
	unsigned count = 0;

	FF_GUARD(&m->lock);
	for (const struct since_file *each = m->opened; each; each = each->next)
		count += each->thread == f->thread;
	if (count >= MOST_OF_A_THREAD)
		return -ELOOP;
	f->prev = &m->opened;
	f->next = m->opened;
	if (f->next)
		f->next->prev = &f->next;
	m->opened = f;
	return 0;
}

static void unlist_opened(struct made_file *m, struct since_file *f)
{
	FF_GUARD(&m->lock);
	if (!f->prev)
		return;
	*f->prev = f->next;
	if (f->next)
		f->next->prev = f->prev;
	f->prev = NULL;
}

/* A descriptor was closed; that nothing is open any more may come to be known much later. */
static void since_flush(struct handle *h)
{
	unlist_opened(h->node->made, file_of(h));
	ff_since_flushed(file_of(h)->file);
}

static void since_free(struct handle *h)
{
	unlist_opened(h->node->made, file_of(h));
	ff_since_close(file_of(h)->file);
	free(file_of(h));
}

static int image_read(struct handle *h, void *buf, size_t size, off_t off, size_t *got)
{
	return ff_since_read_image(file_of(h)->file, buf, size, off, got);
}

static int image_seek(struct handle *h, off_t off, int whence, off_t *out)
{
	const struct made_file *m = h->node->made;

	if (off < 0 || off >= m->size)
		return -ENXIO;
	*out = whence == SEEK_HOLE ? m->size : off;
	return 0;
}

static const struct handle_ops image_handle_ops = {
    .read = image_read,
    .seek = image_seek,
    .sync = derived_nothing_to_sync,
    .flush = since_flush,
    .free = since_free,
};

static int ranges_read(struct handle *h, void *buf, size_t size, off_t off, size_t *got)
{
	return ff_since_read_ranges(file_of(h)->file, buf, size, off, got);
}

static int ranges_seek(struct handle *h, off_t off, int whence, off_t *out)
{
	const struct made_file *m = h->node->made;
	struct ff_since_run run;
	int r = 0;

	if (whence != SEEK_DATA && whence != SEEK_HOLE)
		return -EINVAL;
	if (off < 0 || off >= m->size)
		return -ENXIO;
	while (off < m->size) {
		r = ff_since_next(file_of(h)->file, (uint64_t)off, false, &run);
		if (r < 0 || whence == SEEK_DATA || run.off > (uint64_t)off)
			break;
		off = (off_t)(run.off + run.len);
	}
	if (r < 0 && (r != -ENXIO || whence == SEEK_DATA))
		return r;
	*out = whence == SEEK_DATA ? (off_t)run.off : off;
	return 0;
}

static const struct handle_ops ranges_handle_ops = {
    .read = ranges_read,
    .seek = ranges_seek,
    .sync = derived_nothing_to_sync,
    .flush = since_flush,
    .free = since_free,
};

static int file_open(struct fs *fs, struct node *node, int flags, const struct caller *who,
                     struct handle **out)
{
	struct made_file *m = node->made;
	bool image = node->ops == &since_image_ops;
	struct since_file *f;
	int r = 0;

	if ((flags & O_ACCMODE) != O_RDONLY || flags & O_TRUNC)
		return -EROFS;
	f = calloc(1, sizeof *f);
	if (!f)
		return -ENOMEM;
	f->thread = who->thread;
	if (image && m->pair->old && f->thread)
		r = list_opened(m, f);
	if (r == -ELOOP)
		ff_warning(
		    "an increment against %s was opened as its own backing file: it leads to the "
		    "image beside a copy of it, so it has to be copied before it is used",
		    m->pair->name);
	if (r == 0)
		r = ff_since_open(m->since, &f->file);
	if (r < 0) {
		unlist_opened(m, f);
		free(f);
		return r;
	}
	handle_init(&f->h, image ? &image_handle_ops : &ranges_handle_ops, fs, node);
	f->h.open_flags = flags & O_DIRECT ? FOPEN_DIRECT_IO : FOPEN_KEEP_CACHE;
	*out = &f->h;
	return 0;
}

/* Two tables, though much alike, for a node's kind is told by its table. */
static const struct node_ops since_image_ops = {
    .denied = -EROFS,
    .lasting = true,
    .getattr = file_getattr,
    .open_as = file_open,
    .getxattr = image_getxattr,
    .listxattr = derived_listxattr,
};

static const struct node_ops since_ranges_ops = {
    .denied = -EROFS,
    .lasting = true,
    .getattr = file_getattr,
    .open_as = file_open,
    .getxattr = derived_getxattr,
    .listxattr = derived_listxattr,
};
