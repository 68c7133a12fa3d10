/*
 * Cluster 0 of a fleecing image, and the pure functions of its format. Two tries with each input:
 * as it is, and with the checksum of our header extension put right. What is accepted must encode
 * to the very same bytes and have a layout whose areas lie one after the other.
 */
#include <errno.h>
#include <string.h>
#include <xxhash.h>

#include "cow/qcow2_format.h"
#include "ff_util.h"
#include "fuzz.h"

enum { SUM_AT = 8 + 48 }; /* from the beginning of our extension */

static void check_layout(const struct qcow2_layout *l)
{
	uint64_t end;

	FUZZ_CHECK(l->size % 512 == 0 && l->rt_first == 1);
	FUZZ_CHECK(l->rb_first == l->rt_first + l->rt_count && l->rt_count >= 1);
	FUZZ_CHECK(l->l1_first == l->rb_first + l->rb_count && l->rb_count >= 1);
	FUZZ_CHECK(l->l2_first == l->l1_first + l->l1_count && l->l1_count >= 1);
	FUZZ_CHECK(l->data_first == l->l2_first + l->l2_count);
	FUZZ_CHECK(l->rb_count <= l->rt_count * l->per_table);
	FUZZ_CHECK(l->l2_count <= l->l1_entries && l->l1_entries <= l->l1_count * l->per_table);
	FUZZ_CHECK(l->clusters <= l->l2_count * l->per_table);
	FUZZ_CHECK(l->capacity >= l->data_first + l->clusters);
	/* QEMU's limits, and no offset that pread could not take */
	FUZZ_CHECK(l->l1_entries * 8 <= 32u << 20 && l->rt_count * l->cluster_size <= 8u << 20);
	FUZZ_CHECK(!ff_mul_u64(l->capacity, l->cluster_size, &end) && end <= INT64_MAX);
}

static void check_entry(const struct qcow2_layout *l, uint64_t entry, uint64_t end)
{
	enum ff_image_kind kind;
	uint64_t host;

	if (qcow2_entry_decode(l, entry, end, &host, &kind)) {
		FUZZ_CHECK(entry > 1);
		return;
	}
	FUZZ_CHECK((kind == FF_KIND_DATA) == (host != 0));
	FUZZ_CHECK(host == 0 || (host >= l->data_first && host < end));
	FUZZ_CHECK(host == 0 || entry == (QCOW2_COPIED | host * l->cluster_size));
	FUZZ_CHECK(host != 0 || entry == (kind == FF_KIND_ZERO));
}

static void check(const uint8_t *buf, struct input *in)
{
	uint8_t again[QCOW2_HEAD_SIZE], sums[QCOW2_SUMS_HEAD_SIZE];
	struct qcow2_layout l, same;
	struct qcow2_head head;
	const char *why;
	uint32_t cs;
	int r = qcow2_head_decode(buf, &head, &l, &why);

	if (r) {
		FUZZ_CHECK(r == -EINVAL && why);
		return;
	}
	qcow2_head_encode(&head, &l, again);
	FUZZ_CHECK(memcmp(again, buf, sizeof again) == 0);
	FUZZ_CHECK(strlen(head.backing) <= QCOW2_BACKING_MAX);
	FUZZ_CHECK(strlen(head.format) <= QCOW2_FORMAT_MAX);
	FUZZ_CHECK(!head.backing[0] || head.format[0]);
	check_layout(&l);
	FUZZ_CHECK(qcow2_layout(head.desc.size, l.cluster_size, &same) == 0);
	FUZZ_CHECK(memcmp(&same, &l, sizeof l) == 0);
	FUZZ_CHECK(ff_image_cluster_size(head.desc.size, l.cluster_size, &cs) == 0);
	FUZZ_CHECK(cs == l.cluster_size);
	qcow2_sums_head_encode(&head.desc, sums);
	FUZZ_CHECK(qcow2_sums_head_ok(&head.desc, sums));
	for (int i = 0; i < 8; i++)
		check_entry(&l, input_take(in, 8),
		            input_take(in, 1) % 2 ? l.capacity : l.data_first + 9);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	uint8_t buf[QCOW2_HEAD_SIZE] = {0};
	struct input rest = {data + FF_MIN(size, sizeof buf), data + size};

	memcpy(buf, data, FF_MIN(size, sizeof buf));
	check(buf, &rest);
	for (size_t at = 112; at + SUM_AT + 8 <= sizeof buf; at += 8) {
		if (memcmp(buf + at, "flec", 4) != 0)
			continue;
		ff_put_be64(buf + at + SUM_AT, 0);
		ff_put_be64(buf + at + SUM_AT, XXH3_64bits(buf, sizeof buf));
		rest.p = data + FF_MIN(size, sizeof buf);
		check(buf, &rest);
		break;
	}
	return 0;
}
