/*
 * The seam: every system call of cow/ that touches a source or a fleecing image goes through here,
 * so that a test can link another io.c and let the Nth call fail, be cut short or be lost.
 *
 * All return 0 or -errno. Interrupted calls (EINTR) are resumed and short transfers completed.
 * Thread-safe; no state.
 */
#ifndef FF_COW_IO_H
#define FF_COW_IO_H

#include <stddef.h>
#include <stdint.h>
#include <sys/stat.h>
#include <sys/types.h>

/* *GOT: bytes read; fewer than LEN only at the end of the file. */
int io_pread(int fd, void *buf, size_t len, uint64_t off, size_t *got);
/* LEN bytes or -EIO where the file ends before them. */
int io_pread_full(int fd, void *buf, size_t len, uint64_t off);
/* Writes all LEN bytes. On error some may have been written. */
int io_pwrite(int fd, const void *buf, size_t len, uint64_t off);
/* *DONE: bytes moved, possibly fewer than LEN. */
int io_copy_range(int in_fd, uint64_t in_off, int fd, uint64_t off, size_t len, size_t *done);
int io_truncate(int fd, uint64_t size);
int io_fallocate(int fd, int mode, uint64_t off, uint64_t len);
/* SEEK_DATA or SEEK_HOLE; -ENXIO past the end or where no data follows. Moves the file position,
 * which nothing here relies on. */
int io_seek(int fd, uint64_t off, int whence, uint64_t *out);
int io_fdatasync(int fd);
int io_fsync(int fd);

/* *OUT: a descriptor, O_CLOEXEC always added. */
int io_openat(int dirfd, const char *path, int flags, mode_t mode, int *out);
/* The same, but PATH must stay below DIRFD and no part of it may be a symlink (-ELOOP, -EXDEV). */
int io_open_beneath(int dirfd, const char *path, int flags, mode_t mode, int *out);
/* Holds a shared OFD lock on the byte at OFF as long as FD's open file lives. */
int io_lock_shared(int fd, uint64_t off);
int io_mkdirat(int dirfd, const char *path, mode_t mode);
int io_unlinkat(int dirfd, const char *path, int flags);
int io_renameat(int olddir, const char *old, int newdir, const char *new, unsigned flags);
/* Gives the inode behind FD another name (through /proc/self/fd). */
int io_linkfd(int fd, int newdir, const char *new);
int io_fstat(int fd, struct stat *out);
/* Opens the inode behind FD (O_PATH will do) anew with FLAGS (through /proc/self/fd). */
int io_reopen(int fd, int flags, int *out);

#endif
