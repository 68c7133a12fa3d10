/*
 * What a fleece directory holds, read without changing or locking anything: its directories,
 * manifests, and the heads of the images.
 */
#ifndef FF_CTL_INVENTORY_H
#define FF_CTL_INVENTORY_H

#include <time.h>

#include "cow/manifest.h"
#include "cow/qcow2_format.h"

struct inv_image {
	size_t dir;      /* index of its directory */
	char *path;      /* below the fleece directory */
	int error;       /* it, or its head, cannot be read: 0 or -errno */
	const char *why; /* of -EINVAL; static */
	struct ff_image_desc desc;
	char *backing;      /* as in its head */
	bool raw;           /* that is the source, not an image */
	uint64_t allocated; /* bytes on storage */
	bool named;         /* the manifest names it */
};

enum inv_kind {
	INV_SNAPSHOT, /* it has a manifest, if perhaps a bad one; or has lost it, and has images */
	INV_UNMADE,   /* none, and the mark of a mkdir that did not end */
	INV_DROPPED,  /* .dropped-N */
	INV_FOREIGN,  /* somebody else's: what it holds is not taken in */
};

struct inv_dir {
	char *name;
	enum inv_kind kind;
	int error; /* of the manifest: 0, or it cannot be used */
	const char *why;
	struct manifest manifest; /* tree: NULL without one */
	struct timespec made;
	bool checkpoint;     /* it has the mark of one */
	size_t first, count; /* its images */
	size_t *of_disk;     /* by the manifest's disk: index of its image, SIZE_MAX: missing */
};

/* A file that an interrupted operation left. */
struct inv_stray {
	char *path; /* below the fleece directory */
	uint64_t allocated;
};

struct inventory {
	struct inv_dir *dirs;
	size_t dir_count;
	struct inv_image *images; /* by directory */
	size_t image_count, image_room;
	struct inv_stray *strays;
	size_t stray_count;
};

/* -ENOENT and the like only of FLEECE_FD itself: what goes while it is read is left out. */
int inventory_read(int fleece_fd, struct inventory *out);
void inventory_free(struct inventory *inv);
/* The snapshot called NAME, or NULL. */
const struct inv_dir *inventory_find(const struct inventory *inv, const char *name);
/* Is the image one of a snapshot, so that a view is read from it? */
bool inventory_visible(const struct inventory *inv, const struct inv_image *i);
bool inv_ends_with(const char *s, const char *end);

/* --- inventory_chains.c --- */
/* The images, by disk and from old to new: an array of COUNT pointers, malloc'd. Those that cannot
 * be read are left out. */
struct inv_image **inventory_chains(struct inventory *inv, size_t *count);
bool inv_same_disk(const struct inv_image *a, const struct inv_image *b);
/* The image that A's head names, of the same disk, in N pointers as inventory_chains() has them;
 * NULL: it names the source (*LOST false) or one that is not there. *EXACT: by its right path. */
struct inv_image *inv_next(int fleece_fd, const struct inventory *inv, const struct inv_image *a,
                           struct inv_image *const *chain, size_t n, bool *lost, bool *exact);

#endif
