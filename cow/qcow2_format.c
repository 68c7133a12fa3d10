/*
 * The format of a fleecing image. No state and no I/O.
 *
 * "Metadata first": every position follows from the disk's size and the cluster size.
 *
 *   cluster 0      header, extensions, backing file name: all in the first 4 KiB
 *   rt_first = 1   refcount table     be64 offset of each refcount block, 0: none yet
 *   rb_first       refcount blocks    1 bit a host cluster (refcount_order 0), lowest bit first
 *   l1_first       L1 table           be64 COPIED | offset of each L2 table, 0: none yet
 *   l2_first       L2 tables          one flat array of be64 by guest cluster
 *   data_first     data clusters      appended
 *
 * What has not been written is a hole, reads as zero and means: unallocated. An L2 entry is 0
 * (unallocated: the backing file's), 1 (a cluster of zeros) or COPIED | offset.
 *
 * Cluster 0, offset by offset (big-endian):
 *     0  4  "QFI\xfb"                         48  8  refcount table offset
 *     4  4  version 3                         56  4  refcount table clusters
 *     8  8  backing file name offset, or 0    60 12  no internal snapshots
 *    16  4  backing file name length          72  8  incompatible features: bit 1 "corrupt"
 *    20  4  cluster bits                      80 16  compatible, autoclear features: none
 *    24  8  virtual size                      96  4  refcount order 0
 *    32  4  no encryption                    100  4  header length 112
 *    36  4  L1 entries                       104  8  compression type 0, padding
 *    40  8  L1 offset
 *   112     extension 0xe2792aca: the backing file's format (if there is a backing file)
 *           extension "flec": our own, EXT_LEN bytes, see below
 *           end of extensions, then the backing file's name, then zeros up to 4096
 *
 * Our extension: version 4, flags 4 (1: broken, 2: durable, 4: torn, 8: it has
 * a ledger, see ledger_format.c; bits 8 to 15 of a broken one: why, see reasons.c), seq 8, size 8,
 * disk_ino 8, btime_sec 8, btime_nsec 4, cluster_size 4, XXH3-64 8. The checksum covers all 4096
 * bytes with itself taken as zero, so that a flipped bit anywhere in them is seen. For the same
 * reason decoding ends by encoding again: only the very bytes that we would write are accepted.
 *
 * The checksum file: 64 bytes of head (magic 8, version 4, cluster_size 4, seq 8, disk_ino 8,
 * btime_sec 8, btime_nsec 4, zero 12, XXH3-64 8), then be64 XXH3-64 of each data cluster in the
 * order of the host clusters.
 */
#include "cow/qcow2_format.h"

#include <errno.h>
#include <string.h>

#include <xxhash.h>

#include "ff_util.h"

#define L1_BYTES_MAX (UINT64_C(32) << 20) /* QEMU refuses larger ones */
#define RT_BYTES_MAX (UINT64_C(8) << 20)

#define MAGIC            0x514649fbu
#define HEADER_LENGTH    112u
#define INCOMPAT_CORRUPT UINT64_C(2)
#define EXT_FORMAT       0xe2792acau
#define EXT_OURS         0x666c6563u
#define EXT_LEN          56u
#define EXT_SUM          48u /* offset of the checksum in it */
#define EXT_VERSION      1u
#define FLAG_BROKEN      1u
#define FLAG_DURABLE     2u
#define FLAG_TORN        4u
#define FLAG_LEDGER      8u
#define WHY_SHIFT        8u

static const char sums_magic[8] FF_NONSTRING = "fleesums";
#define SUMS_VERSION 1u
#define SUMS_SUM     56u

