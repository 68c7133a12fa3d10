/*
 * What a mount that stands needs no more.
 */
#ifndef FF_PRIVILEGES_H
#define FF_PRIVILEGES_H

/* Gives up, for good, all capabilities that serving does not need. After the mount, before the
 * first thread (capabilities are each thread's own). 0 or -errno, logged. */
int privileges_drop(void);

#endif
