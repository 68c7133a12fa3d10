/*
 * Which mount of a filesystem this is.
 *
 * A filesystem that fails (its device does, or it finds itself damaged) drops what it had not
 * written; unmounted and mounted again it goes on with what its device holds, as after a power
 * loss, and the boot id is still the same. So a session notes which mount of their filesystems
 * SOURCE and FLEECE_DIR had.
 *
 * st_dev and the filesystem's id come back with it, and the ids of mount points tell mount
 * namespaces apart, of which each start of a service may have a new one. What the kernel makes when
 * a filesystem is mounted, takes away when it is unmounted and numbers anew each time is its
 * directory in sysfs. Those that have none (nfs, fuse, tmpfs …) cannot be told.
 */
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <sys/sysmacros.h>

#include "cow/ending.h"
#include "cow/engine.h"
#include "cow/io.h"
#include "ff_util.h"

/* The number of that directory of sysfs, after its path; -ENOENT. */
static int number_of(const char *path, char *out, size_t size)
{
	struct statx sx;
	int r = io_statx(AT_FDCWD, path, &sx);

	if (!r)
		snprintf(out, size, "%s %llu", path, (unsigned long long)sx.stx_ino);
	return r;
}

static int of_btrfs(int fd, char *out, size_t size)
{
	uint8_t id[16];
	char path[64];
	size_t n = (size_t)sprintf(path, "/sys/fs/btrfs/");
	int r = io_btrfs_id(fd, id);

	if (r)
		return -ENOENT; /* another filesystem without a device of its own */
	for (size_t i = 0; i < sizeof id; i++)
		n += (size_t)sprintf(path + n, "%s%02x",
		                     i == 4 || i == 6 || i == 8 || i == 10 ? "-" : "", id[i]);
	return number_of(path, out, size);
}

static int of_device(dev_t dev, char *out, size_t size)
{
	static const char *const types[] = {"ext4", "xfs", "f2fs"};
	char link[48], target[PATH_MAX], path[NAME_MAX + 32];
	const char *name;
	int r;

	snprintf(link, sizeof link, "/sys/dev/block/%u:%u", major(dev), minor(dev));
	r = io_readlinkat(AT_FDCWD, link, target, sizeof target);
	if (r)
		return r;
	name = strrchr(target, '/');
	name = name ? name + 1 : target;
	r = strlen(name) > NAME_MAX ? -ENOENT : 0;
	for (size_t i = 0; !r && i < FF_ARRAY_SIZE(types); i++) {
		snprintf(path, sizeof path, "/sys/fs/%s/%s", types[i], name);
		r = number_of(path, out, size);
		if (r != -ENOENT)
			return r;
		r = 0;
	}
	return r ? r : -ENOENT;
}

int superblock_of(int fd, char *out, size_t size)
{
	struct stat st;
	int r = io_fstat(fd, &st);

	if (r)
		return r;
	r = major(st.st_dev) ? of_device(st.st_dev, out, size) : of_btrfs(fd, out, size);
	if (r == -ENOENT || r == -ENOTDIR || r == -EACCES || r == -EPERM) {
		snprintf(out, size, "-");
		r = 0;
	}
	return r;
}
