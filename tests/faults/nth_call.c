/*
 * The Nth system call, or the Nth allocation, fails.
 *
 * A case is a workload, what fails (calls on FLEECE_DIR, on SOURCE; allocations), the error,
 * whether one call fails or all from the Nth on, the policy, durable or not, an end, and N. A child
 * runs it: each step may give an error only where the fault excuses it, and views may break only
 * where the policy says so. Then it ends:
 *
 *	healed   the storage is well again: all is looked at, a snapshot more is made and used, and
 *	         the store closed;
 *	killed   the child dies as it is.
 *
 * Its parent opens the store on healthy storage, looks at all of it, makes and uses a snapshot,
 * and drops them all: nothing may be left, and no space taken.
 *
 *	nth_call [--memory] [--cases=N] [--seed=N] [--all] [--jobs=N] [--dir=DIR]
 *	nth_call --case=NAME [--dir=DIR]
 *
 * A choice of cases, of calls or of allocations, or all; or one, by the name that a complaint
 * begins with.
 */
#include <ftw.h>
#include <getopt.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "ff_util.h"
#include "nth_case.h"

enum { MAX_JOBS = 16 };

/* The cases, as numbers: those of one workload, error and durability lie together. */
struct range {
	unsigned workload, error;
	bool durable;
	long calls, first; /* case number */
};

struct plan {
	struct range ranges[64 * 2];
	size_t count;
	long total;
};

static void make_plan(struct round *r, struct plan *p, bool memory)
{
	for (unsigned w = 0; w < round_workload_count; w++)
		for (unsigned e = 0; e < case_errors; e++)
			for (unsigned d = 0; d < 2; d++) {
				struct range *range = &p->ranges[p->count];

				if (case_is_memory(e) != memory)
					continue;
				p->count++;
				*range = (struct range){w, e, d, case_calls(r, w, e, d), p->total};
				p->total += range->calls * CASE_VARIANTS;
			}
}

static struct instance case_of(const struct plan *p, long number)
{
	size_t i = 0;
	long in;

	while (i + 1 < p->count && number >= p->ranges[i + 1].first)
		i++;
	in = number - p->ranges[i].first;
	return (struct instance){
	    .workload = p->ranges[i].workload,
	    .error = p->ranges[i].error,
	    .durable = p->ranges[i].durable,
	    .guest = in & 1,
	    .all = in & 2,
	    .end = in & 4 ? KILLED : HEALED,
	    .nth = in / CASE_VARIANTS + 1,
	};
}

/* Shared by the workers. */
struct board {
	_Atomic long next; /* case of the choice */
	_Atomic long done[MAX_JOBS];
	struct instance now[MAX_JOBS];
	_Atomic long failed;
};

struct work {
	struct plan plan;
	struct board *board;
	long cases; /* of plan.total, one in each stretch of total / cases */
	uint64_t seed;
	const char *dir, *program;
};

