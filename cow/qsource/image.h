/*
 * One qcow2 image of a guest: what lies where. Constant once opened, so used by many threads.
 */
#ifndef FF_COW_QSOURCE_IMAGE_H
#define FF_COW_QSOURCE_IMAGE_H

#include "cow/qsource/cache.h"
#include "cow/qsource/format.h"

struct qs_image {
	struct qs_head head;
	const struct qs_bytes *file;
	const struct qs_bytes *data; /* of its clusters: the file, or the data file once it is set
	                              */
	unsigned layer;              /* its number in the cache */
};

/* Reads and decodes the head of FILE. Errors and WHY as of qs_head_decode(), those of reading, and
 * -ENOMEM, with a WHY too. */
int qs_image_open(const struct qs_bytes *file, unsigned layer, struct qs_image *out, char *why);

/* A run of bytes of the disk. */
struct qs_run {
	enum qs_kind kind;
	uint64_t len;
	uint64_t host;   /* of DATA and PACKED, in the file of the data: it begins in that file, and
	                    what lies past its end are zeros */
	uint32_t packed; /* of PACKED, whose run ends with the cluster: bytes from host on, in the
	                    file */
	const char *bad; /* static; not NULL: the entry is damaged, and that is why */
};

/* What is at OFF of the disk, which is before its end, and in at most MAX bytes from there on. An
 * error is one of reading; damage is told by the run. */
int qs_map(const struct qs_image *img, struct qs_cache *cache, uint64_t off, uint64_t max,
           struct qs_run *out);

#endif
