/*
 * Saving what a change is about to destroy: see save.c.
 */
#ifndef FF_COW_SAVE_H
#define FF_COW_SAVE_H

#include <stdbool.h>
#include <stdint.h>

#include "cow/engine.h"

/* What a change does to the bytes [off, end). */
struct effect {
	uint64_t off, end;
	const char *bytes; /* become these; NULL: zeros, unless unknown */
	bool unknown;
	bool direct; /* it goes past the page cache */
};

enum { SAVE_OVERTAKEN = 1 }; /* the link is no longer the newest, not all is saved */

/* Saves what the effect alters of the clusters [FIRST, END) of TOP, which the caller has pinned and
 * which was the newest link of its disk, until what was broken for it stands on storage. The time
 * that it takes is counted. 0; SAVE_OVERTAKEN; an error only if the guest is to have it. */
int save_old(struct link *top, const struct effect *e, uint64_t first, uint64_t end);
/* Waits for the saves of these clusters that are under way. */
void save_settle(struct ff_disk *d, uint64_t first, uint64_t count);
/* Is a save to a link older than L, of L's disk, under way? None begins after L was frozen. */
bool save_is_before(const struct link *l);

#endif
