/*
 * The bytes of a made-up image: a qcow2 version 3 file of what changed, which exists nowhere.
 *
 *   cluster 0   header, the backing file's format and name
 *   rt_first    refcount table
 *   rb_first    refcount blocks, 1 bit a host cluster: all of them are used, once
 *   l1_first    L1 table
 *   l2_first    those L2 tables that have an entry, in the order of the disk
 *   data_first  the changed clusters that are not zeros, in the order of the disk
 *
 * An L2 entry is COPIED | offset for these; for changed clusters of zeros it is the zero flag, but
 * 0 in an image without a backing file, where unallocated means zeros and not every reader knows
 * the flag. Clusters are those of the tracking, so that what is allocated is exactly what changed;
 * larger ones would take in neighbours, smaller ones waste tables. The tables of a disk that fits
 * QEMU's limits with these clusters in its fleecing images fit them here, being fewer.
 *
 * Every position follows from how many clusters of data lie before a chunk of the disk and from
 * which tables there are (struct ff_since); what is in a chunk is asked anew each time (struct
 * since_view), for changes and zeros give the same answer each time. Should they not, the counts
 * differ, and the read fails.
 */
#include <errno.h>
#include <string.h>

#include "cow/since.h"
#include "ff_util.h"

enum { PAGE = 4096, ENTRIES = PAGE / 8 };
_Static_assert(CHANGES_MAX % ENTRIES == 0, "a page of an L2 table lies in one chunk");

int since_layout(struct ff_since *s, uint32_t cluster_size)
{
	struct qcow2_layout l;
	uint64_t fixed, words = ff_div_up(s->tables, 64);
	int r = qcow2_layout(s->size, cluster_size, &l);

	if (r)
		return r;
	l.l2_count = 0;
	for (uint64_t w = 0; w < words; w++) {
		s->present_before[w] = l.l2_count;
		l.l2_count += (unsigned)__builtin_popcountll(s->present[w]);
	}
	fixed = 1 + l.l1_count + l.l2_count + s->before[s->chunks];
	l.rb_count = l.rt_count = 0;
	for (;;) {
		uint64_t rb = ff_div_up(fixed + l.rb_count + l.rt_count, l.per_block);
		uint64_t rt = ff_div_up(rb, l.per_table);

		if (rb == l.rb_count && rt == l.rt_count)
			break;
		l.rb_count = rb;
		l.rt_count = rt;
	}
	l.rb_first = l.rt_first + l.rt_count;
	l.l1_first = l.rb_first + l.rb_count;
	l.l2_first = l.l1_first + l.l1_count;
	l.data_first = l.l2_first + l.l2_count;
	l.capacity = l.rb_count * l.per_block;
	s->total = l.data_first + s->before[s->chunks];
	s->l = l;
	return s->total > INT64_MAX / cluster_size ? -EFBIG : 0;
}

static bool is_present(const struct ff_since *s, uint64_t table)
{
	return table < s->tables && s->present[table / 64] >> (table % 64) & 1;
}

/* How many tables that are present come before this one. */
static uint64_t rank_of(const struct ff_since *s, uint64_t table)
{
	uint64_t below = s->present[table / 64] & ((UINT64_C(1) << (table % 64)) - 1);

	return s->present_before[table / 64] + (unsigned)__builtin_popcountll(below);
}

/* The last I below COUNT with COUNTS[I] <= X; COUNTS[0] is 0. */
static size_t last_not_above(const uint64_t *counts, size_t count, uint64_t x)
{
	size_t lo = 0, hi = count;

	while (hi - lo > 1) {
		size_t mid = lo + (hi - lo) / 2;

		if (counts[mid] <= x)
			lo = mid;
		else
			hi = mid;
	}
	return lo;
}

/* The bit of WORD that has N set ones below it. */
static unsigned nth_bit(uint64_t word, uint64_t n)
{
	while (n--)
		word &= word - 1;
	return (unsigned)__builtin_ctzll(word);
}

/* The table that is the K-th of those present. */
static uint64_t table_at(const struct ff_since *s, uint64_t k)
{
	size_t w = last_not_above(s->present_before, (size_t)ff_div_up(s->tables, 64), k);

	return (uint64_t)w * 64 + nth_bit(s->present[w], k - s->present_before[w]);
}

/* --- tables, by pages --- */

static void head_page(const struct ff_since *s, uint8_t *page)
{
	qcow2_plain_head_encode(&s->l, s->backing, page);
}

static void refcount_table_page(const struct ff_since *s, uint64_t first, uint8_t *page)
{
	for (uint64_t i = 0; i < ENTRIES && first + i < s->l.rb_count; i++)
		ff_put_be64(page + i * 8, (s->l.rb_first + first + i) * s->l.cluster_size);
}

/* FIRST: the host cluster of its first bit. */
static void refcount_block_page(const struct ff_since *s, uint64_t first, uint8_t *page)
{
	uint64_t n = s->total > first ? FF_MIN(s->total - first, (uint64_t)PAGE * 8) : 0;

	memset(page, 0xff, n / 8);
	if (n % 8)
		page[n / 8] = (uint8_t)((1u << (n % 8)) - 1);
}

static void l1_page(const struct ff_since *s, uint64_t first, uint8_t *page)
{
	for (uint64_t i = 0; i < ENTRIES; i++)
		if (is_present(s, first + i))
			ff_put_be64(page + i * 8,
			            QCOW2_COPIED | (s->l.l2_first + rank_of(s, first + i)) *
			                               s->l.cluster_size);
}

