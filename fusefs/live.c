/*
 * The live tree: names and metadata. Every call is a pass-through to SOURCE by way of the O_PATH
 * descriptor of a node, so no path is ever walked and no symlink followed: a name is looked up in
 * its directory's descriptor, alone, with O_NOFOLLOW. What is no regular file, directory or
 * symlink is never opened.
 *
 * The root is SOURCE's root with two names more, the directory of snapshots and FF_HIDDEN_NAME,
 * which is not listed, and which hides what SOURCE has of that name. An inode that the engine keeps
 * for itself (FLEECE_DIR, should it lie in SOURCE) is not found either.
 *
 * Each change of names or metadata stands between ff_store_change_begin() and _end(), so that a
 * freeze sees it whole or not at all; unlink, rename and everything that touches a file's bytes go
 * through engine functions that enclose themselves. No lock of ours is held around any of them.
 */
#include "fusefs/live.h"

#include <fcntl.h>
#include <linux/xattr.h>
#include <string.h>
#include <sys/xattr.h>
#include <time.h>

#include "ff_log.h"
#include "ff_util.h"
#include "fusefs/creds.h"
#include "fusefs/fuse_api.h"
#include "fusefs/inode.h"
#include "fusefs/options.h"

enum { COMPLAIN_S = 60 };

int live_stat(struct fs *fs, struct node *node, struct stat *out)
{
	if (fstatat(node->fd, "", out, AT_EMPTY_PATH) < 0)
		return -errno;
	ff_store_fix_stat(fs->store, out);
	if (node == fs->root && out->st_nlink > 1)
		out->st_nlink++; /* the directory of snapshots */
	return 0;
}

static int live_getattr(struct fs *fs, struct node *node, struct handle *handle, struct stat *out)
{
	return live_stat(fs, node, out);
}

/* Says what to do when a file cannot be found for want of a descriptor; once a minute, not for each
 * of the names that a find(1) asks for. */
static void complain(struct fs *fs)
{
	struct timespec now;
	long long last = atomic_load(&fs->complained);

	clock_gettime(CLOCK_MONOTONIC, &now);
	if ((!last || now.tv_sec - last >= COMPLAIN_S) &&
	    atomic_compare_exchange_strong(&fs->complained, &last, now.tv_sec + 1))
		ff_error("more files are in use than there may be descriptors: raise the limit of "
		         "open files (ulimit -Hn, or LimitNOFILE= of a service) and mount anew");
}

/* live_entry(), but a symlink is one whatever it leads to. */
static int enter_inode(struct fs *fs, int fd, struct entry *out)
{
	struct node proto = {.ops = &live_node_ops, .fd = fd};
	int r;

	/* Looking at many names must not leave a save without a descriptor. */
	if (fstatat(fd, "", &out->st, AT_EMPTY_PATH) < 0 || fd > fs->highest_fd) {
		r = fd > fs->highest_fd ? -ENFILE : -errno;
		if (fd > fs->highest_fd)
			complain(fs);
		close(fd);
		return r;
	}
	if (ff_store_hides(fs->store, out->st.st_dev, out->st.st_ino)) {
		close(fd);
		return -ENOENT;
	}
	proto.key[0] = out->st.st_dev;
	proto.key[1] = out->st.st_ino;
	ff_store_fix_stat(fs->store, &out->st);
	out->timeout = fs->uncached ? 0 : FS_LIVE_TIMEOUT;
	if (S_ISLNK(out->st.st_mode) && fs->options->device_count > 0)
		out->timeout = 0; /* it may have become a block device's */
	return node_enter(fs->nodes, &proto, &out->node);
}

int live_entry(struct fs *fs, int fd, struct entry *out)
{
	int r = live_device_entry(fs, fd, out);

	if (r == -ENOENT)
		return enter_inode(fs, fd, out);
	close(fd);
	return r;
}

int live_lookup(struct fs *fs, struct node *dir, const char *name, struct entry *out)
{
	int fd;

	if (dir == fs->root && !strcmp(name, fs->snapdir)) {
		out->node = fs->snaps;
		out->timeout = FS_LIVE_TIMEOUT;
		return fs->snaps->ops->getattr(fs, fs->snaps, NULL, &out->st);
	}
	if (dir == fs->root && !strcmp(name, FF_HIDDEN_NAME)) {
		out->node = fs->control[FS_CONTROL_FILES];
		out->timeout = FS_LIVE_TIMEOUT;
		return out->node->ops->getattr(fs, out->node, NULL, &out->st);
	}
	fd = openat(dir->fd, name, O_PATH | O_NOFOLLOW | O_CLOEXEC);
	if (fd < 0)
		return -errno;
	return live_entry(fs, fd, out);
}

int live_may_change(struct fs *fs, const struct node *dir, const char *name, bool make)
{
	if (dir != fs->root)
		return 0;
	if (!strcmp(name, fs->snapdir) || !strcmp(name, FF_HIDDEN_NAME))
		return make ? -EEXIST : -EBUSY;
	return 0;
}

