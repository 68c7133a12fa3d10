/*
 * Requests about open directories. A reply is filled with as many entries as fit. READDIRPLUS also
 * looks each entry up, which counts as a lookup of the kernel's; entries that cannot be looked up
 * (gone meanwhile, or no descriptor left for them) are given without. Lookups are taken back when
 * the reply finds no one to take it.
 */
#include <string.h>

#include "ff_util.h"
#include "fusefs/dispatch.h"
#include "fusefs/inode.h"

/* Most entries in one reply: the smallest takes 24 bytes, with its attributes 152. */
#define MAX_ENTRIES 1024

struct reply {
	fuse_req_t req;
	struct handle *h;
	char *buf;
	size_t size, used;
	size_t count;
	uint64_t looked_up[MAX_ENTRIES]; /* node ids; 0: none */
};

static void op_opendir(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
	struct handle *h;
	int r = -ENOTDIR;

	DISPATCH_NODE(n, ino);
	if (n->ops->opendir)
		r = n->ops->opendir(dispatch_fs(req), n, &h);
	if (r < 0) {
		dispatch_reply_err(req, r);
		return;
	}
	fi->fh = (uintptr_t)h;
	if (fuse_reply_open(req, fi) == -ENOENT)
		handle_free(h);
}

static bool is_dot(const char *name)
{
	return name[0] == '.' && (!name[1] || (name[1] == '.' && !name[2]));
}

static struct fuse_entry_param plain_param(const struct dir_item *item)
{
	return (struct fuse_entry_param){
	    .attr = {.st_ino = item->ino, .st_mode = item->type},
	};
}

/* Adds ITEM with its attributes; false when it does not fit. */
static bool add_plus(struct reply *rp, const struct dir_item *item)
{
	struct fuse_entry_param p = plain_param(item);
	struct fs *fs = rp->h->fs;
	struct node *dir = rp->h->node;
	struct entry e;
	size_t room = rp->size - rp->used;

	if (fuse_add_direntry_plus(rp->req, NULL, 0, item->name, &p, item->next) > room)
		return false;
	rp->looked_up[rp->count] = 0;
	if (!is_dot(item->name) && dir->ops->lookup(fs, dir, item->name, &e) == 0) {
		p = dispatch_entry_param(&e);
		rp->looked_up[rp->count] = p.ino;
	}
	rp->used +=
	    fuse_add_direntry_plus(rp->req, rp->buf + rp->used, room, item->name, &p, item->next);
	return true;
}

static bool add_plain(struct reply *rp, const struct dir_item *item)
{
	struct fuse_entry_param p = plain_param(item);
	size_t room = rp->size - rp->used;
	size_t need =
	    fuse_add_direntry(rp->req, rp->buf + rp->used, room, item->name, &p.attr, item->next);

	if (need > room)
		return false;
	rp->looked_up[rp->count] = 0;
	rp->used += need;
	return true;
}

static int fill(struct reply *rp, off_t off, bool plus)
{
	struct dir_item item;

	FF_GUARD(&rp->h->dir_lock);
	while (rp->count < MAX_ENTRIES) {
		int r = rp->h->ops->item(rp->h, off, &item);

		if (r == -ENOENT)
			break;
		if (r < 0)
			return rp->count > 0 ? 0 : r;
		if (plus ? !add_plus(rp, &item) : !add_plain(rp, &item))
			break;
		rp->count++;
		off = item.next;
	}
	return 0;
}

static void read_dir(fuse_req_t req, size_t size, off_t off, struct fuse_file_info *fi, bool plus)
{
	struct fs *fs = dispatch_fs(req);
	ff_autofree struct reply *rp = malloc(sizeof *rp);
	ff_autofree char *buf = malloc(size);
	int r = -ENOTDIR;

	if (!rp || !buf) {
		fuse_reply_err(req, ENOMEM);
		return;
	}
	rp->req = req;
	rp->h = dispatch_handle(fi);
	rp->buf = buf;
	rp->size = size;
	rp->used = rp->count = 0;
	if (rp->h->ops->item)
		r = fill(rp, off, plus);
	if (r < 0) {
		dispatch_reply_err(req, r);
		return;
	}
	if (fuse_reply_buf(req, buf, rp->used) != -ENOENT)
		return;
	for (size_t i = 0; i < rp->count; i++)
		if (rp->looked_up[i])
			node_forget(fs->nodes, rp->looked_up[i], 1);
}

static void op_readdir(fuse_req_t req, fuse_ino_t ino, size_t size, off_t off,
                       struct fuse_file_info *fi)
{
	read_dir(req, size, off, fi, false);
}

static void op_readdirplus(fuse_req_t req, fuse_ino_t ino, size_t size, off_t off,
                           struct fuse_file_info *fi)
{
	read_dir(req, size, off, fi, true);
}

static void op_releasedir(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
	handle_free(dispatch_handle(fi));
	fuse_reply_err(req, 0);
}

static void op_fsyncdir(fuse_req_t req, fuse_ino_t ino, int data_only, struct fuse_file_info *fi)
{
	struct handle *h = dispatch_handle(fi);

	dispatch_reply_err(req, h->ops->sync ? h->ops->sync(h, data_only) : -EINVAL);
}

void dispatch_add_dir_ops(struct fuse_lowlevel_ops *ops)
{
	ops->opendir = op_opendir;
	ops->readdir = op_readdir;
	ops->readdirplus = op_readdirplus;
	ops->releasedir = op_releasedir;
	ops->fsyncdir = op_fsyncdir;
}