static uint64_t mix(uint64_t x)
{
	x = (x ^ (x >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
	x = (x ^ (x >> 27)) * UINT64_C(0x94d049bb133111eb);
	return x ^ (x >> 31);
}

static long choose(const struct work *w, long i)
{
	long from = (long)((__int128)i * w->plan.total / w->cases);
	long to = (long)((__int128)(i + 1) * w->plan.total / w->cases);

	return from + (long)(mix(w->seed * 1000003 + (uint64_t)i) % (uint64_t)(to - from));
}

/* Never returns. */
static void worker(struct work *w, unsigned number)
{
	struct round_config config = {.dir = w->dir};
	struct round r;
	long i;

	round_init(&r, &config);
	while ((i = atomic_fetch_add(&w->board->next, 1)) < w->cases) {
		w->board->now[number] = case_of(&w->plan, choose(w, i));
		case_run(&r, &w->board->now[number], w->program);
		atomic_fetch_add(&w->board->done[number], 1);
	}
	_exit(0);
}

static pid_t start_worker(struct work *w, unsigned number)
{
	pid_t pid = fork();

	if (pid == 0)
		worker(w, number);
	return pid;
}

/* Starts a worker anew when a case has ended it. */
static void work_off(struct work *w, unsigned jobs)
{
	pid_t pids[MAX_JOBS];
	unsigned left = jobs;

	for (unsigned i = 0; i < jobs; i++)
		pids[i] = start_worker(w, i);
	while (left) {
		int status;
		pid_t pid = wait(&status);
		unsigned i = 0;

		while (i < jobs && pids[i] != pid)
			i++;
		if (i == jobs)
			continue;
		left--;
		if (!status)
			continue;
		if (WIFSIGNALED(status)) {
			char name[128];

			case_name(&w->board->now[i], name);
			fprintf(stderr, "%s --case=%s: afterwards: %s\n", w->program, name,
			        strsignal(WTERMSIG(status)));
		}
		if (atomic_fetch_add(&w->board->failed, 1) < 40) {
			pids[i] = start_worker(w, i);
			left++;
		}
	}
}

static int remove_one(const char *path, const struct stat *st, int type, struct FTW *ftw)
{
	return remove(path);
}

static int run_choice(struct work *w, bool all, bool memory, unsigned jobs)
{
	struct round_config config = {.dir = w->dir};
	struct round r;
	long done = 0;

	round_init(&r, &config);
	make_plan(&r, &w->plan, memory);
	round_done(&r);
	if (all || w->cases > w->plan.total)
		w->cases = w->plan.total;
	work_off(w, jobs);
	for (unsigned i = 0; i < jobs; i++)
		done += w->board->done[i];
	printf("%ld of %ld cases, seed %llu: %ld right, %ld wrong\n", w->cases, w->plan.total,
	       (unsigned long long)w->seed, done, w->board->failed);
	return w->board->failed || done != w->cases;
}

int main(int argc, char **argv)
{
	static const struct option options[] = {
	    {"cases", 1, NULL, 'n'},  {"seed", 1, NULL, 's'}, {"all", 0, NULL, 'a'},
	    {"memory", 0, NULL, 'm'}, {"jobs", 1, NULL, 'j'}, {"dir", 1, NULL, 'd'},
	    {"case", 1, NULL, 'c'},   {NULL, 0, NULL, 0},
	};
	struct work w = {.cases = 4000, .seed = (uint64_t)time(NULL), .program = argv[0]};
	const char *one = NULL;
	char base[80];
	unsigned jobs = 2;
	bool all = false, memory = false;
	int o, result;

	while ((o = getopt_long(argc, argv, "", options, NULL)) != -1) {
		switch (o) {
		case 'n':
			w.cases = atol(optarg);
			break;
		case 's':
			w.seed = strtoull(optarg, NULL, 0);
			break;
		case 'a':
			all = true;
			break;
		case 'm':
			memory = true;
			break;
		case 'j':
			jobs = FF_MAX(1, FF_MIN((unsigned)atoi(optarg), MAX_JOBS));
			break;
		case 'd':
			w.dir = optarg;
			break;
		case 'c':
			one = optarg;
			break;
		default:
			return 2;
		}
	}
	snprintf(base, sizeof base, "%s/fleecefs-nth-XXXXXX",
	         w.dir                           ? w.dir
	         : access("/dev/shm", W_OK) == 0 ? "/dev/shm"
	                                         : "/tmp");
	if (!mkdtemp(base)) {
		perror(base);
		return 99;
	}
	w.dir = base;
	w.board =
	    mmap(NULL, sizeof *w.board, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (w.board == MAP_FAILED)
		return 99;
	if (one) {
		struct round_config config = {.dir = w.dir};
		struct instance c;
		struct round r;

		if (!case_parse(one, &c)) {
			fprintf(stderr, "%s: no such case\n", one);
			return 2;
		}
		round_init(&r, &config);
		pid_t pid = fork();
		if (pid == 0) {
			case_run(&r, &c, argv[0]);
			_exit(0);
		}
		waitpid(pid, &result, 0);
		printf("%s\n", result ? "wrong" : "right");
	} else {
		result = run_choice(&w, all, memory, jobs);
	}
	nftw(base, remove_one, 16, FTW_DEPTH | FTW_PHYS);
	return result ? 1 : 0;
}
