/*
 * Writers, readers and freezes at once, without FUSE: run under the thread sanitizer, and for what
 * the views hold. Each writer stamps its own column of a disk with rising numbers, a whole pass
 * before the next number begins, so a view that is one moment's holds at most two numbers in a
 * column, the higher one first.
 */
#include <criterion/criterion.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "ff_log.h"
#include "ff_util.h"
#include "fixture.h"

enum { WRITERS = 4, ROWS = 64, BLOCK = 4096, ROUNDS = 25, VIEWS = 3 };

static struct fixture fx;
static atomic_bool stop;

struct writer {
	unsigned column;
	atomic_ulong finished; /* the last number of which a whole pass has returned */
	atomic_ulong begun;
};

static void *write_column(void *ctx)
{
	struct writer *w = ctx;
	static const char *const names[] = {"a", "b"};
	uint64_t block[BLOCK / sizeof(uint64_t)];
	struct ff_disk *disk;
	int fd = live_open(&fx, names[w->column % 2], &disk);

	for (uint64_t n = 1; !atomic_load(&stop); n++) {
		atomic_store(&w->begun, n);
		for (size_t i = 0; i < FF_ARRAY_SIZE(block); i++)
			block[i] = n;
		for (size_t row = 0; row < ROWS && !atomic_load(&stop); row++)
			cr_assert_eq(live_write(disk, fd, block, BLOCK,
			                        (off_t)((row * WRITERS + w->column) * BLOCK)),
			             0);
		if (!atomic_load(&stop))
			atomic_store(&w->finished, n);
	}
	ff_disk_put(disk);
	close(fd);
	return NULL;
}

/* Reads the view; the sum of it, so that a second look can be compared. */
static uint64_t check_view(const char *name, struct writer *w, const uint64_t *low,
                           const uint64_t *high)
{
	static uint64_t all[ROWS * WRITERS * BLOCK / sizeof(uint64_t)];
	const struct ff_frozen *f;
	struct ff_reader *rd;
	struct ff_snap *snap;
	uint64_t sum = 0;
	size_t got;

	cr_assert_eq(ff_snap_get(fx.store, name, &snap), 0);
	for (int disk = 0; disk < 2; disk++) {
		cr_assert_eq(ff_frozen_lookup(snap, ff_snap_root(snap), disk ? "b" : "a", &f), 0);
		cr_assert_eq(ff_reader_open(snap, f, &rd), 0);
		cr_assert_eq(ff_reader_read(rd, all, sizeof all, 0, &got), 0);
		cr_assert_eq(got, sizeof all);
		ff_reader_close(rd);
		for (size_t i = 0; i < FF_ARRAY_SIZE(all); i++) {
			size_t block = i / (BLOCK / sizeof(uint64_t)), column = block % WRITERS;
			uint64_t first;

			sum = sum * 31 + all[i];
			if (column % 2 != (unsigned)disk)
				continue;
			first = all[column * (BLOCK / sizeof(uint64_t))];
			cr_assert(all[i] == first || all[i] + 1 == first, "not one moment");
			cr_assert(low == NULL || all[i] >= low[column], "a write is missing");
			cr_assert(high == NULL || all[i] <= high[column], "a later write shows");
		}
	}
	ff_snap_put(snap);
	return sum;
}

static void make_disk(const char *name)
{
	int fd;

	fixture_file(&fx, name, 0, 1);
	fd = openat(fx.source_fd, name, O_WRONLY);
	cr_assert_eq(ftruncate(fd, (off_t)ROWS * WRITERS * BLOCK), 0);
	close(fd);
}

Test(threads, views_hold_one_moment_and_keep_it)
{
	struct writer w[WRITERS] = {{0}};
	uint64_t low[WRITERS], high[WRITERS], sums[VIEWS] = {0};
	pthread_t threads[WRITERS];
	char name[8];

	fixture_init(&fx, 4096);
	make_disk("a");
	make_disk("b");
	fixture_open(&fx);
	for (unsigned i = 0; i < WRITERS; i++) {
		w[i].column = i;
		pthread_create(&threads[i], NULL, write_column, &w[i]);
	}
	for (int round = 0; round < ROUNDS; round++) {
		snprintf(name, sizeof name, "v%d", round % VIEWS);
		if (round >= VIEWS) {
			cr_assert_eq(check_view(name, w, NULL, NULL), sums[round % VIEWS],
			             "a view has changed");
			cr_assert_eq(ff_store_drop(fx.store, name), 0);
		}
		for (int i = 0; i < WRITERS; i++)
			low[i] = atomic_load(&w[i].finished);
		cr_assert_eq(ff_store_freeze(fx.store, name, 0), 0);
		for (int i = 0; i < WRITERS; i++)
			high[i] = atomic_load(&w[i].begun);
		sums[round % VIEWS] = check_view(name, w, low, high);
	}
	atomic_store(&stop, true);
	for (int i = 0; i < WRITERS; i++)
		pthread_join(threads[i], NULL);
	fixture_done(&fx);
}

static void *rewrite(void *ctx)
{
	static char block[BLOCK];
	struct ff_disk *disk;
	int fd = live_open(&fx, "a", &disk);

	for (unsigned n = 1; !atomic_load(&stop); n++) {
		memset(block, (int)(n / (ROWS * WRITERS)), sizeof block);
		cr_assert_eq(
		    live_write(disk, fd, block, BLOCK, (off_t)(n % (ROWS * WRITERS)) * BLOCK), 0);
	}
	ff_disk_put(disk);
	close(fd);
	return NULL;
}

/* What is said of a view that breaks names its directory, whatever that is called by then. */
Test(threads, views_break_while_they_are_renamed_and_dropped)
{
	uint64_t broken = 0;
	pthread_t writer;

	atomic_store(&stop, false);
	fixture_init(&fx, 4096);
	make_disk("a");
	fixture_file(&fx, "a", (size_t)ROWS * WRITERS * BLOCK, 1);
	fx.config.fleece_limit = 10 << 10; /* an image, and nothing in it */
	fixture_open(&fx);
	ff_log_threshold(FF_LOG_ERROR - 1);
	pthread_create(&writer, NULL, rewrite, NULL);
	for (int round = 0; round < 8 * ROUNDS; round++) {
		cr_assert_eq(ff_store_freeze(fx.store, "from", 0), 0);
		usleep(round % 8 * 50);
		cr_assert_eq(ff_store_rename_snap(fx.store, "from", "to"), 0);
		broken += frozen_error(&fx, "to", "a") == -EIO;
		cr_assert_eq(ff_store_drop(fx.store, "to"), 0);
	}
	atomic_store(&stop, true);
	pthread_join(writer, NULL);
	cr_assert_gt(broken, 0);
	fixture_done(&fx);
}
