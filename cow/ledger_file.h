/*
 * Reading a ledger: for the image that it belongs to, and for who only looks at it.
 */
#ifndef FF_COW_LEDGER_FILE_H
#define FF_COW_LEDGER_FILE_H

#include "cow/ledger_format.h"

/* Opens the ledger of the image at IMAGE_PATH below DIRFD and checks its head. -EINVAL: it is
 * damaged, or another image's; -ENOENT. */
int ledger_open(int dirfd, const char *image_path, const struct ff_image_desc *desc,
                uint64_t clusters, int flags, int *out);

/* What is told of each sector that was written: its first cluster and its bits. */
typedef int (*ledger_fn)(void *ctx, enum ledger_part part, uint64_t first, const uint64_t *words);

/* Calls FN for each of them, without reading holes, and adds each to *HASH. FN may be NULL.
 * -EINVAL: a sector is damaged, and *BAD is its offset. */
int ledger_scan(int fd, const struct ff_image_desc *desc, uint64_t clusters, ledger_fn fn,
                void *ctx, uint64_t *hash, uint64_t *bad);

#endif
