/*
 * A mount from beginning to end.
 */
#ifndef FF_SESSION_H
#define FF_SESSION_H

#include "fusefs/options.h"

/* Mounts as the options say and serves requests until the end; in the background unless asked
 * otherwise, and then returns, in the process that called, as soon as the mount is ready. ARGS:
 * libfuse's options. Returns the exit status; failures have been said on stderr. */
int session_run(const struct options *o, struct fuse_args *args);

#endif
