/*
 * What the engine counts: the histogram of waits by itself, and what a look at the store tells
 * after saves, reads, drops and a break; also beside threads that write and look.
 */
#include <criterion/criterion.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "cow/stats.h"
#include "ff_util.h"
#include "fixture.h"

Test(stats, buckets_follow_each_other_without_a_gap)
{
	for (unsigned b = 0; b + 1 < WAIT_BUCKETS; b++) {
		uint64_t end = stats_bucket_end(b);

		cr_assert_eq(stats_bucket(end), b, "bucket %u ends with %llu", b,
		             (unsigned long long)end);
		cr_assert_eq(stats_bucket(end + 1), b + 1);
		cr_assert(b < 8 || end - stats_bucket_end(b - 1) <= end / 5 + 1,
		          "bucket %u is wide", b);
	}
	cr_assert_eq(stats_bucket(0), 0);
	cr_assert_eq(stats_bucket(UINT64_MAX), WAIT_BUCKETS - 1);
	cr_assert_geq(stats_bucket_end(WAIT_BUCKETS - 2), 7000000);
}

/* Waits of 1, 2 … N ms. */
static uint64_t p99_of(unsigned n)
{
	struct wait_sum sum = {.saves = n, .longest_us = n * 1000};

	for (unsigned i = 1; i <= n; i++)
		sum.buckets[stats_bucket(i * 1000)]++;
	return stats_p99(&sum);
}

Test(stats, p99_is_exact_to_a_quarter)
{
	struct wait_sum none = {0};

	cr_assert_eq(stats_p99(&none), 0);
	for (unsigned n = 1; n <= 20000; n += n / 3 + 1) {
		uint64_t right = (n - n / 100) * UINT64_C(1000), told = p99_of(n);

		cr_assert(told >= right && told <= right + right / 4 && told <= n * 1000,
		          "%u waits: %llu, not %llu", n, (unsigned long long)told,
		          (unsigned long long)right);
	}
}

Test(stats, p99_is_no_mean_and_no_maximum)
{
	struct wait_sum sum = {.longest_us = 1000000};

	sum.buckets[stats_bucket(1000)] = 1000;
	sum.buckets[stats_bucket(1000000)] = 9;
	cr_assert(stats_p99(&sum) >= 1000 && stats_p99(&sum) <= 1250);
	sum.buckets[stats_bucket(1000000)] = 20;
	cr_assert_eq(stats_p99(&sum), 1000000);
}

static struct fixture fx;
static atomic_bool stop;

enum { DISKS = 3, CLUSTERS = 64, BLOCK = 4096 };

static void make_store(void)
{
	char name[4];

	fixture_init(&fx, BLOCK);
	for (unsigned i = 0; i < DISKS; i++) {
		snprintf(name, sizeof name, "d%u", i);
		fixture_file(&fx, name, (size_t)CLUSTERS * BLOCK, i);
	}
	fixture_open(&fx);
}

/* What a look came upon: the snapshot last seen, and sums of its disks. */
struct seen {
	struct ff_snap_status snap;
	uint64_t snaps, disks, saves, preserved, allocated, read;
	const char *want; /* the disk to keep */
	struct ff_disk_status disk;
};

static int see_disk(void *ctx, const struct ff_disk_status *d)
{
	struct seen *s = ctx;

	s->disks++;
	s->saves += d->waits.saves;
	s->preserved += d->preserved_bytes;
	s->allocated += d->allocated_bytes;
	s->read += d->read_bytes;
	cr_assert_leq(d->waits.p99_us, d->waits.longest_us);
	cr_assert_eq(d->frozen_bytes, (uint64_t)CLUSTERS * BLOCK);
	if (s->want && strcmp(s->want, d->path) == 0)
		s->disk = *d;
	return 0;
}

