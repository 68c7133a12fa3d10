/*
 * The directory of snapshots: mkdir freezes, rmdir drops, rename renames, everything else is
 * refused. Its mode and owner say who may; they start as 0755 and the mounting user's, and a
 * change of them lasts as long as the mount (snapdir_attr, under snapdir_lock). Its times are those
 * of the set of snapshots.
 *
 * All changes of the set while the mount stands come through here, so the kernel's own cache of
 * names is right without short timeouts. A rename changes what st_ino the whole snapshot shows
 * (it is a function of the name): the kernel is told to forget the attributes that it has.
 *
 * mkdir and rmdir may take seconds, and rmdir waits for RELEASE requests that are on their way:
 * dispatch.c gives both a thread of their own.
 */
#include <fcntl.h>
#include <stdio.h>
#include <string.h>

#include "ff_util.h"
#include "fusefs/fs.h"
#include "fusefs/fuse_api.h"
#include "fusefs/inode.h"

struct name_list {
	char **names;
	size_t count, room;
};

struct snap_dir {
	struct handle h;
	struct name_list list; /* dir_lock of the handle */
};

static void list_free(struct name_list *l)
{
	for (size_t i = 0; i < l->count; i++)
		free(l->names[i]);
	free(l->names);
	*l = (struct name_list){0};
}

static int list_add(void *ctx, const char *name)
{
	struct name_list *l = ctx;

	if (l->count == l->room) {
		size_t room = l->room ? 2 * l->room : 16;
		char **names = reallocarray(l->names, room, sizeof *names);

		if (!names)
			return -ENOMEM;
		l->names = names;
		l->room = room;
	}
	l->names[l->count] = strdup(name);
	if (!l->names[l->count])
		return -ENOMEM;
	l->count++;
	return 0;
}

static int count_one(void *ctx, const char *name)
{
	++*(nlink_t *)ctx;
	return 0;
}

static int snapdir_getattr(struct fs *fs, struct node *node, struct handle *handle,
                           struct stat *out)
{
	struct timespec changed = ff_store_snaps_changed(fs->store);

	pthread_mutex_lock(&fs->snapdir_lock);
	*out = fs->snapdir_attr;
	pthread_mutex_unlock(&fs->snapdir_lock);
	out->st_nlink = 2;
	ff_snap_each(fs->store, count_one, &out->st_nlink);
	out->st_ino = FS_SNAPDIR_INO;
	out->st_blksize = 4096;
	out->st_atim = out->st_mtim = out->st_ctim = changed;
	return 0;
}

static int snapdir_setattr(struct fs *fs, struct node *node, struct handle *handle,
                           const struct attr_change *c)
{
	if (c->which &
	    ~(FUSE_SET_ATTR_MODE | FUSE_SET_ATTR_UID | FUSE_SET_ATTR_GID | FUSE_SET_ATTR_CTIME))
		return -EPERM;
	FF_GUARD(&fs->snapdir_lock);
	if (c->which & FUSE_SET_ATTR_MODE)
		fs->snapdir_attr.st_mode = S_IFDIR | (c->st.st_mode & 07777);
	if (c->which & FUSE_SET_ATTR_UID)
		fs->snapdir_attr.st_uid = c->st.st_uid;
	if (c->which & FUSE_SET_ATTR_GID)
		fs->snapdir_attr.st_gid = c->st.st_gid;
	return 0;
}

bool snapdir_allows(struct fs *fs, const struct caller *who)
{
	struct stat st;
	mode_t need;

	pthread_mutex_lock(&fs->snapdir_lock);
	st = fs->snapdir_attr;
	pthread_mutex_unlock(&fs->snapdir_lock);
	need = who->uid == st.st_uid                ? S_IWUSR | S_IXUSR
	       : who->in_group(who->ask, st.st_gid) ? S_IWGRP | S_IXGRP
	                                            : S_IWOTH | S_IXOTH;
	return who->uid == 0 || (st.st_mode & need) == need;
}

static int snapdir_lookup(struct fs *fs, struct node *dir, const char *name, struct entry *out)
{
	struct ff_snap *snap;
	int r = ff_snap_get(fs->store, name, &snap);

	if (r < 0)
		return r == -EINVAL ? -ENOENT : r;
	r = frozen_entry(fs, snap, ff_snap_root(snap), out);
	out->timeout = FS_LIVE_TIMEOUT;
	return r;
}

static int snapdir_mkdir(struct fs *fs, struct node *dir, const char *name, mode_t mode,
                         const struct caller *who)
{
	return ff_store_freeze(fs->store, name, 0);
}

