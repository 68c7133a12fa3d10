/*
 * The descriptors of a disk: opened when first needed, closed when they are scarce.
 *
 * path_fd pins the inode from the first handle on; the three to read with are opened
 * from it, or by the disk's path, when old data or a frozen view is first read. They stay until the
 * disk goes, and so do those of its images, as long as descriptors are plenty. New ones have the
 * lowest free number: one whose number is above half of what the process may have is a sign that
 * they are not, and is closed when nobody uses the disk. So what is kept for disks and images that
 * nobody uses is at most half of the limit, whatever their number. Of a disk that is in use, the
 * newest image is what its writers need; when descriptors are scarce, the others are closed as
 * well, by the next freeze, drop or reader that ends: no reader is in the barrier `reads` then, and
 * whoever else uses an image that is not the newest has its link pinned.
 */
#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "cow/device.h"
#include "cow/engine.h"
#include "cow/io.h"
#include "ff_log.h"
#include "ff_util.h"

void disk_use(struct ff_disk *d)
{
	FF_GUARD(&d->store->disks_lock);
	d->users++;
}

enum { CLOSED_AT_ONCE = 64, READS_WAIT_MS = 200 };

static void take_high(struct ff_store *s, _Atomic int *fd, int *out, size_t *n)
{
	if (atomic_load(fd) >= s->many_fds && *n < CLOSED_AT_ONCE)
		out[(*n)++] = atomic_exchange(fd, -1);
}

/* What of D is numbered too high, if nobody uses it. */
static int close_unused(struct ff_disk *d, void *ctx)
{
	struct ff_store *s = d->store;
	int fds[CLOSED_AT_ONCE];
	size_t n = 0;

	pthread_mutex_lock(&s->chain);
	pthread_mutex_lock(&s->disks_lock);
	/* A job that nobody waits for any more may use any of them: the next disk that nobody uses
	 * any more will see to them. Who began a job was a user of the disk until after that, so
	 * without users none can begin that is not counted yet. */
	if (atomic_load(&s->late) > 0) {
		atomic_store(&s->left_open, true);
	} else if (d->users == 0 && atomic_load(&d->top)) {
		take_high(s, &d->path_fd, fds, &n);
		take_high(s, &d->source_fd, fds, &n);
		take_high(s, &d->old_fd, fds, &n);
		take_high(s, &d->direct_fd, fds, &n);
		for (struct link *l = atomic_load(&d->top); l; l = l->older)
			n += ff_image_take_fds(l->img, s->many_fds, fds + n, CLOSED_AT_ONCE - n);
	}
	pthread_mutex_unlock(&s->disks_lock);
	pthread_mutex_unlock(&s->chain);
	while (n > 0)
		close(fds[--n]);
	return 0;
}

void disk_unuse(struct ff_disk *d)
{
	struct ff_store *s = d->store;
	bool last;

	pthread_mutex_lock(&s->disks_lock);
	last = --d->users == 0;
	pthread_mutex_unlock(&s->disks_lock);
	if (!last)
		return;
	close_unused(d, NULL);
	if (atomic_load(&s->left_open) && atomic_load(&s->late) == 0 &&
	    atomic_exchange(&s->left_open, false))
		disk_each(s, close_unused, NULL);
}

/* The next descriptor will have the lowest number that is free. */
static bool disk_fds_scarce(const struct ff_store *s)
{
	int fd = fcntl(s->fleece_fd, F_DUPFD_CLOEXEC, 3);

	if (fd >= 0)
		close(fd);
	return fd < 0 ? errno == EMFILE : fd >= s->many_fds;
}

static int park_older(struct ff_disk *d, void *ctx)
{
	struct ff_store *s = d->store;
	struct link *top;
	int fds[CLOSED_AT_ONCE];
	size_t n = 0;

	pthread_mutex_lock(&s->chain);
	top = atomic_load(&d->top);
	for (struct link *l = top ? top->older : NULL; l; l = l->older)
		if (atomic_load(&l->pins) == 0)
			n += ff_image_take_fds(l->img, s->many_fds, fds + n, CLOSED_AT_ONCE - n);
	pthread_mutex_unlock(&s->chain);
	while (n > 0)
		close(fds[--n]);
	return 0;
}

