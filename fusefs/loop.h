/*
 * The threads that serve a mounted session: see loop.c.
 */
#ifndef FF_FUSEFS_LOOP_H
#define FF_FUSEFS_LOOP_H

struct fuse_session;

/* Serves SE with at most MAX threads, of which at most MAX_IDLE are kept while they have nothing to
 * do, until the session ends: by an unmount, or by fuse_session_exit() and a signal to the calling
 * thread that interrupts what it sleeps in. Call it once, from one thread. 0, or -errno of a
 * descriptor that cannot be read any more. */
int loop_run(struct fuse_session *se, unsigned max, unsigned max_idle);

#endif
