/*
 * Looks at block devices that keep nothing: paths, identity, and whether one was left alone.
 *
 * Identity. A device number says little: it goes to another device as soon as this one is detached.
 * The kernel numbers each disk that appears with a number that never comes back on the same boot
 * (diskseq, Linux 5.15); so boot, number and partition identify a device, and a few attributes that
 * some drivers have change when they are given other storage in between. Hashed, they take the
 * place of inode number and birth time, with a birth time no filesystem has. So the identity ends
 * with the boot or when the device is detached, and frozen views with it: what is written to a
 * device while nobody looks leaves no trace in it, unlike a file's, whose ctime tells.
 *
 * Left alone. On the same boot the kernel counts the sectors written to a device, whoever writes: a
 * count that is what it was at a clean end means that nobody did. Device mapper, which Linux 6.1
 * does not have counted by itself, is told to. After a kill there is no such record; a write by way
 * of the node in /dev leaves its times newer than our death. What is written beneath a device (to
 * its backing file, to the whole disk of a partition) shows in neither.
 */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <linux/fs.h>
#include <linux/openat2.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <unistd.h>
#include <xxhash.h>

#include "cow/device.h"
#include "cow/ending.h"
#include "cow/io.h"
#include "ff_util.h"

/* Birth times of devices: the first 136 years of all, some 292 billion years ago. */
#define DEVICE_ERA INT64_MIN

enum { SECTOR = 512, ATTRIBUTE = 256 };

bool identity_is_device(const struct identity *id)
{
	return id->btime_sec <= DEVICE_ERA + UINT32_MAX;
}

bool device_path_valid(const char *path)
{
	if (path[0] != '/' || strlen(path) >= PATH_MAX)
		return false;
	for (const char *p = path + 1;;) {
		size_t n = strcspn(p, "/");

		if (n == 0 || (n == 1 && p[0] == '.') || (n == 2 && p[0] == '.' && p[1] == '.'))
			return false;
		if (!p[n])
			return true;
		p += n + 1;
	}
}

int device_open_path(const char *path, int *out)
{
	struct open_how how = {.flags = O_PATH | O_CLOEXEC, .resolve = RESOLVE_NO_MAGICLINKS};
	char proc[40], real[PATH_MAX];
	ff_autoclose int fd = -1;
	struct stat st;
	int r;

	if (!device_path_valid(path))
		return -ENOTBLK;
	do
		fd = (int)syscall(SYS_openat2, AT_FDCWD, path, &how, sizeof how);
	while (fd < 0 && errno == EINTR);
	if (fd < 0)
		return -errno;
	r = io_fstat(fd, &st);
	if (!r && !S_ISBLK(st.st_mode))
		r = -ENOTBLK;
	snprintf(proc, sizeof proc, "/proc/self/fd/%d", fd);
	if (!r)
		r = io_readlinkat(AT_FDCWD, proc, real, sizeof real);
	if (!r && strncmp(real, "/dev/", 5) != 0)
		r = -ENOTBLK;
	if (!r)
		*out = ff_take_fd(&fd);
	return r;
}

/* An attribute of the device in sysfs, without the newline. */
static int attribute(dev_t rdev, const char *name, char out[ATTRIBUTE])
{
	ff_autoclose int fd = -1;
	char path[80];
	size_t got;
	int r;

	snprintf(path, sizeof path, "/sys/dev/block/%u:%u/%s", major(rdev), minor(rdev), name);
	r = io_openat(AT_FDCWD, path, O_RDONLY, 0, &fd);
	if (!r)
		r = io_pread(fd, out, ATTRIBUTE - 1, 0, &got);
	if (r)
		return r;
	out[got] = '\0';
	out[strcspn(out, "\n")] = '\0';
	return 0;
}

/* Of the whole disk, if the device is a partition. */
static int disk_attribute(dev_t rdev, bool partition, const char *name, char out[ATTRIBUTE])
{
	char up[48];

	snprintf(up, sizeof up, "%s%s", partition ? "../" : "", name);
	return attribute(rdev, up, out);
}

int device_size_of(dev_t rdev, uint64_t *size)
{
	char text[ATTRIBUTE];
	uint64_t sectors;

	if (attribute(rdev, "size", text) || sscanf(text, "%" SCNu64, &sectors) != 1 ||
	    sectors == 0 || sectors > INT64_MAX / SECTOR)
		return -ENXIO;
	*size = sectors * SECTOR;
	return 0;
}

