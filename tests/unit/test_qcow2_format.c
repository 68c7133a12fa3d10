/*
 * The pure part of the format: layouts, the header's round trip, entries.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include <criterion/criterion.h>
#include <criterion/parameterized.h>

#include "cow/qcow2_format.h"
#include "ff_util.h"

#define TIB (UINT64_C(1) << 40)

struct geometry {
	uint64_t size;
	uint32_t cs;
};

static struct geometry geometries[] = {
    {0, 4096},           {1, 4096},           {4096, 4096}, {4097, 4096},
    {TIB, 4096},         {8 * TIB, 4096},     {TIB, 65536}, {16 * TIB, 8192},
    {1000 * TIB, 65536}, {TIB + 13, 2097152}, {1, 2097152}, {123456789, 16384},
};

ParameterizedTestParameters(qcow2_format, layout)
{
	return cr_make_param_array(struct geometry, geometries, FF_ARRAY_SIZE(geometries));
}

ParameterizedTest(struct geometry *g, qcow2_format, layout)
{
	struct qcow2_layout l;

	cr_assert_eq(qcow2_layout(g->size, g->cs, &l), 0);
	cr_assert(l.size >= g->size && l.size < g->size + 512 && l.size % 512 == 0);
	cr_assert(l.clusters * g->cs >= l.size &&
	          (!l.clusters || (l.clusters - 1) * g->cs < l.size));
	/* areas follow one another, each large enough for what it describes */
	cr_assert_eq(l.rt_first, 1);
	cr_assert_eq(l.rb_first, l.rt_first + l.rt_count);
	cr_assert_eq(l.l1_first, l.rb_first + l.rb_count);
	cr_assert_eq(l.l2_first, l.l1_first + l.l1_count);
	cr_assert_eq(l.data_first, l.l2_first + l.l2_count);
	cr_assert_geq(l.rt_count * g->cs, l.rb_count * 8);
	cr_assert_geq(l.l1_count * g->cs, l.l1_entries * 8);
	cr_assert_geq(l.l1_entries, l.l2_count);
	cr_assert_geq(l.l2_count * g->cs, l.clusters * 8);
	cr_assert_geq(l.capacity, l.data_first + l.clusters);
	cr_assert_eq(l.capacity, l.rb_count * g->cs * 8);
	/* QEMU's limits */
	cr_assert_leq(l.l1_entries * 8, UINT64_C(32) << 20);
	cr_assert_leq(l.rt_count * g->cs, UINT64_C(8) << 20);
}

Test(qcow2_format, limits)
{
	struct qcow2_layout l;
	uint32_t cs;

	cr_assert_eq(qcow2_layout(8 * TIB + 1, 4096, &l), -EFBIG);
	cr_assert_eq(qcow2_layout(0, 2048, &l), -EINVAL);
	cr_assert_eq(qcow2_layout(0, 4097, &l), -EINVAL);
	cr_assert_eq(qcow2_layout(0, 4 << 20, &l), -EINVAL);
	cr_assert_eq(qcow2_layout(0, 0, &l), -EINVAL);
	cr_assert_eq(qcow2_layout(INT64_MAX, 2097152, &l), -EFBIG);
	cr_assert_eq(ff_image_cluster_size(8 * TIB, 4096, &cs), 0);
	cr_assert_eq(cs, 4096);
	cr_assert_eq(ff_image_cluster_size(8 * TIB + 1, 4096, &cs), 0);
	cr_assert_eq(cs, 8192);
	cr_assert_eq(ff_image_cluster_size(1, 65536, &cs), 0);
	cr_assert_eq(cs, 65536);
}

