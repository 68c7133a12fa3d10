#include "fault_calls.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/uio.h>
#include <unistd.h>

#include "cow/io.h"
#include "round.h"

/* What a call does, as far as that decides which errors it may give. */
enum kind { READS, CHANGES /* without taking space */, GROWS, SYNCS };

enum { PAGE = 4096 };

/* One thread runs the steps and all of this. */
static struct {
	struct fault fault;
	const char *fleece, *source;
	bool armed;
	bool again; /* interrupted: the call that follows is the one that was resumed */
	long count;
	unsigned fired;
} now;

void fault_arm(const struct fault *f, const char *fleece, const char *source)
{
	now.fault = *f;
	now.fleece = fleece;
	now.source = source;
	now.armed = true;
	now.again = false;
	now.count = 0;
	now.fired = 0;
}

void fault_disarm(void)
{
	now.armed = false;
}

void fault_rearm(void)
{
	now.armed = true;
}

long fault_count(void)
{
	return now.count;
}

unsigned fault_fired(void)
{
	unsigned n = now.fired;

	now.fired = 0;
	return n;
}

static bool can_give(int error, enum kind kind)
{
	switch (error) {
	case ENOSPC:
	case EDQUOT:
		return kind == GROWS || kind == SYNCS;
	case EROFS:
		return kind == GROWS || kind == CHANGES;
	default:
		return true;
	}
}

static bool is_below(const char *path, const char *dir)
{
	size_t n = strlen(dir);

	return strncmp(path, dir, n) == 0 && (path[n] == '\0' || path[n] == '/');
}

/* No call after the one that failed needs to be counted: whose it is, is a costly question. */
static bool is_over(void)
{
	return !now.fault.all && now.fault.nth && now.count >= now.fault.nth;
}

/* Is PATH, seen from the directory FD, on the side of the fault? */
static bool on_side(int fd, const char *path)
{
	const char *dir = now.fault.side == FAULT_FLEECE ? now.fleece : now.source;
	char proc[64], target[4096];
	ssize_t n;

	if (path && path[0] == '/' && sscanf(path, "/proc/self/fd/%d", &fd) != 1)
		return is_below(path, dir);
	snprintf(proc, sizeof proc, "/proc/self/fd/%d", fd);
	n = readlink(proc, target, sizeof target - 1);
	if (n < 0)
		return false;
	target[n] = '\0';
	return is_below(target, dir);
}

/* Counts one, and says whether it is the one. */
static bool is_due(void)
{
	now.count++;
	if (now.fault.nth == 0 || now.count < now.fault.nth ||
	    (now.count > now.fault.nth && !now.fault.all))
		return false;
	now.fired++;
	return true;
}

bool fault_alloc(void)
{
	if (!now.armed || !round_in_engine || now.fault.side != FAULT_MEMORY || !is_due())
		return false;
	if (getenv("ROUND_TRAP"))
		raise(SIGTRAP); /* for a debugger: who asked for it? */
	errno = ENOMEM;
	return true;
}

/* 0, or the error that the call is to give. */
static int fails(const char *call, int fd, const char *path, enum kind kind)
{
	if (!now.armed || !round_in_engine || now.fault.error == FAULT_INTERRUPT ||
	    now.fault.side == FAULT_MEMORY || !can_give(now.fault.error, kind) || is_over() ||
	    !on_side(fd, path))
		return 0;
	if (!is_due())
		return 0;
	if (getenv("ROUND_LOG"))
		fprintf(stderr, "%s fails: descriptor %d, %s\n", call, fd, path ? path : "");
	return -now.fault.error;
}

/* Of what is written before the error: whole pages, for within one nothing is torn. */
static size_t first_part(uint64_t off, size_t len)
{
	uint64_t middle = (off + len / 2) / PAGE * PAGE;

	return middle > off ? (size_t)(middle - off) : 0;
}

/* --- cow/io.h --------------------------------------------------------------------------------- */

#define FAIL(fd, path, kind)                                                                       \
	do {                                                                                       \
		int fail_ = fails(__func__, fd, path, kind);                                       \
		if (fail_)                                                                         \
			return fail_;                                                              \
	} while (0)

/* The function NAME with PARAMETERS, called with ARGUMENTS; which of them says where it goes. */
#define WRAP(name, parameters, arguments, fd, path, kind)                                          \
	int __real_##name parameters;                                                              \
	int __wrap_##name parameters;                                                              \
	int __wrap_##name parameters                                                               \
	{                                                                                          \
		FAIL(fd, path, kind);                                                              \
		return __real_##name arguments;                                                    \
	}

WRAP(io_pread, (int fd, void *buf, size_t len, uint64_t off, size_t *got), (fd, buf, len, off, got),
     fd, NULL, READS)
