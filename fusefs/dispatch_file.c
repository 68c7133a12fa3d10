/*
 * Requests about open files. A handle is what the kernel got as fh; it is good from the reply to
 * OPEN or CREATE to RELEASE, and needs no lookup. It is taken back at once when the reply finds no
 * one to take it (-ENOENT: the request was interrupted).
 */
#include <linux/fuse.h>
#include <string.h>

#include "ff_util.h"
#include "fusefs/dispatch.h"
#include "fusefs/inode.h"

#ifndef HAVE_PARALLEL_DIRECT_WRITES
/* This libfuse cannot say FOPEN_PARALLEL_DIRECT_WRITES: the replies are made by hand. */
static struct fuse_entry_out entry_out(const struct fuse_entry_param *e)
{
	const struct stat *st = &e->attr;

	return (struct fuse_entry_out){
	    .nodeid = e->ino,
	    .generation = e->generation,
	    .entry_valid = (uint64_t)e->entry_timeout,
	    .attr_valid = (uint64_t)e->attr_timeout,
	    .attr =
	        {
	            .ino = st->st_ino,
	            .size = st->st_size,
	            .blocks = st->st_blocks,
	            .atime = st->st_atim.tv_sec,
	            .mtime = st->st_mtim.tv_sec,
	            .ctime = st->st_ctim.tv_sec,
	            .atimensec = st->st_atim.tv_nsec,
	            .mtimensec = st->st_mtim.tv_nsec,
	            .ctimensec = st->st_ctim.tv_nsec,
	            .mode = st->st_mode,
	            .nlink = st->st_nlink,
	            .uid = st->st_uid,
	            .gid = st->st_gid,
	            .rdev = st->st_rdev,
	            .blksize = st->st_blksize,
	        },
	};
}
#endif

static int reply_open(fuse_req_t req, struct handle *h, struct fuse_file_info *fi)
{
#ifdef HAVE_PARALLEL_DIRECT_WRITES
	fi->fh = (uintptr_t)h;
	fi->direct_io = !!(h->open_flags & FOPEN_DIRECT_IO);
	fi->keep_cache = !!(h->open_flags & FOPEN_KEEP_CACHE);
	fi->parallel_direct_writes = !!(h->open_flags & FOPEN_PARALLEL_DIRECT_WRITES);
	return fuse_reply_open(req, fi);
#else
	struct fuse_open_out out = {.fh = (uintptr_t)h, .open_flags = h->open_flags};

	return fuse_reply_buf(req, (const char *)&out, sizeof out);
#endif
}

static int reply_create(fuse_req_t req, const struct entry *e, struct handle *h,
                        struct fuse_file_info *fi)
{
	struct fuse_entry_param p = dispatch_entry_param(e);
#ifdef HAVE_PARALLEL_DIRECT_WRITES
	fi->fh = (uintptr_t)h;
	fi->direct_io = !!(h->open_flags & FOPEN_DIRECT_IO);
	fi->keep_cache = !!(h->open_flags & FOPEN_KEEP_CACHE);
	fi->parallel_direct_writes = !!(h->open_flags & FOPEN_PARALLEL_DIRECT_WRITES);
	return fuse_reply_create(req, &p, fi);
#else
	struct {
		struct fuse_entry_out entry;
		struct fuse_open_out open;
	} out = {entry_out(&p), {.fh = (uintptr_t)h, .open_flags = h->open_flags}};

	return fuse_reply_buf(req, (const char *)&out, sizeof out);
#endif
}

static void op_open(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
	struct caller who = dispatch_caller(req);
	struct handle *h;
	int r = -EISDIR;

	DISPATCH_NODE(n, ino);
	if (n->ops->open_as)
		r = n->ops->open_as(dispatch_fs(req), n, fi->flags, &who, &h);
	else if (n->ops->open)
		r = n->ops->open(dispatch_fs(req), n, fi->flags, &h);
	if (r < 0)
		dispatch_reply_err(req, r);
	else if (reply_open(req, h, fi) == -ENOENT)
		handle_free(h);
}

static void reply_created(fuse_req_t req, int r, const struct entry *e, struct handle *h,
                          struct fuse_file_info *fi)
{
	struct fs *fs = dispatch_fs(req);

	if (r < 0) {
		dispatch_reply_err(req, r);
	} else {
		uint64_t id = e->node->id;

		if (reply_create(req, e, h, fi) == -ENOENT) {
			handle_free(h);
			node_forget(fs->nodes, id, 1);
		}
	}
}

static void op_create(fuse_req_t req, fuse_ino_t parent, const char *name, mode_t mode,
                      struct fuse_file_info *fi)
{
	struct caller who = dispatch_caller(req);
	struct handle *h = NULL;
	struct entry e;
	int r;

	DISPATCH_NODE(dir, parent);
	r = dir->ops->denied;
	if (dir->ops->create)
		r = dir->ops->create(dispatch_fs(req), dir, name, mode, fi->flags, &who, &e, &h);
	reply_created(req, r, &e, h, fi);
}

#ifdef HAVE_TMPFILE
static void op_tmpfile(fuse_req_t req, fuse_ino_t parent, mode_t mode, struct fuse_file_info *fi)
{
	struct caller who = dispatch_caller(req);
	struct handle *h = NULL;
	struct entry e;
	int r;

	DISPATCH_NODE(dir, parent);
	r = dir->ops->denied;
	if (dir->ops->tmpfile)
		r = dir->ops->tmpfile(dispatch_fs(req), dir, mode, fi->flags, &who, &e, &h);
	reply_created(req, r, &e, h, fi);
}
#endif