int qcow2_layout(uint64_t size, uint32_t cluster_size, struct qcow2_layout *out)
{
	struct qcow2_layout l = {.cluster_size = cluster_size, .rt_first = 1};
	uint64_t fixed, rb = 0, rt = 0;

	if (cluster_size < QCOW2_CLUSTER_MIN || cluster_size > QCOW2_CLUSTER_MAX ||
	    (cluster_size & (cluster_size - 1)))
		return -EINVAL;
	if (size > INT64_MAX - 511)
		return -EFBIG;
	l.size = ff_round_up(size, 512);
	l.clusters = ff_div_up(l.size, cluster_size);
	l.per_table = cluster_size / 8;
	l.per_block = (uint64_t)cluster_size * 8;
	l.l2_count = ff_div_up(l.clusters, l.per_table);
	l.l1_entries = FF_MAX(l.l2_count, UINT64_C(1));
	l.l1_count = ff_div_up(l.l1_entries, l.per_table);
	if (l.l1_entries > L1_BYTES_MAX / 8)
		return -EFBIG;

	/* The blocks cover themselves and the table too; one more of them leaves room for clusters
	 * that a failed save could not give back. */
	fixed = 1 + l.l1_count + l.l2_count + l.clusters;
	for (;;) {
		l.rb_count = ff_div_up(fixed + rb + rt, l.per_block) + 1;
		l.rt_count = ff_div_up(l.rb_count, l.per_table);
		if (l.rb_count == rb && l.rt_count == rt)
			break;
		rb = l.rb_count;
		rt = l.rt_count;
	}
	if (l.rt_count > RT_BYTES_MAX / cluster_size)
		return -EFBIG;
	l.rb_first = l.rt_first + l.rt_count;
	l.l1_first = l.rb_first + l.rb_count;
	l.l2_first = l.l1_first + l.l1_count;
	l.data_first = l.l2_first + l.l2_count;
	l.capacity = l.rb_count * l.per_block;
	if (l.capacity > INT64_MAX / cluster_size)
		return -EFBIG;
	*out = l;
	return 0;
}

int ff_image_cluster_size(uint64_t size, uint32_t wanted, uint32_t *out)
{
	struct qcow2_layout l;
	uint32_t cs = wanted;
	int r;

	while ((r = qcow2_layout(size, cs, &l)) == -EFBIG && cs < QCOW2_CLUSTER_MAX)
		cs *= 2;
	if (!r)
		*out = cs;
	return r;
}

int qcow2_head_set_backing(struct qcow2_head *head, const char *backing, const char *format)
{
	size_t len = backing ? strlen(backing) : 0;
	size_t flen = len && format ? strlen(format) : 0;

	if (len > QCOW2_BACKING_MAX)
		return -ENAMETOOLONG;
	if (flen > QCOW2_FORMAT_MAX || (len && !flen))
		return -EINVAL;
	memset(head->backing, 0, sizeof head->backing);
	memset(head->format, 0, sizeof head->format);
	if (len) {
		memcpy(head->backing, backing, len);
		memcpy(head->format, format, flen);
	}
	return 0;
}

static uint8_t *put_extension(uint8_t *p, uint32_t id, size_t len)
{
	ff_put_be32(p, id);
	ff_put_be32(p + 4, (uint32_t)len);
	return p + 8;
}

static void put_fixed_header(const struct qcow2_layout *l, uint64_t incompatible, uint8_t *buf)
{
	ff_put_be32(buf, MAGIC);
	ff_put_be32(buf + 4, 3);
	ff_put_be32(buf + 20, (uint32_t)__builtin_ctz(l->cluster_size));
	ff_put_be64(buf + 24, l->size);
	ff_put_be32(buf + 36, (uint32_t)l->l1_entries);
	ff_put_be64(buf + 40, l->l1_first * l->cluster_size);
	ff_put_be64(buf + 48, l->rt_first * l->cluster_size);
	ff_put_be32(buf + 56, (uint32_t)l->rt_count);
	ff_put_be64(buf + 72, incompatible);
	ff_put_be32(buf + 96, 0);
	ff_put_be32(buf + 100, HEADER_LENGTH);
}

static uint8_t *put_format(uint8_t *p, const char *format)
{
	size_t len = strlen(format);

	p = put_extension(p, EXT_FORMAT, len);
	memcpy(p, format, len);
	return p + ff_round_up(len, 8);
}

static void put_backing(uint8_t *buf, uint8_t *p, const char *backing)
{
	size_t len = strlen(backing);

	if (!len)
		return;
	ff_put_be64(buf + 8, (uint64_t)(p - buf));
	ff_put_be32(buf + 16, (uint32_t)len);
	memcpy(p, backing, len);
}

