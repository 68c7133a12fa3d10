/*
 * Memory that the caches of all open disks share. Each open file has caches of its own, and who may
 * open one may open a thousand: so what all of them keep is bounded. Where there is no more,
 * nothing is kept: reads cost more, and are as right.
 */
#ifndef FF_COW_QSOURCE_KEPT_H
#define FF_COW_QSOURCE_KEPT_H

#include <stdatomic.h>
#include <stdlib.h>

struct qs_kept {
	size_t max;          /* constant */
	atomic_size_t bytes; /* that are kept; never above max */
};

/* NULL: there is no memory, or enough is kept. */
static inline void *qs_kept_alloc(struct qs_kept *k, size_t n)
{
	size_t before = atomic_load(&k->bytes);
	void *p;

	do
		if (n > k->max || before > k->max - n)
			return NULL;
	while (!atomic_compare_exchange_weak(&k->bytes, &before, before + n));
	p = malloc(n);
	if (!p)
		atomic_fetch_sub(&k->bytes, n);
	return p;
}

/* What N bytes were allocated for, or NULL. */
static inline void qs_kept_free(struct qs_kept *k, void *p, size_t n)
{
	if (p)
		atomic_fetch_sub(&k->bytes, n);
	free(p);
}

#endif
