/*
 * Every way of changing a disk's bytes, at every place that matters to a cluster, for several
 * cluster and file sizes: the frozen view stays as it was, the live file becomes what the change
 * says, and what is saved is what the change alters, no more.
 */
#include <criterion/criterion.h>
#include <criterion/parameterized.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "ff_util.h"
#include "fixture.h"

/* Under a sanitizer each case takes long: a part of them, another each time. */
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
enum { ONE_OF = 8 };
#else
enum { ONE_OF = 1 };
#endif

enum op {
	WHOLE,
	LEFT,
	RIGHT,
	SPANNING,
	ADJACENT,
	BEYOND_END,
	OVER_HOLE,
	TWICE,
	SAME_BYTES,
	ONE_BYTE,
	PUNCH,
	ZERO,
	TRUNC_0,
	TRUNC_MIDDLE,
	TRUNC_UP,
	TRUNC_DOWN_UP,
	APPEND,
	COPY,
	ALLOCATE,
	OPS,
};

struct param {
	uint32_t cluster;
	uint32_t size;
	enum op op;
};

struct work {
	struct fixture fx;
	struct ff_disk *disk;
	int fd;
	char *live; /* the model: room for twice the size and four clusters */
	size_t len;
};

static size_t model_room(const struct param *p)
{
	return 2 * (size_t)p->size + 4 * (size_t)p->cluster;
}

static void do_write(struct work *w, size_t off, size_t len, unsigned seed)
{
	char *buf = malloc(len + 1);

	fill(buf, len, seed);
	cr_assert_eq(live_write(w->disk, w->fd, buf, len, (off_t)off), 0);
	memcpy(w->live + off, buf, len);
	if (len)
		w->len = FF_MAX(w->len, off + len);
	free(buf);
}

static void do_truncate(struct work *w, size_t size)
{
	struct ff_change c = {.kind = FF_TRUNCATE, .fd = w->fd, .off = (off_t)size};
	size_t done;

	cr_assert_eq(ff_disk_change(w->disk, &c, &done), 0);
	if (size < w->len)
		memset(w->live + size, 0, w->len - size);
	w->len = size;
}

static void do_fallocate(struct work *w, int mode, size_t off, size_t len)
{
	struct ff_change c = {
	    .kind = FF_FALLOCATE, .fd = w->fd, .off = (off_t)off, .len = len, .mode = mode};
	size_t done;

	cr_assert_eq(ff_disk_change(w->disk, &c, &done), 0);
	if (mode & (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_ZERO_RANGE))
		memset(w->live + off, 0, len);
	if (!(mode & FALLOC_FL_KEEP_SIZE))
		w->len = FF_MAX(w->len, off + len);
}

static void do_copy(struct work *w, size_t from, size_t to, size_t len)
{
	struct ff_change c = {.kind = FF_COPY,
	                      .fd = w->fd,
	                      .off = (off_t)to,
	                      .len = len,
	                      .in_fd = w->fd,
	                      .in_off = (off_t)from};
	size_t done;

	cr_assert_eq(ff_disk_change(w->disk, &c, &done), 0);
	memmove(w->live + to, w->live + from, done);
	w->len = FF_MAX(w->len, to + done);
}

static void do_append(struct work *w, size_t len)
{
	char *buf = malloc(len);
	struct ff_change c = {
	    .kind = FF_WRITE, .fd = w->fd, .len = len, .buf = buf, .append = true};
	size_t done;

	fill(buf, len, 77);
	cr_assert_eq(ff_disk_change(w->disk, &c, &done), 0);
	cr_assert_eq(done, len);
	memcpy(w->live + w->len, buf, len);
	w->len += len;
	free(buf);
}

static void apply(struct work *w, const struct param *p)
{
	size_t c = p->cluster, middle = p->size / 2 / c * c, n = w->len;
	char *same;

	switch (p->op) {
	case WHOLE:
		do_write(w, middle, c, 5);
		break;
	case LEFT:
		do_write(w, middle, c / 3, 5);
		break;
	case RIGHT:
		do_write(w, middle + c / 2, c / 2, 5);
		break;
	case SPANNING:
		do_write(w, middle + c / 2, c, 5);
		break;
	case ADJACENT:
		do_write(w, middle, c, 5);
		do_write(w, middle + c, c, 6);
		break;
	case BEYOND_END:
		do_write(w, n + c + 100, 700, 5);
		break;
	case OVER_HOLE:
		do_write(w, p->size / 4, c, 5);
		break;
	case TWICE:
		do_write(w, middle, c, 5);
		do_write(w, middle, c, 6);
		break;
	case SAME_BYTES:
		same = malloc(n + 1);
		memcpy(same, w->live, n);
		cr_assert_eq(live_write(w->disk, w->fd, same, n, 0), 0);
		free(same);
		break;
	case ONE_BYTE:
		do_write(w, n - 1, 1, 9);
		break;
	case PUNCH:
		do_fallocate(w, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, n / 3, n / 3 + 1);
		break;
	case ZERO:
		do_fallocate(w, FALLOC_FL_ZERO_RANGE, n / 3, n / 3 + 1);
		break;
	case TRUNC_0:
		do_truncate(w, 0);
		break;
	case TRUNC_MIDDLE:
		do_truncate(w, n / 2);
		break;
	case TRUNC_UP:
		do_truncate(w, n + c + 5);
		break;
	case TRUNC_DOWN_UP:
		do_truncate(w, n / 3);
		do_truncate(w, n);
		do_write(w, n / 2, 10, 4);
		break;
	case APPEND:
		do_append(w, c + 13);
		break;
	case COPY:
		do_copy(w, 0, n / 2, n / 2);
		break;
	case ALLOCATE:
		do_fallocate(w, 0, 0, n + c);
		break;
	case OPS:
		break;
	}
}

