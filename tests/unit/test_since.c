/*
 * What changed between two snapshots stays what it was said to be first: whatever saves of before
 * the newer snapshot are still under way when it is asked for, whatever holes of the source are
 * filled with zeros after it, whichever snapshots in between are dropped, and after a restart.
 * (What outlives a restart is in test_said.c.)
 *
 * The linker puts this file's io_pread() in the place of that of cow/io.h, to hold a save up.
 */
#include <criterion/criterion.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdbool.h>
#include <time.h>
#include <unistd.h>

#include "cow/io.h"
#include "ff_util.h"
#include "since_disk.h"

static sem_t held, go_on, made;
static __thread bool hold_pread;

int __real_io_pread(int fd, void *buf, size_t len, uint64_t off, size_t *got);
int __wrap_io_pread(int fd, void *buf, size_t len, uint64_t off, size_t *got);

int __wrap_io_pread(int fd, void *buf, size_t len, uint64_t off, size_t *got)
{
	if (hold_pread) {
		hold_pread = false;
		sem_post(&held);
		sem_wait(&go_on);
	}
	return __real_io_pread(fd, buf, len, off, got);
}

static void setup(void)
{
	since_setup();
	sem_init(&held, 0, 0);
	sem_init(&go_on, 0, 0);
	sem_init(&made, 0, 0);
}

static void *write_held(void *ctx)
{
	hold_pread = true;
	since_write(0, 4 * CLUSTER, 'x');
	return NULL;
}

static void *make_image(void *ctx)
{
	*(struct image *)ctx = since_image("new", "old");
	sem_post(&made);
	return NULL;
}

Test(since, saves_under_way, .init = setup, .fini = since_teardown, .timeout = 60)
{
	struct image first;
	struct timespec soon;
	pthread_t writer, reader;

	cr_assert_eq(ff_store_freeze(since_fx.store, "old", 0), 0);
	pthread_create(&writer, NULL, write_held, NULL);
	sem_wait(&held);
	cr_assert_eq(ff_store_freeze(since_fx.store, "new", 0), 0);
	pthread_create(&reader, NULL, make_image, &first);
	clock_gettime(CLOCK_REALTIME, &soon);
	soon.tv_nsec += 300000000;
	soon.tv_sec += soon.tv_nsec / 1000000000;
	soon.tv_nsec %= 1000000000;
	cr_assert_neq(sem_timedwait(&made, &soon), 0, "not all was known yet");
	sem_post(&go_on);
	pthread_join(writer, NULL);
	pthread_join(reader, NULL);
	since_expect_same(first, since_image("new", "old"));
	free(first.bytes);
}

Test(since, zeros_over_holes, .init = setup, .fini = since_teardown, .timeout = 60)
{
	struct image first, whole;

	since_punch(100 * CLUSTER, 20 * CLUSTER);
	cr_assert_eq(ff_store_freeze(since_fx.store, "old", 0), 0);
	since_punch(0, 10 * CLUSTER);
	since_write(50 * CLUSTER, CLUSTER, 'x');
	cr_assert_eq(ff_store_freeze(since_fx.store, "new", 0), 0);
	first = since_image("new", "old");
	whole = since_image("new", NULL);
	/* what it takes: the header, three tables and an L2 table; the cluster with x */
	cr_assert_eq(first.size, 6 * CLUSTER);
	cr_assert_eq(whole.size, (5 + SIZE / CLUSTER - 30) * CLUSTER);
	since_write(0, 5 * CLUSTER, 0);
	since_write(100 * CLUSTER, 5 * CLUSTER, 0);
	since_expect_same(first, since_image("new", "old"));
	since_expect_same(whole, since_image("new", NULL));
	since_write(3 * CLUSTER, 4 * CLUSTER, 'y');
	since_write(50 * CLUSTER, CLUSTER, 'z');
	since_expect_same(first, since_image("new", "old"));
	since_expect_same(whole, since_image("new", NULL));
	/* saved by now, or zeros that are data */
	fixture_close(&since_fx);
	fixture_open(&since_fx);
	since_expect_same(first, since_image("new", "old"));
	since_expect_same(whole, since_image("new", NULL));
	free(first.bytes);
	free(whole.bytes);
}

Test(since, snapshots_between, .init = setup, .fini = since_teardown, .timeout = 60)
{
	static const char *const names[] = {"old", "one", "two", "three", "new"};
	struct image first;

	for (size_t i = 0; i < 5; i++) {
		cr_assert_eq(ff_store_freeze(since_fx.store, names[i], 0), 0);
		since_write((off_t)(i * 3) * CLUSTER + 5, 5 * CLUSTER, 'a' + (int)i);
		if (i == 1)
			since_punch(30 * CLUSTER, 3 * CLUSTER);
	}
	first = since_image("new", "old");
	cr_assert_eq(ff_store_drop(since_fx.store, "two"), 0);
	since_expect_same(first, since_image("new", "old"));
	cr_assert_eq(ff_store_drop(since_fx.store, "one"), 0);
	since_expect_same(first, since_image("new", "old"));
	fixture_close(&since_fx);
	fixture_open(&since_fx);
	since_expect_same(first, since_image("new", "old"));
	cr_assert_eq(ff_store_drop(since_fx.store, "three"), 0);
	since_expect_same(first, since_image("new", "old"));
	free(first.bytes);
}

Test(since, broken, .init = setup, .fini = since_teardown, .timeout = 60)
{
	struct ff_since *s;
	struct ff_disk *d;
	int fd;

	cr_assert_eq(ff_store_freeze(since_fx.store, "old", 0), 0);
	fd = live_open(&since_fx, "a", &d);
	cr_assert_eq(chain_break_all(d, "of a test"), 0);
	ff_disk_put(d);
	close(fd);
	since_write(0, CLUSTER, 'x');
	cr_assert_eq(ff_store_freeze(since_fx.store, "new", 0), 0);
	cr_assert_eq(since_make("new", "old", &s), -EIO);
	cr_assert_eq(since_make("new", NULL, &s), 0);
	ff_since_free(s);
}
