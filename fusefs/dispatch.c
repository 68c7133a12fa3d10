/*
 * Requests about names and metadata; dispatch_slow.c has those that may take long, dispatch_file.c
 * and dispatch_dir.c those about open files and directories.
 *
 * A node is referenced while a request uses it. An entry that is replied carries a lookup, which
 * is taken back when the reply finds no one to take it (-ENOENT: the request was interrupted).
 */
#include "fusefs/dispatch.h"

#include <limits.h>
#include <linux/limits.h>
#include <string.h>
#include <sys/statvfs.h>

#include "ff_util.h"
#include "fusefs/inode.h"
#include "fusefs/options.h"

void dispatch_put_cleanup(struct node **n)
{
	node_put(*n);
}

bool dispatch_in_group(void *req, gid_t gid)
{
	gid_t groups[256];
	ff_autofree gid_t *many = NULL;
	gid_t *list = groups;
	int n;

	if (fuse_req_ctx(req)->gid == gid)
		return true;
	n = fuse_req_getgroups(req, FF_ARRAY_SIZE(groups), groups);
	if (n > (int)FF_ARRAY_SIZE(groups)) {
		int room = n;

		list = many = calloc(room, sizeof *many);
		n = many ? FF_MIN(fuse_req_getgroups(req, room, many), room) : 0;
	}
	for (int i = 0; i < n; i++)
		if (list[i] == gid)
			return true;
	return false;
}

struct fuse_entry_param dispatch_entry_param(const struct entry *e)
{
	return (struct fuse_entry_param){
	    .ino = e->node->id,
	    .generation = 1,
	    .attr = e->st,
	    .attr_timeout = e->node->ops->costly ? 0 : e->timeout,
	    .entry_timeout = e->timeout,
	};
}

static void reply_entry(fuse_req_t req, const struct entry *e)
{
	struct fuse_entry_param p = dispatch_entry_param(e);
	struct fs *fs = dispatch_fs(req);
	uint64_t id = e->node->id;

	if (fuse_reply_entry(req, &p) == -ENOENT)
		node_forget(fs->nodes, id, 1);
}

void dispatch_reply_made(fuse_req_t req, int r, struct node *dir, const char *name)
{
	struct entry e;

	if (r == 0)
		r = dir->ops->lookup(dispatch_fs(req), dir, name, &e);
	if (r < 0)
		dispatch_reply_err(req, r);
	else
		reply_entry(req, &e);
}

static void op_lookup(fuse_req_t req, fuse_ino_t parent, const char *name)
{
	struct entry e;
	int r = -ENOTDIR;

	DISPATCH_NODE(dir, parent);
	if (dir->ops->lookup)
		r = dir->ops->lookup(dispatch_fs(req), dir, name, &e);
	if (r < 0)
		dispatch_reply_err(req, r);
	else
		reply_entry(req, &e);
}

static void op_forget(fuse_req_t req, fuse_ino_t ino, uint64_t count)
{
	node_forget(dispatch_fs(req)->nodes, ino, count);
	fuse_reply_none(req);
}

static void op_forget_multi(fuse_req_t req, size_t count, struct fuse_forget_data *forgets)
{
	for (size_t i = 0; i < count; i++)
		node_forget(dispatch_fs(req)->nodes, forgets[i].ino, forgets[i].nlookup);
	fuse_reply_none(req);
}

void dispatch_reply_attr(fuse_req_t req, struct node *n, struct handle *h)
{
	struct fs *fs = dispatch_fs(req);
	double timeout = n->ops->lasting ? FS_FROZEN_TIMEOUT : fs->uncached ? 0 : FS_LIVE_TIMEOUT;
	struct stat st;
	int r = n->ops->getattr(fs, n, h, &st);

	if (r < 0)
		dispatch_reply_err(req, r);
	else
		fuse_reply_attr(req, &st, timeout);
}

static void op_setattr(fuse_req_t req, fuse_ino_t ino, struct stat *attr, int to_set,
                       struct fuse_file_info *fi)
{
	struct attr_change c = {.which = to_set, .st = *attr};
	struct handle *h = fi ? dispatch_handle(fi) : NULL;
	int r;