void qcow2_plain_head_encode(const struct qcow2_layout *l, const char *backing, uint8_t *buf)
{
	uint8_t *p = buf + HEADER_LENGTH;

	memset(buf, 0, QCOW2_HEAD_SIZE);
	put_fixed_header(l, 0, buf);
	if (*backing)
		p = put_format(p, "qcow2");
	put_backing(buf, put_extension(p, 0, 0), backing);
}

void qcow2_head_encode(const struct qcow2_head *head, const struct qcow2_layout *l, uint8_t *buf)
{
	const struct ff_image_desc *d = &head->desc;
	uint8_t *p = buf + HEADER_LENGTH, *sum;

	memset(buf, 0, QCOW2_HEAD_SIZE);
	put_fixed_header(l, d->broken ? INCOMPAT_CORRUPT : 0, buf);
	if (*head->backing)
		p = put_format(p, head->format);
	p = put_extension(p, EXT_OURS, EXT_LEN);
	ff_put_be32(p, EXT_VERSION);
	ff_put_be32(p + 4, (d->broken ? FLAG_BROKEN : 0) | (d->durable ? FLAG_DURABLE : 0) |
	                       (d->torn ? FLAG_TORN : 0) | (d->ledger ? FLAG_LEDGER : 0) |
	                       (d->broken ? (uint32_t)d->why << WHY_SHIFT : 0));
	ff_put_be64(p + 8, d->seq);
	ff_put_be64(p + 16, d->size);
	ff_put_be64(p + 24, d->disk_ino);
	ff_put_be64(p + 32, (uint64_t)d->disk_btime_sec);
	ff_put_be32(p + 40, d->disk_btime_nsec);
	ff_put_be32(p + 44, d->cluster_size);
	sum = p + EXT_SUM;
	put_backing(buf, put_extension(p + EXT_LEN, 0, 0), head->backing);
	ff_put_be64(sum, XXH3_64bits(buf, QCOW2_HEAD_SIZE));
}

static const char *fixed_header_wrong(const uint8_t *buf)
{
	if (ff_be32(buf) != MAGIC)
		return "it is not a qcow2 image";
	if (ff_be32(buf + 4) != 3)
		return "its qcow2 version is not 3";
	if (ff_be64(buf + 72) & ~INCOMPAT_CORRUPT)
		return "it has features that fleecefs does not write";
	if (ff_be32(buf + 100) != HEADER_LENGTH)
		return "its header length is not that of a fleecing image";
	if (ff_be32(buf + 16) > QCOW2_BACKING_MAX ||
	    ff_be64(buf + 8) > QCOW2_HEAD_SIZE - QCOW2_BACKING_MAX)
		return "its backing file name is out of bounds";
	return NULL;
}

/* Walks the extensions; everything that is not ours alone ends the walk. */
static const char *decode_extensions(const uint8_t *buf, struct qcow2_head *head)
{
	struct ff_image_desc *d = &head->desc;
	size_t at = HEADER_LENGTH;
	bool ours = false;

	for (;;) {
		uint32_t id, len;
		const uint8_t *p;

		if (at + 8 > QCOW2_HEAD_SIZE)
			return "its header extensions do not end";
		id = ff_be32(buf + at);
		len = ff_be32(buf + at + 4);
		p = buf + at + 8;
		if (!id)
			return ours ? NULL : "it is not a fleecing image";
		if (len > QCOW2_HEAD_SIZE - 8 - at)
			return "a header extension is out of bounds";
		if (id == EXT_FORMAT && len <= QCOW2_FORMAT_MAX) {
			memcpy(head->format, p, len);
		} else if (id == EXT_OURS && len == EXT_LEN && !ours) {
			if (ff_be32(p) != EXT_VERSION)
				return "it was written by another version of fleecefs";
			d->broken = ff_be32(p + 4) & FLAG_BROKEN;
			d->durable = ff_be32(p + 4) & FLAG_DURABLE;
			d->torn = ff_be32(p + 4) & FLAG_TORN;
			d->ledger = ff_be32(p + 4) & FLAG_LEDGER;
			d->why = (uint8_t)(ff_be32(p + 4) >> WHY_SHIFT);
			d->seq = ff_be64(p + 8);
			d->size = ff_be64(p + 16);
			d->disk_ino = ff_be64(p + 24);
			d->disk_btime_sec = (int64_t)ff_be64(p + 32);
			d->disk_btime_nsec = ff_be32(p + 40);
			d->cluster_size = ff_be32(p + 44);
			ours = true;
		} else {
			return "it has a header extension that fleecefs does not write";
		}
		at += 8 + (size_t)ff_round_up(len, 8);
	}
}