static int see_snap(void *ctx, const struct ff_snap_status *snap)
{
	struct seen *s = ctx;

	s->snaps++;
	s->snap = *snap;
	cr_assert_eq(s->saves, snap->waits.saves);
	cr_assert_eq(s->preserved, snap->preserved_bytes);
	cr_assert_eq(s->read, snap->read_bytes);
	cr_assert_geq(snap->allocated_bytes, s->allocated);
	s->saves = s->preserved = s->allocated = s->read = 0;
	return 0;
}

static struct seen look(const char *name, const char *disk)
{
	struct seen s = {.want = disk};
	struct ff_status_visitor v = {see_disk, see_snap, &s};
	struct ff_snap *snap;

	cr_assert_eq(ff_snap_get(fx.store, name, &snap), 0);
	cr_assert_eq(ff_snap_visit(snap, &v), 0);
	ff_snap_put(snap);
	return s;
}

static void overwrite(const char *name, unsigned first, unsigned count, unsigned seed)
{
	char buf[CLUSTERS * BLOCK]; /* several threads call this */
	struct ff_disk *d;
	int fd = live_open(&fx, name, &d);

	fill(buf, (size_t)count * BLOCK, seed);
	cr_assert_eq(live_write(d, fd, buf, (size_t)count * BLOCK, (off_t)first * BLOCK), 0);
	ff_disk_put(d);
	close(fd);
}

Test(stats, what_a_dropped_snapshot_leaves_is_counted_where_it_is)
{
	struct ff_store_status st;
	struct seen s;

	make_store();
	cr_assert_eq(ff_store_freeze(fx.store, "one", 0), 0);
	s = look("one", NULL);
	cr_assert_eq(s.disks, 0);
	cr_assert_eq(s.snap.files, DISKS);
	overwrite("d1", 0, 8, 100);
	cr_assert_eq(ff_store_freeze(fx.store, "two", 0), 0);
	overwrite("d1", 4, 8, 101); /* four that one needs, four that it has */
	s = look("one", "d1");
	cr_assert_eq(s.disk.preserved_bytes, 8 * BLOCK);
	cr_assert_eq(s.disk.waits.saves, 1);
	s = look("two", "d1");
	cr_assert_eq(s.disk.preserved_bytes, 8 * BLOCK);
	cr_assert_eq(s.disks, 1);
	ff_store_status(fx.store, &st);
	cr_assert_eq(st.waits.saves, 2);
	cr_assert_eq(st.saved_bytes, 16 * BLOCK);
	cr_assert_eq(ff_store_drop(fx.store, "two"), 0);
	s = look("one", "d1");
	cr_assert_eq(s.disk.preserved_bytes, 8 * BLOCK);
	ff_store_status(fx.store, &st);
	cr_assert_geq(st.used_bytes, s.snap.allocated_bytes + 4 * BLOCK);
	cr_assert_lt(st.used_bytes, s.snap.allocated_bytes + 8 * BLOCK);
	cr_assert_eq(ff_store_drop(fx.store, "one"), 0);
	ff_store_status(fx.store, &st);
	cr_assert_eq(st.used_bytes, 0);
	cr_assert_eq(st.saved_bytes, 16 * BLOCK);
	fixture_done(&fx);
}

Test(stats, a_new_mount_knows_what_is_preserved)
{
	struct seen s;

	make_store();
	cr_assert_eq(ff_store_freeze(fx.store, "one", 0), 0);
	overwrite("d2", 10, 5, 100);
	s = look("one", NULL);
	fixture_close(&fx);
	fixture_open(&fx);
	cr_assert_eq(look("one", NULL).snap.allocated_bytes, s.snap.allocated_bytes);
	cr_assert_eq(look("one", NULL).snap.created.tv_nsec, s.snap.created.tv_nsec);
	s = look("one", "d2");
	cr_assert_eq(s.disk.preserved_bytes, 5 * BLOCK);
	cr_assert_eq(s.disk.waits.saves, 0);
	cr_assert_eq(s.disks, 1);
	cr_assert_eq(ff_store_drop(fx.store, "one"), 0);
	fixture_done(&fx);
}

static void *write_always(void *ctx)
{
	for (unsigned n = 1; !atomic_load(&stop); n++)
		overwrite(ctx, n % CLUSTERS, 1, 1000 + n);
	return NULL;
}

