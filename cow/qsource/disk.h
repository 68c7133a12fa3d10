/*
 * A guest's disk: an image over its backing files, read as the guest sees it. The layers are added
 * one by one, the uppermost first; after that it is constant, and used by many threads.
 */
#ifndef FF_COW_QSOURCE_DISK_H
#define FF_COW_QSOURCE_DISK_H

#include <stdbool.h>

#include "cow/qsource/image.h"

enum { QS_LAYERS_MAX = 200 };

struct qs_disk;

/* Called when a read meets damage: LAYER's number, from 0; where in the disk; and a static reason.
 */
typedef void (*qs_damaged)(void *ctx, unsigned layer, uint64_t off, const char *why);

/* KEPT bounds what the caches keep of all disks that share it, and lives as long as they. 0 or
 * -ENOMEM. */
int qs_disk_create(qs_damaged damaged, void *ctx, struct qs_kept *kept, struct qs_disk **out);
void qs_disk_destroy(struct qs_disk *d);

/* Puts FILE, a qcow2 image, beneath the layers that there are: *HEAD, which lives as long as the
 * disk, tells what must come next. FILE must live as long. -ELOOP: too many layers. WHY as in
 * qs_head_decode(). */
int qs_disk_add_image(struct qs_disk *d, const struct qs_bytes *file, const struct qs_head **head,
                      char *why);
/* The data file of the layer that was added last. */
void qs_disk_set_data(struct qs_disk *d, const struct qs_bytes *data);
/* The same for a raw file, which must be the last. */
int qs_disk_add_raw(struct qs_disk *d, const struct qs_bytes *file, char *why);
/* All layers are there. 0 or -ENOMEM. */
int qs_disk_complete(struct qs_disk *d);

uint64_t qs_disk_size(const struct qs_disk *d);

/* LEN bytes at OFF, which the disk has. -EIO for damage, else the error of reading. */
int qs_disk_read(struct qs_disk *d, void *buf, size_t len, uint64_t off);

/* How the disk goes on at OFF, which is before its end: *LEN bytes, at most MAX, all of them *DATA,
 * or all zeros that take no place. Damage counts as data, for reading it to tell. */
int qs_disk_extent(struct qs_disk *d, uint64_t off, uint64_t max, bool *data, uint64_t *len);

#endif
