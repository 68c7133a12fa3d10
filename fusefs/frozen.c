/*
 * The frozen tree: what ff_frozen_*() and ff_reader_*() tell, and EROFS for every change but two
 * that are commands: mkdir of .checkpoint in the root of a snapshot, and extended attributes. Who
 * may give them is who may make and drop snapshots. A file that consumes what is read of it can be
 * opened for writing, so that a hole can be punched: then that range is given up.
 *
 * A frozen inode never changes, so names and attributes may be cached for long and pages across
 * opens (FOPEN_KEEP_CACHE); the node ids of a later snapshot are others (see inode.c), so nothing
 * of that is ever shown for it. Data reaches the kernel by copy, never by a page of a live file.
 *
 * A node holds a reference to its snapshot, and an open regular file a reader, which keeps the
 * snapshot from being dropped. Reader, open directory and node are constant after they were made.
 */
#include <dirent.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "ff_util.h"
#include "fusefs/derived.h"
#include "fusefs/fs.h"
#include "fusefs/inode.h"

/* Begins the names of the extended attributes that are ours. */
#define OURS "user.fleecefs."

struct frozen_file {
	struct handle h;
	struct ff_reader *reader;
};

static struct frozen_file *file_of(struct handle *h)
{
	return FF_CONTAINER(h, struct frozen_file, h);
}

int frozen_entry(struct fs *fs, struct ff_snap *snap, const struct ff_frozen *f, struct entry *out)
{
	struct node proto = {
	    .ops = &frozen_node_ops,
	    .key = {(uintptr_t)snap, (uintptr_t)f},
	    .fd = -1,
	    .snap = snap,
	    .frozen = f,
	};

	ff_frozen_stat(snap, f, &out->st);
	out->timeout = FS_FROZEN_TIMEOUT;
	return node_enter(fs->nodes, &proto, &out->node);
}

static bool is_root(const struct node *node)
{
	return node->frozen == ff_snap_root(node->snap);
}

static int frozen_lookup(struct fs *fs, struct node *dir, const char *name, struct entry *out)
{
	const struct ff_frozen *f;
	int r = ff_frozen_lookup(dir->snap, dir->frozen, name, &f);

	if (r == -ENOENT && is_root(dir))
		return derived_lookup(fs, dir->snap, name, out);
	return r < 0 ? r : frozen_entry(fs, ff_snap_ref(dir->snap), f, out);
}

static int frozen_getattr(struct fs *fs, struct node *node, struct handle *handle, struct stat *out)
{
	ff_frozen_stat(node->snap, node->frozen, out);
	return 0;
}

static int frozen_readlink(struct fs *fs, struct node *node, char *buf, size_t size)
{
	const char *target = ff_frozen_readlink(node->snap, node->frozen);
	size_t len = target ? strlen(target) : 0;

	if (!target)
		return -EINVAL;
	if (len >= size)
		return -ENAMETOOLONG;
	memcpy(buf, target, len + 1);
	return 0;
}

static int frozen_read(struct handle *h, void *buf, size_t size, off_t off, size_t *got)
{
	int r = ff_reader_read(file_of(h)->reader, buf, size, off, got);

	if (r == 0)
		ff_reader_passed(file_of(h)->reader, off, *got);
	return r;
}

static int frozen_seek(struct handle *h, off_t off, int whence, off_t *out)
{
	return ff_reader_seek(file_of(h)->reader, off, whence, out);
}

/* A file that consumes may be opened for writing, so that a range of it can be given up: that is
 * all that can be done. */
static int frozen_write(struct handle *h, const void *buf, size_t size, off_t off, int flags,
                        const struct caller *who, size_t *done)
{
	return -EROFS;
}

static int frozen_copy(struct handle *in, off_t in_off, struct handle *out, off_t off, size_t len,
                       size_t *done)
{
	return -EROFS;
}

/* Would the range begin or end within a page? The kernel fills its part of such a page with zeros,
 * in its cache, once the hole is made; readers would take them for what was frozen. */
static bool cuts_a_page(const struct node *node, uint64_t off, uint64_t len)
{
	uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
	struct stat st;

	ff_frozen_stat(node->snap, node->frozen, &st);
	return off % page != 0 ||
	       ((off + len) % page != 0 && off + len < ff_round_up((uint64_t)st.st_size, page));
}