/* Changes owner first (that clears set-id bits), then mode, then times. */
static int set_metadata(struct node *node, const struct attr_change *c)
{
	uid_t uid = c->which & FUSE_SET_ATTR_UID ? c->st.st_uid : (uid_t)-1;
	gid_t gid = c->which & FUSE_SET_ATTR_GID ? c->st.st_gid : (gid_t)-1;
	struct timespec ts[2] = {{.tv_nsec = UTIME_OMIT}, {.tv_nsec = UTIME_OMIT}};
	struct live_path path = live_path(node->fd);

	if (c->which & (FUSE_SET_ATTR_UID | FUSE_SET_ATTR_GID) &&
	    fchownat(node->fd, "", uid, gid, AT_EMPTY_PATH) < 0)
		return -errno;
	if (c->which & FUSE_SET_ATTR_MODE && chmod(path.s, c->st.st_mode & 07777) < 0)
		return -errno;
	if (c->which & FUSE_SET_ATTR_ATIME_NOW)
		ts[0].tv_nsec = UTIME_NOW;
	else if (c->which & FUSE_SET_ATTR_ATIME)
		ts[0] = c->st.st_atim;
	if (c->which & FUSE_SET_ATTR_MTIME_NOW)
		ts[1].tv_nsec = UTIME_NOW;
	else if (c->which & FUSE_SET_ATTR_MTIME)
		ts[1] = c->st.st_mtim;
	if ((ts[0].tv_nsec != UTIME_OMIT || ts[1].tv_nsec != UTIME_OMIT) &&
	    utimensat(AT_FDCWD, path.s, ts, 0) < 0)
		return -errno;
	return 0;
}

int live_set_metadata(struct fs *fs, struct node *node, const struct attr_change *change)
{
	int r;

	ff_store_change_begin(fs->store);
	r = set_metadata(node, change);
	ff_store_change_end(fs->store);
	return r;
}

static int live_setattr(struct fs *fs, struct node *node, struct handle *handle,
                        const struct attr_change *change)
{
	int r = 0;

	if (change->which & FUSE_SET_ATTR_SIZE)
		r = live_truncate(fs, node, handle, change->st.st_size);
	return r < 0 ? r : live_set_metadata(fs, node, change);
}

/* A write by an ordinary user takes the set-user-id bit and the set-group-id bit, an ACL set by one
 * the latter; without group execute permission only if he is not of the file's group. The kernel
 * does that for cached writes to files with group execute permission, else it leaves it to us. */
void live_drop_setid(struct fs *fs, struct node *node, const struct caller *who, bool acl)
{
	struct stat st;
	mode_t drop;

	if (who->uid == 0 || fstatat(node->fd, "", &st, AT_EMPTY_PATH) < 0)
		return;
	drop = st.st_mode & (acl ? S_ISGID : S_ISUID | S_ISGID);
	if (!drop || !(S_ISREG(st.st_mode) || acl))
		return;
	if (drop & S_ISGID && (acl || !(st.st_mode & S_IXGRP)) &&
	    who->in_group(who->ask, st.st_gid))
		drop &= ~(mode_t)S_ISGID;
	if (!drop)
		return;
	ff_store_change_begin(fs->store);
	chmod(live_path(node->fd).s, st.st_mode & 07777 & ~drop);
	ff_store_change_end(fs->store);
	fuse_lowlevel_notify_inval_inode(fs->se, node->id, -1, 0);
}

static int live_readlink(struct fs *fs, struct node *node, char *buf, size_t size)
{
	ssize_t n = readlinkat(node->fd, "", buf, size);

	if (n < 0)
		return -errno;
	if ((size_t)n >= size)
		return -ENAMETOOLONG;
	buf[n] = '\0';
	return 0;
}

static int live_statfs_fd(struct fs *fs, struct node *node)
{
	return node->fd;
}

static int make_node(int dir, const char *name, mode_t mode, dev_t rdev)
{
	int fd;

	if (S_ISDIR(mode))
		return mkdirat(dir, name, mode & 07777) < 0 ? -errno : 0;
	if (!S_ISREG(mode))
		return mknodat(dir, name, mode, rdev) < 0 ? -errno : 0;
	fd = openat(dir, name, O_CREAT | O_EXCL | O_NOFOLLOW | O_WRONLY | O_CLOEXEC, mode & 07777);
	if (fd < 0)
		return -errno;
	close(fd);
	return 0;
}

static int live_mknod(struct fs *fs, struct node *dir, const char *name, mode_t mode, dev_t rdev,
                      const struct caller *who)
{
	struct creds creds;
	int r = live_may_change(fs, dir, name, true);

	if (r < 0)
		return r;
	ff_store_change_begin(fs->store);
	creds_begin(fs, who, &creds);
	r = make_node(dir->fd, name, mode & ~creds.mask, rdev);
	creds_end(&creds);
	if (r == 0)
		r = creds_give(&creds, dir->fd, name);
	ff_store_change_end(fs->store);
	return r;
}