/* --- a read that may take long, in a thread of its own --- */

struct long_read {
	fuse_req_t req;
	struct handle *h; /* which the kernel does not release before the reply */
	size_t size;
	off_t off;
};

/* Does the reader not wait any more, or does the mount end? */
static bool is_given_up(void *req)
{
	return fuse_req_interrupted(req) || fuse_session_exited(dispatch_fs(req)->se);
}

static void *run_long_read(void *arg)
{
	struct long_read *t = arg;
	struct fs *fs = dispatch_fs(t->req);
	ff_autofree char *buf = malloc(t->size + 1);
	size_t got = 0;
	int r = -ENOMEM;

	if (buf)
		r = t->h->ops->read_long(t->h, buf, t->size, t->off, &got, is_given_up, t->req);
	if (r < 0)
		dispatch_reply_err(t->req, r);
	else
		fuse_reply_buf(t->req, buf, got);
	free(t);
	dispatch_task_ends(fs);
	return NULL;
}

static void read_for_long(fuse_req_t req, struct handle *h, size_t size, off_t off)
{
	struct long_read *t = malloc(sizeof *t);
	int r = -ENOMEM;

	if (t) {
		*t = (struct long_read){req, h, size, off};
		r = dispatch_start_task(dispatch_fs(req), run_long_read, t);
	}
	if (r < 0) {
		free(t);
		dispatch_reply_err(req, r);
	}
}

static void op_read(fuse_req_t req, fuse_ino_t ino, size_t size, off_t off,
                    struct fuse_file_info *fi)
{
	struct handle *h = dispatch_handle(fi);
	struct fs_thread *th = fs_thread(dispatch_fs(req));
	char *buf = NULL, *own = NULL;
	size_t got = 0;
	int r = -EBADF;

	if (th && size <= FS_MAX_IO)
		buf = th->buf;
	else if (posix_memalign((void **)&own, 4096, size) == 0)
		buf = own;
	if (!buf)
		r = -ENOMEM;
	else if (h->ops->read)
		r = h->ops->read(h, buf, size, off, &got);
	if (r == -EINPROGRESS && h->ops->read_long)
		read_for_long(req, h, size, off);
	else if (r < 0)
		dispatch_reply_err(req, r);
	else
		fuse_reply_buf(req, buf, got);
	free(own);
}

static void op_write(fuse_req_t req, fuse_ino_t ino, const char *buf, size_t size, off_t off,
                     struct fuse_file_info *fi)
{
	struct handle *h = dispatch_handle(fi);
	struct caller who = dispatch_caller(req);
	size_t done = 0;
	int r = -EBADF;

	if (h->ops->write)
		r = h->ops->write(h, buf, size, off, fi->flags, fi->writepage ? NULL : &who, &done);
	if (r < 0)
		dispatch_reply_err(req, r);
	else
		fuse_reply_write(req, done);
}

static void op_fallocate(fuse_req_t req, fuse_ino_t ino, int mode, off_t off, off_t len,
                         struct fuse_file_info *fi)
{
	struct handle *h = dispatch_handle(fi);
	struct caller who = dispatch_caller(req);

	dispatch_reply_err(req,
	                   h->ops->fallocate ? h->ops->fallocate(h, mode, off, len, &who) : -EBADF);
}

static void op_copy_file_range(fuse_req_t req, fuse_ino_t ino_in, off_t off_in,
                               struct fuse_file_info *fi_in, fuse_ino_t ino_out, off_t off_out,
                               struct fuse_file_info *fi_out, size_t len, int flags)
{
	struct handle *in = dispatch_handle(fi_in), *out = dispatch_handle(fi_out);
	size_t done = 0;
	int r = -EBADF;

	if (flags != 0)
		r = -EINVAL;
	else if (out->ops->copy)
		r = out->ops->copy(in, off_in, out, off_out, len, &done);
	if (r < 0)
		dispatch_reply_err(req, r);
	else
		fuse_reply_write(req, done);
}

static void op_flush(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
	struct handle *h = dispatch_handle(fi);

	if (h->ops->flush)
		h->ops->flush(h);
	fuse_reply_err(req, 0);
}

static void op_release(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
	handle_free(dispatch_handle(fi));
	fuse_reply_err(req, 0);
}

static void op_fsync(fuse_req_t req, fuse_ino_t ino, int data_only, struct fuse_file_info *fi)
{
	struct handle *h = dispatch_handle(fi);

	dispatch_reply_err(req, h->ops->sync ? h->ops->sync(h, data_only) : -EINVAL);
}

static void op_ioctl(fuse_req_t req, fuse_ino_t ino, unsigned cmd, void *arg,
                     struct fuse_file_info *fi, unsigned flags, const void *in, size_t in_size,
                     size_t out_size)
{
	fuse_reply_err(req, ENOTTY);
}

void dispatch_add_file_ops(struct fuse_lowlevel_ops *ops)
{
	ops->open = op_open;
	ops->create = op_create;
#ifdef HAVE_TMPFILE
	ops->tmpfile = op_tmpfile;
#endif
	ops->read = op_read;
	ops->write = op_write;
	ops->fallocate = op_fallocate;
	ops->copy_file_range = op_copy_file_range;
	ops->flush = op_flush;
	ops->release = op_release;
	ops->fsync = op_fsync;
	ops->ioctl = op_ioctl;
}
