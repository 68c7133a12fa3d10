/*
 * A filesystem that can do little, as NFS version 3 or an old ZFS: what such a one refuses is
 * refused here, in the place of cow/io.c (linker option --wrap).
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>

#include "cow/io.h"

int __real_io_openat(int dirfd, const char *path, int flags, mode_t mode, int *out);
int __wrap_io_openat(int dirfd, const char *path, int flags, mode_t mode, int *out);
int __real_io_renameat(int olddir, const char *old, int newdir, const char *new, unsigned flags);
int __wrap_io_renameat(int olddir, const char *old, int newdir, const char *new, unsigned flags);
int __real_io_statx(int dirfd, const char *path, struct statx *out);
int __wrap_io_statx(int dirfd, const char *path, struct statx *out);
bool __wrap_io_is_nfs(int fd);
int __wrap_io_fallocate(int fd, int mode, uint64_t off, uint64_t len);
int __wrap_io_seek(int fd, uint64_t off, int whence, uint64_t *out);
int __wrap_io_lock_shared(int fd, uint64_t off);
int __wrap_io_llistxattr(const char *path, char *buf, size_t size, size_t *len);
int __wrap_io_lgetxattr(const char *path, const char *name, void *buf, size_t size, size_t *len);

int __wrap_io_openat(int dirfd, const char *path, int flags, mode_t mode, int *out)
{
	return flags & O_DIRECT ? -EINVAL : __real_io_openat(dirfd, path, flags, mode, out);
}

/* An exchange is left in: tests make some, as guests do, who would get the error. */
int __wrap_io_renameat(int olddir, const char *old, int newdir, const char *new, unsigned flags)
{
	return flags & RENAME_NOREPLACE ? -EINVAL
	                                : __real_io_renameat(olddir, old, newdir, new, flags);
}

/* No time of birth. */
int __wrap_io_statx(int dirfd, const char *path, struct statx *out)
{
	int r = __real_io_statx(dirfd, path, out);

	if (r == 0) {
		out->stx_mask &= ~STATX_BTIME;
		out->stx_btime = (struct statx_timestamp){0};
	}
	return r;
}

bool __wrap_io_is_nfs(int fd)
{
	return true;
}

int __wrap_io_fallocate(int fd, int mode, uint64_t off, uint64_t len)
{
	return -EOPNOTSUPP;
}

/* All is data, as the kernel has it for filesystems that do not tell. */
int __wrap_io_seek(int fd, uint64_t off, int whence, uint64_t *out)
{
	struct stat st;

	if (fstat(fd, &st) < 0)
		return -errno;
	if (off >= (uint64_t)st.st_size)
		return -ENXIO;
	*out = whence == SEEK_DATA ? off : (uint64_t)st.st_size;
	return 0;
}

int __wrap_io_lock_shared(int fd, uint64_t off)
{
	return -ENOLCK;
}

int __wrap_io_llistxattr(const char *path, char *buf, size_t size, size_t *len)
{
	return -EOPNOTSUPP;
}

int __wrap_io_lgetxattr(const char *path, const char *name, void *buf, size_t size, size_t *len)
{
	return -EOPNOTSUPP;
}
