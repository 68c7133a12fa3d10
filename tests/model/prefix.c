/*
 * prefix FLEECEFS [options]: threads stamp rising numbers into several files while snapshots are
 * made, read and dropped. Each view must hold a prefix of each thread's history, over all files
 * together, and never change.
 *
 * Shared state: for each thread two counters, `started` and `returned`, written by it alone with
 * release order around each write, read by the main thread with acquire order before and after
 * mkdir. `stop` is set by the main thread and by a writer that fails. Everything else belongs to
 * one thread. Snapshots are made, read and dropped by the main thread.
 */
#include "mount.h"
#include "prefix.h"
#include "rng.h"

#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define NAMES 8

struct view {
	bool made;
	uint64_t before[MAX_THREADS], after[MAX_THREADS];
	uint8_t *files[NFILES]; /* as first read */
	uint64_t sizes[NFILES];
};

struct prefix;

struct writer {
	struct prefix *p;
	unsigned number;
	pthread_t thread;
	_Atomic uint64_t started, returned;
};

struct prefix {
	struct mnt mnt;
	struct layout layout;
	struct rng rng; /* the main thread's */
	uint64_t seed;
	unsigned seconds;
	bool keep;
	atomic_bool stop, failed;
	struct writer writers[MAX_THREADS];
	struct view views[NAMES];
	uint8_t *again[NFILES];
	unsigned long snapshots;
};

static void file_path(const struct prefix *p, int view, unsigned k, char path[1024])
{
	if (view < 0)
		snprintf(path, 1024, "%s/file%u", p->mnt.live, k);
	else
		snprintf(path, 1024, "%s/snapshots/nightly-%d/file%u", p->mnt.live, view, k);
}

static int write_one(struct writer *w, const int *buffered, const int *direct, uint8_t *buf,
                     uint64_t n)
{
	unsigned k = record_file(w->number, n);
	int fd = record_direct(k, n) ? direct[k] : buffered[k];
	uint64_t off = record_offset(&w->p->layout, w->number, n);
	ssize_t r;

	record_fill(buf, k, w->number, n);
	atomic_store_explicit(&w->started, n, memory_order_seq_cst);
	r = pwrite(fd, buf, record_size(k), (off_t)off);
	if (r != (ssize_t)record_size(k)) {
		fprintf(stderr, "thread %u: write %llu to file %u: %s\n", w->number,
		        (unsigned long long)n, k, r < 0 ? strerror(errno) : "short");
		return -EIO;
	}
	atomic_store_explicit(&w->returned, n, memory_order_seq_cst);
	return 0;
}

static void *writer_main(void *arg)
{
	struct writer *w = arg;
	int buffered[NFILES], direct[NFILES];
	uint8_t *buf = aligned_alloc(4096, MAX_RECORD);
	struct rng rng = {w->p->seed + w->number + 1};
	bool ok = buf != NULL;
	char path[1024];
	uint64_t n;

	for (unsigned k = 0; k < NFILES; k++) {
		file_path(w->p, -1, k, path);
		buffered[k] = open(path, O_WRONLY | O_CLOEXEC);
		direct[k] = open(path, O_WRONLY | O_DIRECT | O_CLOEXEC);
		ok = ok && buffered[k] >= 0 && direct[k] >= 0;
	}
	for (n = 1; ok && !atomic_load(&w->p->stop); n++) {
		ok = write_one(w, buffered, direct, buf, n) == 0;
		/* Breaks of any length, so that the threads meet the freeze at every point. */
		if (rng_one_in(&rng, 200))
			nanosleep(&(struct timespec){0, (long)rng_below(&rng, 2000000)}, NULL);
		if (rng_one_in(&rng, 2000) && fsync(buffered[n % NFILES]) < 0)
			ok = false;
	}
	if (!ok) {
		fprintf(stderr, "thread %u failed\n", w->number);
		atomic_store(&w->p->failed, true);
	}
	for (unsigned k = 0; k < NFILES; k++) {
		close(buffered[k]);
		close(direct[k]);
	}
	free(buf);
	return NULL;
}

