/*
 * What the tests of guests' images share: a directory of their own in which shell commands make
 * images, and an open disk decoded from the files there.
 */
#ifndef GUESTIMG_H
#define GUESTIMG_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "cow/qsource/disk.h"

struct guest_file {
	struct qs_bytes bytes;
	int fd;
	atomic_int reads_bad; /* reads that were not within the file */
};

struct guestimg {
	char dir[64];
	int dirfd;
	struct qs_disk *disk;
	struct qs_kept own, *kept; /* kept: its own, or one that disks share */
	unsigned files;
	struct guest_file file[QS_LAYERS_MAX * 2];
	char why[QS_WHY];
	char damage[QS_WHY]; /* the last that a read met */
};

/* What the environment has for VARIABLE, or OTHERWISE. */
unsigned guestimg_number(const char *variable, unsigned otherwise);
void guestimg_init(struct guestimg *g);
void guestimg_done(struct guestimg *g);
/* Runs shell commands in the directory; their status. */
int guestimg_run(const struct guestimg *g, const char *fmt, ...)
    __attribute__((format(printf, 2, 3)));
/* Writes NAME, of SIZE bytes: stretches of noise, of text, of zeros, and holes. */
void guestimg_raw(const struct guestimg *g, const char *name, uint64_t size, uint64_t seed);
/* All bytes of NAME; malloc'd. */
uint8_t *guestimg_load(const struct guestimg *g, const char *name, size_t *size);
/* Puts V at OFF of NAME, as qcow2 has its numbers. */
void guestimg_put(const struct guestimg *g, const char *name, uint64_t off, uint64_t v);

/* Opens NAME and all that it needs from the same directory. */
int guestimg_open(struct guestimg *g, const char *name);
void guestimg_close(struct guestimg *g);
/* Compares the whole disk with WANT, by reads of many sizes, and its extents. *DATA: bytes that are
 * not in holes. */
void guestimg_compare(struct guestimg *g, const uint8_t *want, size_t size, uint64_t *data);

#endif
