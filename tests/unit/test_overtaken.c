/*
 * A save that is overtaken: while a thread is on its way through the clusters of a long change, a
 * freeze makes a newer view, and another thread changes clusters that the first has yet to come to.
 * What the first would find in the source then is not the older view's any more.
 *
 * The linker puts this file's io_seek() and io_pread() in the place of those of cow/io.h, to hold
 * the first thread up.
 */
#include <criterion/criterion.h>
#include <fcntl.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdbool.h>
#include <string.h>
#include <unistd.h>

#include "cow/io.h"
#include "fixture.h"

enum { BIG = 4 << 20, LONG = 3 << 20, LATE = 2 << 20, BLOCK = 4096 };

static struct fixture fx;
static char first[BIG], now[BIG];
static sem_t held, go_on;
static __thread bool hold_seek, hold_pread;

int __real_io_seek(int fd, uint64_t off, int whence, uint64_t *out);
int __wrap_io_seek(int fd, uint64_t off, int whence, uint64_t *out);
int __real_io_pread(int fd, void *buf, size_t len, uint64_t off, size_t *got);
int __wrap_io_pread(int fd, void *buf, size_t len, uint64_t off, size_t *got);

static void hold(bool *flag)
{
	if (!*flag)
		return;
	*flag = false;
	sem_post(&held);
	sem_wait(&go_on);
}

int __wrap_io_seek(int fd, uint64_t off, int whence, uint64_t *out)
{
	hold(&hold_seek);
	return __real_io_seek(fd, off, whence, out);
}

int __wrap_io_pread(int fd, void *buf, size_t len, uint64_t off, size_t *got)
{
	hold(&hold_pread);
	return __real_io_pread(fd, buf, len, off, got);
}

static void *change(void *ctx)
{
	const struct ff_change *c = ctx;
	struct ff_change mine = *c;
	struct ff_disk *d;
	size_t done;

	mine.fd = live_open(&fx, "a", &d);
	hold_seek = c->kind == FF_FALLOCATE;
	hold_pread = c->kind == FF_WRITE;
	cr_assert_eq(ff_disk_change(d, &mine, &done), 0);
	ff_disk_put(d);
	close(mine.fd);
	return NULL;
}

/* NOW is what the disk holds after CHANGE, which is held up while the other things happen. */
static void overtake(struct ff_change *c)
{
	char block[BLOCK];
	struct ff_disk *d;
	pthread_t thread;
	int fd;

	sem_init(&held, 0, 0);
	sem_init(&go_on, 0, 0);
	cr_assert_eq(ff_store_freeze(fx.store, "older", 0), 0);
	pthread_create(&thread, NULL, change, c);
	sem_wait(&held);
	cr_assert_eq(ff_store_freeze(fx.store, "newer", 0), 0);
	fd = live_open(&fx, "a", &d);
	memset(block, 'B', sizeof block);
	cr_assert_eq(live_write(d, fd, block, sizeof block, LATE), 0);
	ff_disk_put(d);
	close(fd);
	expect_frozen(&fx, "older", "a", first, BIG);
	sem_post(&go_on);
	pthread_join(thread, NULL);
	expect_frozen(&fx, "older", "a", first, BIG);
	expect_frozen(&fx, "newer", "a", first, BIG);
	cr_assert_eq(ff_store_freeze(fx.store, "newest", 0), 0);
	expect_frozen(&fx, "newest", "a", now, BIG);
}

static void setup(void)
{
	fixture_init(&fx, BLOCK);
	fixture_file(&fx, "a", BIG, 1);
	fill(first, BIG, 1);
	memcpy(now, first, BIG);
	fixture_open(&fx);
}

static void teardown(void)
{
	fixture_done(&fx);
}

Test(overtaken, hole, .init = setup, .fini = teardown, .timeout = 60)
{
	memset(now, 0, LONG);
	overtake(&(struct ff_change){
	    .kind = FF_FALLOCATE, .mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, .len = LONG});
}

Test(overtaken, write, .init = setup, .fini = teardown, .timeout = 60)
{
	fill(now, LONG, 7);
	overtake(&(struct ff_change){.kind = FF_WRITE, .buf = now, .len = LONG});
}
