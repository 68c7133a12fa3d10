/*
 * snapshots/NAME/.raw: the frozen tree once more, with the disks as their guests see them.
 *
 * It has the directories of the snapshot, and of its files those that hold a disk in a format of
 * its own; everything else is not there. A file has the names, owner, rights, times and attributes
 * of the frozen one, the size of the disk, and a number of its own: of the file and of its
 * directory, for an image that has names in two of them may find other backing files in each.
 *
 * A lookup reads the head of a file and no more. How much room the disk takes costs a walk through
 * its tables, so it is counted when attributes are first asked for: the kernel is told to ask
 * (node_ops.costly), which it does in a thread of its own, and what was counted stays with the
 * node. Until then, and where it cannot be counted, a disk counts as full: never as empty, for
 * there are backup tools that would skip it.
 *
 * Who opens a disk must be allowed to read every file that it is made of; the kernel has checked
 * the first of them, with the attributes that it was told here.
 */
#include <linux/fuse.h>
#include <string.h>

#include "ff_util.h"
#include "fusefs/derived.h"
#include "fusefs/options.h"

enum { SALT_RAW_DIR = 4, SALT_RAW = 5 };

static const struct node_ops raw_dir_ops, raw_file_ops;

/* Of a node of a file. */
struct raw_made {
	const struct ff_frozen *dir;
	uint64_t size;
	pthread_mutex_t lock; /* the following */
	bool counted;
	uint64_t blocks;
};

struct raw_file {
	struct derived_file file;
	struct ff_raw *raw;
};

static void made_free(void *made)
{
	struct raw_made *m = made;

	pthread_mutex_destroy(&m->lock);
	free(m);
}

/* --- attributes --- */

static void dir_stat(const struct ff_snap *snap, const struct ff_frozen *dir, struct stat *out)
{
	ff_frozen_stat(snap, dir, out);
	out->st_ino = derived_ino(snap, dir, SALT_RAW_DIR);
}

static ino_t file_ino(const struct ff_snap *snap, const struct ff_frozen *dir,
                      const struct ff_frozen *f)
{
	return derived_ino(snap, f, (uint64_t)derived_ino(snap, dir, SALT_RAW));
}

static int raw_dir_getattr(struct fs *fs, struct node *node, struct handle *handle,
                           struct stat *out)
{
	dir_stat(node->snap, node->frozen, out);
	return 0;
}

static void file_stat(const struct node *node, struct stat *out)
{
	const struct raw_made *m = node->made;

	ff_frozen_stat(node->snap, node->frozen, out);
	out->st_ino = file_ino(node->snap, m->dir, node->frozen);
	out->st_nlink = 1;
	out->st_size = (off_t)m->size;
	out->st_blocks = (blkcnt_t)ff_div_up(m->size, 512);
}

enum { ROOTS = 4 };

/* By which names in images may lead into SOURCE. */
static const char *const *roots(const struct fs *fs, const char *out[ROOTS])
{
	out[0] = fs->mountpoint;
	out[1] = fs->options->mountpoint;
	out[2] = fs->options->source;
	out[3] = NULL;
	return out;
}

/* Counts the blocks, if that can be done. */
static void count(const struct fs *fs, const struct node *node, struct raw_made *m)
{
	const char *paths[ROOTS];
	const struct ff_raw_asker us = {.roots = roots(fs, paths)};
	uint64_t blocks;
	struct ff_raw *raw;

	if (ff_raw_open(node->snap, m->dir, node->frozen, &us, &raw) == 0) {
		if (ff_raw_blocks(raw, &blocks) == 0)
			m->blocks = blocks;
		ff_raw_close(raw);
	}
	m->counted = true;
}

static int raw_file_getattr(struct fs *fs, struct node *node, struct handle *handle,
                            struct stat *out)
{
	struct raw_made *m = node->made;

	file_stat(node, out);
	FF_GUARD(&m->lock);
	if (!m->counted) {
		m->blocks = (uint64_t)out->st_blocks;
		count(fs, node, m);
	}
	out->st_blocks = (blkcnt_t)m->blocks;
	return 0;
}

/* Those of the frozen inode: rights depend on them. */
static int raw_getxattr(struct fs *fs, struct node *node, const char *name, void *buf, size_t size,
                        size_t *len)
{
	return frozen_node_ops.getxattr(fs, node, name, buf, size, len);
}

static int raw_listxattr(struct fs *fs, struct node *node, char *buf, size_t size, size_t *len)
{
	return frozen_node_ops.listxattr(fs, node, buf, size, len);
}

/* --- an open disk --- */

static struct ff_raw *raw_of(struct handle *h)
{
	return FF_CONTAINER(h, struct raw_file, file.h)->raw;
}

static int raw_read(struct handle *h, void *buf, size_t size, off_t off, size_t *got)
{
	return ff_raw_read(raw_of(h), buf, size, off, got);
}

static int raw_seek(struct handle *h, off_t off, int whence, off_t *out)
{
	return ff_raw_seek(raw_of(h), off, whence, out);
}

static void raw_free(struct handle *h)
{
	struct raw_file *f = FF_CONTAINER(h, struct raw_file, file.h);

	if (f->raw) /* else it could not be opened */
		ff_raw_close(f->raw);
	derived_file_fini(&f->file);
	free(f);
}

static const struct handle_ops raw_file_handle_ops = {
    .read = raw_read,
    .seek = raw_seek,
    .sync = derived_nothing_to_sync,
    .flush = derived_flush,
    .free = raw_free,
};

