/*
 * Room on the filesystem of the fleecing images: asked for by many threads, and by one that gets no
 * answer. The linker puts this file's io_fstatvfs() in the place of that of cow/io.h, which tells
 * of a filesystem that the test makes up.
 */
#include <criterion/criterion.h>
#include <errno.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "cow/io.h"
#include "fixture.h"

enum { MIB = 1 << 20, PIECE = 64 << 10, THREADS = 8, TOTAL = 1000 * MIB, RESERVE = 300 * MIB };

static struct fixture fx;
static atomic_llong avail;
static atomic_uint asked;
static __thread bool hangs;
static sem_t has_hung, answer;

int __wrap_io_fstatvfs(int fd, struct statvfs *out);

int __wrap_io_fstatvfs(int fd, struct statvfs *out)
{
	memset(out, 0, sizeof *out);
	out->f_frsize = 1;
	out->f_bavail = (fsblkcnt_t)atomic_load(&avail);
	atomic_fetch_add(&asked, 1);
	if (hangs) {
		sem_post(&has_hung);
		sem_wait(&answer);
	}
	return 0;
}

static void setup(void)
{
	fixture_init(&fx, 4096);
	fx.config.fleece_reserve = RESERVE;
	atomic_store(&avail, TOTAL);
	fixture_file(&fx, "a", PIECE, 1);
	fixture_file(&fx, "b", PIECE, 2);
	sem_init(&has_hung, 0, 0);
	sem_init(&answer, 0, 0);
	fixture_open(&fx);
}

static void teardown(void)
{
	fixture_done(&fx);
}

TestSuite(space, .init = setup, .fini = teardown);

/* What is allowed is taken, a while later, as images take it. */
static void *take(void *ctx)
{
	while (space_charge(fx.store, PIECE, false) == 0)
		atomic_fetch_sub(&avail, PIECE);
	/* Refused too early is none but for what others have in hand. */
	cr_assert_lt(atomic_load(&avail), RESERVE + 2 * THREADS * PIECE);
	return NULL;
}

Test(space, many_take_all_that_is_there_and_no_more)
{
	pthread_t threads[THREADS];

	for (int i = 0; i < THREADS; i++)
		pthread_create(&threads[i], NULL, take, NULL);
	for (int i = 0; i < THREADS; i++)
		pthread_join(threads[i], NULL);
	cr_assert_lt(atomic_load(&avail), RESERVE + PIECE);
	cr_assert_geq(atomic_load(&avail), RESERVE - 2 * THREADS * PIECE);
	/* Now and then, and not for every piece. */
	cr_assert_lt(atomic_load(&asked), (TOTAL - RESERVE) / PIECE / 4);
}

/* A limit of our own is kept to the byte. */
static void *take_limited(void *ctx)
{
	while (space_charge(fx.store, PIECE, false) == 0)
		;
	return NULL;
}

Test(space, a_limit_is_exact)
{
	pthread_t threads[THREADS];

	fx.store->cfg.fleece_limit = 100 * MIB;
	for (int i = 0; i < THREADS; i++)
		pthread_create(&threads[i], NULL, take_limited, NULL);
	for (int i = 0; i < THREADS; i++)
		pthread_join(threads[i], NULL);
	cr_assert_eq(fx.store->space_used, 100 * MIB);
}

/* Somebody else fills the filesystem. */
Test(space, what_others_take_is_noticed)
{
	int n = 0;

	cr_assert_eq(space_charge(fx.store, PIECE, false), 0);
	atomic_store(&avail, RESERVE);
	while (n <= 65 * MIB / PIECE && space_charge(fx.store, PIECE, false) == 0)
		n++;
	cr_assert_leq(n, 64 * MIB / PIECE, "%d pieces are taken of nothing", n);
}

static void *write_hanging(void *ctx)
{
	char block[4096] = "x";
	struct ff_disk *d;
	int fd = live_open(&fx, "a", &d);

	hangs = true;
	cr_assert_eq(live_write(d, fd, block, sizeof block, 0), 0);
	ff_disk_put(d);
	close(fd);
	return NULL;
}

static void *write_other(void *ctx)
{
	char block[4096] = "y";
	struct ff_store_status st;
	struct ff_disk *d;
	int fd = live_open(&fx, "b", &d);

	cr_assert_eq(live_write(d, fd, block, sizeof block, 0), 0);
	ff_disk_put(d);
	close(fd);
	ff_store_status(fx.store, &st);
	sem_post(ctx);
	return NULL;
}

/* One guest's save asks for free space, as it is time to, and gets no answer: the others and who
 * looks at the mount go on. */
Test(space, who_asks_holds_up_nobody)
{
	struct timespec until;
	pthread_t one, two;
	sem_t done;
	int r;

	sem_init(&done, 0, 0);
	cr_assert_eq(ff_store_freeze(fx.store, "s", 0), 0);
	fx.store->space_unchecked = 65 * MIB;
	pthread_create(&one, NULL, write_hanging, NULL);
	sem_wait(&has_hung);
	pthread_create(&two, NULL, write_other, &done);
	clock_gettime(CLOCK_REALTIME, &until);
	until.tv_sec += 10;
	r = sem_timedwait(&done, &until);
	sem_post(&answer);
	pthread_join(one, NULL);
	pthread_join(two, NULL);
	cr_assert_eq(r, 0, "the other guest waited");
	cr_assert_eq(count_saved(&fx, "s", 0) + count_saved(&fx, "s", 1), 2);
}