	DISPATCH_NODE(n, ino);
	r = n->ops->setattr ? n->ops->setattr(dispatch_fs(req), n, h, &c) : n->ops->denied;
	if (r < 0)
		dispatch_reply_err(req, r);
	else
		dispatch_reply_attr(req, n, h);
}

static void op_readlink(fuse_req_t req, fuse_ino_t ino)
{
	char buf[PATH_MAX + 1];
	int r = -EINVAL;

	DISPATCH_NODE(n, ino);
	if (n->ops->readlink)
		r = n->ops->readlink(dispatch_fs(req), n, buf, sizeof buf);
	if (r < 0)
		dispatch_reply_err(req, r);
	else
		fuse_reply_readlink(req, buf);
}

static void op_mknod(fuse_req_t req, fuse_ino_t parent, const char *name, mode_t mode, dev_t rdev)
{
	struct caller who = dispatch_caller(req);
	int r;

	DISPATCH_NODE(dir, parent);
	r = dir->ops->denied;
	if (dir->ops->mknod)
		r = dir->ops->mknod(dispatch_fs(req), dir, name, mode, rdev, &who);
	dispatch_reply_made(req, r, dir, name);
}

static void op_symlink(fuse_req_t req, const char *target, fuse_ino_t parent, const char *name)
{
	struct caller who = dispatch_caller(req);
	struct entry e;
	int r;

	DISPATCH_NODE(dir, parent);
	r = dir->ops->denied;
	if (dir->ops->symlink)
		r = dir->ops->symlink(dispatch_fs(req), dir, name, target, &who, &e);
	if (r < 0)
		dispatch_reply_err(req, r);
	else
		reply_entry(req, &e);
}

static void op_link(fuse_req_t req, fuse_ino_t ino, fuse_ino_t parent, const char *name)
{
	int r;

	DISPATCH_NODE(n, ino);
	DISPATCH_NODE(dir, parent);
	if (!dir->ops->link)
		r = dir->ops->denied;
	else if (n->ops != dir->ops)
		r = -EXDEV;
	else
		r = dir->ops->link(dispatch_fs(req), n, dir, name);
	dispatch_reply_made(req, r, dir, name);
}

static void op_unlink(fuse_req_t req, fuse_ino_t parent, const char *name)
{
	DISPATCH_NODE(dir, parent);
	dispatch_reply_err(req, dir->ops->unlink ? dir->ops->unlink(dispatch_fs(req), dir, name)
	                                         : dir->ops->denied);
}

static void op_rename(fuse_req_t req, fuse_ino_t parent, const char *name, fuse_ino_t new_parent,
                      const char *new_name, unsigned flags)
{
	int r;

	DISPATCH_NODE(dir, parent);
	DISPATCH_NODE(new_dir, new_parent);
	if (!dir->ops->rename)
		r = dir->ops->denied;
	else if (!new_dir->ops->rename)
		r = new_dir->ops->denied;
	else if (dir->ops != new_dir->ops)
		r = -EPERM; /* EXDEV would make mv copy, and leave a snapshot behind */
	else
		r = dir->ops->rename(dispatch_fs(req), dir, name, new_dir, new_name, flags);
	dispatch_reply_err(req, r);
}

/* --- extended attributes, statfs --- */

static void op_getxattr(fuse_req_t req, fuse_ino_t ino, const char *name, size_t size)
{
	ff_autofree char *buf = size ? malloc(size) : NULL;
	size_t len = 0;
	int r = -ENODATA;

	DISPATCH_NODE(n, ino);
	if (size && !buf)
		r = -ENOMEM;
	else if (n->ops->getxattr)
		r = n->ops->getxattr(dispatch_fs(req), n, name, buf, size, &len);
	if (r < 0)
		dispatch_reply_err(req, r);
	else if (size == 0)
		fuse_reply_xattr(req, len);
	else
		fuse_reply_buf(req, buf, len);
}

/* Takes the names out of a list that only an administrator sees; returns the new length. */
static size_t without_trusted(char *list, size_t len)
{
	size_t kept = 0;

	for (size_t i = 0; i < len;) {
		size_t n = strnlen(list + i, len - i - 1) + 1;

		if (strncmp(list + i, "trusted.", 8)) {
			memmove(list + kept, list + i, n);
			kept += n;
		}
		i += n;
	}
	return kept;
}

