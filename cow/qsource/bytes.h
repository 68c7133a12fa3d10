/*
 * Bytes of a file that cannot change while they are read: what a guest's image is decoded from.
 */
#ifndef FF_COW_QSOURCE_BYTES_H
#define FF_COW_QSOURCE_BYTES_H

#include <stddef.h>
#include <stdint.h>

struct qs_bytes {
	uint64_t size;
	/* All LEN bytes at OFF, which the file has. 0 or -errno. */
	int (*read)(const struct qs_bytes *b, void *buf, size_t len, uint64_t off);
	/* lseek(2) with SEEK_DATA or SEEK_HOLE from OFF, which is before the end; -ENXIO as there.
	 */
	int (*seek)(const struct qs_bytes *b, uint64_t off, int whence, uint64_t *out);
};

#endif
