/*
 * snapshots/NEW/.since/OLD/: what changed between two snapshots, as plain files.
 *
 *   .since/              finds each snapshot older than NEW, and "-" for none; lists nothing
 *   .since/OLD/          lists the directories of NEW, and an image for each regular file
 *   .since/OLD/changes.json   is found in its root: see since_json.c
 *   .since/OLD/.../NAME  is found where it is not listed: the ranges that changed as a sparse file
 *
 * The engine says how what is made up is called and makes its bytes; none of it changes, but OLD's
 * name may come to mean another snapshot. So nodes are told apart by the naming (ff_snap_naming())
 * that was OLD's when they were looked up, the kernel asks for OLD anew each time, and all below
 * may be cached for long.
 *
 * A node's key is the address of its frozen name (of a directory or a file; of the snapshot, for
 * what stands for its root) and the naming. MADE is the struct since_pair of a directory; files are
 * in since_file.c. All is constant once made.
 */
#include "fusefs/since.h"

#include <stdlib.h>
#include <string.h>

#include "ff_util.h"
#include "fusefs/options.h"

enum { SALT_SINCE = 2 };

static const struct node_ops since_root_ops, since_dir_ops;

uint64_t since_hash(uint64_t seed, const char *s)
{
	uint64_t h = seed ^ UINT64_C(0xcbf29ce484222325);

	for (; *s; s++)
		h = (h ^ (unsigned char)*s) * UINT64_C(0x100000001b3);
	return h;
}

/* --- pairs --- */

struct since_pair *since_pair_ref(struct since_pair *pair)
{
	atomic_fetch_add(&pair->refs, 1);
	return pair;
}

void since_pair_put(void *p)
{
	struct since_pair *pair = p;

	if (atomic_fetch_sub(&pair->refs, 1) != 1)
		return;
	if (pair->old)
		ff_snap_put(pair->old);
	free(pair);
}

struct ff_since_pair since_engine_pair(const struct fs *fs, struct ff_snap *new,
                                       const struct since_pair *pair)
{
	return (struct ff_since_pair){
	    .new = new,
	    .old = pair->old,
	    .old_name = pair->name,
	    .backing = fs->options->backing,
	};
}

/* Of NEW and what is called NAME. */
static int pair_make(struct fs *fs, struct ff_snap *new, const char *name, struct since_pair **out)
{
	struct since_pair *pair = calloc(1, sizeof *pair);
	int r = 0;

	if (!pair)
		return -ENOMEM;
	atomic_init(&pair->refs, 1);
	pair->salt = since_hash(SALT_SINCE, name);
	if (strcmp(name, "-") == 0) {
		strcpy(pair->name, name);
	} else {
		r = ff_snap_get(fs->store, name, &pair->old);
		if (r == 0) {
			pair->naming = ff_snap_naming(pair->old, pair->name);
			/* renamed just now, or not older */
			if (strcmp(pair->name, name) != 0 || !ff_snap_older(pair->old, new))
				r = -ENOENT;
		}
	}
	if (r < 0)
		since_pair_put(pair);
	else
		*out = pair;
	return r < 0 ? -ENOENT : 0;
}

/* --- .since --- */

static int root_getattr(struct fs *fs, struct node *node, struct handle *handle, struct stat *out)
{
	derived_stat(node->snap, node->frozen, SALT_SINCE, out);
	return 0;
}

int since_enter(struct fs *fs, struct ff_snap *snap, struct entry *out)
{
	int r = derived_enter(fs, &since_root_ops, snap, ff_snap_root(snap),
	                      (const uint64_t[]){(uintptr_t)snap, 0}, NULL, NULL, out);

	return r < 0 ? r : root_getattr(fs, out->node, NULL, &out->st);
}

/* Enters the directory made up from F, which KEY stands for. */
static int enter_dir(struct fs *fs, struct ff_snap *snap, const struct ff_frozen *f,
                     const void *key, struct since_pair *pair, struct entry *out)
{
	int r = derived_enter(fs, &since_dir_ops, snap, f,
	                      (const uint64_t[]){(uintptr_t)key, pair->naming},
	                      since_pair_ref(pair), since_pair_put, out);

	if (r == 0)
		derived_stat(snap, f, pair->salt, &out->st);
	return r;
}

static int root_lookup(struct fs *fs, struct node *dir, const char *name, struct entry *out)
{
	struct since_pair *pair;
	int r = ff_snap_dropped(dir->snap) ? -ENOENT : pair_make(fs, dir->snap, name, &pair);

	if (r < 0)
		return r;
	r = enter_dir(fs, dir->snap, dir->frozen, dir->snap, pair, out);
	out->timeout = 0;
	since_pair_put(pair);
	return r;
}

