/*
 * SOURCE and MOUNTPOINT: are they what they should be?
 */
#ifndef FF_MOUNTPOINT_H
#define FF_MOUNTPOINT_H

#include <stdbool.h>

#include "fusefs/options.h"

struct places {
	char *source;     /* absolute, without symlinks; owned */
	char *mountpoint; /* the same */
	int source_fd;    /* directory descriptor, opened before SOURCE may be covered */
};

/* Finds, checks and opens both; takes a dead mount of ours away first. Says what is wrong. */
int places_find(const struct options *o, struct places *out);
void places_free(struct places *p);

/* Takes away the mount at PATH if it is a fleecefs mount whose process is gone. True: it did. */
bool mountpoint_recover(const char *path);

#endif
