/*
 * The format of a guest's image. No state and no I/O.
 *
 * The rules are QEMU's own where it reads an image, and stricter in one way: bits that are reserved
 * must be zero. What QEMU would read otherwise, or not at all, is an error here, never a guess:
 * encryption of either kind, incompatible features that are not known, a table that is too small.
 *
 * Refcounts and internal snapshots tell nothing about the disk as it is now and are not looked at;
 * nor are autoclear features but that of the data file, or the dirty bit, which is about refcounts.
 *
 * The header, offset by offset (big-endian); version 2 ends at 72:
 *     0  4  "QFI\xfb"                          40  8  L1 offset
 *     4  4  version                            48  8  refcount table offset
 *     8  8  backing file name offset, or 0     56 16  refcount clusters, internal snapshots
 *    16  4  backing file name length           72  8  incompatible features
 *    20  4  cluster bits, 9 to 21              80 16  compatible, autoclear features
 *    24  8  size of the disk                   96  4  refcount order
 *    32  4  encryption: 0, or 1 AES, 2 LUKS   100  4  header length
 *    36  4  L1 entries                        104  1  compression: 0 zlib, 1 zstd
 * Extensions follow it: type 4, length 4, data, filled up to 8 bytes; type 0 is the end. They and
 * the name lie in the first cluster.
 */
#include "cow/qsource/format.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "ff_util.h"

#define V2_LENGTH 72u
#define V3_LENGTH 104u

#define CLUSTER_BITS_MIN 9u
#define CLUSTER_BITS_MAX 21u
#define L1_BYTES_MAX     (UINT64_C(32) << 20)
#define SNAPSHOTS_MAX    65536u

#define INCOMPAT_DIRTY    UINT64_C(1)
#define INCOMPAT_CORRUPT  UINT64_C(2)
#define INCOMPAT_DATA     UINT64_C(4)
#define INCOMPAT_PACKING  UINT64_C(8)
#define INCOMPAT_EXTENDED UINT64_C(16)
#define INCOMPAT_KNOWN    UINT64_C(31)

#define EXT_END      0u
#define EXT_FORMAT   0xe2792acau
#define EXT_FEATURES 0x6803f857u
#define EXT_CRYPTO   0x0537be77u
#define EXT_DATA     0x44415441u

#define FEATURE_LEN 48u /* type 1, bit 1, name */

#define L2_PACKED   (UINT64_C(1) << 62)
#define L2_ZERO     UINT64_C(1)
#define L2_COPIED   (UINT64_C(1) << 63)
#define OFFSET_MASK UINT64_C(0x00fffffffffffe00)
#define L1_RESERVED (~(L2_COPIED | OFFSET_MASK))
#define L2_RESERVED (~(L2_COPIED | L2_PACKED | OFFSET_MASK | L2_ZERO))

bool qs_is_image(const uint8_t *buf, size_t len)
{
	return len >= V2_LENGTH && ff_be32(buf) == QS_MAGIC && ff_be32(buf + 4) >= 2;
}

size_t qs_head_wants(const uint8_t *buf, size_t len)
{
	uint32_t bits;

	if (!qs_is_image(buf, len))
		return 0;
	bits = ff_be32(buf + 20);
	return bits < CLUSTER_BITS_MIN || bits > CLUSTER_BITS_MAX ? 0 : (size_t)1 << bits;
}

bool qs_peek_size(const uint8_t *buf, size_t len, uint64_t *size)
{
	if (!qs_head_wants(buf, len) || ff_be64(buf + 24) > INT64_MAX)
		return false;
	*size = ff_be64(buf + 24);
	return true;
}

__attribute__((format(printf, 3, 4))) static int refuse(char *why, int error, const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(why, QS_WHY, fmt, ap);
	va_end(ap);
	return error;
}

/* What is decoded, and where. */
struct head {
	const uint8_t *buf;
	size_t len;
	size_t length; /* of the header proper */
	uint64_t incompat;
	struct qs_head *out;
	char *why;
};

/* Copies a string of the image, which must have neither NUL nor end too late. */
static int take_string(struct head *d, const char *what, uint64_t off, uint64_t len, size_t max,
                       char *out)
{
	if (len > max)
		return refuse(d->why, -EINVAL, "the %s is %llu bytes long, and may be %zu", what,
		              (unsigned long long)len, max);
	if (off > d->len || len > d->len - off)
		return refuse(d->why, -EINVAL, "the %s lies outside of the first cluster", what);
	if (memchr(d->buf + off, 0, (size_t)len))
		return refuse(d->why, -EINVAL, "the %s has a zero byte in it", what);
	memcpy(out, d->buf + off, (size_t)len);
	out[len] = 0;
	return 0;
}

