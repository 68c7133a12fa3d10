/*
 * Requests that may take long, depending on the kind of node, and the threads that they get then.
 *
 * A kind that says `slow` gets each mkdir, rmdir and setxattr run in a thread of its own, so that
 * the session, even a single-threaded one, serves other requests meanwhile: dropping a snapshot
 * waits for RELEASE requests, and so does making a checkpoint of it. One that says `costly` gets
 * that for getattr and lseek. fs->tasks counts these threads, and those of long reads; the teardown
 * waits for 0, and a thread's last access to fs is that decrement under tasks_lock.
 */
#include <signal.h>
#include <stdlib.h>
#include <string.h>

#include "ff_util.h"
#include "fusefs/creds.h"
#include "fusefs/dispatch.h"
#include "fusefs/inode.h"

void dispatch_task_ends(struct fs *fs)
{
	FF_GUARD(&fs->tasks_lock);
	if (--fs->tasks == 0)
		pthread_cond_broadcast(&fs->tasks_done);
}

int dispatch_start_task(struct fs *fs, void *(*run)(void *), void *t)
{
	sigset_t all, old;
	pthread_t id;
	int r;

	pthread_mutex_lock(&fs->tasks_lock);
	fs->tasks++;
	pthread_mutex_unlock(&fs->tasks_lock);
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &old);
	r = pthread_create(&id, NULL, run, t);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	if (r == 0) {
		pthread_detach(id);
		return 0;
	}
	dispatch_task_ends(fs);
	return -r;
}

void dispatch_wait_tasks(struct fs *fs)
{
	FF_GUARD(&fs->tasks_lock);
	while (fs->tasks > 0)
		pthread_cond_wait(&fs->tasks_done, &fs->tasks_lock);
}

enum task_kind { TASK_GETATTR, TASK_LSEEK, TASK_MKDIR, TASK_RMDIR, TASK_SETXATTR };

struct task {
	fuse_req_t req;
	struct node *node; /* a reference; the directory, or what has the attribute */
	enum task_kind kind;
	struct handle *handle; /* of getattr and lseek; the kernel releases it after the reply */
	off_t off;             /* this and the next: of lseek */
	int whence;
	mode_t mode; /* of mkdir */
	int flags;   /* this and the next two: of setxattr */
	size_t size;
	const char *value; /* behind the name */
	struct caller who;
	char name[];
};

static void seek(fuse_req_t req, struct handle *h, off_t off, int whence)
{
	off_t out = 0;
	int r = h->ops->seek ? h->ops->seek(h, off, whence, &out) : -EINVAL;

	if (r < 0)
		dispatch_reply_err(req, r);
	else
		fuse_reply_lseek(req, out);
}

static void make_dir(fuse_req_t req, struct node *dir, const char *name, mode_t mode,
                     const struct caller *who)
{
	int r = dir->ops->denied;

	if (dir->ops->mkdir)
		r = dir->ops->mkdir(dispatch_fs(req), dir, name, mode, who);
	dispatch_reply_made(req, r, dir, name);
}

static void remove_dir(fuse_req_t req, struct node *dir, const char *name)
{
	dispatch_reply_err(req, dir->ops->rmdir ? dir->ops->rmdir(dispatch_fs(req), dir, name)
	                                        : dir->ops->denied);
}

static void set_attribute(fuse_req_t req, struct node *n, const char *name, const char *value,
                          size_t size, int flags, const struct caller *who)
{
	int r = n->ops->denied;

	if (n->ops->setxattr)
		r = n->ops->setxattr(dispatch_fs(req), n, name, value, size, flags, who);
	dispatch_reply_err(req, r);
}

static void *run_task(void *arg)
{
	struct task *t = arg;
	struct fs *fs = dispatch_fs(t->req);

	creds_detach();
	switch (t->kind) {
	case TASK_GETATTR:
		dispatch_reply_attr(t->req, t->node, t->handle);
		break;
	case TASK_LSEEK:
		seek(t->req, t->handle, t->off, t->whence);
		break;
	case TASK_MKDIR:
		make_dir(t->req, t->node, t->name, t->mode, &t->who);
		break;
	case TASK_RMDIR:
		remove_dir(t->req, t->node, t->name);
		break;
	case TASK_SETXATTR:
		set_attribute(t->req, t->node, t->name, t->value, t->size, t->flags, &t->who);
		break;
	}
	node_put(t->node);
	free(t);
	dispatch_task_ends(fs);
	return NULL;
}

/* HOW: all but the references and what is behind it. */
static void slowly(fuse_req_t req, struct node *node, const char *name, const struct task *how)
{
	size_t len = strlen(name) + 1;
	struct task *t = malloc(sizeof *t + len + how->size);
	int r = -ENOMEM;

	if (t) {
		*t = *how;
		t->req = req;
		t->node = node_ref(node);
		t->who = dispatch_caller(req);
		memcpy(t->name, name, len);
		if (how->size)
			memcpy(t->name + len, how->value, how->size);
		t->value = t->name + len;
		r = dispatch_start_task(dispatch_fs(req), run_task, t);
	}
	if (r == 0)
		return;
	dispatch_reply_err(req, r);
	if (t)
		node_put(t->node);
	free(t);
}

static void op_getattr(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
	struct handle *h = fi ? dispatch_handle(fi) : NULL;

	DISPATCH_NODE(n, ino);
	if (n->ops->costly)
		slowly(req, n, "", &(struct task){.kind = TASK_GETATTR, .handle = h});
	else
		dispatch_reply_attr(req, n, h);
}

static void op_lseek(fuse_req_t req, fuse_ino_t ino, off_t off, int whence,
                     struct fuse_file_info *fi)
{
	struct handle *h = dispatch_handle(fi);

	if (h->node->ops->costly)
		slowly(
		    req, h->node, "",
		    &(struct task){.kind = TASK_LSEEK, .handle = h, .off = off, .whence = whence});
	else
		seek(req, h, off, whence);
}

static void op_mkdir(fuse_req_t req, fuse_ino_t parent, const char *name, mode_t mode)
{
	struct caller who = dispatch_caller(req);

	DISPATCH_NODE(dir, parent);
	if (dir->ops->slow)
		slowly(req, dir, name, &(struct task){.kind = TASK_MKDIR, .mode = mode});
	else
		make_dir(req, dir, name, mode, &who);
}

static void op_rmdir(fuse_req_t req, fuse_ino_t parent, const char *name)
{
	DISPATCH_NODE(dir, parent);
	if (dir->ops->slow)
		slowly(req, dir, name, &(struct task){.kind = TASK_RMDIR});
	else
		remove_dir(req, dir, name);
}

static void op_setxattr(fuse_req_t req, fuse_ino_t ino, const char *name, const char *value,
                        size_t size, int flags)
{
	struct caller who = dispatch_caller(req);

	DISPATCH_NODE(n, ino);
	if (n->ops->slow)
		slowly(req, n, name,
		       &(struct task){
		           .kind = TASK_SETXATTR, .flags = flags, .size = size, .value = value});
	else
		set_attribute(req, n, name, value, size, flags, &who);
}

void dispatch_add_slow_ops(struct fuse_lowlevel_ops *ops)
{
	ops->getattr = op_getattr;
	ops->lseek = op_lseek;
	ops->mkdir = op_mkdir;
	ops->rmdir = op_rmdir;
	ops->setxattr = op_setxattr;
}
