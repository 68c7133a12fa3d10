/*
 * Open files of the live tree.
 *
 * An open file has a descriptor of the source's file with the caller's access mode and the
 * engine's disk. Every change of bytes is one ff_disk_change() on these two; there is no other
 * write here. O_DIRECT is honoured down to the source: the kernel then sends the caller's own
 * reads and writes (FOPEN_DIRECT_IO), many at a time (FOPEN_PARALLEL_DIRECT_WRITES), and the
 * descriptor has the flag too. All other files go through the page cache, written through; but
 * where files may change behind the mount (fs->uncached), that too passes the callers' own reads
 * and writes on, and the source's page cache is the only one.
 *
 * O_APPEND is not set on the descriptor: the flags that come with each write say whether it
 * appends, and the engine finds the end of the file. O_SYNC and O_DSYNC are not set either: a sync
 * has to make the fleecing images durable before the source. The kernel sends one after each
 * cached write of such a file; after direct writes it relies on us.
 *
 * A struct live_file is constant after it was made, so that any number of threads may use it.
 */
#include "fusefs/live.h"

/* Somebody may remove the file between our finding that it exists and our opening it. */
enum { CREATE_TRIES = 16 };

#include <fcntl.h>
#include <linux/fuse.h>

#include "ff_util.h"
#include "fusefs/creds.h"
#include "fusefs/fuse_api.h"
#include "fusefs/inode.h"

/* Flags that the source's descriptor gets from the caller's open. */
#define PASSED_FLAGS (O_ACCMODE | O_DIRECT | O_NOATIME)

/* Most bytes that one copy_file_range of frozen data moves before it returns a short count. */
#define COPY_MAX ((size_t)16 << 20)

struct live_file {
	struct handle h;
	int fd;
	struct ff_disk *disk;
	bool writable;
	bool device;   /* of a block device */
	bool direct;   /* the source's descriptor has O_DIRECT */
	bool uncached; /* the kernel sends the caller's own reads and writes */
};

static const struct handle_ops live_file_ops;

static struct live_file *file_of(struct handle *h)
{
	return FF_CONTAINER(h, struct live_file, h);
}

static int truncate_disk(struct ff_disk *disk, int fd, off_t size)
{
	struct ff_change change = {.kind = FF_TRUNCATE, .fd = fd, .off = size};
	size_t done;

	return ff_disk_change(disk, &change, &done);
}

/* Opens the node's file again with the given flags. */
static int reopen(struct node *node, int flags)
{
	struct live_path path = live_path(node->fd);
	int fd = open(path.s, flags | O_CLOEXEC);

	if (fd < 0 && errno == EPERM && flags & O_NOATIME)
		fd = open(path.s, (flags & ~O_NOATIME) | O_CLOEXEC);
	return fd < 0 ? -errno : fd;
}

/* Makes the handle of FD, which is taken over also on failure. */
static int new_file(struct fs *fs, struct node *node, int fd, int flags, struct handle **out)
{
	struct live_file *f = calloc(1, sizeof *f);
	int r = f ? ff_disk_get(fs->store, fd, &f->disk) : -ENOMEM;

	if (r < 0) {
		free(f);
		close(fd);
		return r;
	}
	f->fd = fd;
	f->writable = (flags & O_ACCMODE) != O_RDONLY;
	f->direct = flags & O_DIRECT;
	f->device = node->ops == &device_node_ops;
	f->uncached = f->direct || fs->uncached || f->device;
	handle_init(&f->h, &live_file_ops, fs, node);
	if (f->uncached)
		f->h.open_flags = FOPEN_DIRECT_IO | FOPEN_PARALLEL_DIRECT_WRITES;
	*out = &f->h;
	return 0;
}

static void live_free(struct handle *h)
{
	struct live_file *f = file_of(h);

	ff_disk_put(f->disk);
	close(f->fd);
	free(f);
}

/* -errno unless the node is a regular file; nothing else may be opened. */
static int check_regular(struct node *node)
{
	struct stat st;

	if (fstatat(node->fd, "", &st, AT_EMPTY_PATH) < 0)
		return -errno;
	if (S_ISDIR(st.st_mode))
		return -EISDIR;
	if (S_ISLNK(st.st_mode))
		return -ELOOP;
	return S_ISREG(st.st_mode) ? 0 : -ENXIO;
}