/* What the image calls the feature, if it does; else its number. */
static void feature_name(const uint8_t *table, size_t len, unsigned bit, char *out, size_t size)
{
	for (size_t at = 0; at + FEATURE_LEN <= len; at += FEATURE_LEN) {
		size_t n = 0;

		if (table[at] != 0 || table[at + 1] != bit)
			continue;
		for (size_t i = 2; i < FEATURE_LEN && table[at + i] && n + 1 < size; i++)
			out[n++] =
			    (char)(table[at + i] >= ' ' && table[at + i] < 127 ? table[at + i]
			                                                       : '?');
		out[n] = 0;
		if (n > 0)
			return;
	}
	snprintf(out, size, "number %u", bit);
}

static int check_features(struct head *d, const uint8_t *table, size_t len)
{
	uint64_t unknown = d->incompat & ~INCOMPAT_KNOWN;
	char name[FEATURE_LEN];

	if (!unknown)
		return 0;
	feature_name(table, len, (unsigned)__builtin_ctzll(unknown), name, sizeof name);
	return refuse(d->why, -ENOTSUP, "it needs a feature of qcow2 that is not decoded: %s",
	              name);
}

static int take_extensions(struct head *d, size_t end)
{
	const uint8_t *features = NULL;
	size_t features_len = 0, at = d->length;
	int r = 0;

	while (!r && at + 8 <= end) {
		uint32_t type = ff_be32(d->buf + at), len = ff_be32(d->buf + at + 4);

		at += 8;
		if (type == EXT_END)
			break;
		if (len > end - at)
			return refuse(d->why, -EINVAL,
			              "a header extension lies outside of the first cluster");
		if (type == EXT_FORMAT) {
			r = take_string(d, "format of its backing file", at, len, QS_FORMAT_MAX,
			                d->out->format);
		} else if (type == EXT_DATA) {
			r = take_string(d, "name of its data file", at, len, QS_NAME_MAX,
			                d->out->data_file);
		} else if (type == EXT_FEATURES) {
			features = d->buf + at;
			features_len = len;
		}
		at = FF_MIN(end, at + ff_round_up(len, 8));
	}
	return r ? r : check_features(d, features, features_len);
}

static int take_encryption(struct head *d)
{
	uint32_t method = ff_be32(d->buf + 32);

	if (method == 0)
		return 0;
	return refuse(d->why, -ENOTSUP, "it is encrypted (%s)",
	              method == 1   ? "AES"
	              : method == 2 ? "LUKS"
	                            : "in an unknown way");
}

static int take_version3(struct head *d)
{
	d->length = V2_LENGTH;
	if (d->out->version == 2)
		return 0;
	if (d->len < V3_LENGTH)
		return refuse(d->why, -EINVAL, "its header is cut short");
	d->length = ff_be32(d->buf + 100);
	if (d->length < V3_LENGTH || d->length > d->len)
		return refuse(d->why, -EINVAL, "its header says to be %zu bytes long", d->length);
	d->incompat = ff_be64(d->buf + 72);
	d->out->corrupt = d->incompat & INCOMPAT_CORRUPT;
	d->out->external = d->incompat & INCOMPAT_DATA;
	d->out->extended = d->incompat & INCOMPAT_EXTENDED;
	if (ff_be32(d->buf + 96) > 6)
		return refuse(d->why, -EINVAL, "its refcounts have an impossible width");
	return 0;
}

/* After the extensions: a feature that is not known may well be about this. */
static int take_packing(struct head *d)
{
	uint8_t packing = d->length > V3_LENGTH ? d->buf[V3_LENGTH] : 0;

	if (packing > 1)
		return refuse(d->why, -ENOTSUP, "its clusters are compressed in an unknown way, %u",
		              packing);
	if ((packing != 0) != !!(d->incompat & INCOMPAT_PACKING))
		return refuse(d->why, -EINVAL, "it contradicts itself about its compression");
	d->out->zstd = packing == 1;
	return 0;
}

static int take_tables(struct head *d)
{
	struct qs_head *h = d->out;
	uint64_t present = ff_be32(d->buf + 36), covered;

	h->l1_offset = ff_be64(d->buf + 40);
	if (h->extended && h->cluster_bits < CLUSTER_BITS_MIN + 5)
		return refuse(d->why, -EINVAL, "its clusters are too small for subclusters");
	h->entry_size = h->extended ? 16 : 8;
	h->l2_entries = h->cluster_size / h->entry_size;
	covered = h->l2_entries << h->cluster_bits;
	if (ff_be64(d->buf + 24) > INT64_MAX)
		return refuse(d->why, -EINVAL, "its disk is too large to be");
	h->size = ff_be64(d->buf + 24);
	h->l1_entries = ff_div_up(h->size, covered);
	if (present * 8 > L1_BYTES_MAX)
		return refuse(d->why, -EINVAL, "its L1 table is larger than 32 MiB");
	if (present < h->l1_entries)
		return refuse(d->why, -EINVAL, "its L1 table is too small for its disk");
	if (h->l1_offset % h->cluster_size || h->l1_offset > INT64_MAX - L1_BYTES_MAX)
		return refuse(d->why, -EINVAL, "its L1 table is at an impossible place");
	if (ff_be32(d->buf + 60) > SNAPSHOTS_MAX)
		return refuse(d->why, -EINVAL, "it has more internal snapshots than may be");
	return 0;
}

