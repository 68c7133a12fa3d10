/*
 * Pieces of L1 and L2 tables, kept for all images of one open disk; bounded. Thread-safe.
 */
#ifndef FF_COW_QSOURCE_CACHE_H
#define FF_COW_QSOURCE_CACHE_H

#include "cow/qsource/bytes.h"
#include "cow/qsource/kept.h"

#define QS_SLICE 4096u /* bytes, at most, of one piece */

struct qs_cache;

/* KEPT, which must live as long, bounds it. 0 or -ENOMEM. */
int qs_cache_create(struct qs_kept *kept, struct qs_cache **out);
void qs_cache_destroy(struct qs_cache *c);

/* LEN bytes (at most QS_SLICE) at OFF of FILE, which has them; from the cache if they are there.
 * LAYER: another number for each file. */
int qs_cache_read(struct qs_cache *c, const struct qs_bytes *file, unsigned layer, uint64_t off,
                  size_t len, uint8_t *buf);

#endif
