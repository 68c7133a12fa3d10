/*
 * A disk that grows while a freeze is at work, which has seen its size already: the view has the
 * size, and the bytes, of the moment of the freeze, and guests do not wait for its image.
 *
 * The linker puts this file's io_statx() and io_openat() in the place of those of cow/io.h: from
 * within the first the disk is seen by the freeze's second walk, from within the other an image is
 * being made.
 */
#include <criterion/criterion.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdbool.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "cow/io.h"
#include "cow/names.h"
#include "ff_log.h"
#include "fixture.h"

enum { BEGIN = 20000, STEP = 5000, MOST = BEGIN + 20 * STEP, SECOND_WALK = 2, DISKS = 2 };

static struct fixture fx;
static char now[MOST], other[STEP];
static size_t size;
static struct ff_disk *held;
static int held_fd = -1;
static unsigned looks, images, within;
static void (*at_look)(void), (*at_new_image)(void);
static pthread_t guest;
static bool guest_waits;
static sem_t guest_done;

int __real_io_statx(int dirfd, const char *path, struct statx *out);
int __wrap_io_statx(int dirfd, const char *path, struct statx *out);
int __real_io_openat(int dirfd, const char *path, int flags, mode_t mode, int *out);
int __wrap_io_openat(int dirfd, const char *path, int flags, mode_t mode, int *out);

int __wrap_io_statx(int dirfd, const char *path, struct statx *out)
{
	int r = __real_io_statx(dirfd, path, out);

	if (at_look && strcmp(path, "disk") == 0 && ++looks == SECOND_WALK)
		at_look();
	return r;
}

int __wrap_io_openat(int dirfd, const char *path, int flags, mode_t mode, int *out)
{
	if (at_new_image && strcmp(path, NAMES_UNFINISHED) == 0 && ++images > DISKS)
		at_new_image();
	return __real_io_openat(dirfd, path, flags, mode, out);
}

static void setup(void)
{
	fixture_init(&fx, 4096);
	fixture_file(&fx, "disk", BEGIN, 1);
	fill(now, BEGIN, 1);
	size = BEGIN;
	fixture_file(&fx, "other", STEP, 2);
	sem_init(&guest_done, 0, 0);
	fixture_open(&fx);
}

static void teardown(void)
{
	if (held) {
		ff_disk_put(held);
		close(held_fd);
	}
	fixture_done(&fx);
}

TestSuite(grown, .init = setup, .fini = teardown);

static void hold(void)
{
	held_fd = live_open(&fx, "disk", &held);
}

/* The test's idea of the disk grows at once, for the guest's write is as good as done. */
static void append(struct ff_disk *d, int fd)
{
	fill(now + size, STEP, 3);
	cr_assert_eq(live_write(d, fd, now + size, STEP, (off_t)size), 0);
	size += STEP;
}

static void grow_held(void)
{
	append(held, held_fd);
}

static void grow_and_close(void)
{
	struct ff_disk *d;
	int fd = live_open(&fx, "disk", &d);

	append(d, fd);
	ff_disk_put(d);
	close(fd);
}

static void expect(const char *name, size_t len)
{
	expect_frozen(&fx, name, "disk", now, len);
}

Test(grown, one_that_is_open)
{
	hold();
	at_look = grow_held;
	cr_assert_eq(ff_store_freeze(fx.store, "s", 0), 0);
	cr_assert_eq(looks, SECOND_WALK);
	cr_assert_eq(size, BEGIN + STEP);
	expect("s", size);
	grow_held();
	expect("s", BEGIN + STEP);
}

/* Nothing is left in memory of who wrote and closed it. */
Test(grown, one_that_was_closed)
{
	at_look = grow_and_close;
	cr_assert_eq(ff_store_freeze(fx.store, "s", 0), 0);
	cr_assert_eq(size, BEGIN + STEP);
	expect("s", size);
	grow_and_close();
	expect("s", BEGIN + STEP);
}

