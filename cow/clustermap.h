/*
 * A bitmap over clusters that is read without a lock: see clustermap.c. Positions and counts are in
 * clusters; a range must lie within the map's size where not said otherwise.
 */
#ifndef FF_COW_CLUSTERMAP_H
#define FF_COW_CLUSTERMAP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define CLUSTERMAP_CHUNK_BITS 32768u /* clusters in a chunk, 4 KiB of bits */

struct clustermap {
	uint64_t size;            /* constant */
	size_t chunk_count;       /* constant */
	uint64_t *_Atomic *chunk; /* atomic: NULL, then set once by compare-and-swap */
};

/* A map of SIZE clusters, none set. -ENOMEM. */
int clustermap_init(struct clustermap *map, uint64_t size);
/* Frees what the map holds. A zeroed map is fine. Not thread-safe. */
void clustermap_fini(struct clustermap *map);

/* Clears all of it and frees what it takes. Not thread-safe. */
void clustermap_empty(struct clustermap *map);

/* Makes room, so that clustermap_set() of the range cannot fail. -ENOMEM. */
int clustermap_reserve(struct clustermap *map, uint64_t first, uint64_t count);
/* Sets a range that has been reserved. Release: see ff_image_marked(). */
void clustermap_set(struct clustermap *map, uint64_t first, uint64_t count);
void clustermap_clear(struct clustermap *map, uint64_t first, uint64_t count);

/* Is the cluster set? Acquire. False beyond the end. */
bool clustermap_test(const struct clustermap *map, uint64_t cluster);
/* Length of the run from FIRST, at most MAX, that is all set or all clear; *SET says which. At
 * least 1 (MAX must be). Acquire. Clusters beyond the end are clear. */
uint64_t clustermap_run(const struct clustermap *map, uint64_t first, uint64_t max, bool *set);

/* The bits of COUNT clusters from FIRST on, in OUT: cluster FIRST + I is bit I % 64 of word I / 64.
 * Acquire. Clusters beyond the end are clear, and so are the bits beyond COUNT. */
void clustermap_bits(const struct clustermap *map, uint64_t first, unsigned count, uint64_t *out);

/* The bits of the chunk that holds FIRST as bytes, lowest bit first, from FIRST on (a multiple of
 * 8), up to the map's size; NULL: all clear. Stable only while the caller keeps others from
 * changing the map. */
const uint8_t *clustermap_bytes(const struct clustermap *map, uint64_t first);

#endif