static int frozen_fallocate(struct handle *h, int mode, off_t off, off_t len,
                            const struct caller *who)
{
	if (mode != (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE) ||
	    !ff_frozen_consumes(h->node->snap, h->node->frozen))
		return -EROFS;
	if (!snapdir_allows(h->fs, who))
		return -EACCES;
	if (off < 0 || len <= 0 || cuts_a_page(h->node, (uint64_t)off, (uint64_t)len))
		return -EINVAL;
	return ff_reader_release(file_of(h)->reader, off, len);
}

static int nothing_to_sync(struct handle *h, bool data_only)
{
	return 0;
}

static void frozen_flush(struct handle *h)
{
	ff_reader_flushed(file_of(h)->reader);
}

static void frozen_free(struct handle *h)
{
	ff_reader_close(file_of(h)->reader);
	free(file_of(h));
}

static const struct handle_ops frozen_file_ops = {
    .read = frozen_read,
    .write = frozen_write,
    .seek = frozen_seek,
    .fallocate = frozen_fallocate,
    .copy = frozen_copy,
    .sync = nothing_to_sync,
    .flush = frozen_flush,
    .free = frozen_free,
};

static int frozen_open(struct fs *fs, struct node *node, int flags, struct handle **out)
{
	struct frozen_file *f;
	int r;

	bool writes = (flags & O_ACCMODE) != O_RDONLY;

	if (flags & O_TRUNC || (writes && !ff_frozen_consumes(node->snap, node->frozen)))
		return -EROFS;
	f = calloc(1, sizeof *f);
	if (!f)
		return -ENOMEM;
	r = ff_reader_open(node->snap, node->frozen, &f->reader);
	if (r < 0) {
		free(f);
		return r;
	}
	handle_init(&f->h, &frozen_file_ops, fs, node);
	/* no page of the cache must be made dirty, not by mmap either */
	f->h.open_flags = flags & O_DIRECT || writes ? FOPEN_DIRECT_IO : FOPEN_KEEP_CACHE;
	*out = &f->h;
	return 0;
}

static int dir_item(struct handle *h, off_t off, struct dir_item *out)
{
	const struct node *n = h->node;
	const struct ff_frozen *f = n->frozen, *root = ff_snap_root(n->snap);
	struct stat st;
	int r = 0;

	out->next = off + 1;
	if (off == 0) {
		out->name = ".";
	} else if (off == 1) {
		out->name = "..";
		f = ff_frozen_parent(n->snap, f);
	} else {
		r = ff_frozen_entry(n->snap, n->frozen, (size_t)off - 2, &out->name, &f);
	}
	if (r < 0)
		return r;
	ff_frozen_stat(n->snap, f, &st);
	out->ino = off == 1 && n->frozen == root ? FS_SNAPDIR_INO : st.st_ino;
	out->type = st.st_mode & S_IFMT;
	return 0;
}

static void dir_free(struct handle *h)
{
	free(h);
}

static const struct handle_ops frozen_dir_ops = {
    .item = dir_item,
    .sync = nothing_to_sync,
    .free = dir_free,
};

static int frozen_opendir(struct fs *fs, struct node *node, struct handle **out)
{
	struct handle *h = calloc(1, sizeof *h);

	if (!h)
		return -ENOMEM;
	handle_init(h, &frozen_dir_ops, fs, node);
	*out = h;
	return 0;
}

struct view {
	enum ff_view_state state;
	uint64_t preserved, released;
};

static int take_snap(void *ctx, const struct ff_snap_status *s)
{
	*(struct view *)ctx = (struct view){s->state, s->preserved_bytes, s->released_bytes};
	return 0;
}

/* An attribute that we make, by what follows OURS in its name. They are found by name and not
 * listed: a program that backs up attributes would else take them for part of the file, and find it
 * changed each time. */
