/*
 * Saving and releasing clusters. The states and the order of writes are told at the top of
 * qcow2_image.c; this file has no state of its own.
 *
 * A save allocates all its data clusters as one contiguous run, so that one write of checksums and
 * one of refcounts serve it, and writes its L2 entries with one pwrite for each contiguous piece of
 * what is wanted: the entries in a gap belong to other saves, which may be writing them. For the
 * most frequent save, one cluster, that makes four small pwrites.
 *
 * A save that fails undoes what it did, from the last step on: L2 entries back to 0 (as those of
 * unmarked clusters are), then refcounts, then the allocation. If a step of the undoing fails, the
 * rest is left: entries that cannot be zeroed keep their data, which is right, if unmarked.
 */
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>

#include "cow/io.h"
#include "cow/qcow2_private.h"
#include "ff_log.h"
#include "ff_util.h"

#define INLINE_ENTRIES 64u /* of a save, without malloc */

struct save {
	struct ff_image *img;
	uint64_t first, count;
	const uint8_t *data;
	uint8_t *entries; /* be64 by cluster: 0 not wanted */
	uint8_t *sums;    /* be64 by data cluster */
	uint64_t used;    /* data clusters */
	uint64_t host;    /* first of them */
};

static int check_range(const struct ff_image *img, uint64_t first, uint64_t count)
{
	return first > img->l.clusters || count > img->l.clusters - first ? -EINVAL : 0;
}

/* The next piece of wanted clusters at or after *AT: [*AT, return value), empty at the end. */
static uint64_t next_piece(const struct save *s, uint64_t *at)
{
	uint64_t end;

	while (*at < s->count && !ff_be64(s->entries + *at * 8))
		++*at;
	for (end = *at; end < s->count && ff_be64(s->entries + end * 8); end++)
		;
	return end;
}

/* Decides what each cluster becomes; data clusters are numbered from host cluster 0 for now. */
static void plan(struct save *s, const uint8_t *wanted)
{
	uint32_t cs = s->img->l.cluster_size;

	for (uint64_t i = 0; i < s->count; i++) {
		const uint8_t *p = s->data + i * cs;
		uint64_t entry = 0;

		if (wanted && !wanted[i])
			entry = 0;
		else if (qcow2_is_zero(p, cs))
			entry = QCOW2_ZERO;
		else {
			ff_put_be64(s->sums + s->used * 8, qcow2_sum(p, cs, s->first + i));
			entry = QCOW2_COPIED | s->used++ * cs;
		}
		ff_put_be64(s->entries + i * 8, entry);
	}
}

/* Moves the data clusters to where they were allocated. */
static void place(struct save *s)
{
	uint64_t base = s->host * s->img->l.cluster_size;

	for (uint64_t i = 0; i < s->count; i++) {
		uint64_t entry = ff_be64(s->entries + i * 8);

		if (entry & QCOW2_COPIED)
			ff_put_be64(s->entries + i * 8, entry + base);
	}
}

static int write_data(struct save *s)
{
	struct ff_image *img = s->img;
	uint64_t cs = img->l.cluster_size, host = s->host, i = 0, end;
	int fd, sums_fd, r = image_fd(img, &fd);

	if (!r)
		r = image_sums_fd(img, true, &sums_fd);
	while (!r && i < s->count) {
		for (end = i; end < s->count && ff_be64(s->entries + end * 8) & QCOW2_COPIED; end++)
			;
		if (end > i)
			r = io_pwrite(fd, s->data + i * cs, (end - i) * cs, host * cs);
		host += end - i;
		i = end + (end == i);
	}
	if (!r)
		r = io_pwrite(sums_fd, s->sums, s->used * 8, qcow2_sum_offset(&img->l, s->host));
	atomic_store(&img->sums_dirty, true);
	return r;
}

/* Writes the L2 entries of all wanted pieces, or zeros in their stead. */
static int write_entries(struct save *s, bool clear)
{
	static const uint8_t zeros[4096];
	struct ff_image *img = s->img;
	uint64_t at = 0, end;
	int fd, r = image_fd(img, &fd);

	for (; !r && (end = next_piece(s, &at)) > at; at = end) {
		uint64_t off = image_l2_offset(img, s->first + at);

		if (!clear)
			r = io_pwrite(fd, s->entries + at * 8, (end - at) * 8, off);
		for (uint64_t i = at; clear && !r && i < end; i += sizeof zeros / 8)
			r = io_pwrite(fd, zeros, FF_MIN((end - i) * 8, sizeof zeros),
			              off + (i - at) * 8);
	}
	return r;
}

static int hook_tables(struct save *s)
{
	uint64_t at = 0, end;
	int r = 0;

	for (; !r && (end = next_piece(s, &at)) > at; at = end)
		r = image_hook_tables(s->img, s->first + at, end - at);
	return r;
}

/* Everything between the allocation and the marks; undone on error, but for the allocation, unless
 * *KEEP says that it must stay. */
static int write_all(struct save *s, bool durable, bool *keep)
{
	int r = s->used ? write_data(s) : 0;

	if (!r)
		r = hook_tables(s);
	if (r)
		return r;
	atomic_fetch_add(&s->img->writes, 1);
	if (durable)
		r = s->used ? ff_image_flush(s->img) : image_flush_tables(s->img);
	if (!r && s->used)
		r = image_refs_set(s->img, s->host, s->used);
	if (r)
		return r;
	r = write_entries(s, false);
	atomic_fetch_add(&s->img->writes, 1);
	if (!r && durable)
		r = ff_image_flush(s->img);
	if (r) {
		*keep = write_entries(s, true) != 0;
		if (!*keep && s->used)
			image_refs_clear(s->img, s->host, s->used);
	}
	return r;
}

