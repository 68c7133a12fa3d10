#include "since_disk.h"

#include <criterion/criterion.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

#include "ff_util.h"

enum { ROOM = 4 << 20 };

struct fixture since_fx;

void since_setup(void)
{
	fixture_init(&since_fx, CLUSTER);
	fixture_file(&since_fx, "a", SIZE, 1);
	fixture_open(&since_fx);
}

void since_teardown(void)
{
	fixture_done(&since_fx);
}

void since_write(off_t off, size_t len, int with)
{
	char *buf = malloc(len);
	struct ff_disk *d;
	int fd = live_open(&since_fx, "a", &d);

	memset(buf, with, len);
	cr_assert_eq(live_write(d, fd, buf, len, off), 0);
	ff_disk_put(d);
	close(fd);
	free(buf);
}

void since_punch(off_t off, size_t len)
{
	struct ff_change c = {.kind = FF_FALLOCATE,
	                      .mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
	                      .off = off,
	                      .len = len};
	struct ff_disk *d;
	size_t done;

	c.fd = live_open(&since_fx, "a", &d);
	cr_assert_eq(ff_disk_change(d, &c, &done), 0);
	ff_disk_put(d);
	close(c.fd);
}

int since_make(const char *new, const char *old, struct ff_since **out)
{
	struct ff_since_pair pair = {.old_name = old ? old : "-"};
	const struct ff_frozen *root, *f;
	enum ff_since_kind kind;
	const char *stored;
	int r;

	cr_assert_eq(ff_snap_get(since_fx.store, new, &pair.new), 0);
	if (old)
		cr_assert_eq(ff_snap_get(since_fx.store, old, &pair.old), 0);
	root = ff_snap_root(pair.new);
	cr_assert_eq(ff_since_find(pair.new, root, "a.qcow2", &kind, &stored, &f), 0);
	cr_assert_eq(kind, FF_SINCE_IMAGE);
	r = ff_since_make(&pair, root, stored, f, out);
	ff_snap_put(pair.new);
	if (old)
		ff_snap_put(pair.old);
	return r;
}

struct image since_image(const char *new, const char *old)
{
	struct image img = {.bytes = malloc(ROOM)};
	struct ff_since_file *file;
	struct ff_since *s;
	size_t got;

	cr_assert_eq(since_make(new, old, &s), 0);
	img.size = (size_t)ff_since_image_size(s);
	cr_assert(img.size <= ROOM);
	cr_assert_eq(ff_since_open(s, &file), 0);
	/* in odd pieces */
	for (size_t at = 0; at < img.size; at += got)
		cr_assert_eq(ff_since_read_image(file, img.bytes + at, 10007, (off_t)at, &got), 0);
	ff_since_flushed(file);
	ff_since_close(file);
	ff_since_free(s);
	return img;
}

void since_expect_same(struct image a, struct image b)
{
	cr_assert_eq(a.size, b.size);
	cr_assert_eq(memcmp(a.bytes, b.bytes, a.size), 0);
	free(b.bytes);
}