static int live_mkdir(struct fs *fs, struct node *dir, const char *name, mode_t mode,
                      const struct caller *who)
{
	return live_mknod(fs, dir, name, S_IFDIR | (mode & 07777), 0, who);
}

/* The kernel wants to have a symlink for a symlink. If it leads to a block device that is to be
 * served, the next look at it shows that. */
static int live_symlink(struct fs *fs, struct node *dir, const char *name, const char *target,
                        const struct caller *who, struct entry *out)
{
	struct creds creds;
	int fd, r = live_may_change(fs, dir, name, true);

	if (r < 0)
		return r;
	ff_store_change_begin(fs->store);
	creds_begin(fs, who, &creds);
	if (symlinkat(target, dir->fd, name) < 0)
		r = -errno;
	creds_end(&creds);
	if (r == 0)
		r = creds_give(&creds, dir->fd, name);
	ff_store_change_end(fs->store);
	if (r < 0)
		return r;
	fd = openat(dir->fd, name, O_PATH | O_NOFOLLOW | O_CLOEXEC);
	return fd < 0 ? -errno : enter_inode(fs, fd, out);
}

static int live_link(struct fs *fs, struct node *node, struct node *dir, const char *name)
{
	struct live_path path = live_path(node->fd);
	int r = live_may_change(fs, dir, name, true);

	if (r < 0)
		return r;
	ff_store_change_begin(fs->store);
	if (linkat(AT_FDCWD, path.s, dir->fd, name, AT_SYMLINK_FOLLOW) < 0)
		r = -errno;
	ff_store_change_end(fs->store);
	return r;
}

static int live_unlink(struct fs *fs, struct node *dir, const char *name)
{
	int r = live_may_change(fs, dir, name, false);

	return r < 0 ? r : ff_store_unlink(fs->store, dir->fd, name);
}

static int live_rmdir(struct fs *fs, struct node *dir, const char *name)
{
	int r = live_may_change(fs, dir, name, false);

	if (r < 0)
		return r;
	ff_store_change_begin(fs->store);
	if (unlinkat(dir->fd, name, AT_REMOVEDIR) < 0)
		r = -errno;
	ff_store_change_end(fs->store);
	return r;
}

static int live_rename(struct fs *fs, struct node *dir, const char *name, struct node *new_dir,
                       const char *new_name, unsigned flags)
{
	int r = live_may_change(fs, dir, name, false);

	if (r == 0) {
		r = live_may_change(fs, new_dir, new_name, true);
		if (r == -EEXIST && !(flags & RENAME_NOREPLACE))
			r = -EBUSY;
	}
	if (r < 0)
		return r;
	if (flags & ~(unsigned)(RENAME_NOREPLACE | RENAME_EXCHANGE))
		return -EINVAL;
	return ff_store_rename(fs->store, dir->fd, name, new_dir->fd, new_name, flags);
}

static int live_getxattr(struct fs *fs, struct node *node, const char *name, void *buf, size_t size,
                         size_t *len)
{
	ssize_t n = getxattr(live_path(node->fd).s, name, buf, size);

	if (n < 0)
		return -errno;
	*len = n;
	return 0;
}

static int live_listxattr(struct fs *fs, struct node *node, char *buf, size_t size, size_t *len)
{
	ssize_t n = listxattr(live_path(node->fd).s, buf, size);

	if (n < 0)
		return -errno;
	*len = n;
	return 0;
}

static int live_setxattr(struct fs *fs, struct node *node, const char *name, const void *value,
                         size_t size, int flags, const struct caller *who)
{
	int r = 0;

	ff_store_change_begin(fs->store);
	if (setxattr(live_path(node->fd).s, name, value, size, flags) < 0)
		r = -errno;
	ff_store_change_end(fs->store);
	if (r == 0 && !strcmp(name, XATTR_NAME_POSIX_ACL_ACCESS))
		live_drop_setid(fs, node, who, true);
	return r;
}

static int live_removexattr(struct fs *fs, struct node *node, const char *name)
{
	int r = 0;

	ff_store_change_begin(fs->store);
	if (removexattr(live_path(node->fd).s, name) < 0)
		r = -errno;
	ff_store_change_end(fs->store);
	return r;
}

const struct node_ops live_node_ops = {
    .denied = -EOPNOTSUPP,
    .lookup = live_lookup,
    .getattr = live_getattr,
    .setattr = live_setattr,
    .readlink = live_readlink,
    .statfs_fd = live_statfs_fd,
    .mknod = live_mknod,
    .mkdir = live_mkdir,
    .symlink = live_symlink,
    .link = live_link,
    .unlink = live_unlink,
    .rmdir = live_rmdir,
    .rename = live_rename,
    .open = live_open,
    .create = live_create,
    .tmpfile = live_tmpfile,
    .opendir = live_opendir,
    .getxattr = live_getxattr,
    .listxattr = live_listxattr,
    .setxattr = live_setxattr,
    .removexattr = live_removexattr,
};
