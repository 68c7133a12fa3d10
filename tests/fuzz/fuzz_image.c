/*
 * A whole fleecing image. An input is a short program that makes one: a header, a length, and
 * entries of its tables, right ones and others, so that the tables of sparse images of any size are
 * within reach of a few bytes. Or, with MODE_RAW, the bytes of the file as they are.
 *
 * Whatever comes of ff_image_load(), it ends soon. An image that it takes must answer within its
 * file: what is read is what lies where its tables say, with the right checksum, or an error; what
 * is saved to it then can be read; and the next load takes it too.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

#include "cow/qcow2_private.h"
#include "ff_util.h"
#include "fuzz.h"

#define IMAGE "i.qcow2"
#define SUMS  "i.xxh3"

enum {
	MODE_PATCH_HEAD = 1, /* header patches count */
	MODE_FIX_HEAD = 2,   /* and its checksum is put right after them */
	MODE_FLAGS = 4,      /* broken, durable */
	MODE_SUMS = 8,       /* a checksum file with a right head */
	MODE_LENGTH = 16,    /* any length of the file */
	MODE_ANY_SIZE = 32,  /* a disk of up to 1 PiB; else a small one */
	MODE_RAW = 128,
};

enum { SUM_AT = 8 + 48, MAX_READ = 4 << 20, MAX_OPS = 600 };

struct maker {
	struct input in;
	unsigned mode;
	struct qcow2_layout l;
	struct qcow2_head head;
	uint8_t cluster0[QCOW2_HEAD_SIZE];
	uint64_t data; /* data clusters in the file */
	int fd, sums_fd;
};

static void put_be64(int fd, uint64_t v, uint64_t off)
{
	uint8_t b[8];

	ff_put_be64(b, v);
	if (off <= INT64_MAX - 8)
		FUZZ_CHECK(pwrite(fd, b, 8, (off_t)off) == 8 || errno == EFBIG);
}

static void fix_head(uint8_t *buf)
{
	for (size_t at = 112; at + SUM_AT + 8 <= QCOW2_HEAD_SIZE; at += 8)
		if (memcmp(buf + at, "flec", 4) == 0) {
			ff_put_be64(buf + at + SUM_AT, 0);
			ff_put_be64(buf + at + SUM_AT, XXH3_64bits(buf, QCOW2_HEAD_SIZE));
			return;
		}
}

/* A data cluster with something in it and its checksum. */
static void fill_cluster(struct maker *m, uint64_t host, uint64_t guest, uint8_t byte)
{
	ff_autofree uint8_t *buf = malloc(m->l.cluster_size);
	uint64_t base = m->l.data_first + host;

	FUZZ_CHECK(buf != NULL);
	memset(buf, byte | 1, m->l.cluster_size);
	if (pwrite(m->fd, buf, m->l.cluster_size, (off_t)(base * m->l.cluster_size)) < 0)
		return;
	if (m->sums_fd >= 0)
		put_be64(m->sums_fd, qcow2_sum(buf, m->l.cluster_size, guest),
		         qcow2_sum_offset(&m->l, base));
}

/* One table entry or other change of the file. */
static void step(struct maker *m)
{
	const struct qcow2_layout *l = &m->l;
	unsigned op = (unsigned)input_take(&m->in, 1);
	uint64_t i = input_take(&m->in, 4), cs = l->cluster_size, v;
	const uint64_t l2 = l->l2_first * cs;

	switch (op % 8) {
	case 0:
		i %= l->rb_count;
		put_be64(m->fd, (l->rb_first + i) * cs, l->rt_first * cs + i * 8);
		break;
	case 1:
		i %= l->l1_entries;
		put_be64(m->fd, QCOW2_COPIED | ((l->l2_first + i) * cs), l->l1_first * cs + i * 8);
		break;
	case 2:
		v = input_take(&m->in, 1);
		put_be64(m->fd, QCOW2_COPIED | ((l->data_first + v) * cs), l2 + i * 8);
		break;
	case 3:
		put_be64(m->fd, QCOW2_ZERO, l2 + i * 8);
		break;
	case 4: /* any entry in any table */
		v = op / 8 % 4 == 0   ? l->rt_first
		    : op / 8 % 4 == 1 ? l->rb_first
		    : op / 8 % 4 == 2 ? l->l1_first
		                      : l->l2_first;
		put_be64(m->fd, input_take(&m->in, 8), v * cs + i * 8);
		break;
	case 5: /* refcount bits */
		v = input_take(&m->in, 8);
		put_be64(m->fd, v, l->rb_first * cs + i * 8);
		break;
	case 6:
		v = input_take(&m->in, 1);
		if (m->data)
			fill_cluster(m, v % m->data, i, (uint8_t)op);
		break;
	default:
		v = input_take(&m->in, 1);
		if (m->mode & MODE_PATCH_HEAD)
			m->cluster0[i % (op & 128 ? QCOW2_HEAD_SIZE : 256)] = (uint8_t)v;
	}
}

