/*
 * Block devices that are served as files: which symlinks lead to one, what identifies it, what it
 * looks like. See device_look.c for the rules, device.c for those that are in use.
 */
#ifndef FF_COW_DEVICE_H
#define FF_COW_DEVICE_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/stat.h>

#include "cow/engine.h"

/* Of an inode number: what file numbers and those of frozen inodes (frozen.c) have not. */
#define DEVICE_INO (UINT64_C(1) << 61)

struct device;
struct devices;

/* --- device_look.c: looks that keep nothing --- */

/* The path of a block device, as a symlink of SOURCE and the options have it: absolute, without
 * empty parts, "." and "..". */
bool device_path_valid(const char *path);
/* A descriptor (O_PATH) of the block device at PATH, whose real path must lie in /dev. -ENOENT,
 * -ENXIO: it is not there; -ENOTBLK: that is something else. */
int device_open_path(const char *path, int *fd);
/* What tells the block device behind FD from all others of this boot. -ENXIO: it is gone, or has no
 * medium. -EOPNOTSUPP: the kernel does not number its disks. */
int device_identify(int fd, struct identity *id);
/* Bytes, by the block device's number; -ENXIO as above. */
int device_size_of(dev_t rdev, uint64_t *size);
/* The same, and of its blocks, by an open descriptor. */
int device_size_open(int fd, uint64_t *size);
int device_block_size(int fd, unsigned *size);
/* What shows at the next mount whether the device was left alone, in the shape that session.c
 * records: the size; as mtime the kernel's count of sectors written; as ctime its node's. */
int device_evidence(int fd, struct stat *st);
/* Has the kernel count the sectors written to a device of device mapper, if it does not yet; there
 * is no such evidence else. -EOPNOTSUPP: it does not for another kind, and may not be able to. */
int device_have_counted(dev_t rdev);
/* Is this the identity of a block device? Of no file. */
bool identity_is_device(const struct identity *id);

/* --- device.c --- */

/* Takes PATTERNS over and claims the devices that SOURCE has links to. */
int devices_open(struct ff_store *s, const char *const *patterns, size_t count);
void devices_close(struct ff_store *s);
/* The device behind the symlink FD (O_PATH). -ENOENT: a symlink like any other; -ENODEV: there
 * should be a device, and is none. PATH: for the log, or NULL. */
int device_of_link(struct ff_store *s, int fd, const char *path, struct device **out);
/* The device at PATH, if a symlink to it would be served; a known one with this identity, whatever
 * its path. */
int device_at(struct ff_store *s, const char *path, struct device **out);
struct device *device_find(struct ff_store *s, const struct identity *id);
/* The known device behind FD, or -EINVAL. */
int device_of_fd(struct ff_store *s, int fd, struct device **out);
/* Takes it for us alone, among those who ask for that. -EBUSY, logged: another program has it. */
int device_claim(struct device *dev);
/* Opens it anew, claimed before. FLAGS as in open(2). */
int device_open(struct device *dev, int flags, int *fd);
/* As a regular file. */
int device_stat(struct device *dev, struct stat *st);
int device_size(struct device *dev, uint64_t *size);
const char *device_path(const struct device *dev);
int device_path_fd(const struct device *dev); /* O_PATH */
const struct identity *device_id(const struct device *dev);
/* A change of its bytes has just been made. */
void device_touch(struct device *dev);
/* The descriptor that it was claimed with, or -1. */
int device_claim_fd(const struct device *dev);
/* For a frozen tree: F is the symlink that FD (O_PATH) is of, and becomes a regular file if that
 * leads to a device. CTX: the store. */
int device_freeze_link(void *ctx, int fd, const char *path, struct ff_frozen *f);

/* --- device_disk.c --- */

/* The disk's device; NULL: it has none, or that is gone. */
struct device *disk_device(struct ff_disk *d);
static inline bool disk_is_device(const struct ff_disk *d)
{
	return identity_is_device(&d->id);
}
/* disk_stat(), with what a clean end is to record. */
int disk_evidence(struct ff_disk *d, struct stat *st);
/* All that was written to it becomes durable. */
int disk_sync_device(struct ff_disk *d, void *ctx);
/* Breaks the disk's views if its device has become smaller than one of them. */
int disk_check_device(struct ff_disk *d, void *ctx);

/* --- device_change.c --- */
/* ff_disk_change() for a device. */
int device_change(struct ff_disk *d, const struct ff_change *c, size_t *done);
/* fallocate(2) with PUNCH_HOLE or ZERO_RANGE of a claiming descriptor, old data being preserved. */
int device_zero(int claim_fd, int mode, uint64_t off, uint64_t len);

#endif
