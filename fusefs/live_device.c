/*
 * Block devices in the live tree: a symlink to one that the options name is shown as a regular file
 * of its size. The engine decides which are, and has the rules; here such a node is one whose
 * descriptor is of the device in /dev, so that two symlinks to one device are one file.
 *
 * Names are the symlink's: unlink and rename act on that. Mode, owner and times are the device
 * node's, and who changes them through the mount changes them there, as he would through the
 * symlink; whether he may is decided by the kernel, by these same. There is no xattr.
 *
 * The kernel keeps nothing of it in memory: the page cache of the device itself is the only one,
 * and whoever uses the device directly sees the same. So a shared mapping is refused.
 *
 * A file that a program truncates to nothing before it writes (O_TRUNC) has holes where that then
 * writes nothing. A device keeps what it had there, so what is truncated to nothing by name or at
 * open is filled with zeros instead, lest a restored disk have bytes of the old one. No other
 * change of size is possible.
 */
#include <fcntl.h>
#include <linux/falloc.h>

#include "ff_util.h"
#include "fusefs/fuse_api.h"
#include "fusefs/inode.h"
#include "fusefs/live.h"
#include "fusefs/options.h"

int live_device_entry(struct fs *fs, int link_fd, struct entry *out)
{
	struct node proto = {.ops = &device_node_ops, .fd = -1};
	struct stat st;
	int fd, r;

	if (fs->options->device_count == 0)
		return -ENOENT;
	r = ff_device_at(fs->store, link_fd, &fd);
	if (r < 0)
		return r;
	if (fstat(fd, &st) < 0)
		r = -errno;
	if (r == 0)
		r = ff_device_stat(fs->store, fd, &out->st);
	if (r < 0) {
		close(fd);
		return r;
	}
	proto.fd = fd;
	proto.key[0] = st.st_dev;
	proto.key[1] = st.st_ino;
	out->timeout = 0;
	return node_enter(fs->nodes, &proto, &out->node);
}

bool live_device_item(struct fs *fs, int dir_fd, const char *name, struct dir_item *out)
{
	ff_autoclose int link = -1, fd = -1;
	struct stat st;

	if (fs->options->device_count == 0)
		return false;
	link = openat(dir_fd, name, O_PATH | O_NOFOLLOW | O_CLOEXEC);
	if (link < 0 || ff_device_at(fs->store, link, &fd) < 0 ||
	    ff_device_stat(fs->store, fd, &st) < 0)
		return false;
	out->ino = st.st_ino;
	out->type = S_IFREG;
	return true;
}

static int device_getattr(struct fs *fs, struct node *node, struct handle *handle, struct stat *out)
{
	return ff_device_stat(fs->store, node->fd, out);
}

int live_device_open(struct fs *fs, struct node *node, int flags)
{
	int fd, r = ff_device_open(fs->store, node->fd, flags, &fd);

	return r < 0 ? r : fd;
}

static int zero_all(struct fs *fs, struct node *node)
{
	struct ff_change change = {.kind = FF_FALLOCATE,
	                           .mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE};
	struct ff_disk *disk;
	struct stat st;
	size_t done;
	int r = live_device_open(fs, node, O_WRONLY);

	if (r < 0)
		return r;
	change.fd = r;
	r = ff_disk_get(fs->store, change.fd, &disk);
	if (r == 0) {
		r = ff_device_stat(fs->store, node->fd, &st);
		change.len = (size_t)st.st_size;
		if (r == 0)
			r = ff_disk_change(disk, &change, &done);
		ff_disk_put(disk);
	}
	close(change.fd);
	return r;
}

static int device_setattr(struct fs *fs, struct node *node, struct handle *handle,
                          const struct attr_change *change)
{
	struct stat st;
	int r = 0;

	if (change->which & FUSE_SET_ATTR_SIZE) {
		r = ff_device_stat(fs->store, node->fd, &st);
		if (r == 0 && change->st.st_size != st.st_size)
			r = change->st.st_size == 0 && !handle ? zero_all(fs, node) : -EPERM;
	}
	return r < 0 ? r : live_set_metadata(fs, node, change);
}

static int device_statfs_fd(struct fs *fs, struct node *node)
{
	return fs->source_fd;
}

const struct node_ops device_node_ops = {
    .denied = -EOPNOTSUPP,
    .getattr = device_getattr,
    .setattr = device_setattr,
    .statfs_fd = device_statfs_fd,
    .open = live_open,
};
