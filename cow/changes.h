/*
 * Which clusters of a disk differ between two snapshots, and which of a frozen disk's are zeros:
 * see changes.c and zeros.c. Positions and counts are in clusters of the disk's chain.
 */
#ifndef FF_COW_CHANGES_H
#define FF_COW_CHANGES_H

#include <stdint.h>

#include "cow/clustermap.h"
#include "cow/engine.h"
#include "ff_util.h"

/* Most clusters that are asked about at once. */
#define CHANGES_MAX CLUSTERMAP_CHUNK_BITS
enum { CHANGES_WORDS = CLUSTERMAP_CHUNK_BITS / 64 };

/* A disk in two snapshots. Whoever uses it holds both of them (struct ff_hold). */
struct changes {
	struct link *new;
	struct link *old; /* NULL: the disk was not there, or is not to be compared: all differs */
};

/* The disk of F, an inode of NEW, against OLD, an older snapshot, or NULL. Waits for saves of
 * before NEW that are still under way. -EIO, with *WHY (static): what changed between them cannot
 * be known any more, or the disk in NEW is lost. */
int changes_begin(struct ff_snap *new, const struct ff_frozen *f, struct ff_snap *old,
                  struct changes *out, const char **why);

/* In BITS, bit I % 64 of word I / 64: may cluster FIRST + I of the disk as it was in OLD differ
 * from the same in NEW? COUNT is CHANGES_MAX at the most; beyond the disk's end and beyond COUNT
 * bits are clear. The answer never changes. -EIO: it is not known. */
int changes_bits(const struct changes *c, uint64_t first, unsigned count, uint64_t *bits);

/* A step over what is quickly seen to be the same: to the first cluster from FIRST on that differs,
 * or somewhere before it. The end of the disk in NEW, if there is none. */
uint64_t changes_next(const struct changes *c, uint64_t first);

/* For one link: which clusters were changed while it was its disk's newest? All that a
 * chain knows of changes comes from here. -EIO: not known. */
int link_changed(struct link *l, uint64_t first, unsigned count, uint64_t *bits);

/* --- zeros.c --- */
/* Of the clusters WANTED of L's disk, bits from cluster CHUNK * CHANGES_MAX on, those that are
 * known to read as zeros in the view of L without a look at their bytes: in ZERO. Both have
 * CHANGES_WORDS words, and WANTED has no bit beyond the disk's end. What was once said of a cluster
 * is said as long as L lives; after a restart too, if zeros_keep() was called. The caller holds L's
 * snapshot, which is no checkpoint, and is a user of its disk. -EIO. */
int zeros_bits(struct link *l, size_t chunk, const uint64_t *wanted, uint64_t *zero);
/* Before anything of what was said is seen: puts it on storage. Errors are logged. */
int zeros_keep(struct link *l);
/* L is about to go. */
void zeros_forget(struct link *l);
/* Nobody will ask of L any more: its snapshot was dropped, or is a checkpoint. */
void zeros_drop(struct link *l);

/* How many clusters of L's disk there are from CHUNK * CHANGES_MAX on, CHANGES_MAX at the most. */
static inline unsigned changes_count(const struct link *l, size_t chunk)
{
	uint64_t first = (uint64_t)chunk * CHANGES_MAX;

	return first < l->clusters ? (unsigned)FF_MIN(l->clusters - first, CHANGES_MAX) : 0;
}

/* The first bit of BITS from AT on, below COUNT, that is SET; COUNT: there is none. */
static inline unsigned bits_find(const uint64_t *bits, unsigned at, unsigned count, bool set)
{
	while (at < count) {
		uint64_t w = (set ? bits[at / 64] : ~bits[at / 64]) >> (at % 64);

		if (w)
			return FF_MIN(at + (unsigned)__builtin_ctzll(w), count);
		at += 64 - at % 64;
	}
	return count;
}

/* Sets the bits [FROM, TO). */
static inline void bits_set(uint64_t *bits, unsigned from, unsigned to)
{
	for (; from < to && from % 64; from++)
		bits[from / 64] |= UINT64_C(1) << (from % 64);
	for (; from + 64 <= to; from += 64)
		bits[from / 64] = ~UINT64_C(0);
	for (; from < to; from++)
		bits[from / 64] |= UINT64_C(1) << (from % 64);
}

#endif
