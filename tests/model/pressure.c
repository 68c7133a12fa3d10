/*
 * pressure [options]: many writers, many disks, many snapshots at once, on the preserving engine
 * itself, so that a sanitizer sees all of it. Snapshots are made, read, renamed and dropped in
 * random order by several threads, while others write all disks and one moves, truncates, punches,
 * unlinks and replaces files. Each view is checked to the byte when it is made (pressure.h), and
 * must read the same for as long as it lives; at the end also after the store was closed and opened
 * again.
 *
 * Threads: `writers`, each with its counters `started` and `returned`, which enclose each write;
 * one that changes names (pressure_odd.c); `makers`, who share the places for snapshots. A place
 * belongs to who holds its lock. `stop` and `failed` are set by anyone.
 */
#include "pressure.h"

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
#include <xxhash.h>

#include "ff_log.h"

enum { MAX_SNAPSHOTS = 64, MAKERS = 4, FILES = MAX_DISKS + ODD_FILES };

struct place {
	pthread_mutex_t lock;
	bool made;
	char name[40];
	uint64_t sum[FILES]; /* of each file's bytes, as first read; 0: there was none */
	bool in_b[MAX_DISKS];
};

struct pressure;

struct writer {
	struct pressure *p;
	unsigned number;
	pthread_t thread;
	_Atomic uint64_t started, returned;
};

struct maker {
	struct pressure *p;
	unsigned number;
	pthread_t thread;
	struct rng rng;
	uint8_t *disks[MAX_DISKS];
	unsigned long made, read;
};

struct pressure {
	char root[64], source[80], fleece[80];
	int source_fd;
	struct ff_store_config config;
	struct ff_store *store;
	struct shape shape;
	unsigned snapshots, seconds;
	uint64_t seed;
	int fds[MAX_DISKS];
	struct ff_disk *disks[MAX_DISKS];
	struct odd odd;
	pthread_t odd_thread, pulse_thread;
	struct writer writers[MAX_WRITERS];
	struct maker makers[MAKERS];
	struct place places[MAX_SNAPSHOTS];
	atomic_uint names; /* given to snapshots so far */
	atomic_bool stop, failed;
};

static int fail(struct pressure *p, const char *what, const char *name, int error)
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

/* The frozen inode at PATH. */
static int find(struct ff_snap *snap, const char *path, const struct ff_frozen **out)
{
	const struct ff_frozen *f = ff_snap_root(snap);
	char copy[64], *rest = copy, *name;
	int r = 0;

	snprintf(copy, sizeof copy, "%s", path);
	while (!r && (name = strsep(&rest, "/")))
		r = ff_frozen_lookup(snap, f, name, &f);
	*out = f;
	return r;
}

/* Reads all of F, at most MAX bytes, in pieces of any size. */
static int read_frozen(struct maker *m, struct ff_snap *snap, const struct ff_frozen *f,
                       uint8_t *buf, size_t max, size_t *size)
{
	struct ff_reader *rd;
	struct stat st;
	size_t got = 1, at = 0;
	int r;

	ff_frozen_stat(snap, f, &st);
	if ((uint64_t)st.st_size > max)
		return -EFBIG;
	r = ff_reader_open(snap, f, &rd);
	if (r)
		return r;
	while (!r && at < (size_t)st.st_size && got > 0) {
		size_t len = 1 + rng_below(&m->rng, rng_one_in(&m->rng, 2) ? 1 << 18 : 9000);

		len = len < max - at ? len : max - at;
		r = ff_reader_read(rd, buf + at, len, (off_t)at, &got);
		at += got;
	}
	ff_reader_close(rd);
	*size = at;
	return r ? r : at == (size_t)st.st_size ? 0 : -EIO;
}

static uint64_t sum_of(const uint8_t *buf, size_t len)
{
	return XXH3_64bits(buf, len) | 1;
}