/* Reads file K of view V to BUF, in pieces of any size; *SIZE: its length. */
static int read_file(struct prefix *p, int v, unsigned k, bool first, uint8_t *buf, uint64_t *size)
{
	uint64_t max = file_size(&p->layout, k), off, len;
	bool direct = !first && rng_one_in(&p->rng, 2);
	char path[1024];
	struct stat st;
	ssize_t n = 1;
	int fd;

	file_path(p, v, k, path);
	fd = open(path, O_RDONLY | O_CLOEXEC | (direct ? O_DIRECT : 0));
	if (fd < 0 || fstat(fd, &st) < 0 || (uint64_t)st.st_size > max) {
		fprintf(stderr, "%s: open: %s\n", path, strerror(errno));
		return -EIO;
	}
	/* The second time, ask the daemon and not the page cache. */
	if (!first && !direct)
		posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
	memset(buf, 0, max);
	for (off = 0; off < (uint64_t)st.st_size && n > 0; off += (uint64_t)n) {
		len = 1 + rng_below(&p->rng, rng_one_in(&p->rng, 2) ? 1u << 20 : 20000);
		n = pread(fd, buf + off, len < max - off ? len : max - off, (off_t)off);
	}
	if (n <= 0 && st.st_size > 0)
		fprintf(stderr, "%s: read at %llu: %s\n", path, (unsigned long long)off,
		        n ? strerror(errno) : "end before the file's size");
	close(fd);
	*size = (uint64_t)st.st_size;
	return n > 0 || st.st_size == 0 ? 0 : -EIO;
}

/* Makes the snapshot and reads it for the first time. */
static int make_view(struct prefix *p, int v)
{
	struct view *view = &p->views[v];
	char path[1024], why[400];
	unsigned t, k;

	snprintf(path, sizeof path, "%s/snapshots/nightly-%d", p->mnt.live, v);
	for (t = 0; t < p->layout.threads; t++)
		view->before[t] = atomic_load(&p->writers[t].returned);
	if (mkdir(path, 0755) < 0) {
		fprintf(stderr, "mkdir %s: %s\n", path, strerror(errno));
		return -EIO;
	}
	for (t = 0; t < p->layout.threads; t++)
		view->after[t] = atomic_load(&p->writers[t].started);
	view->made = true;
	p->snapshots++;
	for (k = 0; k < NFILES; k++)
		if (read_file(p, v, k, true, view->files[k], &view->sizes[k]))
			return -EIO;
	if (prefix_check(&p->layout, view->files, view->before, view->after, why, sizeof why)) {
		fprintf(stderr, "%s (snapshot %lu): %s\n", path, p->snapshots, why);
		return -EIO;
	}
	return 0;
}

/* Reads it again: the same? */
static int check_view_again(struct prefix *p, int v)
{
	struct view *view = &p->views[v];
	uint64_t size, i;
	unsigned k;

	for (k = 0; k < NFILES; k++) {
		if (read_file(p, v, k, false, p->again[k], &size))
			return -EIO;
		if (size == view->sizes[k] &&
		    memcmp(p->again[k], view->files[k], file_size(&p->layout, k)) == 0)
			continue;
		for (i = 0; i < size && p->again[k][i] == view->files[k][i]; i++)
			;
		fprintf(stderr, "nightly-%d: file %u has changed: size %llu then %llu, byte %llu\n",
		        v, k, (unsigned long long)view->sizes[k], (unsigned long long)size,
		        (unsigned long long)i);
		return -EIO;
	}
	return 0;
}

static int drop_view(struct prefix *p, int v)
{
	char path[1024];

	if (check_view_again(p, v))
		return -EIO;
	snprintf(path, sizeof path, "%s/snapshots/nightly-%d", p->mnt.live, v);
	if (rmdir(path) < 0) {
		fprintf(stderr, "rmdir %s: %s\n", path, strerror(errno));
		return -EIO;
	}
	p->views[v].made = false;
	return 0;
}

static int64_t now_ms(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec * 1000 + ts.tv_nsec / 1000000;
}

static int run(struct prefix *p)
{
	int64_t end = now_ms() + p->seconds * 1000;
	int r = 0, v;

	while (!r && now_ms() < end && !atomic_load(&p->failed)) {
		v = (int)rng_below(&p->rng, NAMES);
		if (p->views[v].made)
			r = drop_view(p, v);
		if (!r && rng_one_in(&p->rng, 8))
			continue;
		if (!r)
			r = make_view(p, v);
		if (!r && rng_one_in(&p->rng, 4))
			r = check_view_again(p, v);
		nanosleep(&(struct timespec){0, (long)rng_below(&p->rng, 20000000)}, NULL);
	}
	return r;
}

