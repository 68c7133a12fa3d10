/*
 * From an offset of the disk to what is there, by L1 and L2.
 *
 * Tables are read by slices of at most QS_SLICE bytes through the cache, never whole: a table may
 * have 32 MiB. What an entry leads to is checked against the length of the file here, for that is
 * no matter of the format: a table or a cluster that does not begin in the file is damage, for the
 * range that it stands for and no other. A last cluster that the file has a part of is usual, and
 * the rest of it are zeros.
 *
 * Tables may overlap each other or anything else. That is damage too, of a kind that QEMU's reading
 * does not see either: any bytes are read as a table without harm.
 */
#include "cow/qsource/image.h"

#include <stdio.h>
#include <string.h>

#include "ff_util.h"

int qs_image_open(const struct qs_bytes *file, unsigned layer, struct qs_image *out, char *why)
{
	uint8_t peek[QS_PEEK];
	size_t len = (size_t)FF_MIN(file->size, sizeof peek), wants;
	ff_autofree uint8_t *buf = NULL;
	int r = len ? file->read(file, peek, len, 0) : 0;

	if (!r && len) {
		wants = FF_MAX(qs_head_wants(peek, len), len);
		len = (size_t)FF_MIN(file->size, wants);
		buf = malloc(len);
		r = buf ? file->read(file, buf, len, 0) : -ENOMEM;
	}
	if (r) {
		snprintf(why, QS_WHY, "it cannot be read: %s", strerror(-r));
		return r;
	}
	out->file = out->data = file;
	out->layer = layer;
	return qs_head_decode(buf, len, &out->head, why);
}

/* A slice of a table: of an L1 or L2 table at TABLE, the entries from FIRST on. */
struct slice {
	uint64_t first, count;
	bool missing; /* the file ends before */
	uint8_t data[QS_SLICE];
};

/* The one that entry I of COUNT is in. */
static int take_slice(const struct qs_image *img, struct qs_cache *cache, uint64_t table,
                      unsigned entry_size, uint64_t i, uint64_t count, struct slice *s)
{
	uint64_t per_slice = QS_SLICE / entry_size, off;

	s->first = i - i % per_slice;
	s->count = FF_MIN(per_slice, count - s->first);
	off = table + s->first * entry_size;
	s->missing = off > img->file->size || s->count * entry_size > img->file->size - off;
	if (s->missing)
		return 0;
	return qs_cache_read(cache, img->file, img->layer, off, (size_t)(s->count * entry_size),
	                     s->data);
}

/* Entry I of a slice; with subclusters both its halves. */
static const char *entry_of(const struct qs_image *img, const struct slice *s, uint64_t i,
                            struct qs_entry *out)
{
	const uint8_t *p = s->data + (i - s->first) * img->head.entry_size;
	bool extended = img->head.extended, used;
	const char *bad = qs_l2_decode(&img->head, ff_be64(p), extended ? ff_be64(p + 8) : 0, out);

	if (bad)
		return bad;
	used = out->kind == QS_PACKED || (out->kind == QS_DATA && (!extended || out->alloc));
	return used && out->host >= img->data->size ? "an L2 entry leads past the end of the file"
	                                            : NULL;
}

/* The run at OFF within one cluster, of which the entry is E. */
static void run_of(const struct qs_image *img, const struct qs_entry *e, uint64_t off,
                   struct qs_run *out)
{
	uint64_t size = img->head.cluster_size, in = off % size, sub = size / QS_SUBCLUSTERS, end;
	unsigned i = (unsigned)(in / sub);

	*out = (struct qs_run){.kind = e->kind, .len = size - in, .host = e->host};
	if (e->kind == QS_PACKED) {
		out->packed = (uint32_t)FF_MIN(e->packed, img->data->size - e->host);
		return;
	}
	if (img->head.extended) {
		out->kind = qs_subcluster(e, i);
		for (end = i + 1; end < QS_SUBCLUSTERS; end++)
			if (qs_subcluster(e, (unsigned)end) != out->kind)
				break;
		out->len = end * sub - in;
	}
	out->host += in;
}

