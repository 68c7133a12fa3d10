/*
 * kill FLEECEFS [options]: the daemon is sent SIGKILL at random moments and mounted again over its
 * dead mount. Every frozen byte must be right, every acknowledged write there, and a mkdir, rmdir
 * or rename that was cut short wholly done or wholly undone.
 *
 * A round: writers run, the main thread works on snapshots and on the extras, a third thread kills;
 * then all is mounted again (at times that mount is killed as well) and looked through.
 *
 * Shared state: see kill.h. The views and the extras belong to the main thread.
 */
#include "kill.h"

#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static int64_t now_us(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec * 1000000 + ts.tv_nsec / 1000;
}

static void sleep_us(uint64_t us)
{
	nanosleep(&(struct timespec){(time_t)(us / 1000000), (long)(us % 1000000) * 1000}, NULL);
}

static bool write_one(struct writer *w, const int *buffered, const int *direct, uint8_t *buf,
                      uint64_t n)
{
	unsigned k = record_file(w->number, n);
	int fd = record_direct(k, n) ? direct[k] : buffered[k];
	uint64_t off = record_offset(&w->kt->layout, w->number, n);

	record_fill(buf, k, w->number, n);
	atomic_store(&w->started, n);
	if (pwrite(fd, buf, record_size(k), (off_t)off) != (ssize_t)record_size(k))
		return false;
	atomic_store(&w->returned, n);
	return true;
}

static void *writer_main(void *arg)
{
	struct writer *w = arg;
	uint8_t *buf = aligned_alloc(4096, MAX_RECORD);
	uint64_t n = atomic_load(&w->returned) + 1;
	int buffered[NFILES], direct[NFILES];
	struct rng rng = {w->kt->seed + w->number + n};
	char path[1024], name[16];
	bool ok = buf != NULL;

	for (unsigned k = 0; k < NFILES; k++) {
		snprintf(name, sizeof name, "file%u", k);
		view_path(w->kt, NULL, name, path);
		buffered[k] = open(path, O_WRONLY | O_CLOEXEC);
		direct[k] = open(path, O_WRONLY | O_DIRECT | O_CLOEXEC);
		ok = ok && buffered[k] >= 0 && direct[k] >= 0;
	}
	for (; ok && !atomic_load(&w->kt->stop); n++) {
		ok = write_one(w, buffered, direct, buf, n);
		if (rng_one_in(&rng, 100))
			sleep_us(rng_below(&rng, 3000));
		if (ok && rng_one_in(&rng, 500))
			fsync(buffered[n % NFILES]); /* may be what is cut short */
	}
	for (unsigned k = 0; k < NFILES; k++) {
		close(buffered[k]);
		close(direct[k]);
	}
	free(buf);
	return NULL;
}

/* The write that was cut short is made again before any freeze, so that views hold whole ones. */
static int redo(struct kill_test *kt)
{
	uint8_t buf[MAX_RECORD];
	char path[1024], name[16];

	for (unsigned t = 0; t < WRITERS; t++) {
		struct writer *w = &kt->writers[t];
		uint64_t n = atomic_load(&w->started);
		unsigned k = record_file(t, n);
		int fd;

		if (n == atomic_load(&w->returned))
			continue;
		snprintf(name, sizeof name, "file%u", k);
		view_path(kt, NULL, name, path);
		fd = open(path, O_WRONLY | O_CLOEXEC);
		record_fill(buf, k, t, n);
		if (fd < 0 ||
		    pwrite(fd, buf, record_size(k), (off_t)record_offset(&kt->layout, t, n)) !=
		        (ssize_t)record_size(k)) {
			fprintf(stderr, "%s: writing again: %s\n", path, strerror(errno));
			return -EIO;
		}
		close(fd);
		atomic_store(&w->returned, n);
	}
	return 0;
}

/* --- what the main thread does until the daemon is gone: true while it is there --- */