static int start(struct prefix *p)
{
	char path[1024];
	unsigned k, t;
	int fd;

	for (k = 0; k < NFILES; k++) {
		file_path(p, -1, k, path);
		fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
		/* Half of the files grow, half are sparse from the start. */
		if (fd < 0 || (k % 2 && ftruncate(fd, (off_t)file_size(&p->layout, k)) < 0)) {
			fprintf(stderr, "%s: %s\n", path, strerror(errno));
			return -EIO;
		}
		close(fd);
		p->again[k] = aligned_alloc(4096, file_size(&p->layout, k));
		for (int v = 0; v < NAMES; v++)
			p->views[v].files[k] = aligned_alloc(4096, file_size(&p->layout, k));
	}
	for (t = 0; t < p->layout.threads; t++) {
		p->writers[t].p = p;
		p->writers[t].number = t;
		if (pthread_create(&p->writers[t].thread, NULL, writer_main, &p->writers[t]))
			abort();
	}
	return 0;
}

/* Lets the writers end; what is left of the views must still be the same. R: how it went so far. */
static int finish(struct prefix *p, int r)
{
	unsigned long long writes = 0;

	atomic_store(&p->stop, true);
	for (unsigned t = 0; t < p->layout.threads; t++) {
		pthread_join(p->writers[t].thread, NULL);
		writes += atomic_load(&p->writers[t].returned);
	}
	for (int v = 0; v < NAMES && !r; v++)
		if (p->views[v].made)
			r = drop_view(p, v);
	if (!r && atomic_load(&p->failed))
		r = -EIO;
	if (!r)
		r = mnt_stop(&p->mnt);
	if (!r && (p->snapshots < 3 || writes < 1000)) {
		fprintf(stderr, "too little was done to prove anything\n");
		r = -EIO;
	}
	printf("prefix: %s, %lu snapshots, %llu writes\n", r ? "FAILED" : "ok", p->snapshots,
	       writes);
	return r;
}

static const struct option options[] = {
    {"seed", required_argument, NULL, 's'},    {"seconds", required_argument, NULL, 't'},
    {"threads", required_argument, NULL, 'j'}, {"cluster-size", required_argument, NULL, 'c'},
    {"keep", no_argument, NULL, 'k'},          {NULL, 0, NULL, 0},
};

static uint32_t parse(struct prefix *p, int argc, char **argv)
{
	uint32_t cluster = 4096;
	int c;

	while ((c = getopt_long(argc, argv, "", options, NULL)) != -1) {
		if (c == 's')
			p->seed = strtoull(optarg, NULL, 0);
		else if (c == 't')
			p->seconds = (unsigned)strtoul(optarg, NULL, 0);
		else if (c == 'j')
			p->layout.threads = (unsigned)strtoul(optarg, NULL, 0);
		else if (c == 'c')
			cluster = (uint32_t)strtoul(optarg, NULL, 0);
		else if (c == 'k')
			p->keep = true;
		else
			optind = argc;
	}
	if (argc - optind != 1 || p->layout.threads < 1 || p->layout.threads > MAX_THREADS) {
		fprintf(stderr, "usage: prefix FLEECEFS [--seed=N] [--seconds=N] [--threads=N] "
		                "[--cluster-size=BYTES] [--keep]\n");
		exit(2);
	}
	return cluster;
}

int main(int argc, char **argv)
{
	struct prefix *p = calloc(1, sizeof *p);
	uint32_t cluster;
	int r;

	if (!p)
		return 1;
	p->seed = (uint64_t)time(NULL) << 10 ^ (uint64_t)getpid();
	p->seconds = 15;
	p->layout.threads = 4;
	cluster = parse(p, argc, argv);
	if (prefix_self_test())
		return 1;
	if (mnt_skip())
		return 77;
	p->rng.s = p->seed;
	printf("prefix: --seed=%llu --threads=%u --cluster-size=%u\n", (unsigned long long)p->seed,
	       p->layout.threads, cluster);
	fflush(stdout);
	r = mnt_init(&p->mnt, argv[optind], cluster, p->keep);
	r = r ? r : mnt_start(&p->mnt);
	r = r ? r : start(p);
	if (!r) {
		r = finish(p, run(p));
	}
	if (r)
		mnt_show_log(&p->mnt);
	mnt_done(&p->mnt);
	for (unsigned k = 0; k < NFILES; k++) {
		free(p->again[k]);
		for (int v = 0; v < NAMES; v++)
			free(p->views[v].files[k]);
	}
	free(p);
	return r ? 1 : 0;
}
