/*
 * pressure [options]: many writers, many disks, many snapshots at once, on the preserving engine
 * itself, so that a sanitizer sees all of it. Snapshots are made, read, renamed and dropped in
 * random order by several threads, while others write all disks and one moves, truncates, punches,
 * unlinks and replaces files. Each view is checked to the byte when it is made (pressure.h), and
 * must read the same for as long as it lives; at the end also after the store was closed and opened
 * again.
 *
 * Here are the run from its beginning to its end, and the threads that make changes: `writers`,
 * each with its counters `started` and `returned`, which enclose each write; one that changes names
 * (pressure_odd.c); and the pulse. Those that look are pressure_makers.c's. All go on until `stop`
 * or `failed`, which anyone may set.
 */
#include "pressure_run.h"

#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "ff_log.h"

int fail(struct pressure *p, const char *what, const char *name, int error)
{
	fprintf(stderr, "%s %s: %s\n", what, name, strerror(-error));
	atomic_store(&p->failed, true);
	return error;
}

static void nap(struct rng *rng, uint64_t microseconds)
{
	nanosleep(&(struct timespec){0, (long)rng_below(rng, microseconds * 1000)}, NULL);
}

static void *write_records(void *arg)
{
	struct writer *w = arg;
	struct pressure *p = w->p;
	struct rng rng = {p->seed * 1000 + w->number};
	uint8_t buf[RECORD_MAX];

	for (uint64_t n = 1; !atomic_load(&p->stop) && !atomic_load(&p->failed); n++) {
		unsigned k = record_disk(&p->shape, w->number, n);
		struct ff_change c = {.kind = FF_WRITE, .fd = p->fds[k], .buf = buf};
		size_t done = 0;
		int r;

		record_fill(&p->shape, w->number, n, buf);
		c.len = record_size(k);
		c.off = (off_t)record_offset(&p->shape, w->number, k, record_slot(&p->shape, n));
		atomic_store(&w->started, n);
		r = ff_disk_change(p->disks[k], &c, &done);
		if (!r && done != c.len)
			r = -EIO;
		if (!r && rng_one_in(&rng, 20000))
			r = ff_disk_sync(p->disks[k], p->fds[k], rng_one_in(&rng, 2));
		if (r)
			fail(p, "a write to disk", "", r);
		else
			atomic_store(&w->returned, n);
		/* Without breaks nobody else would come to anything on few processors. */
		if (rng_one_in(&rng, 2))
			nap(&rng, 10000);
	}
	return NULL;
}

static void *change_names(void *arg)
{
	struct pressure *p = arg;
	struct rng rng = {p->seed ^ 77};

	while (!atomic_load(&p->stop) && !atomic_load(&p->failed)) {
		if (odd_change(&p->odd))
			atomic_store(&p->failed, true);
		nap(&rng, 4000);
	}
	return NULL;
}

static void *pulse(void *arg)
{
	struct pressure *p = arg;

	while (!atomic_load(&p->stop) && !atomic_load(&p->failed)) {
		ff_store_pulse(p->store);
		nanosleep(&(struct timespec){0, 300000000}, NULL);
	}
	return NULL;
}

static int open_disks(struct pressure *p)
{
	for (unsigned k = 0; k < p->shape.disks; k++) {
		char path[32];
		int r;

		disk_path(k, p->odd.now.in_b[k], path);
		p->fds[k] = openat(p->source_fd, path, O_RDWR | O_CREAT | O_CLOEXEC, 0640);
		if (p->fds[k] < 0 || ftruncate(p->fds[k], (off_t)disk_size(&p->shape, k)))
			return fail(p, "open", path, -errno);
		r = ff_disk_get(p->store, p->fds[k], &p->disks[k]);
		if (r)
			return fail(p, "get", path, r);
	}
	return 0;
}

static void close_disks(struct pressure *p)
{
	for (unsigned k = 0; k < p->shape.disks; k++) {
		if (p->disks[k])
			ff_disk_put(p->disks[k]);
		if (p->fds[k] >= 0)
			close(p->fds[k]);
		p->disks[k] = NULL;
		p->fds[k] = -1;
	}
}

