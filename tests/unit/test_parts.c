/*
 * The walk of SOURCE and what the frozen tree tells of it; freezes that race with growing disks;
 * the space that is kept free; work that may hang.
 */
#include <criterion/criterion.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/statvfs.h>
#include <sys/xattr.h>
#include <time.h>
#include <unistd.h>

#include "cow/late.h"
#include "ff_util.h"
#include "fixture.h"

static struct fixture fx;

static void setup(void)
{
	fixture_init(&fx, 4096);
}

static void teardown(void)
{
	fixture_done(&fx);
}

TestSuite(tree, .init = setup, .fini = teardown);
TestSuite(store, .init = setup, .fini = teardown);

static const struct ff_frozen *look(struct ff_snap *snap, const char *path)
{
	const struct ff_frozen *f = ff_snap_root(snap);
	char copy[200], *part, *rest = copy;

	snprintf(copy, sizeof copy, "%s", path);
	while ((part = strsep(&rest, "/")))
		if (ff_frozen_lookup(snap, f, part, &f))
			return NULL;
	return f;
}

Test(tree, holds_everything_but_what_is_excluded)
{
	static const char *const globs[] = {"*.iso", "dir/secret"};
	const struct ff_frozen *f;
	struct ff_snap *snap;
	struct stat st, now;
	char path[200], value[16];
	size_t len;

	mkdirat(fx.source_fd, "dir", 0750);
	mkdirat(fx.source_fd, "dir/empty", 01777);
	mkdirat(fx.source_fd, "dir/secret", 0700);
	mkdirat(fx.source_fd, FF_HIDDEN_NAME, 0700);
	fixture_file(&fx, "dir/secret/x", 10, 1);
	fixture_file(&fx, "dir/a.iso", 10, 1);
	fixture_file(&fx, "dir/disk", 4097, 1);
	fixture_file(&fx, "empty", 0, 1);
	cr_assert_eq(linkat(fx.source_fd, "dir/disk", fx.source_fd, "hard", 0), 0);
	cr_assert_eq(symlinkat("/nowhere", fx.source_fd, "link"), 0);
	cr_assert_eq(mkfifoat(fx.source_fd, "fifo", 0600), 0);
	snprintf(path, sizeof path, "%s/dir/disk", fx.source);
	cr_assert_eq(setxattr(path, "user.note", "hello", 5, 0), 0);
	fx.config.exclude = globs;
	fx.config.exclude_count = FF_ARRAY_SIZE(globs);
	fixture_open(&fx);
	cr_assert_eq(ff_store_freeze(fx.store, "s", 0), 0);
	cr_assert_eq(ff_snap_get(fx.store, "s", &snap), 0);

	cr_assert_null(look(snap, "dir/secret"));
	cr_assert_null(look(snap, "dir/a.iso"));
	cr_assert_null(look(snap, FF_HIDDEN_NAME));
	cr_assert_not_null(look(snap, "dir/empty"));
	cr_assert_not_null(look(snap, "fifo"));
	cr_assert_str_eq(ff_frozen_readlink(snap, look(snap, "link")), "/nowhere");
	f = look(snap, "dir/disk");
	cr_assert_eq(f, look(snap, "hard"), "two names, one inode");
	ff_frozen_stat(snap, f, &st);
	cr_assert_eq(stat(path, &now), 0);
	cr_assert_eq(st.st_nlink, 2);
	cr_assert_eq(st.st_mode, now.st_mode);
	cr_assert_eq(memcmp(&st.st_mtim, &now.st_mtim, sizeof st.st_mtim), 0);
	cr_assert_eq(memcmp(&st.st_ctim, &now.st_ctim, sizeof st.st_ctim), 0);
	cr_assert_eq(st.st_blocks, now.st_blocks);
	cr_assert_eq(ff_frozen_getxattr(snap, f, "user.note", value, sizeof value, &len), 0);
	cr_assert(len == 5 && memcmp(value, "hello", 5) == 0);
	cr_assert_eq(ff_frozen_getxattr(snap, f, "user.note", value, 4, &len), -ERANGE);
	cr_assert_eq(ff_frozen_getxattr(snap, f, "user.none", value, 0, &len), -ENODATA);
	cr_assert_eq(count_images(&fx), 2);
	ff_snap_put(snap);
}

static atomic_bool stop;