int live_open(struct fs *fs, struct node *node, int flags, struct handle **out)
{
	static const struct attr_change to_nothing = {.which = FUSE_SET_ATTR_SIZE};
	bool device = node->ops == &device_node_ops;
	int fd, r = device ? 0 : check_regular(node);

	if (r < 0)
		return r;
	fd = device ? live_device_open(fs, node, flags & PASSED_FLAGS)
	            : reopen(node, flags & PASSED_FLAGS);
	if (fd < 0)
		return fd;
	r = new_file(fs, node, fd, flags, out);
	if (r < 0 || !(flags & O_TRUNC))
		return r;
	r = device ? node->ops->setattr(fs, node, NULL, &to_nothing)
	           : live_truncate(fs, node, *out, 0);
	if (r < 0)
		handle_free(*out);
	return r;
}

int live_truncate(struct fs *fs, struct node *node, struct handle *handle, off_t size)
{
	struct live_file *f = handle && handle->ops == &live_file_ops ? file_of(handle) : NULL;
	struct ff_disk *disk;
	int fd, r;

	if (f && f->writable)
		return truncate_disk(f->disk, f->fd, size);
	r = check_regular(node);
	if (r < 0)
		return r;
	fd = reopen(node, O_WRONLY);
	if (fd < 0)
		return fd;
	r = ff_disk_get(fs->store, fd, &disk);
	if (r == 0) {
		r = truncate_disk(disk, fd, size);
		ff_disk_put(disk);
	}
	close(fd);
	return r;
}

/* Enters the file just made as FD, and opens it. FD is taken over. */
static int open_new(struct fs *fs, int fd, int flags, struct entry *entry, struct handle **out)
{
	int path_fd = open(live_path(fd).s, O_PATH | O_CLOEXEC);
	int r = path_fd < 0 ? -errno : live_entry(fs, path_fd, entry);

	if (r < 0) {
		close(fd);
		return r;
	}
	r = new_file(fs, entry->node, fd, flags, out);
	if (r < 0)
		node_forget(fs->nodes, entry->node->id, 1);
	return r;
}

/* Makes a file as the caller; returns its descriptor. */
static int make_file(struct fs *fs, int dir_fd, const char *name, int flags, mode_t mode,
                     const struct caller *who)
{
	struct creds creds;
	int fd, r = 0;

	ff_store_change_begin(fs->store);
	creds_begin(fs, who, &creds);
	fd = openat(dir_fd, name, flags | O_NOFOLLOW | O_CLOEXEC, mode & 07777 & ~creds.mask);
	if (fd < 0)
		r = -errno;
	creds_end(&creds);
	if (fd >= 0 && !creds.ids)
		r = (flags & O_TMPFILE) == O_TMPFILE ? creds_give(&creds, fd, "")
		                                     : creds_give(&creds, dir_fd, name);
	ff_store_change_end(fs->store);
	if (r < 0 && fd >= 0)
		close(fd);
	return r < 0 ? r : fd;
}

/* The name appeared after the kernel had looked it up: this is an open of it. */
static int open_existing(struct fs *fs, struct node *dir, const char *name, int flags,
                         struct entry *entry, struct handle **out)
{
	int r = live_lookup(fs, dir, name, entry);

	if (r < 0)
		return r;
	r = live_open(fs, entry->node, flags, out);
	if (r == 0 && flags & O_TRUNC) {
		r = entry->node->ops->getattr(fs, entry->node, NULL, &entry->st);
		if (r < 0)
			handle_free(*out);
	}
	if (r < 0)
		node_forget(fs->nodes, entry->node->id, 1);
	return r;
}

int live_create(struct fs *fs, struct node *dir, const char *name, mode_t mode, int flags,
                const struct caller *who, struct entry *entry, struct handle **out)
{
	int r = live_may_change(fs, dir, name, true), tries = 0;

	if (r < 0)
		return r == -EEXIST && !(flags & O_EXCL) ? -EISDIR : r;
	do {
		int fd = make_file(fs, dir->fd, name, O_CREAT | O_EXCL | (flags & PASSED_FLAGS),
		                   mode, who);

		if (fd >= 0)
			return open_new(fs, fd, flags, entry, out);
		if (fd != -EEXIST || flags & O_EXCL)
			return fd;
		r = open_existing(fs, dir, name, flags, entry, out);
	} while (r == -ENOENT && ++tries < CREATE_TRIES);
	/* There, and not to be found, again and again: a name that the mount does not show. */
	return r == -ENOENT ? -EPERM : r;
}

int live_tmpfile(struct fs *fs, struct node *dir, mode_t mode, int flags, const struct caller *who,
                 struct entry *entry, struct handle **out)
{
	int keep = flags & (PASSED_FLAGS | O_EXCL);
	int fd = make_file(fs, dir->fd, ".", O_TMPFILE | keep, mode, who);

	return fd < 0 ? fd : open_new(fs, fd, flags, entry, out);
}

