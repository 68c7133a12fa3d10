/*
 * The budget of the fleecing images: a limit of our own, and room to leave on their filesystem.
 *
 * Images charge what they are about to allocate and give back what they freed. Free space is asked
 * for again after every 64 MiB of growth or when the last answer would not suffice, so most charges
 * are an addition under a lock. -ENOSPC means that the policy for failed saves applies.
 */
#include <errno.h>
#include <sys/statvfs.h>

#include "cow/engine.h"
#include "cow/io.h"
#include "ff_log.h"
#include "ff_util.h"

enum { RECHECK_BYTES = 64 << 20 };

void space_adopt_link(struct link *l)
{
	struct ff_store *s = l->disk->store;

	FF_GUARD(&s->space_lock);
	s->space_used += ff_image_allocated(l->img);
	l->charged = true;
}

/* Lock: space_lock held. */
static void ask_for_headroom(struct ff_store *s)
{
	struct statvfs v;

	s->space_unchecked = 0;
	if (io_fstatvfs(s->fleece_fd, &v)) {
		s->space_headroom = 0;
		return;
	}
	s->space_headroom =
	    (int64_t)((uint64_t)v.f_bavail * v.f_frsize) - (int64_t)s->cfg.fleece_reserve;
}

int space_charge(void *store, int64_t bytes)
{
	struct ff_store *s = store;

	FF_GUARD(&s->space_lock);
	if (bytes <= 0) {
		s->space_used -= FF_MIN(s->space_used, (uint64_t)-bytes);
		return 0;
	}
	if (s->cfg.fleece_limit && s->space_used + (uint64_t)bytes > s->cfg.fleece_limit)
		return -ENOSPC;
	if (s->cfg.fleece_reserve) {
		if (s->space_unchecked > RECHECK_BYTES || s->space_headroom < bytes)
			ask_for_headroom(s);
		if (s->space_headroom < bytes)
			return -ENOSPC;
		s->space_headroom -= bytes;
		s->space_unchecked += (uint64_t)bytes;
	}
	s->space_used += (uint64_t)bytes;
	return 0;
}

int space_charge_link(struct link *l)
{
	struct ff_store *s = l->disk->store;
	int r = space_charge(s, (int64_t)ff_image_allocated(l->img));

	l->charged = r == 0;
	if (r)
		ff_error("%s: no room for another fleecing image within fleece-limit (%llu MiB, 0: "
		         "none) and fleece-reserve (%llu MiB stay free): drop snapshots, or change "
		         "these",
		         s->fleece_path, (unsigned long long)s->cfg.fleece_limit >> 20,
		         (unsigned long long)s->cfg.fleece_reserve >> 20);
	return r;
}

void space_release_link(struct link *l)
{
	if (l->charged)
		space_charge(l->disk->store, -(int64_t)ff_image_allocated(l->img));
	l->charged = false;
}
