/*
 * What a name of a backing or data file in an image means. Pure.
 */
#ifndef FF_COW_QSOURCE_NAMES_H
#define FF_COW_QSOURCE_NAMES_H

#include <stdbool.h>

#include "cow/qsource/format.h"

struct qs_name {
	char path[QS_NAME_MAX + 1];     /* not empty */
	char format[QS_FORMAT_MAX + 1]; /* that the name itself gives, or empty */
	bool absolute;                  /* else it begins at the directory of the image */
};

/* -ENOTSUP: it is none of a file, and WHY (QS_WHY bytes) says so. */
int qs_name_decode(const char *name, struct qs_name *out, char *why);

/* Of a file whose format nobody tells, which begins with these LEN bytes: does QEMU take it for
 * something that is neither qcow2 nor raw? NULL, or what; static. */
const char *qs_foreign_format(const uint8_t *buf, size_t len);

/* Bytes for that. */
#define QS_FOREIGN_PEEK 512u

#endif