static void op_listxattr(fuse_req_t req, fuse_ino_t ino, size_t size)
{
	ff_autofree char *list = malloc(XATTR_LIST_MAX);
	size_t len = 0;
	int r = 0;

	DISPATCH_NODE(n, ino);
	if (!list)
		r = -ENOMEM;
	else if (n->ops->listxattr)
		r = n->ops->listxattr(dispatch_fs(req), n, list, XATTR_LIST_MAX, &len);
	if (r == 0 && fuse_req_ctx(req)->uid != 0)
		len = without_trusted(list, len);
	if (r == 0 && size > 0 && len > size)
		r = -ERANGE;
	if (r < 0)
		dispatch_reply_err(req, r);
	else if (size == 0)
		fuse_reply_xattr(req, len);
	else
		fuse_reply_buf(req, list, len);
}

static void op_removexattr(fuse_req_t req, fuse_ino_t ino, const char *name)
{
	DISPATCH_NODE(n, ino);
	dispatch_reply_err(req, n->ops->removexattr ? n->ops->removexattr(dispatch_fs(req), n, name)
	                                            : n->ops->denied);
}

static void op_statfs(fuse_req_t req, fuse_ino_t ino)
{
	struct fs *fs = dispatch_fs(req);
	struct statvfs st;

	DISPATCH_NODE(n, ino);
	if (fstatvfs(n->ops->statfs_fd ? n->ops->statfs_fd(fs, n) : fs->source_fd, &st) < 0)
		fuse_reply_err(req, errno);
	else
		fuse_reply_statfs(req, &st);
}

static void want(struct fuse_conn_info *conn, unsigned caps)
{
	conn->want |= conn->capable & caps;
}

static void op_init(void *userdata, struct fuse_conn_info *conn)
{
	struct fs *fs = userdata;

	want(conn, FUSE_CAP_POSIX_ACL | FUSE_CAP_DONT_MASK | FUSE_CAP_ASYNC_DIO |
	               FUSE_CAP_ASYNC_READ | FUSE_CAP_PARALLEL_DIROPS | FUSE_CAP_READDIRPLUS |
	               FUSE_CAP_READDIRPLUS_AUTO | FUSE_CAP_AUTO_INVAL_DATA);
	conn->max_write = FS_MAX_IO;
	conn->max_read = fs->options->max_read;
	conn->max_readahead = 4u << 20;
	conn->max_background = 128;
	conn->congestion_threshold = 96;
	conn->time_gran = 1;
	if (fs->conn_opts)
		fuse_apply_conn_info_opts(fs->conn_opts, conn);
	/* Whatever the options say. A write that waits in the kernel's cache would miss the freeze;
	 * the kernel clears set-id bits itself, also for O_TRUNC, if it truncates in a step of its
	 * own; writes are to arrive in memory. */
	conn->want &= ~(unsigned)(FUSE_CAP_HANDLE_KILLPRIV | FUSE_CAP_WRITEBACK_CACHE |
	                          FUSE_CAP_ATOMIC_O_TRUNC | FUSE_CAP_SPLICE_READ |
	                          FUSE_CAP_SPLICE_WRITE | FUSE_CAP_SPLICE_MOVE);
	conn->max_write = FF_MIN(conn->max_write, FS_MAX_IO);
}

struct fuse_lowlevel_ops dispatch_ops(void)
{
	struct fuse_lowlevel_ops ops = {
	    .init = op_init,
	    .lookup = op_lookup,
	    .forget = op_forget,
	    .forget_multi = op_forget_multi,
	    .setattr = op_setattr,
	    .readlink = op_readlink,
	    .mknod = op_mknod,
	    .symlink = op_symlink,
	    .link = op_link,
	    .unlink = op_unlink,
	    .rename = op_rename,
	    .getxattr = op_getxattr,
	    .listxattr = op_listxattr,
	    .removexattr = op_removexattr,
	    .statfs = op_statfs,
	};

	dispatch_add_slow_ops(&ops);
	dispatch_add_file_ops(&ops);
	dispatch_add_dir_ops(&ops);
	return ops;
}