/* Clusters of the disk in which BEFORE and AFTER differ, both zeros after their ends. What a file
 * gets beyond its old end, but in its last cluster, is a change of that cluster. */
static size_t differing(const char *before, size_t size, const char *after, size_t after_len,
                        size_t c)
{
	size_t n = 0;

	for (size_t at = 0; at < size; at += c) {
		bool same = true;

		if (at + c <= FF_MIN(size, after_len)) {
			n += memcmp(before + at, after + at, c) != 0;
			continue;
		}
		for (size_t i = at; i < at + c && same; i++)
			same = (i < size ? before[i] : 0) == (i < after_len ? after[i] : 0);
		n += !same;
	}
	return n;
}

static void setup(struct work *w, const struct param *p, bool hole)
{
	fixture_init(&w->fx, p->cluster);
	fixture_file(&w->fx, "disk", p->size, 1);
	fixture_open(&w->fx);
	w->live = calloc(1, model_room(p));
	w->len = p->size;
	fill(w->live, p->size, 1);
	w->fd = live_open(&w->fx, "disk", &w->disk);
	if (hole)
		do_fallocate(w, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, p->size / 4,
		             p->size / 4 + 1);
}

static void teardown(struct work *w)
{
	close(w->fd);
	ff_disk_put(w->disk);
	free(w->live);
	fixture_done(&w->fx);
}

static void expect_live(struct work *w)
{
	char *buf = malloc(w->len + 1);
	ssize_t n = pread(w->fd, buf, w->len + 1, 0);

	cr_assert_eq(n, (ssize_t)w->len);
	cr_assert(memcmp(buf, w->live, w->len) == 0, "the live file is not what was written");
	free(buf);
}

ParameterizedTestParameters(overwrites, one)
{
	static const uint32_t clusters[] = {4096, 65536, 2 << 20};
	static const uint32_t sizes[] = {1, 511, 4096, 4097, 65536 + 511, (3 << 20) + 5};
	static struct param params[3 * 6 * OPS];
	const char *given = getenv("SEED");
	unsigned seed = given ? (unsigned)strtoul(given, NULL, 10) : (unsigned)getpid(), all = 0;
	size_t n = 0;

	if (ONE_OF > 1)
		printf("one of %d, SEED=%u\n", ONE_OF, seed);
	for (size_t c = 0; c < FF_ARRAY_SIZE(clusters); c++)
		for (size_t s = 0; s < FF_ARRAY_SIZE(sizes); s++)
			for (int op = 0; op < OPS; op++)
				if ((all++ + seed) % ONE_OF == 0)
					params[n++] =
					    (struct param){clusters[c], sizes[s], (enum op)op};
	return cr_make_param_array(struct param, params, n);
}

ParameterizedTest(struct param *p, overwrites, one)
{
	struct work w;
	char *first, *second;
	size_t second_len;

	setup(&w, p, p->op == OVER_HOLE);
	first = malloc(w.len + 1);
	memcpy(first, w.live, w.len);
	cr_assert_eq(ff_store_freeze(w.fx.store, "first", 0), 0);
	apply(&w, p);
	expect_live(&w);
	expect_frozen(&w.fx, "first", "disk", first, p->size);
	/* Sizes of one cluster and more: what is equal was not saved, what differs was, once. */
	if (p->op != COPY && p->op != TWICE && p->op != TRUNC_DOWN_UP)
		cr_assert_eq(count_saved(&w.fx, "first", 0),
		             differing(first, p->size, w.live, w.len, p->cluster));

	/* The same again over a second snapshot, the first seeing through it. */
	second_len = w.len;
	second = malloc(w.len + 1);
	memcpy(second, w.live, w.len);
	cr_assert_eq(ff_store_freeze(w.fx.store, "second", 0), 0);
	do_truncate(&w, p->size);
	do_write(&w, 0, p->size, 3);
	expect_frozen(&w.fx, "first", "disk", first, p->size);
	expect_frozen(&w.fx, "second", "disk", second, second_len);

	/* And the other way: with the second gone, the first needs what it had saved. */
	cr_assert_eq(ff_store_drop(w.fx.store, "second"), 0);
	do_write(&w, 0, p->size, 4);
	do_truncate(&w, p->size + 3 * p->cluster);
	expect_frozen(&w.fx, "first", "disk", first, p->size);
	cr_assert_eq(ff_store_drop(w.fx.store, "first"), 0);
	cr_assert_eq(count_images(&w.fx), 0);
	expect_live(&w);
	free(first);
	free(second);
	teardown(&w);
}