static bool make(struct kill_test *kt, struct view *v)
{
	char path[1024];

	snprintf(v->name, sizeof v->name, "s%u", (unsigned)rng_below(&kt->rng, 100000));
	for (unsigned i = 0; i < VIEWS; i++)
		if (&kt->views[i] != v && kt->views[i].made &&
		    strcmp(kt->views[i].name, v->name) == 0)
			return true;
	for (unsigned t = 0; t < WRITERS; t++)
		v->before[t] = atomic_load(&kt->writers[t].returned);
	memcpy(v->extras, kt->extras, sizeof v->extras);
	v->read = false;
	kt->subject = v;
	kt->doing = MAKING;
	view_path(kt, v, "", path);
	path[strlen(path) - 1] = '\0';
	v->made = mkdir(path, 0755) == 0;
	for (unsigned t = 0; t < WRITERS; t++)
		v->after[t] = atomic_load(&kt->writers[t].started);
	kt->made += v->made;
	return v->made;
}

static bool drop(struct kill_test *kt, struct view *v)
{
	char path[1024];

	kt->subject = v;
	kt->doing = DROPPING;
	view_path(kt, v, "", path);
	if (rmdir(path) < 0)
		return false;
	v->made = false;
	kt->dropped++;
	return true;
}

static bool rename_view(struct kill_test *kt, struct view *v)
{
	char from[1024], to[1024];

	snprintf(kt->new_name, sizeof kt->new_name, "r%u", (unsigned)rng_below(&kt->rng, 100000));
	for (unsigned i = 0; i < VIEWS; i++)
		if (kt->views[i].made && strcmp(kt->views[i].name, kt->new_name) == 0)
			return true;
	kt->subject = v;
	kt->doing = RENAMING;
	snprintf(from, sizeof from, "%s/snapshots/%s", kt->mnt.live, v->name);
	snprintf(to, sizeof to, "%s/snapshots/%s", kt->mnt.live, kt->new_name);
	if (rename(from, to) < 0)
		return false;
	memcpy(v->name, kt->new_name, sizeof v->name);
	return true;
}

static bool write_extra(struct kill_test *kt, const char *path, unsigned generation)
{
	int fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
	uint8_t buf[EXTRA_SIZE];
	bool ok;

	extra_fill(buf, generation);
	ok = fd >= 0 && pwrite(fd, buf, 7000, 0) == 7000 &&
	     pwrite(fd, buf + 7000, EXTRA_SIZE - 7000, 7000) == EXTRA_SIZE - 7000;
	if (fd >= 0 && close(fd) < 0)
		ok = false;
	return ok;
}

/* Makes, deletes, or renames one over another: each a disk that snapshots need, perhaps. */
static bool change_extras(struct kill_test *kt)
{
	unsigned i = (unsigned)rng_below(&kt->rng, EXTRAS), j = (i + 1) % EXTRAS;
	char a[1024], b[1024], name[16];

	snprintf(name, sizeof name, "extra%u", i);
	view_path(kt, NULL, name, a);
	snprintf(name, sizeof name, "extra%u", j);
	view_path(kt, NULL, name, b);
	kt->doing = CHANGING_EXTRAS;
	memcpy(kt->old_extras, kt->extras, sizeof kt->extras);
	kt->maybe_partial = 0;
	if (!kt->extras[i]) {
		kt->extras[i] = kt->maybe_partial = ++kt->next_extra;
		return write_extra(kt, a, kt->extras[i]);
	}
	if (rng_one_in(&kt->rng, 2)) {
		kt->extras[i] = 0;
		return unlink(a) == 0;
	}
	kt->extras[j] = kt->extras[i];
	kt->extras[i] = 0;
	return rename(a, b) == 0;
}

