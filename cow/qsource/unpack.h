/*
 * Compressed clusters: unpacking them, and the few that are kept unpacked.
 */
#ifndef FF_COW_QSOURCE_UNPACK_H
#define FF_COW_QSOURCE_UNPACK_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "cow/qsource/kept.h"

/* Unpacks LEN bytes to exactly SIZE. What follows the packed data in BUF does not matter. -EIO:
 * that is not what they are; -ENOMEM. */
int qs_unpack(bool zstd, const uint8_t *buf, size_t len, uint8_t *out, size_t size);

struct qs_unpacked;

/* Keeps clusters of up to SIZE bytes, as far as KEPT, which must live as long, allows. 0 or
 * -ENOMEM. */
int qs_unpacked_create(size_t size, struct qs_kept *kept, struct qs_unpacked **out);
void qs_unpacked_destroy(struct qs_unpacked *u);

/* How to make a cluster: all SIZE bytes of it. */
typedef int (*qs_unpacked_make)(void *ctx, uint8_t *out, size_t size);

/* Copies LEN bytes at IN of the cluster called (LAYER, CLUSTER), of SIZE bytes, to BUF; made by
 * MAKE, its error passed on, where it is not kept. One thread makes it and others that want it
 * meanwhile wait. */
int qs_unpacked_read(struct qs_unpacked *u, unsigned layer, uint64_t cluster, size_t size,
                     qs_unpacked_make make, void *ctx, size_t in, size_t len, uint8_t *buf);

#endif