static void make_sums(struct maker *m)
{
	uint8_t head[QCOW2_SUMS_HEAD_SIZE];

	qcow2_sums_head_encode(&m->head.desc, head);
	fuzz_put(SUMS, head, sizeof head);
	m->sums_fd = openat(fuzz_dir(), SUMS, O_WRONLY | O_CLOEXEC);
	FUZZ_CHECK(m->sums_fd >= 0);
}

static bool make(struct maker *m)
{
	static const char *const backing[] = {NULL, "/s/disk", "../s2/disk-fleece-2.qcow2",
	                                      "x.backing"};
	struct ff_image_desc *d = &m->head.desc;
	unsigned bits = (unsigned)input_take(&m->in, 1), b;
	uint64_t length;

	d->cluster_size = 4096u << bits % 10;
	d->size = input_take(&m->in, 8);
	/* a map of 1 PiB is still made within a millisecond */
	d->size %= m->mode & MODE_ANY_SIZE ? UINT64_C(1) << 50 : 64 << 20;
	b = (unsigned)input_take(&m->in, 1);
	d->broken = m->mode & MODE_FLAGS && b & 4;
	d->durable = m->mode & MODE_FLAGS && b & 8;
	d->seq = input_take(&m->in, 2);
	d->disk_ino = 7;
	m->data = input_take(&m->in, 1);
	length = input_take(&m->in, 6);
	if (qcow2_layout(d->size, d->cluster_size, &m->l))
		return false;
	FUZZ_CHECK(qcow2_head_set_backing(&m->head, backing[b % 4], b % 4 < 2 ? "raw" : "qcow2") ==
	           0);
	if (!(m->mode & MODE_LENGTH))
		length = (m->l.data_first + m->data) * d->cluster_size;
	if (ftruncate(m->fd, (off_t)length) < 0)
		return false;
	qcow2_head_encode(&m->head, &m->l, m->cluster0);
	if (m->mode & MODE_SUMS)
		make_sums(m);
	for (int n = 0; m->in.p < m->in.end && n < MAX_OPS; n++)
		step(m);
	if (m->mode & MODE_FIX_HEAD)
		fix_head(m->cluster0);
	FUZZ_CHECK(pwrite(m->fd, m->cluster0, QCOW2_HEAD_SIZE, 0) == QCOW2_HEAD_SIZE);
	/* entries written past the end must not make the file longer than it is to be */
	return ftruncate(m->fd, (off_t)length) == 0;
}

/* The same look-up, done here: what the file has for this cluster, or false. */
static bool peek(struct ff_image *img, int fd, uint64_t cluster, uint8_t *out)
{
	uint64_t cs = img->l.cluster_size, entry;
	uint8_t raw[8];

	FUZZ_CHECK(pread(fd, raw, 8, (off_t)(img->l.l2_first * cs + cluster * 8)) == 8);
	entry = ff_be64(raw);
	memset(out, 0, cs);
	if (entry == QCOW2_ZERO)
		return true;
	FUZZ_CHECK((entry & ~QCOW2_COPIED) % cs == 0);
	FUZZ_CHECK((entry & ~QCOW2_COPIED) >= img->l.data_first * cs);
	return pread(fd, out, cs, (off_t)(entry & ~QCOW2_COPIED)) == (ssize_t)cs;
}

static void check_read(struct ff_image *img, int fd, uint64_t first, uint64_t n)
{
	uint64_t cs = img->l.cluster_size;
	ff_autofree uint8_t *got = malloc(n * cs), *want = malloc(cs);
	int r = ff_image_read(img, first, n, got);

	FUZZ_CHECK(got && want && (r == 0 || r == -EIO));
	for (uint64_t i = 0; !r && i < n; i++)
		FUZZ_CHECK(peek(img, fd, first + i, want) && memcmp(got + i * cs, want, cs) == 0);
}