/* False: something failed, and only the daemon's end may be the reason. */
static bool work(struct kill_test *kt)
{
	struct view *v = &kt->views[rng_below(&kt->rng, VIEWS)];
	bool there;

	switch (rng_below(&kt->rng, 8)) {
	case 0:
	case 1:
		there = change_extras(kt);
		break;
	case 2:
		if (v->made) {
			there = rename_view(kt, v);
			break;
		}
		__attribute__((fallthrough));
	default:
		there = v->made ? drop(kt, v) : make(kt, v);
	}
	if (there)
		kt->doing = NOTHING;
	return there;
}

struct killer {
	pid_t pid;
	uint64_t delay_us;
	struct kill_test *kt;
};

static void *killer_main(void *arg)
{
	struct killer *k = arg;

	sleep_us(k->delay_us);
	kill(k->pid, SIGKILL);
	atomic_store(&k->kt->stop, true);
	return NULL;
}

static int run_until_killed(struct kill_test *kt)
{
	struct killer k = {kt->mnt.daemon, rng_below(&kt->rng, 40000), kt};
	int64_t patience = now_us() + 60000000;
	pthread_t thread;

	kt->doing = NOTHING;
	atomic_store(&kt->stop, false);
	for (unsigned t = 0; t < WRITERS; t++)
		if (pthread_create(&kt->writers[t].thread, NULL, writer_main, &kt->writers[t]))
			abort();
	if (pthread_create(&thread, NULL, killer_main, &k))
		abort();
	while (work(kt) && now_us() < patience)
		if (rng_one_in(&kt->rng, 3))
			sleep_us(rng_below(&kt->rng, 4000));
	if (!atomic_load(&kt->stop) && kt->doing != NOTHING)
		sleep_us(50000); /* between the signal and the flag */
	if (!atomic_load(&kt->stop)) {
		fprintf(stderr, "an operation (%d) failed with the daemon alive: %s\n", kt->doing,
		        strerror(errno));
		atomic_store(&kt->stop, true);
		return -EIO;
	}
	pthread_join(thread, NULL);
	for (unsigned t = 0; t < WRITERS; t++)
		pthread_join(kt->writers[t].thread, NULL);
	if (kt->doing == MAKING)
		for (unsigned t = 0; t < WRITERS; t++)
			kt->subject->after[t] = atomic_load(&kt->writers[t].started);
	return mnt_collect_killed(&kt->mnt);
}

static int mount_again(struct kill_test *kt)
{
	int r = 0;

	while (!r && rng_one_in(&kt->rng, 4)) {
		kt->done++;
		r = mnt_start_and_kill(&kt->mnt, (unsigned)rng_below(&kt->rng, 40000));
	}
	return r ? r : mnt_start(&kt->mnt);
}

static int look_through(struct kill_test *kt)
{
	int r = check_names(kt);

	if (!r)
		r = check_live(kt);
	if (!r)
		r = settle_extras(kt);
	for (unsigned i = 0; i < VIEWS && !r; i++)
		if (kt->views[i].made)
			r = check_view(kt, &kt->views[i]);
	return r ? r : redo(kt);
}

static int round_of(struct kill_test *kt)
{
	int r = run_until_killed(kt);

	kt->done++;
	if (!r && rng_one_in(&kt->rng, 10))
		r = check_images(kt, false);
	if (!r)
		r = mount_again(kt);
	if (!r)
		r = look_through(kt);
	/* Now and then a clean end in between, which may be cut short as well. */
	if (!r && rng_one_in(&kt->rng, 12)) {
		r = mnt_stop(&kt->mnt);
		r = r ? r : mnt_start(&kt->mnt);
	}
	return r;
}

