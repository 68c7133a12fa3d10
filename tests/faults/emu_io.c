/*
 * The functions of cow/io.h as storage that can lose power has them: --wrap of the linker puts them
 * in the place of the real ones. See emu_disk.h.
 */
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "cow/io.h"
#include "emu_disk.h"
#include "ff_util.h"

#define WRAPPED(result, name, ...)                                                                 \
	result __real_##name(__VA_ARGS__);                                                         \
	result __wrap_##name(__VA_ARGS__);                                                         \
	result __wrap_##name(__VA_ARGS__)

static void unlock(const int *unused)
{
	emu_unlock();
}

/* Until the end of the scope. */
#define LOCKED                                                                                     \
	int locked_ __attribute__((cleanup(unlock), unused)) = 0;                                  \
	emu_lock()

WRAPPED(int, io_pwrite, int fd, const void *buf, size_t len, uint64_t off)
{
	LOCKED;
	int r = __real_io_pwrite(fd, buf, len, off);

	if (!r && len)
		emu_note_data(emu_inode_of(fd), EMU_WRITE, off, len, buf);
	return r;
}

WRAPPED(int, io_pwrite_part, int fd, const void *buf, size_t len, uint64_t off, size_t *done)
{
	LOCKED;
	int r = __real_io_pwrite_part(fd, buf, len, off, done);

	if (!r && *done)
		emu_note_data(emu_inode_of(fd), EMU_WRITE, off, *done, buf);
	return r;
}

WRAPPED(int, io_copy_range, int in_fd, uint64_t in_off, int fd, uint64_t off, size_t len,
        size_t *done)
{
	LOCKED;
	ff_autofree void *copy = NULL;
	int r = __real_io_copy_range(in_fd, in_off, fd, off, len, done);

	if (r || !*done)
		return r;
	copy = malloc(*done);
	if (!copy || pread(fd, copy, *done, (off_t)off) != (ssize_t)*done)
		abort();
	emu_note_data(emu_inode_of(fd), EMU_WRITE, off, *done, copy);
	return 0;
}

WRAPPED(int, io_truncate, int fd, uint64_t size)
{
	LOCKED;
	int r = __real_io_truncate(fd, size);

	if (!r)
		emu_note_data(emu_inode_of(fd), EMU_SIZE, size, 0, NULL);
	return r;
}

WRAPPED(int, io_fallocate, int fd, int mode, uint64_t off, uint64_t len)
{
	LOCKED;
	struct stat st;
	int r = __real_io_fallocate(fd, mode, off, len);

	if (r || fstat(fd, &st))
		return r;
	if (mode & (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_ZERO_RANGE))
		emu_note_data(emu_inode_of(fd), EMU_ZERO, off, len, NULL);
	if (!(mode & FALLOC_FL_KEEP_SIZE) && (uint64_t)st.st_size == off + len)
		emu_note_data(emu_inode_of(fd), EMU_SIZE, off + len, 0, NULL);
	return 0;
}

static int sync_fd(int fd, bool fs)
{
	struct emu_inode *in;

	emu_lock();
	in = emu_inode_of(fd);
	emu_unlock();
	emu_sync(in, fs);
	return 0;
}

WRAPPED(int, io_fdatasync, int fd)
{
	return sync_fd(fd, false);
}

WRAPPED(int, io_fsync, int fd)
{
	return sync_fd(fd, false);
}

WRAPPED(int, io_syncfs, int fd)
{
	return sync_fd(fd, true);
}

/* The directory that PATH's last part stands in, in *OUT; that part. *OWN: to be closed. */
static const char *enter(int dirfd, const char *path, int *own, int *out)
{
	const char *slash = strrchr(path, '/');
	ff_autofree char *parent = NULL;

	*out = dirfd;
	if (!slash)
		return path;
	parent = slash == path ? strdup("/") : strndup(path, (size_t)(slash - path));
	*own = parent ? openat(dirfd, parent, O_PATH | O_DIRECTORY | O_CLOEXEC) : -1;
	*out = *own;
	return slash + 1;
}

/* PATH is about to be changed to lead to TO, a new inode if NEW. */
static void note_name(int dirfd, const char *path, struct emu_inode *to, bool new)
{
	ff_autoclose int own = -1;
	int dir;
	const char *name = enter(dirfd, path, &own, &dir);

	if (new)
		to = emu_new(dir, name);
	emu_note_names(emu_dir_of(dir), name, to, NULL, NULL, NULL);
}

