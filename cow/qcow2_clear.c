/*
 * Giving up what an image holds, once its ledger says what that was.
 *
 * Piece by piece (ff_image_drop_recorded) where views still need other clusters; all at once
 * (ff_image_clear) where none needs any and none ever will: then the tables go as well, which else
 * would take eight bytes a cluster, and the file is cut to what a new one has.
 *
 * Order of a clearing: L2 entries, (fdatasync,) L1 entries, refcounts, then data and checksums. No
 * entry is left in a table that L1 does not lead to, which would be damage. A process killed in
 * between leaves refcounts that are too high, or a file that is too long: the next load mends both.
 * There is no save beside it, and no reader, so nobody looks at a table that is about to go.
 */
#include <errno.h>
#include <fcntl.h>
#include <string.h>

#include "cow/io.h"
#include "cow/qcow2_private.h"
#include "ff_util.h"

enum { PAGE = 4096 };

int ff_image_drop_recorded(struct ff_image *img, uint64_t first, uint64_t count)
{
	uint64_t end = first + count;
	int r = 0;

	while (!r && first < end) {
		bool recorded;
		uint64_t n = ff_image_recorded_run(img, first, end - first, &recorded);

		if (recorded)
			r = ff_image_release(img, first, n);
		first += n;
	}
	return r;
}

/* Makes LEN bytes at OFF zeros, by a hole where that can be. */
static int make_zeros(int fd, uint64_t off, uint64_t len)
{
	static const uint8_t zeros[PAGE];
	uint64_t end = off + len, to = FF_MIN(ff_round_up(off, PAGE), end), data;
	int r = to > off ? io_pwrite(fd, zeros, to - off, off) : 0;

	if (!r && to < end)
		r = io_fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, to, end - to);
	if (r != -EOPNOTSUPP)
		return r;
	/* by hand, then, where there is something */
	for (r = 0; !r && to < end; to += PAGE) {
		r = io_seek(fd, to, SEEK_DATA, &data);
		if (r == -ENXIO || (!r && data >= end))
			return 0;
		to = r ? to : FF_MAX(to, data - data % PAGE);
		r = io_pwrite(fd, zeros, FF_MIN(end - to, (uint64_t)PAGE), to);
	}
	return r;
}

static uint64_t set_in(const struct clustermap *map)
{
	uint64_t n = 0;

	for (uint64_t at = 0, run; at < map->size; at += run) {
		bool set;

		run = clustermap_run(map, at, map->size - at, &set);
		n += set ? run : 0;
	}
	return n;
}

/* All L1 entries, then the refcounts of what they led to. Lock held. */
static int forget_tables(struct ff_image *img, int fd)
{
	const struct qcow2_layout *l = &img->l;
	uint64_t cs = l->cluster_size, keep, from;
	int r = make_zeros(fd, l->l1_first * cs, l->l1_count * cs);
	if (r)
		return r;
	clustermap_clear(&img->tables, 0, img->tables.size);
	clustermap_clear(&img->refs, l->l2_first, l->capacity - l->l2_first);
	/* The byte in which the first of those bits is has others, too. */
	keep = FF_MIN(ff_round_up(l->l2_first, 8), l->capacity);
	r = keep > l->l2_first ? image_refs_write(img, l->l2_first, keep - l->l2_first) : 0;
	from = l->rb_first * cs + keep / 8;
	return r ? r : make_zeros(fd, from, l->l1_first * cs - from);
}

static int cut(struct ff_image *img, int fd)
{
	const struct qcow2_layout *l = &img->l;
	int r = io_truncate(fd, l->data_first * l->cluster_size);

	image_keep_sums(img);
	if (!r && atomic_load(&img->sums_fd) >= 0)
		r = io_truncate(atomic_load(&img->sums_fd), QCOW2_SUMS_HEAD_SIZE);
	return r;
}

/* Gives the budget back what the image had beyond KEPT and the files beside it. */
static void charge_back(struct ff_image *img, uint64_t kept)
{
	const struct ledger *g;
	uint64_t had;

	FF_GUARD(&img->ledger_lock); /* nothing else is charged meanwhile */
	g = atomic_load(&img->ledger);
	kept += (g ? g->allocated : 0) + atomic_load(&img->said_charged);
	had = atomic_load(&img->allocated);
	image_charge_back(img, had > kept ? had - kept : 0);
}

int ff_image_clear(struct ff_image *img, bool durable)
{
	int fd, r = image_fd(img, &fd);
	uint64_t blocks = 0, cs = img->l.cluster_size;
	bool empty;

	if (r)
		return r;
	pthread_mutex_lock(&img->alloc_lock);
	empty = img->pristine || (img->next == img->l.data_first && set_in(&img->tables) == 0);
	pthread_mutex_unlock(&img->alloc_lock);
	if (empty)
		return 0;
	r = make_zeros(fd, img->l.l2_first * cs, (img->l.data_first - img->l.l2_first) * cs);
	atomic_fetch_add(&img->writes, 1);
	if (!r && durable)
		r = ff_image_flush(img);
	if (r)
		return r;
	atomic_store(&img->preserved, 0);
	pthread_mutex_lock(&img->alloc_lock);
	r = forget_tables(img, fd);
	if (!r)
		r = cut(img, fd);
	if (!r) {
		img->next = img->l.data_first;
		img->given_back_count = 0;
	}
	blocks = set_in(&img->blocks);
	pthread_mutex_unlock(&img->alloc_lock);
	atomic_fetch_add(&img->writes, 1);
	if (r)
		return r;
	charge_back(img, (1 + blocks) * QCOW2_TABLE_CHARGE);
	return 0;
}
