/*
 * A guest's fsync: what was saved for the disk becomes durable before the disk does, so that no
 * loss of power leaves a view without what its disk no longer has.
 *
 * A link knows how many of its saves are durable (flushed); one that has more is pinned and
 * flushed, and flushed is raised to what there was before, never lowered: callers at the same time
 * may finish in any order.
 */
#include <errno.h>

#include "cow/engine.h"
#include "cow/io.h"
#include "cow/reasons.h"
#include "ff_util.h"

struct to_flush {
	struct link *link;
	uint64_t saves; /* that will be durable */
};

/* Pins up to ROOM links with saves that are not known to be durable. */
static size_t unflushed_links(struct ff_disk *d, struct to_flush *out, size_t room)
{
	size_t n = 0;

	FF_GUARD(&d->store->chain);
	for (struct link *l = atomic_load(&d->top); l && n < room; l = l->older) {
		uint64_t saves = atomic_load(&l->saves);

		if (saves != atomic_load(&l->flushed)) {
			atomic_fetch_add(&l->pins, 1);
			out[n++] = (struct to_flush){l, saves};
		}
	}
	return n;
}

static int flush_link(const struct to_flush *f)
{
	uint64_t before = atomic_load(&f->link->flushed);
	int r = ff_image_flush(f->link->img);

	while (!r && before < f->saves &&
	       !atomic_compare_exchange_weak(&f->link->flushed, &before, f->saves))
		;
	atomic_fetch_sub(&f->link->pins, 1);
	return r;
}

int ff_disk_sync(struct ff_disk *disk, int fd, bool data_only)
{
	struct to_flush links[16];
	size_t n;
	int r = 0;

	do {
		n = unflushed_links(disk, links, FF_ARRAY_SIZE(links));
		for (size_t i = 0; i < n; i++) {
			int e = flush_link(&links[i]);

			r = r ? r : e;
		}
	} while (n == FF_ARRAY_SIZE(links) && !r);
	if (r && disk->store->cfg.policy == FF_BREAK_GUEST_WRITE)
		return guest_error(r);
	if (r)
		r = chain_break_all(disk, WHY_NOT_DURABLE);
	if (r)
		return guest_error(r);
	return data_only ? io_fdatasync(fd) : io_fsync(fd);
}
