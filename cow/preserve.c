/*
 * Copy-before-write: the one way to a source's bytes.
 *
 * A change goes through two phases that never overlap:
 *
 *   1. Save (save.c), outside the barrier. Each cluster of the disk's newest link that the change
 *      touches and that is not marked is claimed, read from the source, saved, marked, and given
 *      free. A cluster whose bytes the change does not alter is left as it is: it needs no saving.
 *      One run of clusters is one read and one save.
 *   2. Change, inside the barrier: the system call on the source, if the newest link is still the
 *      one that phase 1 saved for; if a freeze has come in between, phase 1 is done again for the
 *      new link. So a freeze waits for system calls on sources alone, never for a save, and no
 *      change straddles it.
 *
 * Why a frozen reader is right without a lock: a cluster is marked (release) before the change that
 * needs the mark begins. A reader that read the source while the change was under way, and looks at
 * the marks afterwards, finds it, and reads the image instead.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>

#include "cow/device.h"
#include "cow/engine.h"
#include "cow/io.h"
#include "cow/save.h"
#include "ff_util.h"

enum {
	COPY_BYTES = 16 << 20, /* of one copy_file_range, so that a freeze need not wait longer */
	DIRECT_ALIGN = 4096,
};

static struct effect effect_of(const struct ff_change *c)
{
	uint64_t off = (uint64_t)c->off;

	switch (c->kind) {
	case FF_WRITE:
		return (struct effect){.off = off, .end = off + c->len, .bytes = c->buf};
	case FF_COPY:
		return (struct effect){.off = off, .end = off + c->len, .unknown = true};
	case FF_TRUNCATE:
		return (struct effect){.off = off, .end = UINT64_MAX};
	case FF_FALLOCATE:
		if (c->mode & (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_ZERO_RANGE))
			return (struct effect){.off = off, .end = off + c->len};
		break;
	}
	return (struct effect){.end = 0};
}

static bool has_unmarked(struct link *top, uint64_t first, uint64_t end)
{
	bool marked;

	while (first < end) {
		first += ff_image_run(top->img, first, end - first, &marked);
		if (!marked)
			return true;
	}
	return false;
}

/* The clusters of LINK that the effect touches. */
static void touched_clusters(struct link *l, const struct effect *e, uint64_t *first, uint64_t *end)
{
	uint64_t size = ff_image_desc(l->img)->cluster_size;

	*first = e->off / size;
	*end = e->end > e->off ? FF_MIN((e->end - 1) / size + 1, l->clusters) : 0;
}

/* Phase 2. */
static int change_source(struct ff_disk *d, const struct ff_change *c, size_t *done)
{
	*done = 0;
	switch (c->kind) {
	case FF_WRITE:
		return io_pwrite_part(c->fd, c->buf, c->len, (uint64_t)c->off, done);
	case FF_TRUNCATE:
		return io_truncate(c->fd, (uint64_t)c->off);
	case FF_FALLOCATE:
		return disk_is_device(d) ? device_zero(c->fd, c->mode, (uint64_t)c->off, c->len)
		                         : io_fallocate(c->fd, c->mode, (uint64_t)c->off, c->len);
	case FF_COPY:
		return io_copy_range(c->in_fd, (uint64_t)c->in_off, c->fd, (uint64_t)c->off, c->len,
		                     done);
	}
	return -EINVAL;
}

int guest_error(int r)
{
	return r == -ENOSPC || r == -EDQUOT ? -ENOSPC : r == -ENOMEM ? r : -EIO;
}

static bool is_direct(int fd)
{
	int flags = fcntl(fd, F_GETFL);

	return flags >= 0 && flags & O_DIRECT;
}

/* After a change: a freeze that does not see this has the change's times already. The epoch may
 * rise between the two steps, and another thread note that it has; that must stay. */
static void touch(struct ff_disk *d)
{
	unsigned now = atomic_load(&d->store->epoch), before = atomic_load(&d->touched);

	while (before < now && !atomic_compare_exchange_weak(&d->touched, &before, now))
		;
}

/* Both phases. */
static int change(struct ff_disk *d, const struct ff_change *c, size_t *done)
{
	struct effect e = effect_of(c);
	struct link *saved = NULL, *top;
	uint64_t first, end;
	unsigned token;
	int r;

	for (;;) {
		token = barrier_enter(d->store->writes);
		top = atomic_load(&d->top);
		if (!top || top == saved)
			break;
		touched_clusters(top, &e, &first, &end);
		if (!has_unmarked(top, first, end))
			break;
		atomic_fetch_add(&top->pins, 1);
		barrier_exit(d->store->writes, token);
		if (saved)
			atomic_fetch_sub(&saved->pins, 1);
		saved = top;
		e.direct = is_direct(c->fd);
		r = save_old(top, &e, first, end);
		if (r) {
			atomic_fetch_sub(&saved->pins, 1);
			saved = NULL;
		}
		if (r < 0)
			return guest_error(r);
	}
	r = change_source(d, c, done);
	if (disk_is_device(d))
		device_touch(disk_device(d));
	touch(d);
	barrier_exit(d->store->writes, token);
	if (saved)
		atomic_fetch_sub(&saved->pins, 1);
	return r;
}

/* O_DIRECT wants aligned memory. */
int preserve_change(struct ff_disk *d, const struct ff_change *c, size_t *done)
{
	ff_autofree void *copy = NULL;
	struct ff_change aligned = *c;

	if (c->kind != FF_WRITE || (uintptr_t)c->buf % DIRECT_ALIGN == 0 || !is_direct(c->fd))
		return change(d, c, done);
	copy = aligned_alloc(DIRECT_ALIGN, ff_round_up(FF_MAX(c->len, 1), DIRECT_ALIGN));
	if (!copy)
		return -ENOMEM;
	memcpy(copy, c->buf, c->len);
	aligned.buf = copy;
	return change(d, &aligned, done);
}

int ff_disk_change(struct ff_disk *disk, const struct ff_change *c, size_t *done)
{
	struct ff_change limited = *c;
	struct stat st;
	int r;

	if (c->off < 0 || c->in_off < 0)
		return -EINVAL;
	switch (c->kind) {
	case FF_COPY:
		limited.len = FF_MIN(c->len, COPY_BYTES);
		break;
	case FF_FALLOCATE:
		if (c->mode & ~(FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE | FALLOC_FL_ZERO_RANGE))
			return -EOPNOTSUPP;
		if (c->len == 0)
			return -EINVAL;
		break;
	case FF_WRITE:
	case FF_TRUNCATE:
		break;
	}
	if (c->kind != FF_TRUNCATE && limited.len > (uint64_t)(INT64_MAX - c->off))
		return -EFBIG;
	if (disk_is_device(disk))
		return device_change(disk, &limited, done);
	if (c->kind != FF_WRITE || !c->append)
		return preserve_change(disk, &limited, done);
	FF_GUARD(&disk->append);
	r = io_fstat(c->fd, &st);
	limited.off = st.st_size;
	return r ? r : preserve_change(disk, &limited, done);
}
