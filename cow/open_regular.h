/*
 * Opening of files that somebody else may have put there.
 */
#ifndef FF_COW_OPEN_REGULAR_H
#define FF_COW_OPEN_REGULAR_H

/* Opens the regular file PATH below DIRFD. No part of PATH may be a symlink, nor lead out of DIRFD;
 * what is no regular file is looked at but not opened, for opening a device can have effects and a
 * FIFO makes one wait. -EINVAL: not a regular file. Errors of openat2(2) besides. */
int open_regular(int dirfd, const char *path, int flags, int *out);

#endif
