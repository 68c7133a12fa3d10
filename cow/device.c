/*
 * The block devices that are served as files.
 *
 * Which. A symlink of SOURCE is one if all of this holds, and else is a symlink like any other:
 *
 *   1. Root or the user who mounts owns it. Others who may write to SOURCE can so not add devices
 *      to what is frozen and claimed.
 *   2. Its target, as it is written, is an absolute path without "." and "..", and matches a
 *      pattern of the options. It is not the real path that must: /dev/vg0/disk is a symlink that
 *      udev makes to /dev/dm-7, and tomorrow to /dev/dm-3.
 *   3. The target is a block device, and its real path lies in /dev.
 *
 * Where a target of 1. and 2. is not there, a freeze fails: a snapshot that has a symlink in place
 * of the disk would be a backup without it, unnoticed. Mode and owner are the device node's, so
 * nobody gets by a link what he could not do to the device.
 *
 * A device is, as an object, made when it is first met, and stays until the store is closed:
 *
 *   known → claimed
 *
 * Claimed is: opened O_EXCL, by which a mount, device mapper, RAID or another fleecefs are kept
 * off it, and with the lock that QEMU looks for. A claimed device cannot become another under its
 * number, so its identity need not be asked for again. All that are linked are claimed when the
 * store is opened, others when they are first opened or frozen. What was done to it before nobody
 * knows: so that is when it was changed last, until it is changed by us.
 *
 * All reading and writing goes through the page cache that the kernel has for the device, or past
 * it with O_DIRECT, which the kernel keeps coherent with that.
 */
#include "cow/device.h"

#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "cow/io.h"
#include "ff_log.h"
#include "ff_util.h"

enum { QEMU_WRITES = 101, QEMU_UNSHARES_WRITING = 201, CLAIM_TRIES = 10, CLAIM_POLL_MS = 50 };

struct device {
	struct ff_store *store;
	struct device *next; /* constant once it is on the list */
	struct identity id;
	dev_t rdev;
	char *path;           /* as the first symlink that was met has it */
	int path_fd;          /* O_PATH */
	pthread_mutex_t lock; /* claiming; a leaf */
	atomic_int claim_fd;  /* -1: not claimed; set once */
	atomic_llong changed; /* nanoseconds since 1970; 0: not claimed; only grows */
};

struct devices {
	char **patterns;
	size_t count;
	pthread_mutex_t lock; /* additions to the list; a leaf */
	struct device *_Atomic first;
	atomic_bool told_owner, told_kernel;
};

static bool matches(const struct devices *all, const char *path)
{
	for (size_t i = 0; i < all->count; i++)
		if (fnmatch(all->patterns[i], path, FNM_PATHNAME | FNM_PERIOD) == 0)
			return true;
	return false;
}

struct device *device_find(struct ff_store *s, const struct identity *id)
{
	struct device *dev = s->devices ? atomic_load(&s->devices->first) : NULL;

	while (dev && !identity_same(&dev->id, id))
		dev = dev->next;
	return dev;
}

/* The device behind FD that is claimed. */
static struct device *find_claimed(struct ff_store *s, int fd)
{
	struct device *dev = s->devices ? atomic_load(&s->devices->first) : NULL;
	struct stat st;

	if (!dev || io_fstat(fd, &st) || !S_ISBLK(st.st_mode))
		return NULL;
	while (dev && (dev->rdev != st.st_rdev || atomic_load(&dev->claim_fd) < 0))
		dev = dev->next;
	return dev;
}

static struct device *device_new(struct ff_store *s, const struct identity *id, dev_t rdev,
                                 const char *path)
{
	struct device *dev = calloc(1, sizeof *dev);

	if (!dev || !(dev->path = strdup(path))) {
		free(dev);
		return NULL;
	}
	dev->store = s;
	dev->id = *id;
	dev->rdev = rdev;
	atomic_init(&dev->claim_fd, -1);
	pthread_mutex_init(&dev->lock, NULL);
	return dev;
}

static void device_free(struct device *dev)
{
	if (dev->claim_fd >= 0)
		close(dev->claim_fd);
	close(dev->path_fd);
	pthread_mutex_destroy(&dev->lock);
	free(dev->path);
	free(dev);
}

/* FD is taken over. */
static int add_device(struct ff_store *s, int fd, const char *path, struct device **out)
{
	ff_autoclose int own = fd;
	struct device *dev;
	struct identity id;
	struct stat st;
	int r = device_identify(fd, &id);

	if (!r)
		r = io_fstat(fd, &st);
	if (r)
		return r;
	id.dev = s->source_dev;
	FF_GUARD(&s->devices->lock);
	dev = device_find(s, &id);
	if (!dev) {
		dev = device_new(s, &id, st.st_rdev, path);
		if (!dev)
			return -ENOMEM;
		dev->path_fd = ff_take_fd(&own);
		dev->next = atomic_load(&s->devices->first);
		atomic_store(&s->devices->first, dev);
	}
	*out = dev;
	return 0;
}