static int take_names(struct head *d)
{
	struct qs_head *h = d->out;
	uint64_t name = ff_be64(d->buf + 8);
	size_t end = FF_MIN(d->len, h->cluster_size);
	int r;

	if (name > h->cluster_size)
		return refuse(d->why, -EINVAL,
		              "the name of its backing file lies outside of the first cluster");
	r = take_extensions(d, name ? FF_MIN(end, (size_t)name) : end);
	if (!r && name)
		r = take_string(d, "name of its backing file", name, ff_be32(d->buf + 16),
		                QS_NAME_MAX, h->backing);
	if (!r && h->external && !h->data_file[0])
		r = refuse(d->why, -EINVAL, "its data are in another file, which it does not name");
	return r;
}

int qs_head_decode(const uint8_t *buf, size_t len, struct qs_head *out, char *why)
{
	struct qs_head h = {0};
	struct head d = {.buf = buf, .len = len, .out = &h, .why = why};
	int r;

	if (len < V2_LENGTH || ff_be32(buf) != QS_MAGIC)
		return refuse(why, -EINVAL, "it does not begin as a qcow2 image");
	h.version = ff_be32(buf + 4);
	if (h.version != 2 && h.version != 3)
		return refuse(why, -ENOTSUP, "it is of version %u, not 2 or 3", h.version);
	h.cluster_bits = ff_be32(buf + 20);
	if (h.cluster_bits < CLUSTER_BITS_MIN || h.cluster_bits > CLUSTER_BITS_MAX)
		return refuse(why, -EINVAL, "its clusters have an impossible size");
	h.cluster_size = UINT32_C(1) << h.cluster_bits;
	if (d.len > h.cluster_size)
		d.len = h.cluster_size;
	r = take_encryption(&d);
	if (!r)
		r = take_version3(&d);
	if (!r)
		r = take_names(&d);
	if (!r)
		r = take_packing(&d);
	if (!r)
		r = take_tables(&d);
	if (!r)
		*out = h;
	return r;
}

const char *qs_l1_decode(const struct qs_head *h, uint64_t entry, uint64_t *offset)
{
	if (entry & L1_RESERVED)
		return "an L1 entry has bits that must be zero";
	*offset = entry & OFFSET_MASK;
	if (*offset % h->cluster_size)
		return "an L1 entry leads to no cluster";
	return NULL;
}

static const char *packed_decode(const struct qs_head *h, uint64_t entry, uint64_t bitmap,
                                 struct qs_entry *out)
{
	unsigned shift = 62 - (h->cluster_bits - 8);
	uint64_t sectors = (entry >> shift & ((UINT64_C(1) << (h->cluster_bits - 8)) - 1)) + 1;

	if (h->external)
		return "a compressed cluster where the data are in another file";
	if (bitmap)
		return "a compressed cluster has subclusters";
	*out = (struct qs_entry){.kind = QS_PACKED};
	out->host = entry & ((UINT64_C(1) << shift) - 1);
	out->packed = (uint32_t)(sectors * 512 - out->host % 512);
	return NULL;
}

static const char *extended_decode(uint64_t bitmap, struct qs_entry *out)
{
	out->alloc = (uint32_t)bitmap;
	out->zero = (uint32_t)(bitmap >> 32);
	if (out->alloc & out->zero)
		return "a subcluster is both data and zeros";
	if (out->kind == QS_NONE && out->alloc)
		return "a subcluster has data, and no place for them";
	return NULL;
}

const char *qs_l2_decode(const struct qs_head *h, uint64_t entry, uint64_t bitmap,
                         struct qs_entry *out)
{
	if (entry & L2_PACKED)
		return packed_decode(h, entry, bitmap, out);
	if (entry & L2_RESERVED)
		return "an L2 entry has bits that must be zero";
	*out = (struct qs_entry){.host = entry & OFFSET_MASK};
	if (out->host % h->cluster_size)
		return "an L2 entry leads to no cluster";
	/* In a data file, offset 0 is a place like any other. */
	out->kind = out->host || (h->external && entry & L2_COPIED) ? QS_DATA : QS_NONE;
	if (entry & L2_ZERO) {
		if (h->version < 3 || h->extended)
			return "an L2 entry has a zero flag, which this image cannot have";
		out->kind = QS_ZERO;
	}
	return h->extended ? extended_decode(bitmap, out) : NULL;
}

enum qs_kind qs_subcluster(const struct qs_entry *e, unsigned i)
{
	if (e->kind == QS_PACKED)
		return QS_PACKED;
	if (e->zero >> i & 1)
		return QS_ZERO;
	return e->alloc >> i & 1 ? QS_DATA : QS_NONE;
}