int qcow2_head_decode(const uint8_t *buf, struct qcow2_head *head, struct qcow2_layout *l,
                      const char **why)
{
	struct qcow2_head h = {0};
	uint8_t again[QCOW2_HEAD_SIZE];

	*why = fixed_header_wrong(buf);
	if (!*why)
		*why = decode_extensions(buf, &h);
	if (*why)
		return -EINVAL;
	memcpy(h.backing, buf + ff_be64(buf + 8), ff_be32(buf + 16));
	if (qcow2_layout(h.desc.size, h.desc.cluster_size, l)) {
		*why = "its size or cluster size is impossible";
		return -EINVAL;
	}
	qcow2_head_encode(&h, l, again);
	if (memcmp(buf, again, sizeof again) != 0) {
		*why = "its header is damaged or was changed by another program";
		return -EINVAL;
	}
	*head = h;
	return 0;
}

int qcow2_entry_decode(const struct qcow2_layout *l, uint64_t entry, uint64_t end, uint64_t *host,
                       enum ff_image_kind *kind)
{
	uint64_t offset = entry & ~QCOW2_COPIED;

	*host = 0;
	if (!entry || entry == QCOW2_ZERO) {
		*kind = entry ? FF_KIND_ZERO : FF_KIND_NONE;
		return 0;
	}
	if (!(entry & QCOW2_COPIED) || offset % l->cluster_size ||
	    offset / l->cluster_size < l->data_first || offset / l->cluster_size >= end)
		return -EINVAL;
	*host = offset / l->cluster_size;
	*kind = FF_KIND_DATA;
	return 0;
}

uint64_t qcow2_entry_hash(uint64_t entry, uint64_t cluster)
{
	return XXH3_64bits_withSeed(&entry, sizeof entry, cluster);
}

void qcow2_sums_head_encode(const struct ff_image_desc *desc, uint8_t *buf)
{
	memset(buf, 0, QCOW2_SUMS_HEAD_SIZE);
	memcpy(buf, sums_magic, sizeof sums_magic);
	ff_put_be32(buf + 8, SUMS_VERSION);
	ff_put_be32(buf + 12, desc->cluster_size);
	ff_put_be64(buf + 16, desc->seq);
	ff_put_be64(buf + 24, desc->disk_ino);
	ff_put_be64(buf + 32, (uint64_t)desc->disk_btime_sec);
	ff_put_be32(buf + 40, desc->disk_btime_nsec);
	ff_put_be64(buf + SUMS_SUM, XXH3_64bits(buf, SUMS_SUM));
}

bool qcow2_sums_head_ok(const struct ff_image_desc *desc, const uint8_t *buf)
{
	uint8_t want[QCOW2_SUMS_HEAD_SIZE];

	qcow2_sums_head_encode(desc, want);
	return memcmp(want, buf, sizeof want) == 0;
}

uint64_t qcow2_sum_offset(const struct qcow2_layout *l, uint64_t host)
{
	return QCOW2_SUMS_HEAD_SIZE + (host - l->data_first) * 8;
}

uint64_t qcow2_sum(const void *data, uint32_t cluster_size, uint64_t guest)
{
	return XXH3_64bits_withSeed(data, cluster_size, guest);
}

bool qcow2_is_zero(const void *data, size_t size)
{
	static const uint8_t zero[64];

	/* the rest equals itself shifted by 64 bytes exactly if it repeats the first 64 */
	return memcmp(data, zero, sizeof zero) == 0 &&
	       memcmp(data, (const uint8_t *)data + sizeof zero, size - sizeof zero) == 0;
}
