/*
 * Between the parts of a freeze: freeze.c has the order of its steps, freeze_images.c what it makes
 * for each disk. One thread at a time: admin is held.
 */
#ifndef FF_COW_FREEZE_H
#define FF_COW_FREEZE_H

#include "cow/engine.h"

struct spare;

struct freeze {
	struct ff_store *store;
	struct ff_snap *snap;
	struct spare *spares; /* made beforehand, sorted by inode; malloc'd */
	size_t spare_count;
	atomic_uint late; /* an image is being made that was not waited for */
	bool durable; /* some disk of it has views that are to survive power loss, or will have */
};

/* SOURCE as it is now. */
int freeze_walk(struct freeze *f, bool xattrs, struct tree **out);
/* Step 1: an empty image for each disk that there is now, as spares. */
int freeze_make_spares(struct freeze *f);
/* Step 2: the spares that fit the disks of the snapshot's tree, in IMAGES, NULL for those that none
 * fits; names what is to hold each of them. The other spares go, before images are made where they
 * stand. On error, too, what is in IMAGES is the caller's. */
int freeze_adopt(struct freeze *f, struct ff_image **images);
/* Removes the spares that are left. */
void freeze_drop_spares(struct freeze *f);
/* An empty image of INODE's disk as PATH in the snapshot's directory. Errors are logged. */
int freeze_make_image(struct freeze *f, const struct ff_frozen *inode, const char *path,
                      struct ff_image **out);
/* Removes it and frees it. */
void freeze_drop_image(struct ff_image *img);
/* Where the disk is, as struct ff_disk has it. */
const char *freeze_disk_path(const struct ff_frozen *inode);

#endif