/* Is this the end because there is nothing any more? A guest would take it for zeros. */
static bool device_is_gone(struct handle *h)
{
	struct stat st;

	return ff_device_stat(h->fs->store, h->node->fd, &st) < 0 || st.st_size == 0;
}

static int live_read(struct handle *h, void *buf, size_t size, off_t off, size_t *got)
{
	struct live_file *f = file_of(h);
	size_t done = 0;

	while (done < size) {
		ssize_t n = pread(f->fd, (char *)buf + done, size - done, off + (off_t)done);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0 && done == 0)
			return -errno;
		if (n <= 0)
			break;
		done += n;
		if (f->direct) /* a short direct read is the end, or leaves an unaligned rest */
			break;
	}
	if (done == 0 && size > 0 && f->device && device_is_gone(h))
		return -EIO;
	*got = done;
	return 0;
}

static int live_write(struct handle *h, const void *buf, size_t size, off_t off, int flags,
                      const struct caller *who, size_t *done)
{
	struct live_file *f = file_of(h);
	struct ff_change change = {
	    .kind = FF_WRITE,
	    .fd = f->fd,
	    .off = off,
	    .len = size,
	    .buf = buf,
	    .append = flags & O_APPEND && who,
	};
	int r;

	if (!f->writable)
		return -EBADF;
	r = ff_disk_change(f->disk, &change, done);
	if (r == 0 && who)
		live_drop_setid(h->fs, h->node, who, false);
	if (r == 0 && f->uncached && flags & O_DSYNC)
		r = ff_disk_sync(f->disk, f->fd, (flags & O_SYNC) != O_SYNC);
	return r;
}

/* It has data from one end to the other. */
static int seek_device(struct handle *h, off_t off, int whence, off_t *out)
{
	struct stat st;
	int r = ff_device_stat(h->fs->store, h->node->fd, &st);

	if (r < 0)
		return r;
	if (whence != SEEK_DATA && whence != SEEK_HOLE)
		return -EINVAL;
	if (off < 0 || off >= st.st_size)
		return -ENXIO;
	*out = whence == SEEK_DATA ? off : st.st_size;
	return 0;
}

static int live_seek(struct handle *h, off_t off, int whence, off_t *out)
{
	off_t r;

	if (file_of(h)->device)
		return seek_device(h, off, whence, out);
	r = lseek(file_of(h)->fd, off, whence);

	if (r < 0)
		return -errno;
	*out = r;
	return 0;
}

static int live_fallocate(struct handle *h, int mode, off_t off, off_t len,
                          const struct caller *who)
{
	struct live_file *f = file_of(h);
	struct ff_change change = {
	    .kind = FF_FALLOCATE, .fd = f->fd, .off = off, .len = len, .mode = mode};
	size_t done;

	return f->writable ? ff_disk_change(f->disk, &change, &done) : -EBADF;
}

static int copy_in_memory(struct handle *in, off_t in_off, struct handle *out, off_t off,
                          size_t len, size_t *done)
{
	struct fs_thread *th = fs_thread(out->fs);
	size_t total = 0;

	if (!th)
		return -ENOMEM;
	len = FF_MIN(len, COPY_MAX);
	while (total < len) {
		size_t got = 0, put = 0;
		int r = in->ops->read(in, th->buf, FF_MIN(len - total, (size_t)FS_MAX_IO),
		                      in_off + (off_t)total, &got);

		if (r == 0 && got > 0)
			r = live_write(out, th->buf, got, off + (off_t)total, 0, NULL, &put);
		if (r < 0 && total == 0)
			return r;
		total += put;
		if (r < 0 || got == 0 || put < got)
			break;
	}
	*done = total;
	return 0;
}

static int live_copy(struct handle *in, off_t in_off, struct handle *out, off_t off, size_t len,
                     size_t *done)
{
	struct live_file *f = file_of(out);
	struct ff_change change = {.kind = FF_COPY, .fd = f->fd, .off = off, .in_off = in_off};

	if (!f->writable || !in->ops->read)
		return -EBADF;
	if (in->ops != &live_file_ops || f->device || file_of(in)->device)
		return copy_in_memory(in, in_off, out, off, len, done);
	change.len = FF_MIN(len, (size_t)1 << 30);
	change.in_fd = file_of(in)->fd;
	return ff_disk_change(f->disk, &change, done);
}

static int live_sync(struct handle *h, bool data_only)
{
	struct live_file *f = file_of(h);

	return ff_disk_sync(f->disk, f->fd, data_only);
}

static const struct handle_ops live_file_ops = {
    .read = live_read,
    .write = live_write,
    .seek = live_seek,
    .fallocate = live_fallocate,
    .copy = live_copy,
    .sync = live_sync,
    .free = live_free,
};
