/*
 * The real system calls behind io.h. A link-time seam costs nothing here, and needs no table of
 * function pointers: a test that injects faults links its own version of this file.
 */
#include "cow/io.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/btrfs.h>
#include <linux/magic.h>
#include <linux/openat2.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/vfs.h>
#include <sys/xattr.h>
#include <unistd.h>

#include "ff_util.h"

int io_pread(int fd, void *buf, size_t len, uint64_t off, size_t *got)
{
	size_t done = 0;

	while (done < len) {
		ssize_t n = pread(fd, (char *)buf + done, len - done, (off_t)(off + done));

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return -errno;
		if (n == 0)
			break;
		done += (size_t)n;
	}
	*got = done;
	return 0;
}

#ifndef RWF_DONTCACHE
#define RWF_DONTCACHE 0x80 /* linux/fs.h, since 6.14 */
#endif

int io_pread_once(int fd, void *buf, size_t len, uint64_t off, size_t *got)
{
	struct iovec iov = {buf, len};
	ssize_t n = preadv2(fd, &iov, 1, (off_t)off, RWF_DONTCACHE);
	size_t done = n > 0 ? (size_t)n : 0;
	int r = 0;

	*got = 0;
	/* not for this filesystem, interrupted, an error, or the end of the file */
	if (done < len)
		r = io_pread(fd, (char *)buf + done, len - done, off + done, got);
	*got += done;
	return r;
}

int io_pread_full(int fd, void *buf, size_t len, uint64_t off)
{
	size_t got;
	int r = io_pread(fd, buf, len, off, &got);

	return r ? r : got == len ? 0 : -EIO;
}

int io_pwrite(int fd, const void *buf, size_t len, uint64_t off)
{
	size_t done = 0;

	while (done < len) {
		ssize_t n = pwrite(fd, (const char *)buf + done, len - done, (off_t)(off + done));

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return -errno;
		if (n == 0)
			return -EIO;
		done += (size_t)n;
	}
	return 0;
}

int io_pwrite_part(int fd, const void *buf, size_t len, uint64_t off, size_t *done)
{
	*done = 0;
	while (*done < len) {
		ssize_t n =
		    pwrite(fd, (const char *)buf + *done, len - *done, (off_t)(off + *done));

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return *done ? 0 : n < 0 ? -errno : -EIO;
		*done += (size_t)n;
	}
	return 0;
}

int io_copy_range(int in_fd, uint64_t in_off, int fd, uint64_t off, size_t len, size_t *done)
{
	off_t from = (off_t)in_off, to = (off_t)off;
	ssize_t n;

	do
		n = copy_file_range(in_fd, &from, fd, &to, len, 0);
	while (n < 0 && errno == EINTR);
	if (n < 0)
		return -errno;
	*done = (size_t)n;
	return 0;
}

int io_truncate(int fd, uint64_t size)
{
	int r;

	do
		r = ftruncate(fd, (off_t)size);
	while (r < 0 && errno == EINTR);
	return r < 0 ? -errno : 0;
}

int io_fallocate(int fd, int mode, uint64_t off, uint64_t len)
{
	int r;

	do
		r = fallocate(fd, mode, (off_t)off, (off_t)len);
	while (r < 0 && errno == EINTR);
	return r < 0 ? -errno : 0;
}

int io_seek(int fd, uint64_t off, int whence, uint64_t *out)
{
	off_t r = lseek(fd, (off_t)off, whence);

	if (r < 0)
		return -errno;
	*out = (uint64_t)r;
	return 0;
}

bool io_pread_cached(int fd, void *buf, size_t len, uint64_t off)
{
	struct iovec iov = {buf, len};

	return preadv2(fd, &iov, 1, (off_t)off, RWF_NOWAIT) == (ssize_t)len;
}

void io_will_need(int fd, uint64_t off, uint64_t len)
{
	posix_fadvise(fd, (off_t)off, (off_t)len, POSIX_FADV_WILLNEED); /* a hint */
}

#ifndef __NR_cachestat
#define __NR_cachestat 451 /* on all architectures, in Linux 6.5 and later */
#endif