/* FIRST: the guest cluster of its first entry. */
static int l2_page(struct ff_since_file *f, uint64_t first, uint8_t *page)
{
	const struct ff_since *s = f->since;
	size_t chunk = (size_t)(first / CHANGES_MAX);
	unsigned at = first % CHANGES_MAX;
	struct since_view v;
	uint64_t host;
	int r;

	if (chunk >= s->chunks)
		return 0;
	r = since_view(f, chunk, &v);
	if (r)
		return r;
	host = s->l.data_first + s->before[chunk];
	for (unsigned w = 0; w < at / 64; w++)
		host += (unsigned)__builtin_popcountll(v.data[w]);
	for (unsigned i = 0; i < ENTRIES; i++) {
		uint64_t bit = UINT64_C(1) << ((at + i) % 64);
		unsigned w = (at + i) / 64;

		if (v.data[w] & bit)
			ff_put_be64(page + i * 8, QCOW2_COPIED | host++ * s->l.cluster_size);
		else if (v.changed[w] & bit && !s->whole)
			ff_put_be64(page + i * 8, QCOW2_ZERO);
	}
	return 0;
}

/* PAGE, which is zeros, becomes the page at OFF of what comes before the data. */
static int table_page(struct ff_since_file *f, uint64_t off, uint8_t *page)
{
	const struct ff_since *s = f->since;
	const struct qcow2_layout *l = &s->l;
	uint64_t cluster = off / l->cluster_size, in = off % l->cluster_size, k;

	if (off == 0) {
		head_page(s, page);
	} else if (cluster >= l->l2_first) {
		k = table_at(s, cluster - l->l2_first);
		return l2_page(f, k * l->per_table + in / 8, page);
	} else if (cluster >= l->l1_first) {
		l1_page(s, (off - l->l1_first * l->cluster_size) / 8, page);
	} else if (cluster >= l->rb_first) {
		refcount_block_page(s, (off - l->rb_first * l->cluster_size) * 8, page);
	} else if (cluster >= l->rt_first) {
		refcount_table_page(s, (off - l->rt_first * l->cluster_size) / 8, page);
	}
	return 0;
}

/* [off, end) lies before the data. */
static int read_tables(struct ff_since_file *f, uint64_t off, uint64_t end, char *buf)
{
	uint8_t page[PAGE];
	int r = 0;

	while (off < end && !r) {
		uint64_t begin = off - off % PAGE;
		size_t n = (size_t)(FF_MIN(end, begin + PAGE) - off);

		memset(page, 0, sizeof page);
		r = table_page(f, begin, page);
		memcpy(buf, page + (off - begin), n);
		buf += n;
		off += n;
	}
	return r;
}

/* --- data --- */

/* Bytes [at, at+len) of the disk, with zeros beyond its end. */
static int read_disk(struct ff_since_file *f, uint64_t at, size_t len, char *buf)
{
	size_t got = 0, want = at < f->since->size ? (size_t)FF_MIN(len, f->since->size - at) : 0;
	int r = want ? ff_reader_read(f->reader, buf, want, (off_t)at, &got) : 0;

	if (!r && got != want)
		return -EIO;
	if (!r)
		memset(buf + want, 0, len - want);
	return r;
}

/* Bytes [off, end) of the image, which are data of one chunk: that has its first at host byte BASE.
 */
static int read_chunk(struct ff_since_file *f, size_t chunk, uint64_t base, uint64_t off,
                      uint64_t end, char *buf)
{
	uint64_t size = f->since->l.cluster_size, nth = (off - base) / size,
	         in = (off - base) % size;
	struct since_view v;
	unsigned at = 0, w = 0;
	int r = since_view(f, chunk, &v);

	if (r)
		return r;
	while (w < CHANGES_WORDS && nth >= (unsigned)__builtin_popcountll(v.data[w]))
		nth -= (unsigned)__builtin_popcountll(v.data[w++]);
	if (w == CHANGES_WORDS)
		return -EIO;
	at = w * 64 + nth_bit(v.data[w], nth);
	while (off < end && !r) {
		unsigned to = bits_find(v.data, at, v.count, false);
		uint64_t from = ((uint64_t)chunk * CHANGES_MAX + at) * size + in;
		size_t n = (size_t)FF_MIN(end - off, (to - at) * size - in);

		r = read_disk(f, from, n, buf);
		buf += n;
		off += n;
		in = 0;
		at = bits_find(v.data, to, v.count, true);
	}
	return r;
}

static int read_data(struct ff_since_file *f, uint64_t off, uint64_t end, char *buf)
{
	const struct ff_since *s = f->since;
	uint64_t size = s->l.cluster_size, data = s->l.data_first * size;
	int r = 0;

	while (off < end && !r) {
		size_t chunk = last_not_above(s->before, s->chunks, (off - data) / size);
		uint64_t base = data + s->before[chunk] * size;
		uint64_t to = FF_MIN(end, data + s->before[chunk + 1] * size);

		r = read_chunk(f, chunk, base, off, to, buf);
		buf += to - off;
		off = to;
	}
	return r;
}

uint64_t ff_since_image_size(const struct ff_since *s)
{
	return s->total * s->l.cluster_size;
}

int ff_since_read_image(struct ff_since_file *f, void *buf, size_t len, off_t off, size_t *got)
{
	const struct ff_since *s = f->since;
	uint64_t size = ff_since_image_size(s), data = s->l.data_first * s->l.cluster_size;
	uint64_t from = (uint64_t)off, to, tables;
	int r = 0;

	if (off < 0)
		return -EINVAL;
	to = from >= size ? from : from + FF_MIN(len, size - from);
	tables = FF_MIN(to, data);
	if (from < tables)
		r = read_tables(f, from, tables, buf);
	if (!r && to > data)
		r = read_data(f, FF_MAX(from, data), to, (char *)buf + (FF_MAX(from, data) - from));
	if (!r && atomic_load(&f->changes.new->broken))
		r = -EIO;
	if (!r)
		*got = (size_t)(to - from);
	return r;
}
