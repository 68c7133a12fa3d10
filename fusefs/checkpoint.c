/*
 * snapshots/NAME/.checkpoint, an empty directory: there if the snapshot is a checkpoint. It is made
 * by mkdir, which frozen.c takes for what it means, and goes with the snapshot.
 */
#include "ff_util.h"
#include "fusefs/derived.h"

enum { SALT = 0xc4ec };

static int get_attr(struct fs *fs, struct node *node, struct handle *handle, struct stat *out)
{
	derived_stat(node->snap, ff_snap_root(node->snap), SALT, out);
	return 0;
}

static int no_entry(struct fs *fs, struct node *dir, const char *name, struct entry *out)
{
	return -ENOENT;
}

static int dir_item(struct handle *h, off_t off, struct dir_item *out)
{
	const struct ff_frozen *root = ff_snap_root(h->node->snap);
	struct stat st;

	if (off > 1)
		return -ENOENT;
	ff_frozen_stat(h->node->snap, root, &st);
	*out = (struct dir_item){off == 0 ? "." : "..",
	                         off == 0 ? derived_ino(h->node->snap, root, SALT) : st.st_ino,
	                         S_IFDIR, off + 1};
	return 0;
}

static const struct handle_ops dir_ops = {
    .item = dir_item,
    .sync = derived_nothing_to_sync,
    .free = derived_dir_free,
};

static int open_dir(struct fs *fs, struct node *node, struct handle **out)
{
	return derived_opendir(fs, node, &dir_ops, out);
}

static const struct node_ops checkpoint_node_ops = {
    .denied = -EROFS,
    .lasting = true,
    .lookup = no_entry,
    .getattr = get_attr,
    .opendir = open_dir,
};

int checkpoint_enter(struct fs *fs, struct ff_snap *snap, struct entry *out)
{
	const uint64_t key[2] = {(uintptr_t)snap, SALT};

	if (!ff_snap_is_checkpoint(snap))
		return -ENOENT;
	derived_stat(snap, ff_snap_root(snap), SALT, &out->st);
	return derived_enter(fs, &checkpoint_node_ops, snap, ff_snap_root(snap), key, NULL, NULL,
	                     out);
}