int io_cached(int fd, uint64_t off, uint64_t len, uint64_t *got)
{
	struct {
		uint64_t off, len;
	} range = {off, len};
	struct {
		uint64_t cache, dirty, writeback, evicted, recently_evicted;
	} stat;

	if (syscall(__NR_cachestat, fd, &range, &stat, 0) < 0)
		return -errno;
	*got = FF_MIN(stat.cache * (uint64_t)sysconf(_SC_PAGESIZE), len);
	return 0;
}

int io_fdatasync(int fd)
{
	int r;

	do
		r = fdatasync(fd);
	while (r < 0 && errno == EINTR);
	return r < 0 ? -errno : 0;
}

int io_fsync(int fd)
{
	int r;

	do
		r = fsync(fd);
	while (r < 0 && errno == EINTR);
	return r < 0 ? -errno : 0;
}

int io_syncfs(int fd)
{
	int r;

	do
		r = syncfs(fd);
	while (r < 0 && errno == EINTR);
	return r < 0 ? -errno : 0;
}

int io_openat(int dirfd, const char *path, int flags, mode_t mode, int *out)
{
	int fd;

	do
		fd = openat(dirfd, path, flags | O_CLOEXEC, mode);
	while (fd < 0 && errno == EINTR);
	if (fd < 0)
		return -errno;
	*out = fd;
	return 0;
}

int io_open_beneath(int dirfd, const char *path, int flags, mode_t mode, int *out)
{
	struct open_how how = {
	    .flags = (unsigned)flags | O_CLOEXEC,
	    .mode = mode,
	    .resolve = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS,
	};
	long fd;

	do /* EAGAIN: something was renamed meanwhile, the walk could not be proved safe */
		fd = syscall(SYS_openat2, dirfd, path, &how, sizeof how);
	while (fd < 0 && (errno == EINTR || errno == EAGAIN));
	if (fd < 0)
		return -errno;
	*out = (int)fd;
	return 0;
}

int io_lock_shared(int fd, uint64_t off)
{
	struct flock lock = {
	    .l_type = F_RDLCK,
	    .l_whence = SEEK_SET,
	    .l_start = (off_t)off,
	    .l_len = 1,
	};

	return fcntl(fd, F_OFD_SETLK, &lock) < 0 ? -errno : 0;
}

int io_is_locked(int fd, uint64_t off, bool *held)
{
	struct flock lock = {
	    .l_type = F_WRLCK,
	    .l_whence = SEEK_SET,
	    .l_start = (off_t)off,
	    .l_len = 1,
	};

	if (fcntl(fd, F_OFD_GETLK, &lock) < 0)
		return -errno;
	*held = lock.l_type != F_UNLCK;
	return 0;
}

int io_flock(int fd, int operation)
{
	int r;

	do
		r = flock(fd, operation | LOCK_NB);
	while (r < 0 && errno == EINTR);
	return r < 0 ? -errno : 0;
}

/* The directory in which the last part of PATH stands, found without following a symlink or leaving
 * DIRFD; *PATH becomes that part. A path without a slash needs no look, one without DIRFD is the
 * user's own. *OWN: to be closed. */
static int enter_parent(int dirfd, const char **path, int *own, int *out)
{
	const char *slash = strrchr(*path, '/');
	char parent[PATH_MAX];
	int r;

	*out = dirfd;
	if (!slash || dirfd == AT_FDCWD)
		return 0;
	if ((size_t)(slash - *path) >= sizeof parent)
		return -ENAMETOOLONG;
	memcpy(parent, *path, (size_t)(slash - *path));
	parent[slash - *path] = '\0';
	r = io_open_beneath(dirfd, parent, O_PATH | O_DIRECTORY, 0, own);
	*path = slash + 1;
	*out = *own;
	return r;
}

int io_mkdirat(int dirfd, const char *path, mode_t mode)
{
	ff_autoclose int own = -1;
	int dir, r = enter_parent(dirfd, &path, &own, &dir);

	return r ? r : mkdirat(dir, path, mode) < 0 ? -errno : 0;
}

int io_unlinkat(int dirfd, const char *path, int flags)
{
	ff_autoclose int own = -1;
	int dir, r = enter_parent(dirfd, &path, &own, &dir);

	return r ? r : unlinkat(dir, path, flags) < 0 ? -errno : 0;
}