/* Reads disk K of a view to m->disks[k], and which directory it was in. */
static int read_disk(struct maker *m, struct ff_snap *snap, unsigned k, bool *in_b)
{
	struct pressure *p = m->p;
	const struct ff_frozen *f, *other;
	char a[32], b[32];
	size_t size;
	int r, found_a, found_b;

	disk_path(k, false, a);
	disk_path(k, true, b);
	found_a = find(snap, a, &f);
	found_b = find(snap, b, &other);
	if ((found_a == 0) == (found_b == 0)) {
		fprintf(stderr, "%s: is %s\n", a, found_a ? "missing" : "there twice");
		return -EIO;
	}
	*in_b = found_b == 0;
	r = read_frozen(m, snap, *in_b ? other : f, m->disks[k], disk_size(&p->shape, k), &size);
	if (!r && size != disk_size(&p->shape, k))
		r = -EIO;
	return r;
}

static int read_odd(struct maker *m, struct ff_snap *snap, unsigned i, struct odd_file *out,
                    uint64_t *sum)
{
	uint8_t buf[ODD_BLOCKS * ODD_BLOCK];
	const struct ff_frozen *f;
	char name[16];
	size_t size;
	int r;

	snprintf(name, sizeof name, "odd%u", i);
	memset(out, 0, sizeof *out);
	*sum = 0;
	r = find(snap, name, &f);
	if (r)
		return r == -ENOENT ? 0 : r;
	r = read_frozen(m, snap, f, buf, sizeof buf, &size);
	if (r)
		return r;
	*sum = sum_of(buf, size);
	return odd_decode(buf, size, out);
}

/* A view is wrong: is it so for good, or was it only what was read first? */
static void look_closer(struct maker *m, struct ff_snap *snap, struct place *pl)
{
	struct shape *s = &m->p->shape;
	bool in_b;

	for (unsigned k = 0; k < s->disks; k++) {
		uint64_t size = disk_size(s, k), at;
		uint8_t *first = malloc(size);

		if (!first)
			return;
		memcpy(first, m->disks[k], size);
		if (read_disk(m, snap, k, &in_b) == 0)
			for (at = 0; at < size; at += 512)
				if (memcmp(first + at, m->disks[k] + at, 512) != 0)
					fprintf(
					    stderr,
					    "%s: disk %u, sector at %llu: write %llu is now %llu\n",
					    pl->name, k, (unsigned long long)at,
					    (unsigned long long)*(uint64_t *)(void *)(first + at),
					    (unsigned long long)*(uint64_t *)(void *)(m->disks[k] +
					                                              at));
		free(first);
	}
}

/* The first look at a view: is it right? */
static int check_new(struct maker *m, struct place *pl, struct ff_snap *snap,
                     const uint64_t *before, const uint64_t *after)
{
	struct pressure *p = m->p;
	struct odd_state *state = calloc(1, sizeof *state);
	char why[400] = "";
	int r = state ? 0 : -ENOMEM;

	for (unsigned i = 0; i < ODD_FILES && !r; i++)
		r = read_odd(m, snap, i, &state->files[i], &pl->sum[MAX_DISKS + i]);
	if (r)
		snprintf(why, sizeof why, "a file that changes: %s", strerror(-r));
	for (unsigned k = 0; k < p->shape.disks && !r; k++) {
		r = read_disk(m, snap, k, &pl->in_b[k]);
		state->in_b[k] = pl->in_b[k];
		pl->sum[k] = sum_of(m->disks[k], disk_size(&p->shape, k));
		if (r)
			snprintf(why, sizeof why, "disk %u: %s", k, strerror(-r));
	}
	if (!r && (r = odd_check(&p->odd, state, before[MAX_WRITERS], after[MAX_WRITERS])))
		snprintf(why, sizeof why, "names, sizes and holes are of no one moment");
	if (!r)
		r = view_check(&p->shape, m->disks, before, after, why, sizeof why);
	if (r) {
		fprintf(stderr, "%s: %s\n", pl->name, why);
		look_closer(m, snap, pl);
	}
	free(state);
	return r;
}

static int make_snapshot(struct maker *m, struct place *pl)
{
	uint64_t before[MAX_WRITERS + 1], after[MAX_WRITERS + 1];
	struct pressure *p = m->p;
	struct ff_snap *snap;
	int r;

	snprintf(pl->name, sizeof pl->name, "s%u", atomic_fetch_add(&p->names, 1));
	before[MAX_WRITERS] = atomic_load(&p->odd.returned);
	for (unsigned t = 0; t < p->shape.writers; t++)
		before[t] = atomic_load(&p->writers[t].returned);
	r = ff_store_freeze(p->store, pl->name, 0);
	for (unsigned t = 0; t < p->shape.writers; t++)
		after[t] = atomic_load(&p->writers[t].started);
	after[MAX_WRITERS] = atomic_load(&p->odd.started);
	if (r)
		return fail(p, "freeze", pl->name, r);
	pl->made = true;
	m->made++;
	r = ff_snap_get(p->store, pl->name, &snap);
	if (r)
		return fail(p, "get", pl->name, r);
	r = check_new(m, pl, snap, before, after);
	ff_snap_put(snap);
	return r ? fail(p, "a new view", pl->name, r) : 0;
}

