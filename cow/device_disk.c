/*
 * Devices as those meet them who have a disk in hand, or a file of the mount: which one it is, what
 * it looks like, whether it is still large enough for what is frozen of it.
 */
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <time.h>

#include "cow/device.h"
#include "cow/io.h"
#include "cow/reasons.h"
#include "ff_util.h"

struct device *disk_device(struct ff_disk *d)
{
	struct device *dev = atomic_load(&d->device);

	if (!dev && disk_is_device(d)) {
		dev = device_find(d->store, &d->id);
		if (dev)
			atomic_store(&d->device, dev);
	}
	return dev;
}

int disk_evidence(struct ff_disk *d, struct stat *st)
{
	struct device *dev = disk_device(d);

	if (!disk_is_device(d))
		return disk_stat(d, st);
	return dev ? device_evidence(device_path_fd(dev), st) : -ENXIO;
}

int disk_sync_device(struct ff_disk *d, void *ctx)
{
	struct device *dev = disk_device(d);
	int fd = dev ? device_claim_fd(dev) : -1;

	return fd >= 0 ? io_fsync(fd) : 0;
}

int disk_check_device(struct ff_disk *d, void *ctx)
{
	struct device *dev = disk_device(d);
	uint64_t size = 0, needed = 0;

	if (!disk_is_device(d) || !chain_wanted(d))
		return 0;
	pthread_mutex_lock(&d->store->chain);
	for (struct link *l = atomic_load(&d->top); l; l = l->older)
		needed = FF_MAX(needed, ff_image_desc(l->img)->size);
	pthread_mutex_unlock(&d->store->chain);
	if (!dev || device_size(dev, &size) || size < needed)
		chain_break_all(d, WHY_SMALLER);
	return 0;
}

int ff_device_at(struct ff_store *store, int link_fd, int *fd)
{
	char target[PATH_MAX];
	struct device *dev;
	int r = device_of_link(store, link_fd, NULL, &dev);

	if (r != -ENODEV)
		return r ? r : io_reopen(device_path_fd(dev), O_PATH, fd);
	/* Shown as a symlink it would lead whoever opens it past the mount, the moment that there
	 * is a medium again. */
	r = io_readlinkat(link_fd, "", target, sizeof target);
	return r || device_open_path(target, fd) ? -ENOENT : 0;
}

int ff_device_stat(struct ff_store *store, int fd, struct stat *st)
{
	struct device *dev;
	struct timespec now;
	struct stat node;
	int r = device_of_fd(store, fd, &dev);

	if (!r)
		r = device_stat(dev, st);
	if (!r)
		return 0;
	r = io_fstat(fd, &node);
	if (r)
		return r;
	clock_gettime(CLOCK_REALTIME, &now);
	*st = (struct stat){
	    .st_ino = DEVICE_INO | node.st_rdev,
	    .st_mode = S_IFREG | (node.st_mode & 0666),
	    .st_nlink = 1,
	    .st_uid = node.st_uid,
	    .st_gid = node.st_gid,
	    .st_blksize = 4096,
	    .st_atim = node.st_atim,
	    .st_mtim = now,
	    .st_ctim = now,
	};
	return 0;
}

int ff_device_open(struct ff_store *store, int fd, int flags, int *out)
{
	struct device *dev;
	uint64_t size;
	int r = device_of_fd(store, fd, &dev);

	if (!r)
		r = device_size(dev, &size);
	if (!r)
		r = device_open(dev, flags, out);
	return r == -EINVAL ? -ENXIO : r;
}