int io_symlinkat(const char *target, int dirfd, const char *path)
{
	return symlinkat(target, dirfd, path) < 0 ? -errno : 0;
}

int io_readlinkat(int dirfd, const char *path, char *buf, size_t size)
{
	ssize_t n = readlinkat(dirfd, path, buf, size - 1);

	if (n < 0)
		return -errno;
	buf[n] = '\0';
	return 0;
}

int io_renameat(int olddir, const char *old, int newdir, const char *new, unsigned flags)
{
	ff_autoclose int own_old = -1, own_new = -1;
	int from, to, r = enter_parent(olddir, &old, &own_old, &from);

	if (!r)
		r = enter_parent(newdir, &new, &own_new, &to);
	return r ? r : syscall(SYS_renameat2, from, old, to, new, flags) < 0 ? -errno : 0;
}

int io_linkfd(int fd, int newdir, const char *new)
{
	char proc[40];

	snprintf(proc, sizeof proc, "/proc/self/fd/%d", fd);
	return linkat(AT_FDCWD, proc, newdir, new, AT_SYMLINK_FOLLOW) < 0 ? -errno : 0;
}

int io_fstat(int fd, struct stat *out)
{
	return fstat(fd, out) < 0 ? -errno : 0;
}

int io_reopen(int fd, int flags, int *out)
{
	char proc[40];

	snprintf(proc, sizeof proc, "/proc/self/fd/%d", fd);
	return io_openat(AT_FDCWD, proc, flags, 0, out);
}

int io_statx(int dirfd, const char *path, struct statx *out)
{
	return statx(dirfd, path, AT_EMPTY_PATH | AT_SYMLINK_NOFOLLOW | AT_NO_AUTOMOUNT,
	             STATX_BASIC_STATS | STATX_BTIME, out) < 0
	           ? -errno
	           : 0;
}

int io_fstatvfs(int fd, struct statvfs *out)
{
	int r;

	do
		r = fstatvfs(fd, out);
	while (r < 0 && errno == EINTR);
	return r < 0 ? -errno : 0;
}

bool io_knows_holes(int fd)
{
	struct statfs st;

	if (fstatfs(fd, &st) < 0)
		return false;
	switch ((unsigned long)st.f_type) {
	case EXT4_SUPER_MAGIC:
	case XFS_SUPER_MAGIC:
	case BTRFS_SUPER_MAGIC:
	case F2FS_SUPER_MAGIC:
	case TMPFS_MAGIC:
		return true;
	default:
		return false;
	}
}

bool io_is_nfs(int fd)
{
	struct statfs st;

	return fstatfs(fd, &st) == 0 && st.f_type == NFS_SUPER_MAGIC;
}

int io_btrfs_id(int fd, uint8_t out[16])
{
	struct btrfs_ioctl_fs_info_args info = {0};

	_Static_assert(sizeof info.fsid == 16, "btrfs");
	if (ioctl(fd, BTRFS_IOC_FS_INFO, &info) < 0)
		return -errno;
	memcpy(out, info.fsid, sizeof info.fsid);
	return 0;
}

int io_writeback_error(int fd)
{
	int r;

	do
		r = sync_file_range(fd, 0, 0, SYNC_FILE_RANGE_WAIT_BEFORE);
	while (r < 0 && errno == EINTR);
	return r < 0 ? -errno : 0;
}

int io_fdopendir(int fd, DIR **out)
{
	int r;

	*out = fdopendir(fd);
	if (*out)
		return 0;
	r = -errno;
	close(fd);
	return r;
}

int io_readdir(DIR *dir, const struct dirent **out)
{
	do {
		errno = 0;
		*out = readdir(dir);
		if (!*out)
			return -errno;
	} while (strcmp((*out)->d_name, ".") == 0 || strcmp((*out)->d_name, "..") == 0);
	return 0;
}

int io_llistxattr(const char *path, char *buf, size_t size, size_t *len)
{
	ssize_t n = llistxattr(path, buf, size);

	if (n < 0)
		return -errno;
	*len = (size_t)n;
	return 0;
}

int io_lgetxattr(const char *path, const char *name, void *buf, size_t size, size_t *len)
{
	ssize_t n = lgetxattr(path, name, buf, size);

	if (n < 0)
		return -errno;
	*len = (size_t)n;
	return 0;
}
