/*
 * In which order things become durable, on storage that knows what is (emu_disk.h):
 *
 *   a guest's sync    what was saved of the disk is durable before the sync of the source begins,
 *                     and all of it, the names of the files too, when it returns
 *   `durable`         what a change destroys is durable before the change begins
 *   flushes           many writers' first overwrites at once share them
 *
 *   powersync [--seed=N]
 */
#include <err.h>
#include <fcntl.h>
#include <ftw.h>
#include <getopt.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "ff_log.h"
#include "ff_util.h"
#include "power_world.h"

enum { BLOCK = 4096, BLOCKS = 256, WRITERS = 16, GUESTS = 4 };

static const char *const disks[] = {"disk0", "disk1"};

struct guest {
	struct world *w;
	const char *name;
	unsigned number;
	struct emu_rng rng;
	struct ff_disk *disk;
	int fd;
	pthread_t thread;
	pthread_barrier_t *round;
};

static int remove_one(const char *path, const struct stat *st, int type, struct FTW *ftw)
{
	return remove(path);
}

static struct world *begin(bool durable, unsigned sync_us)
{
	struct world *w = calloc(1, sizeof *w);
	const char *dir = access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/var/tmp";
	char path[200];
	int r;

	if (!w)
		err(1, "no memory");
	snprintf(w->root, sizeof w->root, "%s/fleecefs-power-XXXXXX", dir);
	if (!mkdtemp(w->root))
		err(1, "%s", w->root);
	w->cluster = BLOCK;
	snprintf(w->source, sizeof w->source, "%s/source", w->root);
	snprintf(w->fleece, sizeof w->fleece, "%s/fleece", w->root);
	if (mkdir(w->source, 0755) || mkdir(w->fleece, 0700))
		err(1, "%s", w->root);
	for (size_t d = 0; d < FF_ARRAY_SIZE(disks); d++) {
		static char bytes[BLOCKS * BLOCK];
		int fd;

		snprintf(path, sizeof path, "%s/%s", w->source, disks[d]);
		fd = open(path, O_WRONLY | O_CREAT | O_EXCL, 0644);
		memset(bytes, 'a', sizeof bytes);
		if (fd < 0 || write(fd, bytes, sizeof bytes) != sizeof bytes)
			err(1, "%s", path);
		close(fd);
	}
	emu_start(w->root, EMU_ANY, false, sync_us);
	r = world_open(w, durable);
	if (r)
		errx(1, "the store does not open: %s", strerror(-r));
	return w;
}

/* The number of violations. */
static unsigned end(struct world *w, const char *what)
{
	unsigned n;

	if (emu_order_violations())
		complain(w, "%s: %u times the source's turn came before what was saved was durable",
		         what, emu_order_violations());
	world_close(w);
	emu_stop();
	nftw(w->root, remove_one, 16, FTW_DEPTH | FTW_PHYS);
	n = w->violations;
	free(w);
	return n;
}

static void freeze(struct world *w)
{
	char name[16];
	int r;

	snprintf(name, sizeof name, "s%u", w->snap_count++);
	r = ff_store_freeze(w->store, name, 0);
	if (r)
		complain(w, "mkdir of %s fails: %s", name, strerror(-r));
}

static void guest_open(struct guest *g, struct world *w, unsigned number, unsigned seed)
{
	int r;

	*g = (struct guest){.w = w, .name = disks[number % 2], .number = number, .rng = {seed}};
	g->fd = openat(w->source_fd, g->name, O_RDWR | O_CLOEXEC);
	r = ff_disk_get(w->store, g->fd, &g->disk);
	if (r)
		errx(1, "%s: %s", g->name, strerror(-r));
}

static void guest_close(struct guest *g)
{
	ff_disk_put(g->disk);
	close(g->fd);
}

static void guest_write(struct guest *g, unsigned block)
{
	char bytes[BLOCK];
	struct ff_change c = {.kind = FF_WRITE,
	                      .fd = g->fd,
	                      .off = (off_t)block * BLOCK,
	                      .len = sizeof bytes,
	                      .buf = bytes};
	size_t done;
	int r;

	memset(bytes, 'b' + (int)emu_random(&g->rng, 20), sizeof bytes);
	r = ff_disk_change(g->disk, &c, &done);
	if (r)
		complain(g->w, "a change of %s fails: %s", g->name, strerror(-r));
}

static void guest_sync(struct guest *g, bool writes)
{
	int r;

	emu_guest(g->name, writes);
	r = ff_disk_sync(g->disk, g->fd, emu_random(&g->rng, 2));
	if (r)
		complain(g->w, "a sync of %s fails: %s", g->name, strerror(-r));
}