/* Does NEXT go on where RUN, which has LEN bytes so far, ends? */
static bool goes_on(const struct qs_run *run, uint64_t len, const struct qs_run *next)
{
	if (next->kind != run->kind || run->kind == QS_PACKED)
		return false;
	return run->kind != QS_DATA || next->host == run->host + len;
}

/* The run at OFF, as far as the slice tells. MAX > 0. */
static void run_in_slice(const struct qs_image *img, const struct slice *s, uint64_t off,
                         uint64_t max, struct qs_run *out)
{
	uint64_t i = (off >> img->head.cluster_bits) % img->head.l2_entries;
	struct qs_entry e;
	struct qs_run next;

	*out = (struct qs_run){.bad = entry_of(img, s, i, &e)};
	if (out->bad) {
		out->len = img->head.cluster_size - off % img->head.cluster_size;
		return;
	}
	run_of(img, &e, off, out);
	while (out->len < max) {
		uint64_t at = off + out->len;

		i = (at >> img->head.cluster_bits) % img->head.l2_entries;
		if (i < s->first || i >= s->first + s->count ||
		    (i == s->first && at % img->head.cluster_size == 0))
			return; /* the slice has ended */
		if (entry_of(img, s, i, &e))
			return;
		run_of(img, &e, at, &next);
		if (!goes_on(out, out->len, &next))
			return;
		out->len += next.len;
	}
}

/* Bytes of the disk from OFF on that COUNT entries stand for, the first of which has OFF; each has
 * SPAN bytes. */
static uint64_t bytes_left(uint64_t off, uint64_t span, uint64_t count)
{
	uint64_t all;

	if (ff_mul_u64(count, span, &all))
		all = UINT64_MAX;
	return all - off % span;
}

/* In the L1 slice: where is the L2 table of OFF? 0: there is none, or it is bad, as *OUT says. */
static uint64_t table_of(const struct qs_image *img, const struct slice *s, uint64_t off,
                         uint64_t span, struct qs_run *out)
{
	uint64_t i = off / span, table = 0, count = 1, other;

	*out = (struct qs_run){.kind = QS_NONE};
	if (s->missing)
		out->bad = "the L1 table lies past the end of the file";
	else
		out->bad = qs_l1_decode(&img->head, ff_be64(s->data + (i - s->first) * 8), &table);
	if (table && !out->bad)
		return table;
	for (; !out->bad && i + count < s->first + s->count; count++)
		if (qs_l1_decode(&img->head, ff_be64(s->data + (i + count - s->first) * 8),
		                 &other) ||
		    other)
			break;
	out->len = bytes_left(off, span, s->missing ? s->first + s->count - i : count);
	return 0;
}

int qs_map(const struct qs_image *img, struct qs_cache *cache, uint64_t off, uint64_t max,
           struct qs_run *out)
{
	const struct qs_head *h = &img->head;
	uint64_t span = h->l2_entries << h->cluster_bits, i, table;
	struct slice s;
	int r = take_slice(img, cache, h->l1_offset, 8, off / span, h->l1_entries, &s);

	if (r)
		return r;
	max = FF_MIN(max, h->size - off);
	table = table_of(img, &s, off, span, out);
	if (table) {
		i = (off >> h->cluster_bits) % h->l2_entries;
		r = take_slice(img, cache, table, h->entry_size, i, h->l2_entries, &s);
		if (r)
			return r;
		if (s.missing)
			*out = (struct qs_run){
			    .bad = "an L2 table lies past the end of the file",
			    .len = bytes_left(off, h->cluster_size, s.first + s.count - i)};
		else
			run_in_slice(img, &s, off, max, out);
	}
	out->len = FF_MIN(out->len, max);
	return 0;
}