int device_size_open(int fd, uint64_t *size)
{
	uint64_t bytes;

	if (ioctl(fd, BLKGETSIZE64, &bytes) < 0)
		return -errno;
	if (bytes == 0 || bytes > INT64_MAX)
		return -ENXIO;
	*size = bytes;
	return 0;
}

int device_block_size(int fd, unsigned *size)
{
	int bytes;

	if (ioctl(fd, BLKSSZGET, &bytes) < 0)
		return -errno;
	if (bytes < SECTOR || bytes & (bytes - 1))
		return -EINVAL;
	*size = (unsigned)bytes;
	return 0;
}

int device_identify(int fd, struct identity *id)
{
	/* that some drivers have, by the whole disk: another one is another device */
	static const char *const more[] = {"dm/uuid", "md/uuid", "pid", "backend"};
	char boot[64], value[ATTRIBUTE], text[12 * ATTRIBUTE];
	uint64_t size;
	XXH128_hash_t hash;
	struct stat st;
	bool partition;
	int n, r = io_fstat(fd, &st);

	if (r)
		return r;
	if (!S_ISBLK(st.st_mode))
		return -ENOTBLK;
	r = device_size_of(st.st_rdev, &size);
	if (!r)
		r = session_boot_id(boot, sizeof boot);
	if (r)
		return r;
	partition = attribute(st.st_rdev, "partition", value) == 0;
	n = snprintf(text, sizeof text, "%s%u:%u %s ", boot, major(st.st_rdev), minor(st.st_rdev),
	             partition ? value : "");
	if (partition && attribute(st.st_rdev, "start", value) == 0)
		n += snprintf(text + n, sizeof text - (size_t)n, "%s ", value);
	if (disk_attribute(st.st_rdev, partition, "diskseq", value))
		return -EOPNOTSUPP;
	n += snprintf(text + n, sizeof text - (size_t)n, "%s", value);
	for (size_t i = 0; i < FF_ARRAY_SIZE(more); i++)
		if (disk_attribute(st.st_rdev, partition, more[i], value) == 0)
			n += snprintf(text + n, sizeof text - (size_t)n, " %s %s", more[i], value);
	hash = XXH3_128bits(text, (size_t)n);
	*id = (struct identity){
	    .ino = (hash.low64 & (DEVICE_INO - 1)) | DEVICE_INO,
	    .btime_sec = DEVICE_ERA + (int64_t)(hash.high64 >> 32),
	    .btime_nsec = (uint32_t)hash.high64 % 1000000000,
	};
	return 0;
}

int device_have_counted(dev_t rdev)
{
	ff_autoclose int fd = -1;
	char text[ATTRIBUTE], path[80];
	bool partition = attribute(rdev, "partition", text) == 0;
	int r = disk_attribute(rdev, partition, "queue/iostats", text);

	if (r || strcmp(text, "0") != 0)
		return r;
	/* Some drivers never count, whatever they say: that would be taken for evidence. */
	if (disk_attribute(rdev, partition, "dm/name", text))
		return -EOPNOTSUPP;
	snprintf(path, sizeof path, "/sys/dev/block/%u:%u/%squeue/iostats", major(rdev),
	         minor(rdev), partition ? "../" : "");
	r = io_openat(AT_FDCWD, path, O_WRONLY, 0, &fd);
	return r ? r : io_pwrite(fd, "1", 1, 0);
}

/* Sectors written to the device, or thrown away, since it is there. */
static int sectors_changed(dev_t rdev, int64_t *out)
{
	uint64_t written, discarded = 0;
	char text[ATTRIBUTE];
	bool partition = attribute(rdev, "partition", text) == 0;

	/* where the kernel was told not to count, a count means nothing */
	if (disk_attribute(rdev, partition, "queue/iostats", text) || strcmp(text, "0") == 0 ||
	    attribute(rdev, "stat", text))
		return -ENODATA;
	if (sscanf(text, "%*u %*u %*u %*u %*u %*u %" SCNu64 " %*u %*u %*u %*u %*u %*u %" SCNu64,
	           &written, &discarded) < 1)
		return -ENODATA;
	*out = (int64_t)((written + discarded) & INT64_MAX);
	return 0;
}

int device_evidence(int fd, struct stat *st)
{
	uint64_t size;
	int64_t changed;
	int r = io_fstat(fd, st);

	if (!r)
		r = device_size_of(st->st_rdev, &size);
	if (r)
		return r;
	if (sectors_changed(st->st_rdev, &changed))
		changed = -1; /* which is never taken for the same */
	st->st_size = (off_t)size;
	st->st_mtim = (struct timespec){.tv_sec = changed};
	return 0;
}