WRAP(io_pread_once, (int fd, void *buf, size_t len, uint64_t off, size_t *got),
     (fd, buf, len, off, got), fd, NULL, READS)
WRAP(io_pread_full, (int fd, void *buf, size_t len, uint64_t off), (fd, buf, len, off), fd, NULL,
     READS)
WRAP(io_copy_range, (int in_fd, uint64_t in_off, int fd, uint64_t off, size_t len, size_t *done),
     (in_fd, in_off, fd, off, len, done), fd, NULL, GROWS)
WRAP(io_truncate, (int fd, uint64_t size), (fd, size), fd, NULL, CHANGES)
WRAP(io_fallocate, (int fd, int mode, uint64_t off, uint64_t len), (fd, mode, off, len), fd, NULL,
     GROWS)
WRAP(io_seek, (int fd, uint64_t off, int whence, uint64_t *out), (fd, off, whence, out), fd, NULL,
     READS)
WRAP(io_fdatasync, (int fd), (fd), fd, NULL, SYNCS)
WRAP(io_fsync, (int fd), (fd), fd, NULL, SYNCS)
WRAP(io_syncfs, (int fd), (fd), fd, NULL, SYNCS)
WRAP(io_openat, (int fd, const char *path, int flags, mode_t mode, int *out),
     (fd, path, flags, mode, out), fd, path,
     flags &O_CREAT               ? GROWS
     : flags &(O_WRONLY | O_RDWR) ? CHANGES
                                  : READS)
WRAP(io_open_beneath, (int fd, const char *path, int flags, mode_t mode, int *out),
     (fd, path, flags, mode, out), fd, path,
     flags &O_CREAT               ? GROWS
     : flags &(O_WRONLY | O_RDWR) ? CHANGES
                                  : READS)
WRAP(io_lock_shared, (int fd, uint64_t off), (fd, off), fd, NULL, READS)
WRAP(io_is_locked, (int fd, uint64_t off, bool *held), (fd, off, held), fd, NULL, READS)
WRAP(io_flock, (int fd, int operation), (fd, operation), fd, NULL, READS)
WRAP(io_mkdirat, (int fd, const char *path, mode_t mode), (fd, path, mode), fd, path, GROWS)
WRAP(io_unlinkat, (int fd, const char *path, int flags), (fd, path, flags), fd, path, CHANGES)
WRAP(io_symlinkat, (const char *target, int fd, const char *path), (target, fd, path), fd, path,
     GROWS)
WRAP(io_readlinkat, (int fd, const char *path, char *buf, size_t size), (fd, path, buf, size), fd,
     path, READS)
WRAP(io_renameat, (int fd, const char *old, int to, const char *new, unsigned flags),
     (fd, old, to, new, flags), fd, old, GROWS)
WRAP(io_linkfd, (int fd, int to, const char *new), (fd, to, new), to, NULL, GROWS)
WRAP(io_fstat, (int fd, struct stat *out), (fd, out), fd, NULL, READS)
WRAP(io_statx, (int fd, const char *path, struct statx *out), (fd, path, out), fd, path, READS)
WRAP(io_fstatvfs, (int fd, struct statvfs *out), (fd, out), fd, NULL, READS)
WRAP(io_readdir, (DIR * dir, const struct dirent **out), (dir, out), dirfd(dir), NULL, READS)
WRAP(io_llistxattr, (const char *path, char *buf, size_t size, size_t *len), (path, buf, size, len),
     -1, path, READS)
WRAP(io_lgetxattr, (const char *path, const char *name, void *buf, size_t size, size_t *len),
     (path, name, buf, size, len), -1, path, READS)
WRAP(io_reopen, (int fd, int flags, int *out), (fd, flags, out), fd, NULL,
     flags &(O_WRONLY | O_RDWR) ? CHANGES : READS)

int __real_io_pwrite(int fd, const void *buf, size_t len, uint64_t off);
int __wrap_io_pwrite(int fd, const void *buf, size_t len, uint64_t off);
int __wrap_io_pwrite(int fd, const void *buf, size_t len, uint64_t off)
{
	int e = fails(__func__, fd, NULL, GROWS);
	size_t part = first_part(off, len);

	if (!e)
		return __real_io_pwrite(fd, buf, len, off);
	if (part)
		__real_io_pwrite(fd, buf, part, off);
	return e;
}

int __real_io_pwrite_part(int fd, const void *buf, size_t len, uint64_t off, size_t *done);
int __wrap_io_pwrite_part(int fd, const void *buf, size_t len, uint64_t off, size_t *done);
int __wrap_io_pwrite_part(int fd, const void *buf, size_t len, uint64_t off, size_t *done)
{
	int e = fails(__func__, fd, NULL, GROWS);
	size_t part = first_part(off, len);

	if (!e)
		return __real_io_pwrite_part(fd, buf, len, off, done);
	*done = 0;
	return part ? __real_io_pwrite_part(fd, buf, part, off, done) : e;
}