static int root_item(struct handle *h, off_t off, struct dir_item *out)
{
	const struct node *n = h->node;
	struct stat st;

	if (off > 1)
		return -ENOENT;
	ff_frozen_stat(n->snap, n->frozen, &st);
	*out = (struct dir_item){
	    off == 0 ? "." : "..",
	    off == 0 ? derived_ino(n->snap, n->frozen, SALT_SINCE) : st.st_ino,
	    S_IFDIR,
	    off + 1,
	};
	return 0;
}

static const struct handle_ops root_handle_ops = {
    .item = root_item,
    .sync = derived_nothing_to_sync,
    .free = derived_dir_free,
};

static int root_opendir(struct fs *fs, struct node *node, struct handle **out)
{
	return derived_opendir(fs, node, &root_handle_ops, out);
}

/* --- directories --- */

static int dir_getattr(struct fs *fs, struct node *node, struct handle *handle, struct stat *out)
{
	const struct since_pair *pair = node->made;

	derived_stat(node->snap, node->frozen, pair->salt, out);
	return 0;
}

static int dir_lookup(struct fs *fs, struct node *dir, const char *name, struct entry *out)
{
	bool root = dir->frozen == ff_snap_root(dir->snap);
	struct since_found what = {.name = name};
	enum ff_since_kind kind;
	int r = ff_since_find(dir->snap, dir->frozen, name, &kind, &what.stored, &what.f);

	if (root && strcmp(name, SINCE_JSON) == 0 &&
	    (r == -ENOENT || (r == 0 && kind == FF_SINCE_RANGES)))
		return ff_snap_dropped(dir->snap) ? -ENOENT
		                                  : since_json_enter(fs, dir->snap, dir->made, out);
	if (r < 0)
		return r;
	if (kind == FF_SINCE_DIR)
		return enter_dir(fs, dir->snap, what.f, what.stored, dir->made, out);
	what.image = kind == FF_SINCE_IMAGE;
	return since_file_enter(fs, dir, &what, out);
}

struct since_dir {
	struct handle h;
	char name[FF_SINCE_NAME_MAX + 1]; /* of the entry that was given last; lock: dir_lock */
};

static int dir_item(struct handle *h, off_t off, struct dir_item *out)
{
	struct since_dir *d = FF_CONTAINER(h, struct since_dir, h);
	const struct node *n = h->node;
	const struct since_pair *pair = n->made;
	const struct ff_frozen *f = n->frozen;
	enum ff_since_kind kind = FF_SINCE_DIR;
	uint64_t salt = pair->salt;
	int r = 0;

	if (off == 1)
		f = ff_frozen_parent(n->snap, f);
	for (; off > 1; off++) {
		r = ff_since_entry(n->snap, n->frozen, (size_t)off - 2, d->name, &kind, &f);
		if (r < 0)
			return r;
		if (kind != FF_SINCE_NONE)
			break;
	}
	if (kind == FF_SINCE_IMAGE)
		salt = since_file_salt(n, d->name, true);
	else if (off == 1 && n->frozen == f)
		salt = SALT_SINCE;
	*out = (struct dir_item){
	    .name = off > 1 ? d->name
	            : off   ? ".."
	                    : ".",
	    .ino = derived_ino(n->snap, f, salt),
	    .type = kind == FF_SINCE_DIR ? S_IFDIR : S_IFREG,
	    .next = off + 1,
	};
	return 0;
}

static void dir_free(struct handle *h)
{
	free(FF_CONTAINER(h, struct since_dir, h));
}

static const struct handle_ops dir_handle_ops = {
    .item = dir_item,
    .sync = derived_nothing_to_sync,
    .free = dir_free,
};

static int dir_opendir(struct fs *fs, struct node *node, struct handle **out)
{
	struct since_dir *d = calloc(1, sizeof *d);

	if (!d)
		return -ENOMEM;
	handle_init(&d->h, &dir_handle_ops, fs, node);
	*out = &d->h;
	return 0;
}

/* --- tables: also where two are alike, for a node's kind is told by its table --- */

static const struct node_ops since_root_ops = {
    .denied = -EROFS,
    .lasting = true,
    .lookup = root_lookup,
    .getattr = root_getattr,
    .opendir = root_opendir,
    .getxattr = derived_getxattr,
    .listxattr = derived_listxattr,
};

static const struct node_ops since_dir_ops = {
    .denied = -EROFS,
    .lasting = true,
    .lookup = dir_lookup,
    .getattr = dir_getattr,
    .opendir = dir_opendir,
    .getxattr = derived_getxattr,
    .listxattr = derived_listxattr,
};
