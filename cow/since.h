/*
 * What the files of since_*.c share. See the essay in since.c.
 */
#ifndef FF_COW_SINCE_H
#define FF_COW_SINCE_H

#include "cow/changes.h"
#include "cow/qcow2_format.h"

/* All constant once made. */
struct ff_since {
	struct ff_snap *new; /* a reference */
	struct ff_snap *old; /* the same, or NULL */
	const struct ff_frozen *f;
	uint64_t size;  /* of the disk, bytes */
	bool whole;     /* the image leads to no other, for all counts as changed */
	char *old_path; /* the disk's in OLD, or NULL: it is not there */
	char backing[QCOW2_BACKING_MAX + 1];
	uint64_t changed;         /* bytes in changed clusters, not beyond the size */
	size_t chunks;            /* of CHANGES_MAX clusters */
	uint64_t *before;         /* clusters of data in all chunks before this one; CHUNKS + 1 */
	uint64_t tables;          /* L2 tables that a full image would have */
	uint64_t *present;        /* bits: the image has this one */
	uint64_t *present_before; /* by word of these: how many are set in the words before it */
	struct qcow2_layout l;    /* l2_count: those that are present */
	uint64_t total;           /* host clusters of the image */
};

/* One chunk's bits. */
struct since_view {
	uint64_t changed[CHANGES_WORDS];
	uint64_t data[CHANGES_WORDS]; /* of those, what is not zeros */
	unsigned count;               /* clusters in it */
};

struct ff_since_file {
	const struct ff_since *since;
	struct ff_hold *new_hold;
	struct ff_hold *old_hold; /* NULL without an older snapshot */
	struct ff_reader *reader; /* of NEW's */
	struct changes changes;
	pthread_mutex_t lock; /* the following: what was asked for last */
	size_t kept_chunk;    /* CHUNKS: nothing yet */
	struct since_view kept;
};

/* What is in a chunk, if it is still what the layout was made for; else -EIO, logged. */
int since_view(struct ff_since_file *f, size_t chunk, struct since_view *out);

/* The layout of S's image, from its present tables and its clusters of data. -EFBIG. */
int since_layout(struct ff_since *s, uint32_t cluster_size);

/* --- since_names.c --- */
/* The path that F, an inode of SNAP with this disk number, has below its root; malloc'd. PREFERRED
 * if that is one of its paths. -ENOENT, -ENOMEM. */
int since_path(const struct ff_snap *snap, uint32_t disk, const char *preferred, char **out);
/* The path of NAME in DIR; malloc'd, NULL without memory. */
char *since_join(const struct ff_snap *snap, const struct ff_frozen *dir, const char *name);
/* The name of the image of the disk at PATH in SNAP, below that of its directory; malloc'd. */
char *since_image_path(const struct ff_snap *snap, const char *path);

#endif