/* The snapshot NAME is called NEW_NAME from now on, or (NULL) is no more. */
static void follow_ephemeral(struct fs *fs, const char *name, const char *new_name)
{
	FF_GUARD(&fs->snapdir_lock);
	if (!fs->ephemeral || strcmp(fs->ephemeral, name))
		return;
	free(fs->ephemeral);
	/* without memory for the name, the next mount drops it */
	fs->ephemeral = new_name ? strdup(new_name) : NULL;
}

static int snapdir_rmdir(struct fs *fs, struct node *dir, const char *name)
{
	int r = ff_store_drop(fs->store, name);

	if (r == 0)
		follow_ephemeral(fs, name, NULL);
	return r;
}

struct id_list {
	uint64_t *ids;
	size_t count, room;
};

static void collect_id(void *ctx, const struct node *node)
{
	struct id_list *l = ctx;

	if (l->count == l->room) {
		size_t room = l->room ? 2 * l->room : 64;
		uint64_t *ids = reallocarray(l->ids, room, sizeof *ids);

		if (!ids) /* old numbers show until they time out */
			return;
		l->ids = ids;
		l->room = room;
	}
	l->ids[l->count++] = node->id;
}

/* Has the kernel ask again for the attributes of everything in the snapshot NAME. */
static void forget_attributes(struct fs *fs, const char *name)
{
	struct id_list l = {0};
	struct ff_snap *snap;

	if (ff_snap_get(fs->store, name, &snap) < 0)
		return;
	nodes_of_snap(fs->nodes, snap, collect_id, &l);
	for (size_t i = 0; i < l.count; i++)
		fuse_lowlevel_notify_inval_inode(fs->se, l.ids[i], -1, 0);
	free(l.ids);
	ff_snap_put(snap);
}

static int snapdir_rename(struct fs *fs, struct node *dir, const char *name, struct node *new_dir,
                          const char *new_name, unsigned flags)
{
	int r;

	if (flags & ~(unsigned)RENAME_NOREPLACE)
		return -EINVAL;
	r = ff_store_rename_snap(fs->store, name, new_name);
	if (r == 0) {
		follow_ephemeral(fs, name, new_name);
		forget_attributes(fs, new_name);
	}
	return r;
}

/* The entries are those of the last time that offset 0 was read. */
static int snapdir_item(struct handle *h, off_t off, struct dir_item *out)
{
	struct fs *fs = h->fs;
	struct name_list *l = &FF_CONTAINER(h, struct snap_dir, h)->list;
	struct ff_snap *snap;
	struct stat st;
	int r;

	if (off == 0) {
		list_free(l);
		r = ff_snap_each(fs->store, list_add, l);
		if (r < 0)
			return r;
	}
	if (off < 2) {
		fstat(fs->source_fd, &st);
		*out = (struct dir_item){off == 0 ? "." : "..",
		                         off == 0 ? FS_SNAPDIR_INO : st.st_ino, S_IFDIR, off + 1};
		return 0;
	}
	for (size_t i = (size_t)off - 2; i < l->count; i++) {
		if (ff_snap_get(fs->store, l->names[i], &snap) < 0)
			continue;
		ff_frozen_stat(snap, ff_snap_root(snap), &st);
		ff_snap_put(snap);
		*out = (struct dir_item){l->names[i], st.st_ino, S_IFDIR, (off_t)i + 3};
		return 0;
	}
	return -ENOENT;
}

static int nothing_to_sync(struct handle *h, bool data_only)
{
	return 0;
}

static void snapdir_free(struct handle *h)
{
	struct snap_dir *d = FF_CONTAINER(h, struct snap_dir, h);

	list_free(&d->list);
	free(d);
}

static const struct handle_ops snapdir_handle_ops = {
    .item = snapdir_item,
    .sync = nothing_to_sync,
    .free = snapdir_free,
};

static int snapdir_opendir(struct fs *fs, struct node *node, struct handle **out)
{
	struct snap_dir *d = calloc(1, sizeof *d);

	if (!d)
		return -ENOMEM;
	handle_init(&d->h, &snapdir_handle_ops, fs, node);
	*out = &d->h;
	return 0;
}

const struct node_ops snapdir_node_ops = {
    .denied = -EPERM,
    .lookup = snapdir_lookup,
    .getattr = snapdir_getattr,
    .setattr = snapdir_setattr,
    .mkdir = snapdir_mkdir,
    .rmdir = snapdir_rmdir,
    .rename = snapdir_rename,
    .opendir = snapdir_opendir,
    .slow = true,
};