/* Is there something to close? */
static bool has_high(struct ff_disk *d)
{
	struct ff_store *s = d->store;
	struct link *top;

	FF_GUARD(&s->chain);
	top = atomic_load(&d->top);
	for (struct link *l = top ? top->older : NULL; l; l = l->older)
		if (atomic_load(&l->pins) == 0 && ff_image_highest_fd(l->img) >= s->many_fds)
			return true;
	return false;
}

void disk_make_room(struct ff_store *s, struct ff_disk *d)
{
	if (!disk_fds_scarce(s) || atomic_load(&s->late) > 0 || (d && !has_high(d)) ||
	    pthread_mutex_trylock(&s->reads_closing))
		return;
	if (barrier_close(s->reads, READS_WAIT_MS) == 0) {
		if (d)
			park_older(d, NULL);
		else
			disk_each(s, park_older, NULL);
		barrier_open(s->reads);
	}
	pthread_mutex_unlock(&s->reads_closing);
}

/* Opens the disk by its path, which must not lead over a symlink or out of SOURCE. */
static int open_by_path(struct ff_disk *d, int *out)
{
	ff_autoclose int fd = -1;
	struct identity id;
	struct stat st;
	struct device *dev = disk_device(d);
	int r = -ENOENT;

	if (disk_is_device(d))
		return dev ? device_open(dev, O_PATH, out) : -EIO;
	pthread_mutex_lock(&d->store->paths);
	if (d->path)
		r = io_open_beneath(d->store->source_fd, d->path, O_PATH | O_NOFOLLOW, 0, &fd);
	pthread_mutex_unlock(&d->store->paths);
	if (!r)
		r = identity_of(fd, "", &id, &st);
	if ((!r && (!identity_same(&id, &d->id) || !S_ISREG(st.st_mode))) || r == -ENOENT ||
	    r == -ENOTDIR || r == -ELOOP || r == -EXDEV) {
		ff_error("%s: a disk (inode %llu) is no longer where it was: was it moved behind "
		         "the mount?",
		         d->store->source_path, (unsigned long long)d->id.ino);
		r = -EIO; /* to whoever reads a frozen view */
	}
	if (!r)
		*out = ff_take_fd(&fd);
	return r;
}

/* Opens the disk's source as *AT, unless it is. */
static int open_source(struct ff_disk *d, _Atomic int *at, int flags, int *fd)
{
	int r = 0, path_fd, out = -1;

	*fd = atomic_load_explicit(at, memory_order_acquire);
	if (*fd >= 0)
		return 0;
	FF_GUARD(&d->fd_lock);
	*fd = atomic_load(at);
	if (*fd >= 0 || *fd == FD_REFUSED)
		return *fd >= 0 ? 0 : -EINVAL;
	path_fd = atomic_load(&d->path_fd);
	if (path_fd < 0) {
		r = open_by_path(d, &path_fd);
		if (r)
			return r;
		atomic_store(&d->path_fd, path_fd);
	}
	/* Reading for a backup is no access of the guest's; only an owner may say so. */
	r = io_reopen(path_fd, flags | O_RDONLY | O_NOATIME, &out);
	if (r == -EPERM)
		r = io_reopen(path_fd, flags | O_RDONLY, &out);
	if (r == -EINVAL)
		atomic_store(at, FD_REFUSED);
	if (r)
		return r;
	atomic_store_explicit(at, out, memory_order_release);
	*fd = out;
	return 0;
}

int disk_source(struct ff_disk *d, int *fd)
{
	return open_source(d, &d->source_fd, 0, fd);
}

int disk_old_source(struct ff_disk *d, bool direct, int *fd)
{
	return direct ? open_source(d, &d->direct_fd, O_DIRECT, fd)
	              : open_source(d, &d->old_fd, 0, fd);
}

int disk_seek(struct ff_disk *d, uint64_t off, int whence, uint64_t *out)
{
	int fd, r;

	if (disk_is_device(d)) {
		*out = whence == SEEK_DATA ? off : INT64_MAX;
		return 0;
	}
	r = disk_source(d, &fd);
	return r ? r : io_seek(fd, off, whence, out);
}

int disk_stat(struct ff_disk *d, struct stat *st)
{
	struct device *dev = disk_device(d);
	int fd = atomic_load(&d->path_fd), r;

	if (disk_is_device(d))
		return dev ? device_stat(dev, st) : -EIO;
	if (fd >= 0)
		return io_fstat(fd, st);
	r = disk_source(d, &fd);
	return r ? r : io_fstat(fd, st);
}
