/*
 * Visits the regular files of a snapshot, in the order of the directories' bytes.
 */
#ifndef FF_FROZEN_WALK_H
#define FF_FROZEN_WALK_H

#include <stddef.h>

#include "ff_store.h"

struct frozen_walk {
	struct ff_snap *snap;
	/* Called with each, F, which is called NAME in DIR; W->path is its path below the root. Not
	 * 0: the walk ends, and returns that. */
	int (*file)(struct frozen_walk *w, const struct ff_frozen *dir, const char *name,
	            const struct ff_frozen *f);
	char *path;
	size_t len, room; /* of path; the walk's own */
};

/* W: snap and file are set, the rest is 0. -EIO: a directory could not be frozen. -ESTALE: the
 * snapshot was dropped. */
int frozen_walk(struct frozen_walk *w);

#endif
