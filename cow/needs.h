/*
 * Which old data some view still needs, and giving back what none does: see needs.c.
 */
#ifndef FF_COW_NEEDS_H
#define FF_COW_NEEDS_H

#include "cow/engine.h"

enum { NEEDS_MAX = 256, NEEDS_WORDS = NEEDS_MAX / 64 };

/* In NEEDED, NEEDS_WORDS words: which of COUNT clusters from FIRST on, at most NEEDS_MAX, does some
 * view need from what L would hold of them? L is in its chain. Takes the chain lock. */
void needs_of(struct link *l, uint64_t first, unsigned count, uint64_t *needed);
/* Length of the run of bits from AT on, below COUNT, that are all set or all clear. */
unsigned needs_run(const uint64_t *needed, unsigned at, unsigned count, bool *set);

/* Gives back what is not needed of L, which is pinned; afterwards all that is marked in a hidden
 * one and not needed is marked in the next older one, too. Locks: admin. */
int needs_sweep_link(struct link *l);
/* Gives back what is not needed any more of a range of clusters that L's view has given up. L is
 * kept in its chain. Locks: admin. */
int needs_sweep_range(struct link *l, uint64_t first, uint64_t count);
/* The same of each link of the disk that is not hidden, if some view of it needs less than all.
 * Failures are logged: what is not given back stays until the next time. Locks: admin. */
void needs_sweep(struct ff_disk *d);

#endif