/* With an older view, whose image names the one that is made anew. */
Test(grown, one_that_has_views)
{
	hold();
	cr_assert_eq(ff_store_freeze(fx.store, "older", 0), 0);
	grow_held();
	at_look = grow_held;
	looks = 0;
	cr_assert_eq(ff_store_freeze(fx.store, "s", 0), 0);
	grow_held();
	expect("s", BEGIN + 2 * STEP);
	expect("older", BEGIN);
	ff_disk_put(held);
	close(held_fd);
	fixture_close(&fx);
	fixture_open(&fx);
	hold();
	expect("s", BEGIN + 2 * STEP);
	expect("older", BEGIN);
}

static bool is_done_in(int seconds, long ms)
{
	struct timespec until;

	clock_gettime(CLOCK_REALTIME, &until);
	until.tv_sec += seconds;
	until.tv_nsec += ms * 1000000;
	if (until.tv_nsec >= 1000000000) {
		until.tv_sec++;
		until.tv_nsec -= 1000000000;
	}
	return sem_timedwait(&guest_done, &until) == 0;
}

static void *write_other(void *ctx)
{
	struct ff_disk *d;
	int fd = live_open(&fx, "other", &d);

	cr_assert_eq(live_write(d, fd, other, sizeof other, 0), 0);
	ff_disk_put(d);
	close(fd);
	sem_post(&guest_done);
	return NULL;
}

static void another_writes(void)
{
	pthread_create(&guest, NULL, write_other, NULL);
	guest_waits |= !is_done_in(5, 0);
}

Test(grown, guests_do_not_wait_for_its_image)
{
	hold();
	at_look = grow_held;
	at_new_image = another_writes;
	cr_assert_eq(ff_store_freeze(fx.store, "s", 0), 0);
	cr_assert_eq(images, DISKS + 1);
	pthread_join(guest, NULL);
	cr_assert(!guest_waits, "a guest waited for an image");
	expect("s", BEGIN + STEP);
}

static void *grow(void *ctx)
{
	grow_held();
	sem_post(&guest_done);
	return NULL;
}

/* One that can grow only when the freeze has come to its end is within the barrier. */
static void grow_again(void)
{
	pthread_create(&guest, NULL, grow, NULL);
	if (is_done_in(0, 500))
		pthread_join(guest, NULL);
	else
		within++;
}

Test(grown, one_that_goes_on_growing)
{
	size_t at_flip;

	hold();
	at_look = grow_held;
	at_new_image = grow_again;
	cr_assert_eq(ff_store_freeze(fx.store, "s", 0), 0);
	cr_assert_eq(within, 1);
	pthread_join(guest, NULL);
	at_flip = size - STEP;
	cr_assert_gt(at_flip, BEGIN + 2 * STEP);
	expect("s", at_flip);
	grow_held();
	expect("s", at_flip);
}

/* The storage does not answer until the guest, which waits for the freeze, has gone on. */
static void grow_or_hang(void)
{
	grow_again();
	if (within)
		guest_waits |= !is_done_in(20, 0);
}

Test(grown, storage_that_hangs_while_guests_wait)
{
	hold();
	fx.store->cfg.cbw_timeout = 1;
	ff_log_threshold(FF_LOG_ERROR - 1);
	at_look = grow_held;
	at_new_image = grow_or_hang;
	cr_assert_eq(ff_store_freeze(fx.store, "s", 0), -ETIMEDOUT);
	cr_assert_eq(within, 1);
	pthread_join(guest, NULL);
	cr_assert(!guest_waits, "the guest waited for the storage");
	cr_assert_eq(frozen_error(&fx, "s", "disk"), -ENOENT);
	cr_assert_eq(count_images(&fx), 0);
	at_look = at_new_image = NULL;
	cr_assert_eq(ff_store_freeze(fx.store, "s", 0), 0);
	grow_held();
	expect("s", size - STEP);
}