int device_at(struct ff_store *s, const char *path, struct device **out)
{
	struct devices *all = s->devices;
	int fd, r;

	if (!all || !device_path_valid(path) || !matches(all, path))
		return -ENOENT;
	r = device_open_path(path, &fd);
	if (r == -ENOTBLK || r == -ELOOP)
		return -ENOENT;
	if (r)
		return r == -EMFILE || r == -ENFILE || r == -ENOMEM ? r : -ENODEV;
	*out = find_claimed(s, fd);
	if (*out) {
		close(fd);
		return 0;
	}
	r = add_device(s, fd, path, out);
	if (r == -EOPNOTSUPP && !atomic_exchange(&all->told_kernel, true))
		ff_error("%s: block devices cannot be served: this kernel does not number its "
		         "disks (Linux 5.15 and later do)",
		         path);
	return r == -ENXIO || r == -EOPNOTSUPP ? -ENODEV : r;
}

int device_of_link(struct ff_store *s, int fd, const char *path, struct device **out)
{
	struct devices *all = s->devices;
	char target[PATH_MAX];
	struct stat st;
	int r;

	if (!all)
		return -ENOENT;
	r = io_fstat(fd, &st);
	if (!r && !S_ISLNK(st.st_mode))
		r = -ENOENT;
	if (!r)
		r = io_readlinkat(fd, "", target, sizeof target);
	if (!r && (!device_path_valid(target) || !matches(all, target)))
		r = -ENOENT;
	if (r)
		return r;
	if (st.st_uid != 0 && st.st_uid != geteuid()) {
		if (!atomic_exchange(&all->told_owner, true))
			ff_warning("%s: a symlink to %s, but not one of root's or the mounting "
			           "user's: not served as a file, nor are others like it",
			           path ? path : "(in SOURCE)", target);
		return -ENOENT;
	}
	return device_at(s, target, out);
}

int device_of_fd(struct ff_store *s, int fd, struct device **out)
{
	struct identity id;
	struct device *dev = find_claimed(s, fd);
	int r = 0;

	if (!dev) {
		r = device_identify(fd, &id);
		id.dev = s->source_dev;
		dev = r ? NULL : device_find(s, &id);
	}
	if (!dev)
		return r == -ENXIO ? r : -EINVAL;
	*out = dev;
	return 0;
}

/* What keeps QEMU from opening it for writing. */
static void lock_against_qemu(const struct device *dev, int fd)
{
	bool writer = false;
	int r;

	if (!dev->store->cfg.source_lock)
		return;
	if (io_is_locked(fd, QEMU_WRITES, &writer) == 0 && writer)
		ff_warning("%s: another program (QEMU?) has it open for writing, past the mount: "
		           "what it writes spoils snapshots; let it use the file in the mount",
		           dev->path);
	r = io_lock_shared(fd, QEMU_UNSHARES_WRITING);
	if (r)
		ff_warning("%s: cannot be locked: %s", dev->path, strerror(-r));
}

/* Once. */
static int try_claim(struct device *dev)
{
	ff_autoclose int fd = -1;
	struct identity id;
	int r;

	FF_GUARD(&dev->lock);
	if (atomic_load(&dev->claim_fd) >= 0)
		return 0;
	r = io_reopen(dev->path_fd, O_RDWR | O_EXCL, &fd);
	if (r == -EACCES || r == -EPERM || r == -EROFS)
		r = io_reopen(dev->path_fd, O_RDONLY | O_EXCL, &fd);
	if (!r)
		r = device_identify(fd, &id);
	id.dev = dev->id.dev;
	if (!r && !identity_same(&id, &dev->id))
		r = -ENXIO; /* it was detached, and its number is another's */
	if (r)
		return r;
	lock_against_qemu(dev, fd);
	r = device_have_counted(dev->rdev);
	if (r)
		ff_warning("%s: the kernel does not count what is written to it (%s): snapshots of "
		           "it will not outlive an unmount",
		           dev->path, strerror(-r));
	device_touch(dev);
	atomic_store(&dev->claim_fd, ff_take_fd(&fd));
	return 0;
}

int device_claim(struct device *dev)
{
	int r = try_claim(dev);

	/* Programs that only look at a device, as when one appears, have it for a moment. */
	for (int i = 0; r == -EBUSY && i < CLAIM_TRIES; i++) {
		nanosleep(&(struct timespec){.tv_nsec = CLAIM_POLL_MS * 1000000L}, NULL);
		r = try_claim(dev);
	}
	if (r == -EBUSY)
		ff_error("%s is in use (mounted, or part of RAID, LVM or another mapping): it "
		         "can be used through the mount, and frozen, when that has ended",
		         dev->path);
	else if (r)
		ff_error("%s: cannot be opened: %s", dev->path, strerror(-r));
	return r;
}

int device_open(struct device *dev, int flags, int *fd)
{
	int r = device_claim(dev);

	if (r || flags & O_PATH)
		return r ? r : io_reopen(dev->path_fd, O_PATH, fd);
	r = io_reopen(dev->path_fd, flags, fd);
	return r == -EPERM && flags & O_NOATIME ? io_reopen(dev->path_fd, flags & ~O_NOATIME, fd)
	                                        : r;
}