static int prepare(struct kill_test *kt)
{
	char path[1024], name[16];

	for (unsigned k = 0; k < NFILES; k++) {
		int fd;

		snprintf(name, sizeof name, "file%u", k);
		view_path(kt, NULL, name, path);
		fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
		if (fd < 0 || (k % 2 && ftruncate(fd, (off_t)file_size(&kt->layout, k)) < 0)) {
			fprintf(stderr, "%s: %s\n", path, strerror(errno));
			return -EIO;
		}
		close(fd);
		kt->again[k] = malloc(file_size(&kt->layout, k));
		for (unsigned v = 0; v < VIEWS; v++)
			kt->views[v].files[k] = malloc(file_size(&kt->layout, k));
	}
	for (unsigned t = 0; t < WRITERS; t++) {
		kt->writers[t].kt = kt;
		kt->writers[t].number = t;
	}
	return 0;
}

static int finish(struct kill_test *kt)
{
	int r = check_images(kt, true);

	for (unsigned i = 0; i < VIEWS && !r; i++)
		if (kt->views[i].made && !drop(kt, &kt->views[i])) {
			fprintf(stderr, "rmdir %s: %s\n", kt->views[i].name, strerror(errno));
			r = -EIO;
		}
	if (!r)
		r = check_empty(kt);
	return r ? r : mnt_stop(&kt->mnt);
}

static const struct option options[] = {
    {"seed", required_argument, NULL, 's'},
    {"kills", required_argument, NULL, 'k'},
    {"cluster-size", required_argument, NULL, 'c'},
    {"keep", no_argument, NULL, 'K'},
    {NULL, 0, NULL, 0},
};

static uint32_t parse(struct kill_test *kt, int argc, char **argv)
{
	uint32_t cluster = 4096;
	int c;

	while ((c = getopt_long(argc, argv, "", options, NULL)) != -1) {
		if (c == 's')
			kt->seed = strtoull(optarg, NULL, 0);
		else if (c == 'k')
			kt->kills = (unsigned)strtoul(optarg, NULL, 0);
		else if (c == 'c')
			cluster = (uint32_t)strtoul(optarg, NULL, 0);
		else if (c == 'K')
			kt->keep = true;
		else
			optind = argc;
	}
	if (argc - optind != 1 || kt->kills < 1) {
		fprintf(stderr,
		        "usage: kill FLEECEFS [--seed=N] [--kills=N] [--cluster-size=BYTES] "
		        "[--keep]\n");
		exit(2);
	}
	return cluster;
}

int main(int argc, char **argv)
{
	struct kill_test *kt = calloc(1, sizeof *kt);
	unsigned long long writes = 0;
	uint32_t cluster;
	int r;

	if (!kt)
		return 1;
	kt->seed = (uint64_t)time(NULL) << 10 ^ (uint64_t)getpid();
	kt->kills = 50;
	kt->layout.threads = WRITERS;
	cluster = parse(kt, argc, argv);
	if (mnt_skip())
		return 77;
	kt->rng.s = kt->seed;
	printf("kill: --seed=%llu --kills=%u --cluster-size=%u\n", (unsigned long long)kt->seed,
	       kt->kills, cluster);
	fflush(stdout);
	r = mnt_init(&kt->mnt, argv[optind], cluster, kt->keep);
	if (!r)
		r = mnt_start(&kt->mnt);
	if (!r)
		r = prepare(kt);
	while (!r && kt->done < kt->kills)
		r = round_of(kt);
	if (!r)
		r = finish(kt);
	for (unsigned t = 0; t < WRITERS; t++)
		writes += atomic_load(&kt->writers[t].returned);
	printf("kill: %s, %u kills, %llu writes, %lu snapshots made, %lu dropped; cut short: %lu "
	       "done, %lu undone; %lu images with leaks\n",
	       r ? "FAILED" : "ok", kt->done, writes, kt->made, kt->dropped, kt->finished,
	       kt->undone, kt->leaks);
	if (r)
		mnt_show_log(&kt->mnt);
	mnt_done(&kt->mnt);
	for (unsigned k = 0; k < NFILES; k++) {
		free(kt->again[k]);
		for (unsigned v = 0; v < VIEWS; v++)
			free(kt->views[v].files[k]);
	}
	free(kt);
	return r ? 1 : 0;
}