/* One guest, who is alone: nothing of the disk may be left to do after its sync. */
static unsigned alone(bool durable, unsigned seed)
{
	struct world *w = begin(durable, 0);
	struct guest g[2];

	for (unsigned i = 0; i < 2; i++)
		guest_open(&g[i], w, i, seed + i);
	for (unsigned i = 0; i < 400; i++) {
		struct guest *one = &g[emu_random(&g->rng, 2)];

		if (i % 40 == 0) {
			emu_guest(NULL, false);
			freeze(w);
			emu_settle(); /* what comes after this are saves and changes alone */
		}
		emu_guest(one->name, durable);
		guest_write(one, emu_random(&g->rng, BLOCKS));
		if (emu_random(&g->rng, 4) > 0)
			continue;
		guest_sync(one, durable);
		if (emu_pending(one->name))
			complain(w, "%u files or names of %s are not durable after a sync",
			         emu_pending(one->name), one->name);
	}
	emu_guest(NULL, false);
	for (unsigned i = 0; i < 2; i++)
		guest_close(&g[i]);
	return end(w, durable ? "a guest, durable" : "a guest");
}

static void *write_and_sync(void *arg)
{
	struct guest *g = arg;

	for (unsigned i = 0; i < 60; i++) {
		for (unsigned n = emu_random(&g->rng, 4); n > 0; n--)
			guest_write(g, emu_random(&g->rng, BLOCKS / GUESTS) * GUESTS + g->number);
		guest_sync(g, false);
	}
	return NULL;
}

/* Many guests on two disks: what one saved before its sync goes before it. */
static unsigned together(unsigned seed)
{
	struct world *w = begin(false, 200);
	struct guest g[GUESTS];

	freeze(w);
	for (unsigned i = 0; i < GUESTS; i++)
		guest_open(&g[i], w, i, seed + i);
	for (unsigned i = 0; i < GUESTS; i++)
		pthread_create(&g[i].thread, NULL, write_and_sync, &g[i]);
	for (unsigned i = 0; i < 6; i++) {
		nanosleep(&(struct timespec){.tv_nsec = 5000000}, NULL);
		freeze(w); /* which syncs nothing here */
	}
	for (unsigned i = 0; i < GUESTS; i++)
		pthread_join(g[i].thread, NULL);
	for (unsigned i = 0; i < GUESTS; i++)
		guest_close(&g[i]);
	return end(w, "guests");
}

static void *first_writes(void *arg)
{
	struct guest *g = arg;

	for (unsigned b = g->number; b < BLOCKS; b += WRITERS) {
		pthread_barrier_wait(g->round);
		guest_write(g, b);
	}
	return NULL;
}

/* First overwrites of all of a disk by THREADS writers: flushes of fleecing files that they cost.
 */
static unsigned flushes_of(unsigned threads, unsigned seed, unsigned *violations)
{
	struct world *w = begin(true, 500);
	struct guest g[WRITERS];
	pthread_barrier_t round;
	unsigned before;

	pthread_barrier_init(&round, NULL, threads);
	freeze(w);
	for (unsigned i = 0; i < WRITERS; i++) {
		guest_open(&g[i], w, 0, seed + i);
		g[i].number = i;
		g[i].round = &round;
	}
	before = emu_counts().syncs;
	for (unsigned i = 0; i < WRITERS; i++)
		if (threads == 1)
			first_writes(&g[i]);
		else
			pthread_create(&g[i].thread, NULL, first_writes, &g[i]);
	for (unsigned i = 0; i < WRITERS && threads > 1; i++)
		pthread_join(g[i].thread, NULL);
	before = emu_counts().syncs - before;
	for (unsigned i = 0; i < WRITERS; i++)
		guest_close(&g[i]);
	pthread_barrier_destroy(&round);
	*violations += end(w, "first overwrites");
	return before;
}

static unsigned shared(unsigned seed)
{
	unsigned violations = 0, one = flushes_of(1, seed, &violations);
	unsigned many = flushes_of(WRITERS, seed, &violations);

	printf("%d first overwrites cost one writer %u flushes, %d at once %u\n", BLOCKS, one,
	       WRITERS, many);
	if (one < BLOCKS)
		printf("  violation: one writer's are not all flushed\n");
	if (many * 3 > one)
		printf("  violation: writers do not share their flushes\n");
	return violations + (one < BLOCKS) + (many * 3 > one);
}

int main(int argc, char **argv)
{
	static const struct option options[] = {{"seed", required_argument, NULL, 's'}, {0}};
	unsigned seed = (unsigned)time(NULL), violations = 0;
	int c;

	ff_log_threshold(FF_LOG_ERROR - 1);
	while ((c = getopt_long(argc, argv, "", options, NULL)) != -1) {
		if (c != 's')
			errx(2, "usage: %s [--seed=N]", argv[0]);
		seed = (unsigned)strtoul(optarg, NULL, 10);
	}
	printf("seed %u\n", seed);
	violations += alone(false, seed);
	violations += alone(true, seed + 10);
	violations += together(seed + 20);
	violations += shared(seed + 30);
	printf("%u violations\n", violations);
	return violations != 0;
}