static int set_up(struct pressure *p)
{
	strcpy(p->root, "/var/tmp/fleecefs-pressure-XXXXXX");
	if (!mkdtemp(p->root))
		return fail(p, "mkdtemp", p->root, -errno);
	snprintf(p->source, sizeof p->source, "%s/source", p->root);
	snprintf(p->fleece, sizeof p->fleece, "%s/fleece", p->root);
	mkdir(p->source, 0755);
	p->source_fd = open(p->source, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (p->source_fd < 0 || mkdirat(p->source_fd, "a", 0755) ||
	    mkdirat(p->source_fd, "b", 0755))
		return fail(p, "mkdir", p->source, -errno);
	p->config.source_fd = p->source_fd;
	p->config.source_path = p->source;
	p->config.fleece_path = p->fleece;
	p->odd.source_fd = p->source_fd;
	p->odd.shape = p->shape;
	p->odd.rng.s = p->seed + 5;
	p->odd.history = calloc(HISTORY, sizeof *p->odd.history);
	pthread_mutex_init(&p->odd.lock, NULL);
	for (unsigned i = 0; i < MAKERS; i++) {
		p->makers[i].p = p;
		p->makers[i].rng.s = p->seed + 100 + i;
		for (unsigned k = 0; k < p->shape.disks; k++)
			if (!(p->makers[i].disks[k] = malloc(disk_size(&p->shape, k))))
				return -ENOMEM;
	}
	for (unsigned i = 0; i < p->snapshots; i++)
		pthread_mutex_init(&p->places[i].lock, NULL);
	return p->odd.history ? 0 : -ENOMEM;
}

static void start(pthread_t *thread, void *(*fn)(void *), void *arg)
{
	if (pthread_create(thread, NULL, fn, arg))
		abort();
}

static void run(struct pressure *p)
{
	struct timespec now, end;

	start(&p->odd_thread, change_names, p);
	start(&p->pulse_thread, pulse, p);
	for (unsigned t = 0; t < p->shape.writers; t++) {
		p->writers[t].p = p;
		p->writers[t].number = t;
		start(&p->writers[t].thread, write_records, &p->writers[t]);
	}
	for (unsigned i = 0; i < MAKERS; i++)
		start(&p->makers[i].thread, make_and_drop, &p->makers[i]);
	clock_gettime(CLOCK_MONOTONIC, &end);
	end.tv_sec += p->seconds;
	do {
		nanosleep(&(struct timespec){0, 20000000}, NULL);
		clock_gettime(CLOCK_MONOTONIC, &now);
	} while (now.tv_sec < end.tv_sec && !atomic_load(&p->failed));
	atomic_store(&p->stop, true);
	for (unsigned i = 0; i < MAKERS; i++)
		pthread_join(p->makers[i].thread, NULL);
	for (unsigned t = 0; t < p->shape.writers; t++)
		pthread_join(p->writers[t].thread, NULL);
	pthread_join(p->odd_thread, NULL);
	pthread_join(p->pulse_thread, NULL);
}

static int images;

static int count_image(const char *path, const struct stat *st, int type, struct FTW *ftw)
{
	images += strstr(path, ".qcow2") != NULL;
	return 0;
}

/* What is left must be right for the next mount too; then all of it goes. */
static int remount_and_drop(struct pressure *p)
{
	int r = ff_store_close(p->store);

	p->store = NULL;
	if (!r)
		r = ff_store_open(&p->config, &p->store);
	if (r)
		return fail(p, "open again", p->source, r);
	for (unsigned i = 0; i < p->snapshots && !r; i++)
		if (p->places[i].made)
			r = check_again(&p->makers[0], &p->places[i], true);
	for (unsigned i = 0; i < p->snapshots && !r; i++)
		if (p->places[i].made)
			r = drop_snapshot(&p->makers[0], &p->places[i]);
	if (r)
		return r;
	nftw(p->fleece, count_image, 16, FTW_PHYS);
	if (images) {
		fprintf(stderr, "%d images are left with no snapshot\n", images);
		return -EIO;
	}
	return 0;
}

static int remove_one(const char *path, const struct stat *st, int type, struct FTW *ftw)
{
	return remove(path);
}

static int finish(struct pressure *p, int r, bool keep)
{
	unsigned long long writes = 0, made = 0, again = 0;
	struct rusage usage;

	close_disks(p);
	if (!r && p->store)
		r = remount_and_drop(p);
	if (p->store && ff_store_close(p->store))
		r = r ? r : -EIO;
	for (unsigned t = 0; t < p->shape.writers; t++)
		writes += atomic_load(&p->writers[t].returned);
	for (unsigned i = 0; i < MAKERS; i++) {
		made += p->makers[i].made;
		again += p->makers[i].read;
		for (unsigned k = 0; k < p->shape.disks; k++)
			free(p->makers[i].disks[k]);
	}
	free(p->odd.history);
	if (p->source_fd >= 0)
		close(p->source_fd);
	if (!keep && *p->source)
		nftw(p->root, remove_one, 16, FTW_DEPTH | FTW_PHYS);
	getrusage(RUSAGE_SELF, &usage);
	if (!r && (made < 3 || writes < 1000)) {
		fprintf(stderr, "too little was done to prove anything\n");
		r = -EIO;
	}
	printf("pressure: %s: %llu snapshots made, %llu times read again, %llu writes, %llu "
	       "changes of names and sizes, %ld MiB\n",
	       r ? "FAILED" : "ok", made, again, writes,
	       (unsigned long long)atomic_load(&p->odd.returned), usage.ru_maxrss / 1024);
	return r;
}

static const struct option options[] = {
    {"seed", required_argument, NULL, 's'},
    {"seconds", required_argument, NULL, 't'},
    {"threads", required_argument, NULL, 'j'},
    {"disks", required_argument, NULL, 'd'},
    {"snapshots", required_argument, NULL, 'n'},
    {"cluster-size", required_argument, NULL, 'c'},
    {"files", required_argument, NULL, 'f'},
    {"keep", no_argument, NULL, 'k'},
    {NULL, 0, NULL, 0},
};

static bool parse(struct pressure *p, int argc, char **argv)
{
	unsigned long long files = 0;
	bool keep = false;
	int c;

	p->config.cluster_size = 4096;
	while ((c = getopt_long(argc, argv, "", options, NULL)) != -1) {
		if (c == 's')
			p->seed = strtoull(optarg, NULL, 0);
		else if (c == 't')
			p->seconds = (unsigned)strtoul(optarg, NULL, 0);
		else if (c == 'j')
			p->shape.writers = (unsigned)strtoul(optarg, NULL, 0);
		else if (c == 'd')
			p->shape.disks = (unsigned)strtoul(optarg, NULL, 0);
		else if (c == 'n')
			p->snapshots = (unsigned)strtoul(optarg, NULL, 0);
		else if (c == 'c')
			p->config.cluster_size = (uint32_t)strtoul(optarg, NULL, 0);
		else if (c == 'f')
			files = strtoull(optarg, NULL, 0);
		else if (c == 'k')
			keep = true;
		else
			p->snapshots = 0;
	}
	if (p->shape.writers - 1 >= MAX_WRITERS || p->shape.disks - 1 >= MAX_DISKS ||
	    p->snapshots - 1 >= MAX_SNAPSHOTS || optind != argc) {
		fprintf(stderr, "usage: pressure [--seed=N] [--seconds=N] [--threads=1..64] "
		                "[--disks=1..64] [--snapshots=1..64] [--cluster-size=BYTES] "
		                "[--files=LIMIT] [--keep]\n");
		exit(2);
	}
	if (files && setrlimit(RLIMIT_NOFILE, &(struct rlimit){files, files}))
		exit(2);
	return keep;
}

int main(int argc, char **argv)
{
	struct pressure *p = calloc(1, sizeof *p);
	bool keep;
	int r;

	if (!p)
		return 1;
	p->seed = (uint64_t)time(NULL) << 10 ^ (uint64_t)getpid();
	p->seconds = 10;
	p->shape = (struct shape){.writers = 64, .disks = 50};
	p->snapshots = 20;
	p->source_fd = -1;
	memset(p->fds, -1, sizeof p->fds);
	keep = parse(p, argc, argv);
	if (view_check_test())
		return 1;
	printf("pressure: --seed=%llu --threads=%u --disks=%u --snapshots=%u --cluster-size=%u\n",
	       (unsigned long long)p->seed, p->shape.writers, p->shape.disks, p->snapshots,
	       p->config.cluster_size);
	fflush(stdout);
	ff_log_threshold(FF_LOG_WARNING);
	r = set_up(p);
	if (!r)
		r = ff_store_open(&p->config, &p->store);
	p->odd.store = p->store;
	if (!r)
		r = open_disks(p);
	if (!r) {
		run(p);
		r = atomic_load(&p->failed) ? -EIO : 0;
	}
	r = finish(p, r, keep);
	free(p);
	return r ? 1 : 0;
}