/* Appends records that say how long the disk was when they were written. */
static void *grow(void *ctx)
{
	struct ff_disk *disk;
	int fd = live_open(&fx, "log", &disk);
	uint64_t record[100];

	for (uint64_t n = 0; !atomic_load(&stop); n++) {
		struct ff_change c = {.kind = FF_WRITE,
		                      .fd = fd,
		                      .len = sizeof record,
		                      .buf = record,
		                      .append = true};
		size_t done;

		for (size_t i = 0; i < FF_ARRAY_SIZE(record); i++)
			record[i] = n;
		cr_assert_eq(ff_disk_change(disk, &c, &done), 0);
		if (n % 500 == 499) {
			struct ff_change t = {.kind = FF_TRUNCATE, .fd = fd, .off = 0};

			cr_assert_eq(ff_disk_change(disk, &t, &done), 0);
			n = UINT64_MAX;
		}
	}
	ff_disk_put(disk);
	close(fd);
	return NULL;
}

Test(store, freezes_of_a_disk_that_grows_meanwhile)
{
	pthread_t thread;
	bool whole = false;

	fixture_file(&fx, "log", 0, 1);
	fixture_open(&fx);
	pthread_create(&thread, NULL, grow, NULL);
	for (int round = 0; round < 200; round++) {
		static uint64_t got[500 * 100];
		const struct ff_frozen *f;
		struct ff_reader *rd;
		struct ff_snap *snap;
		struct stat st;
		size_t len;

		cr_assert_eq(ff_store_freeze(fx.store, "s", 0), 0);
		cr_assert_eq(ff_snap_get(fx.store, "s", &snap), 0);
		f = look(snap, "log");
		ff_frozen_stat(snap, f, &st);
		cr_assert_eq(st.st_size % 800, 0, "half a record");
		cr_assert_eq((uint64_t)st.st_size, ff_image_desc(snap->links[0]->img)->size);
		cr_assert_eq(ff_reader_open(snap, f, &rd), 0);
		cr_assert_eq(ff_reader_read(rd, got, sizeof got, 0, &len), 0);
		cr_assert_eq(len, (size_t)st.st_size);
		for (size_t i = 0; i < len / 8; i++)
			cr_assert_eq(got[i], i / 100);
		whole |= len > 0;
		ff_reader_close(rd);
		ff_snap_put(snap);
		cr_assert_eq(ff_store_drop(fx.store, "s"), 0);
	}
	atomic_store(&stop, true);
	pthread_join(thread, NULL);
	cr_assert(whole);
}

Test(store, space_is_kept_free)
{
	struct statvfs v;

	fixture_file(&fx, "disk", 100000, 1);
	fx.config.policy = FF_BREAK_GUEST_WRITE;
	cr_assert_eq(statvfs(fx.root, &v), 0);
	fixture_open(&fx);
	/* More than the filesystem can ever have free. */
	fx.store->cfg.fleece_reserve = (uint64_t)v.f_blocks * v.f_frsize + 1;
	cr_assert_eq(ff_store_freeze(fx.store, "s", 0), -ENOSPC);
	cr_assert_eq(count_images(&fx), 0);
	fx.store->cfg.fleece_reserve = 0;
	cr_assert_eq(ff_store_freeze(fx.store, "s", 0), 0);
	fx.store->cfg.fleece_reserve = (uint64_t)v.f_blocks * v.f_frsize + 1;
	for (int i = 0; i < 2; i++) {
		struct ff_disk *disk;
		int fd = live_open(&fx, "disk", &disk);

		cr_assert_eq(live_write(disk, fd, "x", 1, 5), i ? 0 : -ENOSPC);
		ff_disk_put(disk);
		close(fd);
		fx.store->cfg.fleece_reserve = 0;
	}
	cr_assert_gt(fx.store->space_used, 0);
	cr_assert_eq(ff_store_drop(fx.store, "s"), 0);
	cr_assert_eq(fx.store->space_used, 0, "%llu", (unsigned long long)fx.store->space_used);
}

struct slow {
	atomic_bool go, ran;
};

static int answer(void *ctx)
{
	return -42;
}

static int slow(void *ctx)
{
	struct slow *s = ctx;

	while (!atomic_load(&s->go))
		nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
	atomic_store(&s->ran, true);
	return 0;
}

Test(late, waits_so_long_and_no_longer)
{
	static struct slow s;
	atomic_uint running = 0;
	struct timespec before, after;

	cr_assert_eq(late_run(answer, NULL, 5, &running), -42);
	clock_gettime(CLOCK_MONOTONIC, &before);
	cr_assert_eq(late_run(slow, &s, 1, &running), -ETIMEDOUT);
	clock_gettime(CLOCK_MONOTONIC, &after);
	cr_assert_lt(after.tv_sec - before.tv_sec, 4);
	cr_assert(!atomic_load(&s.ran));
	atomic_store(&s.go, true);
	for (int i = 0; i < 5000 && atomic_load(&running); i++)
		nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
	cr_assert_eq(atomic_load(&running), 0);
	cr_assert(atomic_load(&s.ran));
}
