/*
 * Frozen reads of a sparse source: holes are not read, and a hole that is filled, or made, while a
 * reader looks for it is not shown.
 *
 * The linker puts this file's io_seek() and io_pread_once() in the place of those of cow/io.h: the
 * first changes the disk before a reader's look or after it, the second counts what is read.
 */
#include <criterion/criterion.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "cow/io.h"
#include "ff_util.h"
#include "fixture.h"

enum { SIZE = (4 << 20) + 5000, BLOCK = 4096, HOLE = 1 << 20, DATA = 3 << 20 };

static struct fixture fx;
static char want[SIZE], now[SIZE];
static struct ff_disk *disk;
static int fd;
static size_t bytes_read;

static enum moment { NEVER, BEFORE, AFTER } moment; /* of the next look that a reader takes */
static struct ff_change change;

int __real_io_seek(int fd, uint64_t off, int whence, uint64_t *out);
int __wrap_io_seek(int fd, uint64_t off, int whence, uint64_t *out);
int __real_io_pread_once(int fd, void *buf, size_t len, uint64_t off, size_t *got);
int __wrap_io_pread_once(int fd, void *buf, size_t len, uint64_t off, size_t *got);

static void change_at(enum moment which)
{
	size_t done;

	if (moment != which)
		return;
	moment = NEVER;
	cr_assert_eq(ff_disk_change(disk, &change, &done), 0);
}

int __wrap_io_seek(int f, uint64_t off, int whence, uint64_t *out)
{
	enum moment which = moment;
	int r;

	if (which == BEFORE)
		change_at(BEFORE);
	r = __real_io_seek(f, off, whence, out);
	if (which == AFTER)
		change_at(AFTER);
	return r;
}

int __wrap_io_pread_once(int f, void *buf, size_t len, uint64_t off, size_t *got)
{
	bytes_read += len;
	return __real_io_pread_once(f, buf, len, off, got);
}

/* Data at 0, at the end of the first half, at DATA and at the very end, each with odd bounds. */
static void setup(void)
{
	static const struct {
		off_t off;
		size_t len;
	} pieces[] = {{0, 10000}, {HOLE - 70000, 70000}, {DATA + 1000, 300000}, {SIZE - 100, 100}};

	fixture_init(&fx, BLOCK);
	fixture_file(&fx, "a", 0, 1);
	fd = openat(fx.source_fd, "a", O_RDWR | O_CLOEXEC);
	cr_assert_geq(fd, 0);
	memset(want, 0, sizeof want);
	for (size_t i = 0; i < FF_ARRAY_SIZE(pieces); i++) {
		fill(want + pieces[i].off, pieces[i].len, (unsigned)i + 1);
		cr_assert_eq(pwrite(fd, want + pieces[i].off, pieces[i].len, pieces[i].off),
		             (ssize_t)pieces[i].len);
	}
	close(fd);
	memcpy(now, want, SIZE);
	moment = NEVER;
	fixture_open(&fx);
	fx.store->knows_holes = true; /* wherever this runs */
	fd = live_open(&fx, "a", &disk);
	cr_assert_eq(ff_store_freeze(fx.store, "s", 0), 0);
}

static void teardown(void)
{
	ff_disk_put(disk);
	close(fd);
	fixture_done(&fx);
}

static void read_all(char *buf)
{
	const struct ff_frozen *f;
	struct ff_snap *snap;
	struct ff_reader *rd;
	size_t got;

	cr_assert_eq(ff_snap_get(fx.store, "s", &snap), 0);
	cr_assert_eq(ff_frozen_lookup(snap, ff_snap_root(snap), "a", &f), 0);
	cr_assert_eq(ff_reader_open(snap, f, &rd), 0);
	memset(buf, 0x55, SIZE);
	cr_assert_eq(ff_reader_read(rd, buf, SIZE, 0, &got), 0);
	cr_assert_eq(got, SIZE);
	ff_reader_close(rd);
	ff_snap_put(snap);
}

Test(holes, are_not_read, .init = setup, .fini = teardown, .timeout = 60)
{
	char *buf = malloc(SIZE);

	bytes_read = 0;
	read_all(buf);
	cr_assert_eq(memcmp(buf, want, SIZE), 0);
	cr_assert_gt(bytes_read, 380000);
	cr_assert_lt(bytes_read, 1 << 20, "%zu bytes of %d were read", bytes_read, SIZE);
	free(buf);
	expect_frozen(&fx, "s", "a", want, SIZE);
}

/* CHANGE comes before or after the look that finds out about the offset where it is. */
static void meanwhile(enum moment when, struct ff_change c)
{
	char *buf = malloc(SIZE);

	change = c;
	change.fd = fd;
	if (c.kind == FF_WRITE)
		memcpy(now + c.off, c.buf, c.len);
	else
		memset(now + c.off, 0, (size_t)c.len);
	moment = when;
	read_all(buf);
	cr_assert_eq(moment, NEVER, "nobody looked for holes");
	cr_assert_eq(memcmp(buf, want, SIZE), 0, "what came later was shown");
	free(buf);
	expect_frozen(&fx, "s", "a", want, SIZE);
	cr_assert_eq(ff_store_freeze(fx.store, "t", 0), 0);
	expect_frozen(&fx, "t", "a", now, SIZE);
}

static const char written[100000] = "what the guest wrote meanwhile";

Test(holes, filled_before_the_look, .init = setup, .fini = teardown, .timeout = 60)
{
	meanwhile(BEFORE,
	          (struct ff_change){
	              .kind = FF_WRITE, .buf = written, .off = 200000, .len = sizeof written});
}

Test(holes, filled_after_the_look, .init = setup, .fini = teardown, .timeout = 60)
{
	meanwhile(AFTER,
	          (struct ff_change){
	              .kind = FF_WRITE, .buf = written, .off = 200000, .len = sizeof written});
}

Test(holes, made_before_the_look, .init = setup, .fini = teardown, .timeout = 60)
{
	meanwhile(BEFORE, (struct ff_change){.kind = FF_FALLOCATE,
	                                     .mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
	                                     .off = 0,
	                                     .len = 500000});
}

Test(holes, made_after_the_look, .init = setup, .fini = teardown, .timeout = 60)
{
	meanwhile(AFTER, (struct ff_change){.kind = FF_FALLOCATE,
	                                    .mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
	                                    .off = 0,
	                                    .len = 500000});
}