typedef int (*open_fn)(int, const char *, int, mode_t, int *);

static int open_noted(open_fn real, int dirfd, const char *path, int flags, mode_t mode, int *out)
{
	struct stat st;
	bool new;
	int r;

	if (!(flags & O_CREAT))
		return real(dirfd, path, flags, mode, out);
	LOCKED;
	new = fstatat(dirfd, path, &st, AT_SYMLINK_NOFOLLOW) < 0;
	r = real(dirfd, path, flags, mode, out);
	if (!r && new)
		note_name(dirfd, path, NULL, true);
	return r;
}

WRAPPED(int, io_openat, int dirfd, const char *path, int flags, mode_t mode, int *out)
{
	if (strcmp(path, "/proc/sys/kernel/random/boot_id") == 0)
		path = emu_boot_id_path();
	return open_noted(__real_io_openat, dirfd, path, flags, mode, out);
}

WRAPPED(int, io_open_beneath, int dirfd, const char *path, int flags, mode_t mode, int *out)
{
	return open_noted(__real_io_open_beneath, dirfd, path, flags, mode, out);
}

WRAPPED(int, io_mkdirat, int dirfd, const char *path, mode_t mode)
{
	LOCKED;
	int r = __real_io_mkdirat(dirfd, path, mode);

	if (!r)
		note_name(dirfd, path, NULL, true);
	return r;
}

WRAPPED(int, io_unlinkat, int dirfd, const char *path, int flags)
{
	LOCKED;
	int r = __real_io_unlinkat(dirfd, path, flags);

	if (!r)
		note_name(dirfd, path, NULL, false);
	return r;
}

WRAPPED(int, io_symlinkat, const char *target, int dirfd, const char *path)
{
	LOCKED;
	int r = __real_io_symlinkat(target, dirfd, path);

	if (!r)
		note_name(dirfd, path, NULL, true);
	return r;
}

WRAPPED(int, io_renameat, int olddir, const char *old, int newdir, const char *new, unsigned flags)
{
	LOCKED;
	ff_autoclose int own = -1, own2 = -1;
	int from, to, r;
	const char *name = enter(olddir, old, &own, &from), *name2 = enter(newdir, new, &own2, &to);
	struct emu_inode *moved = emu_inode_at(from, name), *there = emu_inode_at(to, name2);

	r = __real_io_renameat(olddir, old, newdir, new, flags);
	if (!r)
		emu_rename(moved, name2);
	if (!r && flags & RENAME_EXCHANGE)
		emu_rename(there, name);
	if (!r && moved != there)
		emu_note_names(emu_dir_of(from), name, flags & RENAME_EXCHANGE ? there : NULL,
		               emu_dir_of(to), name2, moved);
	return r;
}

WRAPPED(int, io_linkfd, int fd, int newdir, const char *new)
{
	LOCKED;
	int r = __real_io_linkfd(fd, newdir, new);

	if (!r)
		note_name(newdir, new, emu_inode_of(fd), false);
	return r;
}

WRAPPED(int, io_fstat, int fd, struct stat *out)
{
	LOCKED;
	int r = __real_io_fstat(fd, out);
	struct emu_inode *in = emu_inode_of(fd);
	uint64_t ino;
	int64_t btime;

	if (r || !in)
		return r;
	emu_times(in, &ino, &btime, &out->st_mtim, &out->st_ctim);
	out->st_ino = ino;
	return 0;
}

static void to_statx(struct statx_timestamp *out, const struct timespec *t)
{
	out->tv_sec = t->tv_sec;
	out->tv_nsec = (uint32_t)t->tv_nsec;
}

WRAPPED(int, io_statx, int dirfd, const char *path, struct statx *out)
{
	LOCKED;
	int r = __real_io_statx(dirfd, path, out);
	struct emu_inode *in = *path ? emu_inode_at(dirfd, path) : emu_inode_of(dirfd);
	struct timespec mtime, ctime;
	uint64_t ino;
	int64_t btime;

	if (r || !in)
		return r;
	emu_times(in, &ino, &btime, &mtime, &ctime);
	out->stx_ino = ino;
	out->stx_mask |= STATX_BTIME;
	out->stx_btime = (struct statx_timestamp){.tv_sec = btime};
	to_statx(&out->stx_mtime, &mtime);
	to_statx(&out->stx_ctime, &ctime);
	return 0;
}