static void fill_head(struct qcow2_head *h, struct qcow2_layout *l, const char *backing)
{
	memset(h, 0, sizeof *h);
	h->desc = (struct ff_image_desc){
	    .seq = 0x0102030405060708,
	    .size = 1234567,
	    .disk_ino = UINT64_MAX,
	    .disk_btime_sec = -1,
	    .disk_btime_nsec = 999999999,
	    .cluster_size = 4096,
	};
	cr_assert_eq(qcow2_layout(h->desc.size, h->desc.cluster_size, l), 0);
	cr_assert_eq(qcow2_head_set_backing(h, backing, "qcow2"), 0);
}

Test(qcow2_format, header_round_trip)
{
	static const char *const names[] = {"", "b", "a/rather/long/name with spaces \xff"};
	uint8_t buf[QCOW2_HEAD_SIZE];
	struct qcow2_head h, got;
	struct qcow2_layout l, gl;
	const char *why;

	for (unsigned i = 0; i < FF_ARRAY_SIZE(names) * 2; i++) {
		fill_head(&h, &l, names[i / 2]);
		h.desc.broken = i % 2;
		h.desc.why = (uint8_t)(i * 50);
		memset(buf, 0xee, sizeof buf);
		qcow2_head_encode(&h, &l, buf);
		cr_assert_eq(qcow2_head_decode(buf, &got, &gl, &why), 0);
		cr_assert_eq(got.desc.seq, h.desc.seq);
		cr_assert_eq(got.desc.size, h.desc.size);
		cr_assert_eq(got.desc.disk_ino, h.desc.disk_ino);
		cr_assert_eq(got.desc.disk_btime_sec, h.desc.disk_btime_sec);
		cr_assert_eq(got.desc.disk_btime_nsec, h.desc.disk_btime_nsec);
		cr_assert_eq(got.desc.broken, h.desc.broken);
		cr_assert_eq(got.desc.why, i % 2 ? h.desc.why : 0);
		cr_assert_str_eq(got.backing, names[i / 2]);
		cr_assert_str_eq(got.format, *names[i / 2] ? "qcow2" : "");
		cr_assert_eq(gl.data_first, l.data_first);
		/* what any qcow2 reader sees */
		cr_assert_eq(ff_be32(buf), 0x514649fb);
		cr_assert_eq(ff_be64(buf + 24), ff_round_up(1234567, 512));
		cr_assert_eq(ff_be64(buf + 72), i % 2 ? 2 : 0);
	}
}

/* Any byte of random noise, at any place, is refused, whatever its checksum. */
Test(qcow2_format, header_damage)
{
	uint8_t buf[QCOW2_HEAD_SIZE];
	struct qcow2_head h, got;
	struct qcow2_layout l, gl;
	const char *why;

	fill_head(&h, &l, "base.raw");
	qcow2_head_encode(&h, &l, buf);
	srand(1);
	for (unsigned i = 0; i < 50000; i++) {
		unsigned at = i < 4096 ? i : (unsigned)rand() % 400;
		uint8_t old = buf[at];

		buf[at] = (uint8_t)(old + 1 + rand() % 255);
		why = NULL;
		cr_assert_eq(qcow2_head_decode(buf, &got, &gl, &why), -EINVAL);
		cr_assert_not_null(why);
		buf[at] = old;
	}
	for (unsigned i = 0; i < 2000; i++) { /* lengths and offsets above all */
		uint8_t copy[QCOW2_HEAD_SIZE];

		memcpy(copy, buf, sizeof copy);
		for (unsigned j = 0; j < 40; j++)
			copy[8 + rand() % 200] = (uint8_t)(rand() % 3 ? rand() : 0xff);
		cr_assert_eq(qcow2_head_decode(copy, &got, &gl, &why), -EINVAL);
	}
}

Test(qcow2_format, backing_names)
{
	struct qcow2_head h = {0};
	char name[1025];

	memset(name, 'n', sizeof name);
	name[1024] = 0;
	cr_assert_eq(qcow2_head_set_backing(&h, name, "raw"), -ENAMETOOLONG);
	name[1023] = 0;
	cr_assert_eq(qcow2_head_set_backing(&h, name, "raw"), 0);
	cr_assert_eq(qcow2_head_set_backing(&h, "x", NULL), -EINVAL);
	cr_assert_eq(qcow2_head_set_backing(&h, "x", "a format of far too many letters"), -EINVAL);
	cr_assert_eq(strlen(h.backing), 1023);
	cr_assert_eq(qcow2_head_set_backing(&h, NULL, NULL), 0);
	cr_assert_str_eq(h.backing, "");
}