static void publish(struct save *s)
{
	uint64_t at = 0, end;

	for (; (end = next_piece(s, &at)) > at; at = end) {
		clustermap_set(&s->img->marks, s->first + at, end - at);
		atomic_fetch_add_explicit(&s->img->preserved, end - at, memory_order_relaxed);
	}
}

static int run_save(struct save *s, bool durable)
{
	struct ff_image *img = s->img;
	bool keep = false;
	int r = clustermap_reserve(&img->marks, s->first, s->count);

	if (!r && s->used)
		r = image_alloc(img, s->used, &s->host);
	if (r)
		return r;
	if (s->used)
		place(s);
	r = write_all(s, durable, &keep);
	if (!r)
		publish(s);
	else if (s->used && !keep)
		image_unalloc(img, s->host, s->used);
	return r;
}

int ff_image_save(struct ff_image *img, uint64_t first, uint64_t count, const void *data,
                  const uint8_t *wanted, bool durable)
{
	uint8_t inline_entries[INLINE_ENTRIES * 16];
	ff_autofree uint8_t *heap = NULL;
	struct save s = {.img = img, .first = first, .count = count, .data = data};
	int r = check_range(img, first, count);

	if (r)
		return r;
	if (count > INLINE_ENTRIES) {
		heap = malloc(count * 16);
		if (!heap)
			return -ENOMEM;
	}
	s.entries = heap ? heap : inline_entries;
	s.sums = s.entries + count * 8;
	plan(&s, wanted);
	return run_save(&s, durable);
}

int ff_image_save_zeros(struct ff_image *img, uint64_t first, uint64_t count, bool durable)
{
	uint8_t entries[IMAGE_ENTRIES * 8];
	uint64_t done = 0;
	int r = check_range(img, first, count);

	for (size_t i = 0; i < IMAGE_ENTRIES; i++)
		ff_put_be64(entries + i * 8, QCOW2_ZERO);
	if (!r)
		r = clustermap_reserve(&img->marks, first, count);
	if (!r && durable) {
		r = image_hook_tables(img, first, count);
		if (!r)
			r = image_flush_tables(img);
	}
	while (!r && done < count) {
		struct save s = {
		    .img = img,
		    .first = first + done,
		    .count = FF_MIN(count - done, (uint64_t)IMAGE_ENTRIES),
		    .entries = entries,
		};
		bool keep; /* nothing is allocated here */

		/* zeros of earlier turns stay when a later one fails: they are right */
		r = write_all(&s, false, &keep);
		done += s.count;
	}
	if (!r && durable)
		r = ff_image_flush(img);
	if (!r) {
		clustermap_set(&img->marks, first, count);
		atomic_fetch_add_explicit(&img->preserved, count, memory_order_relaxed);
	}
	return r;
}

/* --- releasing -------------------------------------------------------------------------------- */

/* Frees N neighbouring host clusters that no table refers to any more. */
static int free_run(struct ff_image *img, uint64_t host, uint64_t n)
{
	uint64_t cs = img->l.cluster_size;
	int fd, r = image_fd(img, &fd);

	if (!r)
		r = image_refs_clear(img, host, n);
	if (r)
		return r;
	r = io_fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, host * cs, n * cs);
	if (r == -EOPNOTSUPP)
		return 0;
	if (!r)
		image_charge_back(img, n * cs);
	return r;
}

/* Releases a marked run of at most IMAGE_ENTRIES clusters. HOLLOW: the data alone. */
static int release_run(struct ff_image *img, uint64_t first, uint64_t count, bool hollow)
{
	uint8_t entries[IMAGE_ENTRIES * 8] = {0};
	uint64_t host[IMAGE_ENTRIES], i = 0, n = 0, stored = 0;
	uint8_t kinds[IMAGE_ENTRIES];
	int fd, r = image_entries(img, first, count, NULL, host, kinds);

	while (!r && n < count && kinds[n] == FF_KIND_NONE)
		n++;
	if (r || n == count) /* nothing stored: write nothing, which would make a table of a hole */
		return r;
	for (uint64_t k = 0; k < count; k++) {
		if (kinds[k] == FF_KIND_NONE)
			continue;
		if (hollow)
			ff_put_be64(entries + k * 8, QCOW2_ZERO);
		else
			stored++;
	}
	r = image_fd(img, &fd);
	if (!r)
		r = io_pwrite(fd, entries, count * 8, image_l2_offset(img, first));
	if (!r)
		atomic_fetch_sub_explicit(&img->preserved, stored, memory_order_relaxed);
	for (; !r && i < count; i += n) {
		n = 1;
		if (!host[i])
			continue;
		while (i + n < count && host[i + n] == host[i] + n)
			n++;
		r = free_run(img, host[i], n);
	}
	atomic_fetch_add(&img->writes, 1);
	return r;
}

static int release(struct ff_image *img, uint64_t first, uint64_t count, bool hollow)
{
	int r = check_range(img, first, count);

	while (!r && count) {
		bool marked;
		uint64_t max = FF_MIN(count, (uint64_t)IMAGE_ENTRIES);
		uint64_t n = clustermap_run(&img->marks, first, max, &marked);

		if (marked)
			r = release_run(img, first, n, hollow);
		first += n;
		count -= n;
	}
	return r;
}

int ff_image_release(struct ff_image *img, uint64_t first, uint64_t count)
{
	return release(img, first, count, false);
}

int ff_image_hollow(struct ff_image *img, uint64_t first, uint64_t count)
{
	return release(img, first, count, true);
}
