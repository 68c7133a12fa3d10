/*
 * A disk as a picture: how many of the clusters of each of CELLS equal ranges are what.
 */
#ifndef FF_CTL_MAP_H
#define FF_CTL_MAP_H

#include <stdint.h>

struct map_cell {
	uint64_t clusters, preserved, gone, hole; /* the rest is unchanged */
};

struct map {
	const char *title; /* NAME/DISK */
	uint64_t size;     /* of the disk, bytes */
	uint32_t cluster_size;
	uint64_t clusters;
	uint64_t preserved, hole; /* of these */
	uint64_t gone;            /* the same: given up, or changed and not kept */
	unsigned width;           /* cells in a row */
	uint64_t count;           /* of cells */
	struct map_cell *cells;
};

/* In characters, on standard output. */
void map_draw(const struct map *m);
/* As SVG. */
void map_svg(const struct map *m);

#endif
