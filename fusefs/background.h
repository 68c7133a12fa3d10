/*
 * Going to the background, with a word to whoever waits.
 */
#ifndef FF_BACKGROUND_H
#define FF_BACKGROUND_H

#include <stdbool.h>

/* Forks; no other thread may exist. True: this is the child, in a session of its own, and *READY_FD
 * is for background_ready(). False: this is the parent, *STATUS is what it exits with, and the
 * child is ready, or has ended (then a dead mount that it left at MOUNTPOINT is gone), or there is
 * none. */
bool background(const char *mountpoint, int *ready_fd, int *status);

/* The child: all is ready. Lets go of the terminal; the log goes to syslog from here on. False:
 * nobody waited any more. */
bool background_ready(int ready_fd);

#endif