/* Has the caller this right by the mode? Of one with a list of rights only its owner's part is
 * known. */
static bool may(void *ctx, const struct stat *st, bool acl, mode_t what)
{
	const struct caller *who = ctx;

	if (who->uid == 0)
		return true;
	if (who->uid == st->st_uid)
		return st->st_mode & what << 6;
	if (acl)
		return false;
	if (who->in_group(who->ask, st->st_gid))
		return st->st_mode & what << 3;
	return st->st_mode & what;
}

static int raw_open(struct fs *fs, struct node *node, int flags, const struct caller *who,
                    struct handle **out)
{
	const struct raw_made *m = node->made;
	const char *paths[ROOTS];
	struct ff_raw_asker asker = {roots(fs, paths), may, (void *)who};
	struct raw_file *f = calloc(1, sizeof *f);
	int r;

	if (!f)
		return -ENOMEM;
	r = derived_file_init(&f->file, &raw_file_handle_ops, fs, node, flags);
	if (r < 0) {
		free(f);
		return r;
	}
	r = ff_raw_open(node->snap, m->dir, node->frozen, &asker, &f->raw);
	if (r < 0) {
		handle_free(&f->file.h);
		return r;
	}
	*out = &f->file.h;
	return 0;
}

/* --- directories --- */

static int enter_dir(struct fs *fs, struct ff_snap *snap, const struct ff_frozen *dir,
                     struct entry *out)
{
	dir_stat(snap, dir, &out->st);
	return derived_enter(fs, &raw_dir_ops, snap, dir,
	                     (const uint64_t[]){(uintptr_t)snap, (uintptr_t)dir}, NULL, NULL, out);
}

static int enter_file(struct fs *fs, struct ff_snap *snap, const struct ff_frozen *dir,
                      const struct ff_frozen *f, struct entry *out)
{
	struct raw_made *m = calloc(1, sizeof *m);
	int r;

	if (!m)
		return -ENOMEM;
	m->dir = dir;
	pthread_mutex_init(&m->lock, NULL);
	r = ff_raw_size(snap, f, &m->size);
	if (r < 0) {
		made_free(m);
		return r;
	}
	r = derived_enter(fs, &raw_file_ops, snap, f,
	                  (const uint64_t[]){(uintptr_t)dir, (uintptr_t)f}, m, made_free, out);
	if (r == 0)
		file_stat(out->node, &out->st);
	return r;
}

static bool is_dir(const struct ff_snap *snap, const struct ff_frozen *f)
{
	struct stat st;

	ff_frozen_stat(snap, f, &st);
	return S_ISDIR(st.st_mode);
}

static int raw_lookup(struct fs *fs, struct node *dir, const char *name, struct entry *out)
{
	const struct ff_frozen *f;
	int r = ff_frozen_lookup(dir->snap, dir->frozen, name, &f);

	if (r < 0)
		return r;
	if (is_dir(dir->snap, f))
		return enter_dir(fs, dir->snap, f, out);
	return ff_raw_is(dir->snap, f) ? enter_file(fs, dir->snap, dir->frozen, f, out) : -ENOENT;
}

static int raw_item(struct handle *h, off_t off, struct dir_item *out)
{
	const struct node *n = h->node;
	const struct ff_frozen *f = n->frozen, *root = ff_snap_root(n->snap);
	struct stat st;
	int r;

	if (off < 2) {
		if (off == 1)
			f = ff_frozen_parent(n->snap, f);
		ff_frozen_stat(n->snap, f, &st);
		out->name = off == 0 ? "." : "..";
		out->ino = off == 1 && n->frozen == root ? st.st_ino
		                                         : derived_ino(n->snap, f, SALT_RAW_DIR);
		out->type = S_IFDIR;
		out->next = off + 1;
		return 0;
	}
	for (size_t i = (size_t)off - 2;; i++) {
		r = ff_frozen_entry(n->snap, n->frozen, i, &out->name, &f);
		if (r < 0)
			return r;
		out->next = (off_t)i + 3;
		if (is_dir(n->snap, f)) {
			out->type = S_IFDIR;
			out->ino = derived_ino(n->snap, f, SALT_RAW_DIR);
			return 0;
		}
		if (ff_raw_is(n->snap, f)) {
			out->type = S_IFREG;
			out->ino = file_ino(n->snap, n->frozen, f);
			return 0;
		}
	}
}

static const struct handle_ops raw_dir_handle_ops = {
    .item = raw_item,
    .sync = derived_nothing_to_sync,
    .free = derived_dir_free,
};

static int raw_opendir(struct fs *fs, struct node *node, struct handle **out)
{
	return derived_opendir(fs, node, &raw_dir_handle_ops, out);
}

static const struct node_ops raw_dir_ops = {
    .denied = -EROFS,
    .lasting = true,
    .lookup = raw_lookup,
    .getattr = raw_dir_getattr,
    .opendir = raw_opendir,
    .getxattr = raw_getxattr,
    .listxattr = raw_listxattr,
};

static const struct node_ops raw_file_ops = {
    .denied = -EROFS,
    .lasting = true,
    .costly = true,
    .getattr = raw_file_getattr,
    .open_as = raw_open,
    .getxattr = raw_getxattr,
    .listxattr = raw_listxattr,
};

int raw_enter(struct fs *fs, struct ff_snap *snap, struct entry *out)
{
	return enter_dir(fs, snap, ff_snap_root(snap), out);
}
