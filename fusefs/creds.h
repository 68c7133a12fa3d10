/*
 * Acting for a caller: what a request makes belongs to who asked for it.
 */
#ifndef FF_CREDS_H
#define FF_CREDS_H

#include "fusefs/fs.h"

/* Prepares the process, before a second thread exists: *OUT says whether callers' ids can be taken
 * on without losing capabilities. */
void creds_setup(bool *out);

struct creds {
	struct fs *fs;
	const struct caller *who;
	mode_t mask; /* bits of a mode that have to be cleared by hand */
	bool ids, umask;
};

/* Takes on the caller's file system ids and umask, for this thread alone. */
void creds_begin(struct fs *fs, const struct caller *who, struct creds *out);
void creds_end(struct creds *c);

/* Gives a file just made to the caller where creds_begin() could not see to that. A directory with
 * the set-group-id bit gives its own group: hence DIR_FD, the directory. */
int creds_give(const struct creds *c, int dir_fd, const char *name);

/* A thread that makes files of our own: gets a umask of its own, which is 0. */
void creds_detach(void);

#endif