static void check_marked(struct ff_image *img, int fd, uint64_t first, uint64_t n)
{
	uint8_t kinds[600];

	for (uint64_t at = first; at < first + n; at += sizeof kinds) {
		uint64_t now = FF_MIN(first + n - at, sizeof kinds);

		FUZZ_CHECK(ff_image_kinds(img, at, now, kinds) == 0);
		for (uint64_t i = 0; i < now; i++)
			FUZZ_CHECK(kinds[i] == FF_KIND_DATA || kinds[i] == FF_KIND_ZERO);
	}
	check_read(img, fd, first, FF_MIN(n, FF_MAX(MAX_READ / img->l.cluster_size / 4, 1u)));
}

/* All runs of marked clusters; the first one that is not marked is returned, or the number of all.
 */
static uint64_t check_runs(struct ff_image *img, int fd)
{
	uint64_t clusters = ff_image_clusters(img), at = 0, free_one = clusters;
	uint8_t kind;
	bool marked;

	for (int runs = 0; at < clusters && runs < 200; runs++) {
		uint64_t n = ff_image_run(img, at, clusters - at, &marked);

		FUZZ_CHECK(n >= 1 && n <= clusters - at && marked == ff_image_marked(img, at));
		if (marked)
			check_marked(img, fd, at, n);
		else if (free_one == clusters)
			free_one = at;
		at += n;
	}
	FUZZ_CHECK(!ff_image_marked(img, clusters) && !ff_image_marked(img, UINT64_MAX));
	FUZZ_CHECK(ff_image_kinds(img, clusters, 1, &kind) == -EINVAL);
	FUZZ_CHECK(ff_image_kinds(img, UINT64_MAX, 2, &kind) == -EINVAL);
	return free_one;
}

static void check_save(struct ff_image **img, uint64_t cluster)
{
	uint32_t cs = (*img)->l.cluster_size;
	ff_autofree uint8_t *data = malloc(cs), *got = malloc(cs);
	int r;

	FUZZ_CHECK(data && got);
	memset(data, 0x5a, cs);
	r = ff_image_save(*img, cluster, 1, data, NULL, false);
	FUZZ_CHECK(r == 0 || r == -ENOSPC || r == -EFBIG);
	if (r)
		return;
	FUZZ_CHECK(ff_image_read(*img, cluster, 1, got) == 0 && memcmp(got, data, cs) == 0);
	ff_image_free(ff_take_ptr(img));
	FUZZ_CHECK(ff_image_load(fuzz_dir(), IMAGE, img) == 0);
	FUZZ_CHECK(ff_image_marked(*img, cluster));
	FUZZ_CHECK(ff_image_read(*img, cluster, 1, got) == 0 && memcmp(got, data, cs) == 0);
}

static void check(int fd)
{
	struct ff_image *img = NULL;
	struct stat st;
	uint64_t free_one;
	int r = ff_image_load(fuzz_dir(), IMAGE, &img);

	FUZZ_CHECK(r == 0 || r == -EINVAL);
	if (r)
		return;
	FUZZ_CHECK(fstat(fd, &st) == 0);
	FUZZ_CHECK((uint64_t)st.st_size == img->next * img->l.cluster_size);
	FUZZ_CHECK(img->next >= img->l.data_first && img->next <= img->l.capacity);
	FUZZ_CHECK(strlen(ff_image_backing(img)) <= QCOW2_BACKING_MAX);
	free_one = check_runs(img, fd);
	if (free_one < ff_image_clusters(img))
		check_save(&img, free_one);
	FUZZ_CHECK(ff_image_set_backing(img, "/s/other", "raw") == 0);
	FUZZ_CHECK(ff_image_set_broken(img, 7) == 0);
	ff_image_free(img);
	FUZZ_CHECK(ff_image_load(fuzz_dir(), IMAGE, &img) == 0);
	FUZZ_CHECK(ff_image_is_broken(img) && strcmp(ff_image_backing(img), "/s/other") == 0);
	ff_image_free(img);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct maker m = {.in = {data, data + size}, .sums_fd = -1};
	bool made = true;

	unlinkat(fuzz_dir(), SUMS, 0);
	m.mode = (unsigned)input_take(&m.in, 1);
	fuzz_put(IMAGE, m.in.p, m.mode & MODE_RAW ? (size_t)(m.in.end - m.in.p) : 0);
	m.fd = openat(fuzz_dir(), IMAGE, O_RDWR | O_CLOEXEC);
	FUZZ_CHECK(m.fd >= 0);
	if (!(m.mode & MODE_RAW))
		made = make(&m);
	if (m.sums_fd >= 0)
		close(m.sums_fd);
	if (made)
		check(m.fd);
	close(m.fd);
	return 0;
}
