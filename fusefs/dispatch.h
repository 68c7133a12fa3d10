/*
 * Requests of the kernel: each is routed to the function of the node's or handle's kind, and its
 * result becomes the one reply. Nothing outside dispatch*.c replies to a request.
 */
#ifndef FF_DISPATCH_H
#define FF_DISPATCH_H

#include "fusefs/fs.h"
#include "fusefs/fuse_api.h"

/* The whole table; the session's user data is the struct fs. */
struct fuse_lowlevel_ops dispatch_ops(void);

/* Waits until no thread makes or drops a snapshot, or reads for long, any more. */
void dispatch_wait_tasks(struct fs *fs);

/* --- between the parts of dispatch --- */

/* Runs RUN(TASK) in a thread with all signals blocked: they are for the thread that waits for them.
 * The thread's last access to FS is dispatch_task_ends(). */
int dispatch_start_task(struct fs *fs, void *(*run)(void *), void *task);
void dispatch_task_ends(struct fs *fs);

void dispatch_add_slow_ops(struct fuse_lowlevel_ops *ops);
void dispatch_add_file_ops(struct fuse_lowlevel_ops *ops);
void dispatch_add_dir_ops(struct fuse_lowlevel_ops *ops);

static inline struct fs *dispatch_fs(fuse_req_t req)
{
	return fuse_req_userdata(req);
}

static inline struct handle *dispatch_handle(const struct fuse_file_info *fi)
{
	return (struct handle *)(uintptr_t)fi->fh;
}

bool dispatch_in_group(void *req, gid_t gid);

static inline struct caller dispatch_caller(fuse_req_t req)
{
	const struct fuse_ctx *c = fuse_req_ctx(req);

	return (struct caller){c->uid, c->gid, c->pid, c->umask, dispatch_in_group, req};
}

/* R: 0 or -errno. */
static inline void dispatch_reply_err(fuse_req_t req, int r)
{
	fuse_reply_err(req, -r);
}

struct fuse_entry_param dispatch_entry_param(const struct entry *e);
/* After NAME was made in DIR (R: 0, or the error that it was not): replies with its entry. */
void dispatch_reply_made(fuse_req_t req, int r, struct node *dir, const char *name);
/* Asks N for its attributes and replies with them. */
void dispatch_reply_attr(fuse_req_t req, struct node *n, struct handle *h);

void dispatch_put_cleanup(struct node **n);

/* Declares N, the node called ID, with a reference until the end of the scope, or replies that it
 * is unknown and returns. */
#define DISPATCH_NODE(n, id)                                                                       \
	__attribute__((cleanup(dispatch_put_cleanup))) struct node *n =                            \
	    node_get(dispatch_fs(req)->nodes, id);                                                 \
	if (!(n)) {                                                                                \
		fuse_reply_err(req, ESTALE);                                                       \
		return;                                                                            \
	}

#endif