static int own_xattr(struct node *n, const char *name, char *out, size_t size)
{
	static const char *const words[] = {"ok", "checkpoint", "broken", "torn"};
	struct timespec created = ff_snap_created(n->snap);
	struct ff_disk_status disk;
	struct view view;
	const struct ff_status_visitor visitor = {.snap = take_snap, .ctx = &view};
	int r;

	if (is_root(n)) {
		r = ff_snap_visit(n->snap, &visitor);
	} else {
		r = ff_frozen_status(n->snap, n->frozen, &disk);
		view = (struct view){disk.state, disk.preserved_bytes, disk.released_bytes};
	}
	if (r < 0)
		return r == -EINVAL ? -ENODATA : r;
	if (strcmp(name, "state") == 0)
		return snprintf(out, size, "%s", words[view.state]);
	if (strcmp(name, "created") == 0)
		return snprintf(out, size, "%lld.%09ld", (long long)created.tv_sec,
		                created.tv_nsec);
	if (strcmp(name, "consume") == 0 && !is_root(n))
		return snprintf(out, size, "%d", ff_frozen_consumes(n->snap, n->frozen));
	if (strcmp(name, "released") == 0)
		return snprintf(out, size, "%llu", (unsigned long long)view.released);
	if (strcmp(name, "preserved") == 0)
		return snprintf(out, size, "%llu", (unsigned long long)view.preserved);
	return -ENODATA;
}

static int frozen_getxattr(struct fs *fs, struct node *node, const char *name, void *buf,
                           size_t size, size_t *len)
{
	if (strncmp(name, OURS, strlen(OURS)) == 0) {
		char value[64];
		int r = own_xattr(node, name + strlen(OURS), value, sizeof value);

		if (r >= 0 && size > 0 && (size_t)r > size)
			return -ERANGE;
		if (r >= 0) {
			if (size > 0)
				memcpy(buf, value, (size_t)r);
			*len = (size_t)r;
			return 0;
		}
		if (r != -ENODATA)
			return r;
	}
	return ff_frozen_getxattr(node->snap, node->frozen, name, buf, size, len);
}

/* BUF has room for all that there may be. A name that ours hide is not listed either. */
static int frozen_listxattr(struct fs *fs, struct node *node, char *buf, size_t size, size_t *len)
{
	size_t kept = 0, n;
	int r = ff_frozen_listxattr(node->snap, node->frozen, buf, size, len);

	for (size_t i = 0; r == 0 && i < *len; i += n) {
		char value[64];

		n = strlen(buf + i) + 1;
		if (strncmp(buf + i, OURS, strlen(OURS)) == 0 &&
		    own_xattr(node, buf + i + strlen(OURS), value, sizeof value) >= 0)
			continue;
		memmove(buf + kept, buf + i, n);
		kept += n;
	}
	if (r == 0)
		*len = kept;
	return r;
}

/* The one directory that can be made. */
static int frozen_mkdir(struct fs *fs, struct node *dir, const char *name, mode_t mode,
                        const struct caller *who)
{
	if (!is_root(dir) || strcmp(name, CHECKPOINT_NAME) != 0)
		return -EROFS;
	return snapdir_allows(fs, who) ? ff_snap_checkpoint(dir->snap) : -EACCES;
}

static bool is_regular(const struct node *node)
{
	struct stat st;

	ff_frozen_stat(node->snap, node->frozen, &st);
	return S_ISREG(st.st_mode);
}

/* The attributes that are commands. */
static int frozen_setxattr(struct fs *fs, struct node *node, const char *name, const void *value,
                           size_t size, int flags, const struct caller *who)
{
	bool yes = size == 1 && *(const char *)value == '1';
	bool no = size == 1 && *(const char *)value == '0';
	bool checkpoint = strcmp(name, OURS "checkpoint") == 0 && is_root(node);
	bool consume = strcmp(name, OURS "consume") == 0 && (is_root(node) || is_regular(node));

	if (!checkpoint && !consume)
		return -EROFS;
	if (!snapdir_allows(fs, who))
		return -EACCES;
	if (!yes && !(no && consume))
		return -EINVAL;
	return checkpoint ? ff_snap_checkpoint(node->snap)
	                  : ff_snap_consume(node->snap, is_root(node) ? NULL : node->frozen, yes);
}

const struct node_ops frozen_node_ops = {
    .denied = -EROFS,
    .lasting = true,
    .lookup = frozen_lookup,
    .getattr = frozen_getattr,
    .readlink = frozen_readlink,
    .open = frozen_open,
    .opendir = frozen_opendir,
    .getxattr = frozen_getxattr,
    .listxattr = frozen_listxattr,
    .mkdir = frozen_mkdir,
    .setxattr = frozen_setxattr,
    .slow = true,
};