static int64_t nanoseconds(struct timespec t)
{
	return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static struct timespec now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_REALTIME, &t);
	return t;
}

void device_touch(struct device *dev)
{
	long long before = atomic_load(&dev->changed), after;

	/* A clock that was set back must not make it look unchanged. */
	do
		after = FF_MAX(before + 1, (long long)nanoseconds(now()));
	while (!atomic_compare_exchange_weak(&dev->changed, &before, after));
}

static struct timespec later(struct timespec a, struct timespec b)
{
	return nanoseconds(a) > nanoseconds(b) ? a : b;
}

int device_claim_fd(const struct device *dev)
{
	return atomic_load(&dev->claim_fd);
}

int device_size(struct device *dev, uint64_t *size)
{
	int fd = device_claim_fd(dev);

	return fd < 0 ? device_size_of(dev->rdev, size) : device_size_open(fd, size);
}

int device_stat(struct device *dev, struct stat *out)
{
	int64_t changed = atomic_load(&dev->changed);
	struct timespec latest = changed ? (struct timespec){.tv_sec = changed / 1000000000,
	                                                     .tv_nsec = changed % 1000000000}
	                                 : now();
	struct stat node;
	uint64_t size;
	int r = device_size(dev, &size);

	if (!r)
		r = io_fstat(dev->path_fd, &node);
	if (r)
		return r;
	*out = (struct stat){
	    .st_ino = dev->id.ino,
	    .st_mode = S_IFREG | (node.st_mode & 0666),
	    .st_nlink = 1,
	    .st_uid = node.st_uid,
	    .st_gid = node.st_gid,
	    .st_size = (off_t)size,
	    .st_blksize = 4096,
	    .st_blocks = (blkcnt_t)(size / 512),
	    .st_atim = node.st_atim,
	    .st_mtim = later(latest, node.st_mtim),
	    .st_ctim = later(latest, node.st_ctim),
	};
	return 0;
}

int device_path_fd(const struct device *dev)
{
	return dev->path_fd;
}

const char *device_path(const struct device *dev)
{
	return dev->path;
}

const struct identity *device_id(const struct device *dev)
{
	return &dev->id;
}

int device_freeze_link(void *ctx, int fd, const char *path, struct ff_frozen *f)
{
	struct device *dev;
	int r = device_of_link(ctx, fd, path, &dev);

	if (r == -ENOENT)
		return 0;
	if (r == -ENODEV)
		ff_error("%s: the block device that this symlink leads to, %s, is not there; "
		         "exclude it or remove it",
		         path, f->target);
	if (!r)
		r = device_claim(dev);
	if (!r)
		r = device_stat(dev, &f->st);
	if (r)
		return r;
	f->btime_sec = dev->id.btime_sec;
	f->btime_nsec = dev->id.btime_nsec;
	f->device = dev;
	free(ff_take_ptr(&f->target));
	return 0;
}

/* At the beginning nothing is an error yet. */
static int meet_link(void *ctx, int fd, const char *path, struct ff_frozen *f)
{
	struct device *dev;
	int r = device_of_link(ctx, fd, path, &dev);

	if (r == -ENODEV)
		ff_warning("%s: the block device that this symlink leads to, %s, is not there",
		           path, f->target);
	if (!r)
		device_claim(dev);
	return r == -ENOMEM ? r : 0;
}

int devices_open(struct ff_store *s, const char *const *patterns, size_t count)
{
	struct tree_walk how = source_walk(s);
	struct tree *t;
	int r;

	if (count == 0)
		return 0;
	if (s->cfg.durable) {
		ff_error("durable and device exclude each other: what was written to a block "
		         "device while the power was off leaves no trace, so its snapshots do not "
		         "outlive that; mount the devices by themselves, without durable");
		return -EINVAL;
	}
	s->devices = calloc(1, sizeof *s->devices);
	if (!s->devices)
		return -ENOMEM;
	pthread_mutex_init(&s->devices->lock, NULL);
	s->devices->patterns = calloc(count, sizeof(char *));
	if (!s->devices->patterns)
		return -ENOMEM;
	for (size_t i = 0; i < count; i++, s->devices->count++)
		if (!(s->devices->patterns[i] = strdup(patterns[i])))
			return -ENOMEM;
	how.link = meet_link;
	how.link_ctx = s;
	r = tree_walk(&how, &t);
	if (!r)
		tree_free(t);
	return r == -ENOMEM ? r : 0; /* what cannot be read keeps a freeze from being made */
}

void devices_close(struct ff_store *s)
{
	struct devices *all = s->devices;

	if (!all)
		return;
	for (struct device *dev = all->first, *next; dev; dev = next) {
		next = dev->next;
		device_free(dev);
	}
	for (size_t i = 0; i < all->count; i++)
		free(all->patterns[i]);
	free(all->patterns);
	pthread_mutex_destroy(&all->lock);
	free(all);
}
