/*
 * The seam: every system call of cow/ that touches SOURCE or FLEECE_DIR goes through here, so that
 * a test can put its own functions in their place and let the Nth call fail, be cut short or be
 * lost.
 *
 * All return 0 or -errno. Interrupted calls (EINTR) are resumed and short transfers completed.
 * Thread-safe; no state.
 */
#ifndef FF_COW_IO_H
#define FF_COW_IO_H

#include <dirent.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/types.h>

/* *GOT: bytes read; fewer than LEN only at the end of the file. */
int io_pread(int fd, void *buf, size_t len, uint64_t off, size_t *got);
/* The same for what is not wanted again soon: where kernel and filesystem can, what had to be read
 * from storage does not stay in the page cache. */
int io_pread_once(int fd, void *buf, size_t len, uint64_t off, size_t *got);
/* LEN bytes or -EIO where the file ends before them. */
int io_pread_full(int fd, void *buf, size_t len, uint64_t off);
/* Writes all LEN bytes. On error some may have been written. */
int io_pwrite(int fd, const void *buf, size_t len, uint64_t off);
/* The same for a guest's write, where what was written before an error counts: then *DONE < LEN. */
int io_pwrite_part(int fd, const void *buf, size_t len, uint64_t off, size_t *done);
/* *DONE: bytes moved, possibly fewer than LEN. */
int io_copy_range(int in_fd, uint64_t in_off, int fd, uint64_t off, size_t len, size_t *done);
int io_truncate(int fd, uint64_t size);
int io_fallocate(int fd, int mode, uint64_t off, uint64_t len);
/* SEEK_DATA or SEEK_HOLE; -ENXIO past the end or where no data follows. Moves the file position,
 * which nothing here relies on. */
int io_seek(int fd, uint64_t off, int whence, uint64_t *out);
/* Reads LEN bytes if all are in the page cache; false: not, and what BUF has is undefined. */
bool io_pread_cached(int fd, void *buf, size_t len, uint64_t off);
/* Begins to read the range into the page cache, without waiting for it. */
void io_will_need(int fd, uint64_t off, uint64_t len);
/* *GOT: how many bytes of the range are in the page cache or on their way to it, in whole pages, at
 * most LEN. -ENOSYS: the kernel does not tell. */
int io_cached(int fd, uint64_t off, uint64_t len, uint64_t *got);
int io_fdatasync(int fd);
int io_fsync(int fd);
/* Of the whole filesystem that FD is on. */
int io_syncfs(int fd);

/* *OUT: a descriptor, O_CLOEXEC always added. */
int io_openat(int dirfd, const char *path, int flags, mode_t mode, int *out);
/* The same, but PATH must stay below DIRFD and no part of it may be a symlink (-ELOOP, -EXDEV). */
int io_open_beneath(int dirfd, const char *path, int flags, mode_t mode, int *out);
/* Holds a shared OFD lock on the byte at OFF as long as FD's open file lives. */
int io_lock_shared(int fd, uint64_t off);
/* Does somebody else hold a lock of any kind on the byte at OFF? */
int io_is_locked(int fd, uint64_t off, bool *held);
/* Takes the lock of flock(2) on FD, LOCK_EX or LOCK_SH, or gives it back, LOCK_UN. Never waits:
 * -EWOULDBLOCK, and then a lock that FD had is lost. */
int io_flock(int fd, int operation);
/* These three: below a DIRFD (not AT_FDCWD) no part of PATH that leads to the last may be a
 * symlink. */
int io_mkdirat(int dirfd, const char *path, mode_t mode);
int io_unlinkat(int dirfd, const char *path, int flags);
int io_renameat(int olddir, const char *old, int newdir, const char *new, unsigned flags);
int io_symlinkat(const char *target, int dirfd, const char *path);
/* The target in BUF, cut to SIZE - 1 bytes, with a NUL after it. */
int io_readlinkat(int dirfd, const char *path, char *buf, size_t size);
/* Gives the inode behind FD another name (through /proc/self/fd). */
int io_linkfd(int fd, int newdir, const char *new);
int io_fstat(int fd, struct stat *out);
/* With an empty PATH, of DIRFD itself; never follows a symlink, mounts nothing. Basic fields and
 * the birth time. */
int io_statx(int dirfd, const char *path, struct statx *out);
int io_fstatvfs(int fd, struct statvfs *out);
/* Is SEEK_DATA on FD's filesystem a mere look at extents? Elsewhere it may write back what is dirty
 * (ZFS waits for its whole pool to do so, NFS asks the server). */
bool io_knows_holes(int fd);
/* Is FD on NFS? */
bool io_is_nfs(int fd);
/* The id of the btrfs that FD is on; -ENOTTY: of another filesystem. */
int io_btrfs_id(int fd, uint8_t out[16]);
/* The error, if any, of writing back FD's pages that nobody was told of yet. Flushes nothing. */
int io_writeback_error(int fd);
/* A stream over the directory FD, which belongs to it from then on (also on error). */
int io_fdopendir(int fd, DIR **out);
/* The next entry but "." and "..", or NULL after the last. Valid until the next call. */
int io_readdir(DIR *dir, const struct dirent **out);
/* listxattr(2), getxattr(2) of PATH, which is not followed if it is a symlink. */
int io_llistxattr(const char *path, char *buf, size_t size, size_t *len);
int io_lgetxattr(const char *path, const char *name, void *buf, size_t size, size_t *len);
/* Opens the inode behind FD (O_PATH will do) anew with FLAGS (through /proc/self/fd). */
int io_reopen(int fd, int flags, int *out);

#endif