static void *look_always(void *ctx)
{
	struct seen s = {0};
	struct ff_status_visitor v = {see_disk, see_snap, &s};
	struct ff_store_status st;

	while (!atomic_load(&stop)) {
		cr_assert_eq(ff_store_visit(fx.store, &v), 0);
		cr_assert_eq(s.saves, 0, "disks without their snapshot");
		ff_store_status(fx.store, &st);
	}
	return NULL;
}

static void *read_always(void *ctx)
{
	while (!atomic_load(&stop))
		frozen_error(&fx, ctx, "d0");
	return NULL;
}

Test(stats, looks_beside_everything)
{
	pthread_t threads[5];
	char name[4];

	make_store();
	cr_assert_eq(ff_store_freeze(fx.store, "kept", 0), 0);
	pthread_create(&threads[0], NULL, write_always, "d0");
	pthread_create(&threads[1], NULL, write_always, "d0");
	pthread_create(&threads[2], NULL, write_always, "d1");
	pthread_create(&threads[3], NULL, look_always, NULL);
	pthread_create(&threads[4], NULL, read_always, "kept");
	for (unsigned round = 0; round < 15; round++) {
		for (unsigned i = 0; i < 4; i++) {
			snprintf(name, sizeof name, "s%u", i);
			cr_assert_eq(ff_store_freeze(fx.store, name, 0), 0);
		}
		for (unsigned i = 0; i < 4; i++) {
			snprintf(name, sizeof name, "s%u", (i * 3 + round) % 4);
			cr_assert_eq(ff_store_drop(fx.store, name), 0);
		}
	}
	atomic_store(&stop, true);
	for (size_t i = 0; i < FF_ARRAY_SIZE(threads); i++)
		pthread_join(threads[i], NULL);
	cr_assert_eq(ff_store_drop(fx.store, "kept"), 0);
	fixture_done(&fx);
}

static atomic_uint looking; /* 1: in a look, 2: to end it */

static int look_long(void *ctx, const struct ff_snap_status *snap)
{
	atomic_store(&looking, 1);
	while (atomic_load(&looking) != 2)
		usleep(1000);
	return 0;
}

static void *one_look(void *ctx)
{
	struct ff_status_visitor v = {.snap = look_long};

	cr_assert_eq(ff_store_visit(fx.store, &v), 0);
	return NULL;
}

static void *one_drop(void *ctx)
{
	return (void *)(intptr_t)ff_store_drop(fx.store, "one");
}

/* A drop waits for a look; a reader that comes meanwhile is a reader. */
Test(stats, a_drop_waits_for_a_look_and_minds_readers_after_it)
{
	pthread_t look_thread, drop_thread;
	const struct ff_frozen *f;
	struct ff_reader *rd;
	struct ff_snap *snap;
	void *result;
	char c;
	size_t got;

	make_store();
	cr_assert_eq(ff_store_freeze(fx.store, "one", 0), 0);
	pthread_create(&look_thread, NULL, one_look, NULL);
	while (atomic_load(&looking) != 1)
		usleep(1000);
	pthread_create(&drop_thread, NULL, one_drop, NULL);
	usleep(50000); /* it waits by now, or will find the reader */
	cr_assert_eq(ff_snap_get(fx.store, "one", &snap), 0, "dropped while it is looked at");
	cr_assert_eq(ff_frozen_lookup(snap, ff_snap_root(snap), "d0", &f), 0);
	cr_assert_eq(ff_reader_open(snap, f, &rd), 0);
	atomic_store(&looking, 2);
	pthread_join(look_thread, NULL);
	pthread_join(drop_thread, &result);
	cr_assert_eq((int)(intptr_t)result, -EBUSY);
	cr_assert_eq(ff_reader_read(rd, &c, 1, 0, &got), 0);
	ff_reader_close(rd);
	ff_snap_put(snap);
	cr_assert_eq(ff_store_drop(fx.store, "one"), 0);
	fixture_done(&fx);
}
