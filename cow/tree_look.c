/*
 * What one entry of SOURCE is: see tree_look.h. Somebody may put another in its place at any
 * moment, so that what is told of it must be of one inode; nothing that is followed leads out of
 * SOURCE.
 */
#include "cow/tree_look.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sysmacros.h>
#include <sys/xattr.h>
#include <unistd.h>

#include "cow/io.h"
#include "cow/open_regular.h"
#include "ff_util.h"

/* Somebody may replace an entry between two looks at it. */
enum { LOOKS = 64 };

/* The xattrs of DIRFD/NAME as one blob. Filesystems without xattrs have none. */
int tree_read_xattrs(int dirfd, const char *name, struct ff_frozen *f)
{
	char proc[40 + NAME_MAX];
	ff_autofree char *list = NULL;
	size_t n;
	int r;

	if (name)
		snprintf(proc, sizeof proc, "/proc/self/fd/%d/%s", dirfd, name);
	else
		snprintf(proc, sizeof proc, "/proc/self/fd/%d/.", dirfd);
	r = io_llistxattr(proc, NULL, 0, &n);
	if (r || n == 0)
		return r == -ENOTSUP || r == -EACCES || r == -EPERM ? 0 : r;
	list = malloc(n);
	if (!list)
		return -ENOMEM;
	r = io_llistxattr(proc, list, n, &n);
	if (r)
		return r;
	for (const char *key = list; key < list + n; key += strlen(key) + 1) {
		size_t key_len = strlen(key) + 1, at = f->xattr_len, len;
		char *p;

		r = io_lgetxattr(proc, key, NULL, 0, &len);
		if (r == -ENODATA || r == -EPERM || r == -EACCES)
			continue; /* gone, or not ours to read */
		if (r)
			return r;
		p = realloc(f->xattrs, at + key_len + 4 + len);
		if (!p)
			return -ENOMEM;
		f->xattrs = p;
		r = io_lgetxattr(proc, key, p + at + key_len + 4, len, &len);
		if (r == -ENODATA)
			continue;
		if (r)
			return r;
		memcpy(p + at, key, key_len);
		ff_put_be32(p + at + key_len, (uint32_t)len);
		f->xattr_len = (uint32_t)(at + key_len + 4 + (size_t)len);
	}
	return 0;
}

static int read_target(int dirfd, const char *name, struct ff_frozen *f)
{
	char buf[PATH_MAX + 1];
	int r = io_readlinkat(dirfd, name, buf, sizeof buf);

	if (r)
		return r;
	f->target = strdup(buf);
	return f->target ? 0 : -ENOMEM;
}

/* Opens directory NAME, if it is still the inode that SX speaks of. */
static int open_same(int dirfd, const char *name, const struct statx *sx, int *out)
{
	ff_autoclose int fd = -1;
	struct stat st;
	int r = io_openat(dirfd, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW, 0, &fd);

	if (!r)
		r = io_fstat(fd, &st);
	if (!r && (st.st_ino != sx->stx_ino ||
	           st.st_dev != makedev(sx->stx_dev_major, sx->stx_dev_minor)))
		r = -ESTALE;
	if (!r)
		*out = ff_take_fd(&fd);
	return r;
}

void tree_take_statx(const struct statx *sx, struct ff_frozen *f)
{
	memset(f, 0, sizeof *f);
	f->st.st_ino = sx->stx_ino;
	f->st.st_mode = sx->stx_mode;
	f->st.st_nlink = sx->stx_nlink;
	f->st.st_uid = sx->stx_uid;
	f->st.st_gid = sx->stx_gid;
	f->st.st_rdev = makedev(sx->stx_rdev_major, sx->stx_rdev_minor);
	f->st.st_size = (off_t)sx->stx_size;
	f->st.st_blksize = sx->stx_blksize;
	f->st.st_blocks = (blkcnt_t)sx->stx_blocks;
	f->st.st_atim = (struct timespec){sx->stx_atime.tv_sec, sx->stx_atime.tv_nsec};
	f->st.st_mtim = (struct timespec){sx->stx_mtime.tv_sec, sx->stx_mtime.tv_nsec};
	f->st.st_ctim = (struct timespec){sx->stx_ctime.tv_sec, sx->stx_ctime.tv_nsec};
	if (sx->stx_mask & STATX_BTIME) {
		f->btime_sec = sx->stx_btime.tv_sec;
		f->btime_nsec = sx->stx_btime.tv_nsec;
	}
	f->disk = TREE_NO_DISK;
}

static dev_t dev_of(const struct statx *sx)
{
	return makedev(sx->stx_dev_major, sx->stx_dev_minor);
}

/* Is this FLEECE_DIR? */
static bool is_hidden(const struct tree_walk *how, const struct statx *sx)
{
	return sx->stx_ino == how->hide_ino && dev_of(sx) == how->hide_dev;
}

/* What is mounted below SOURCE: listed, with an inode number that no other here has. */
static void take_mounted(const struct statx *sx, struct ff_frozen *f)
{
	tree_take_statx(sx, f);
	f->st.st_ino = (sx->stx_ino ^ dev_of(sx) << 32) | UINT64_C(1) << 63;
	if (S_ISREG(sx->stx_mode) || S_ISDIR(sx->stx_mode))
		f->disk = TREE_UNFROZEN;
}

/* A disk that we may not read cannot be frozen: better said now than at the first save. Root may
 * read all, and an owner's right shows in the mode. */
static int check_readable(int dirfd, const char *name, const struct statx *sx)
{
	ff_autoclose int fd = -1;
	uid_t me = geteuid();
	int r;

	if (me == 0 || (sx->stx_uid == me && sx->stx_mode & S_IRUSR))
		return 0;
	r = open_regular(dirfd, name, O_RDONLY, &fd);
	return r == -EINVAL ? -ESTALE : r;
}

/* Has the symlink NAME, which F is of, looked at by who knows more of it. */
static int look_at_link(const struct tree_walk *how, const char *path, int dirfd, const char *name,
                        struct ff_frozen *f)
{
	ff_autoclose int fd = -1;
	struct stat st;
	int r = io_openat(dirfd, name, O_PATH | O_NOFOLLOW, 0, &fd);

	if (!r)
		r = io_fstat(fd, &st);
	if (r == -ENOENT || (!r && st.st_ino != f->st.st_ino))
		r = -ESTALE;
	if (!r)
		r = how->link(how->link_ctx, fd, path, f);
	if (r)
		free(ff_take_ptr(&f->target));
	return r;
}

int tree_look(const struct tree_walk *how, const char *path, int dirfd, const char *name,
              struct ff_frozen *f, int *fd)
{
	struct statx sx;
	int r = -ESTALE;

	for (int i = 0; i < LOOKS && (r == -ESTALE || r == -ENOTDIR || r == -ELOOP); i++) {
		r = io_statx(dirfd, name, &sx);
		if (!r && is_hidden(how, &sx))
			r = -ENOENT;
		if (r)
			return r;
		if (dev_of(&sx) != how->dev) {
			take_mounted(&sx, f);
			return 0;
		}
		tree_take_statx(&sx, f);
		if (S_ISDIR(sx.stx_mode))
			r = open_same(dirfd, name, &sx, fd);
		if (S_ISREG(sx.stx_mode))
			r = check_readable(dirfd, name, &sx);
		if (S_ISLNK(sx.stx_mode)) {
			r = read_target(dirfd, name, f);
			r = r == -EINVAL || r == -ENOENT ? -ESTALE : r;
			if (!r && how->link)
				r = look_at_link(how, path, dirfd, name, f);
		}
	}
	return r;
}