Test(qcow2_format, entries)
{
	struct qcow2_layout l;
	enum ff_image_kind kind;
	uint64_t host, end, at;

	cr_assert_eq(qcow2_layout(1 << 20, 4096, &l), 0);
	end = l.data_first + 10;
	at = l.data_first * 4096;
	cr_assert_eq(qcow2_entry_decode(&l, 0, end, &host, &kind), 0);
	cr_assert_eq(kind, FF_KIND_NONE);
	cr_assert_eq(qcow2_entry_decode(&l, 1, end, &host, &kind), 0);
	cr_assert_eq(kind, FF_KIND_ZERO);
	cr_assert_eq(qcow2_entry_decode(&l, QCOW2_COPIED | (at + 9 * 4096), end, &host, &kind), 0);
	cr_assert_eq(kind, FF_KIND_DATA);
	cr_assert_eq(host, l.data_first + 9);
	cr_assert_eq(qcow2_entry_decode(&l, QCOW2_COPIED | (at + 10 * 4096), end, &host, &kind),
	             -EINVAL);
	cr_assert_eq(qcow2_entry_decode(&l, QCOW2_COPIED | (at - 4096), end, &host, &kind),
	             -EINVAL);
	cr_assert_eq(qcow2_entry_decode(&l, QCOW2_COPIED | (at + 512), end, &host, &kind), -EINVAL);
	cr_assert_eq(qcow2_entry_decode(&l, QCOW2_COPIED | at | 1, end, &host, &kind), -EINVAL);
	cr_assert_eq(qcow2_entry_decode(&l, QCOW2_COPIED | 1, end, &host, &kind), -EINVAL);
	cr_assert_eq(qcow2_entry_decode(&l, QCOW2_COPIED, end, &host, &kind), -EINVAL);
	cr_assert_eq(qcow2_entry_decode(&l, at, end, &host, &kind), -EINVAL);
	cr_assert_eq(qcow2_entry_decode(&l, UINT64_MAX, end, &host, &kind), -EINVAL);
	cr_assert_eq(
	    qcow2_entry_decode(&l, QCOW2_COPIED | (UINT64_C(1) << 62) | at, end, &host, &kind),
	    -EINVAL);
}

Test(qcow2_format, zero_detection)
{
	uint8_t *buf = calloc(1, 4096);

	cr_assert(qcow2_is_zero(buf, 4096));
	for (unsigned i = 0; i < 4096; i++) {
		buf[i] = 1;
		cr_assert_not(qcow2_is_zero(buf, 4096));
		buf[i] = 0;
	}
	memset(buf, 3, 4096);
	cr_assert_not(qcow2_is_zero(buf, 4096));
	free(buf);
}

Test(qcow2_format, checksums)
{
	struct ff_image_desc a = {.seq = 1, .size = 2, .disk_ino = 3, .cluster_size = 4096}, b;
	uint8_t head[QCOW2_SUMS_HEAD_SIZE], data[4096] = {1};

	qcow2_sums_head_encode(&a, head);
	cr_assert(qcow2_sums_head_ok(&a, head));
	for (unsigned i = 0; i < sizeof head; i++) {
		head[i] ^= 0x40;
		cr_assert_not(qcow2_sums_head_ok(&a, head));
		head[i] ^= 0x40;
	}
	b = a;
	b.seq++; /* another image of the same disk */
	cr_assert_not(qcow2_sums_head_ok(&b, head));
	cr_assert_neq(qcow2_sum(data, 4096, 0), qcow2_sum(data, 4096, 1));
}