int __real_io_fdopendir(int fd, DIR **out);
int __wrap_io_fdopendir(int fd, DIR **out);
int __wrap_io_fdopendir(int fd, DIR **out)
{
	int e = fails(__func__, fd, NULL, READS);

	if (!e)
		return __real_io_fdopendir(fd, out);
	close(fd);
	return e;
}

/* --- the C library ---------------------------------------------------------------------------- */

/* Is this call to be interrupted? With ALL each is, and then succeeds when it is resumed. */
static bool interrupted(int fd, const char *path)
{
	if (!now.armed || !round_in_engine || now.fault.error != FAULT_INTERRUPT || is_over() ||
	    !on_side(fd, path))
		return false;
	if (now.again) {
		now.again = false;
		return false;
	}
	if (!is_due())
		return false;
	now.again = true;
	errno = EINTR;
	return true;
}

#define RESUMED(name, parameters, arguments, fd, path)                                             \
	int __real_##name parameters;                                                              \
	int __wrap_##name parameters;                                                              \
	int __wrap_##name parameters                                                               \
	{                                                                                          \
		return interrupted(fd, path) ? -1 : __real_##name arguments;                       \
	}

RESUMED(ftruncate64, (int fd, off_t len), (fd, len), fd, NULL)
RESUMED(fallocate64, (int fd, int mode, off_t off, off_t len), (fd, mode, off, len), fd, NULL)
RESUMED(fdatasync, (int fd), (fd), fd, NULL)
RESUMED(fsync, (int fd), (fd), fd, NULL)
RESUMED(syncfs, (int fd), (fd), fd, NULL)
RESUMED(flock, (int fd, int how), (fd, how), fd, NULL)
RESUMED(fstatvfs64, (int fd, struct statvfs *out), (fd, out), fd, NULL)

/* Those that move bytes may move fewer. */
#define MOVES(name, parameters, arguments, fewer, fd)                                              \
	ssize_t __real_##name parameters;                                                          \
	ssize_t __wrap_##name parameters;                                                          \
	ssize_t __wrap_##name parameters                                                           \
	{                                                                                          \
		if (!interrupted(fd, NULL))                                                        \
			return __real_##name arguments;                                            \
		if (len < 2 || now.count % 2 == 0)                                                 \
			return -1;                                                                 \
		return __real_##name fewer;                                                        \
	}

MOVES(pread64, (int fd, void *buf, size_t len, off_t off), (fd, buf, len, off),
      (fd, buf, len / 2, off), fd)
MOVES(pwrite64, (int fd, const void *buf, size_t len, off_t off), (fd, buf, len, off),
      (fd, buf, len / 2, off), fd)
MOVES(copy_file_range, (int in_fd, off_t *in_off, int fd, off_t *off, size_t len, unsigned flags),
      (in_fd, in_off, fd, off, len, flags), (in_fd, in_off, fd, off, len / 2, flags), fd)

ssize_t __real_preadv64v2(int fd, const struct iovec *iov, int n, off_t off, int flags);
ssize_t __wrap_preadv64v2(int fd, const struct iovec *iov, int n, off_t off, int flags);
ssize_t __wrap_preadv64v2(int fd, const struct iovec *iov, int n, off_t off, int flags)
{
	struct iovec half = {iov->iov_base, iov->iov_len / 2};

	if (!interrupted(fd, NULL))
		return __real_preadv64v2(fd, iov, n, off, flags);
	if (!half.iov_len || now.count % 2 == 0)
		return -1;
	return __real_preadv64v2(fd, &half, 1, off, flags);
}

int __real_openat64(int fd, const char *path, int flags, ...);
int __wrap_openat64(int fd, const char *path, int flags, ...);
int __wrap_openat64(int fd, const char *path, int flags, ...)
{
	mode_t mode = 0;
	va_list ap;

	if (flags & O_CREAT) {
		va_start(ap, flags);
		mode = va_arg(ap, mode_t);
		va_end(ap);
	}
	return interrupted(fd, path) ? -1 : __real_openat64(fd, path, flags, mode);
}

/* openat2 and renameat2; the latter is never interrupted. */
long __real_syscall(long number, ...);
long __wrap_syscall(long number, ...);
long __wrap_syscall(long number, ...)
{
	long a[5];
	va_list ap;

	va_start(ap, number);
	for (int i = 0; i < 5; i++)
		a[i] = va_arg(ap, long);
	va_end(ap);
	if (number == 437 /* openat2 */ && interrupted((int)a[0], (const char *)a[1]))
		return -1;
	return __real_syscall(number, a[0], a[1], a[2], a[3], a[4]);
}