/* Reads all of it, or some, again. */
static int check_again(struct maker *m, struct place *pl, bool all)
{
	struct pressure *p = m->p;
	struct odd_file odd;
	struct ff_snap *snap;
	uint64_t sum;
	bool in_b;
	int r = ff_snap_get(p->store, pl->name, &snap);

	for (unsigned k = 0; k < p->shape.disks && !r; k++) {
		if (!all && !rng_one_in(&m->rng, 5))
			continue;
		r = read_disk(m, snap, k, &in_b);
		if (!r && (in_b != pl->in_b[k] ||
		           sum_of(m->disks[k], disk_size(&p->shape, k)) != pl->sum[k])) {
			fprintf(stderr, "%s: disk %u is not what it was\n", pl->name, k);
			r = -EIO;
		}
	}
	for (unsigned i = 0; i < ODD_FILES && !r; i++) {
		r = read_odd(m, snap, i, &odd, &sum);
		if (!r && sum != pl->sum[MAX_DISKS + i]) {
			fprintf(stderr, "%s: odd%u is not what it was\n", pl->name, i);
			r = -EIO;
		}
	}
	ff_snap_put(snap);
	m->read++;
	return r ? fail(p, "a view read again", pl->name, r) : 0;
}

static int rename_snapshot(struct maker *m, struct place *pl)
{
	struct pressure *p = m->p;
	char name[40];
	int r;

	snprintf(name, sizeof name, "s%u-was-%s", atomic_fetch_add(&p->names, 1), pl->name);
	name[24] = '\0';
	r = ff_store_rename_snap(p->store, pl->name, name);
	if (r)
		return fail(p, "rename", pl->name, r);
	memcpy(pl->name, name, sizeof name);
	return 0;
}

/* While a frozen file is open: refused. */
static int drop_in_use(struct maker *m, struct place *pl)
{
	const struct ff_frozen *f;
	struct ff_reader *rd;
	struct ff_snap *snap;
	char path[32];
	int r = ff_snap_get(m->p->store, pl->name, &snap);

	if (r)
		return fail(m->p, "get", pl->name, r);
	disk_path(0, pl->in_b[0], path);
	r = find(snap, path, &f);
	if (!r)
		r = ff_reader_open(snap, f, &rd);
	if (!r) {
		r = ff_store_drop(m->p->store, pl->name) == -EBUSY ? 0 : -EBUSY;
		ff_reader_close(rd);
	}
	ff_snap_put(snap);
	return r ? fail(m->p, "a drop of a snapshot in use", pl->name, r) : 0;
}

static int drop_snapshot(struct maker *m, struct place *pl)
{
	int r = rng_one_in(&m->rng, 4) ? check_again(m, pl, true) : 0;

	if (!r && rng_one_in(&m->rng, 8))
		r = drop_in_use(m, pl);
	if (r)
		return r;
	r = ff_store_drop(m->p->store, pl->name);
	if (r)
		return fail(m->p, "drop", pl->name, r);
	pl->made = false;
	return 0;
}

static void *make_and_drop(void *arg)
{
	struct maker *m = arg;
	struct pressure *p = m->p;

	while (!atomic_load(&p->stop) && !atomic_load(&p->failed)) {
		struct place *pl = &p->places[rng_below(&m->rng, p->snapshots)];
		unsigned roll = (unsigned)rng_below(&m->rng, 10);

		if (pthread_mutex_trylock(&pl->lock))
			continue;
		if (!pl->made)
			make_snapshot(m, pl);
		else if (roll < 5)
			drop_snapshot(m, pl);
		else if (roll < 7)
			rename_snapshot(m, pl);
		else
			check_again(m, pl, false);
		pthread_mutex_unlock(&pl->lock);
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
		p->makers[i].number = i;
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
