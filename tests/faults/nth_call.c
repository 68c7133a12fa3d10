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
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/lsan_interface.h>
#endif

#include "cow/engine.h"
#include "fault_calls.h"
#include "ff_util.h"
#include "round.h"

enum { PATIENCE_S = 120, MAX_JOBS = 16 };

enum end { HEALED, KILLED, ENDS };

static const char *const sides[] = {"fleece", "source", "memory"};
static const char *const ends[] = {"healed", "killed"};

static const struct {
	enum fault_side side;
	int error;
	const char *name;
} errors[] = {
    {FAULT_FLEECE, ENOSPC, "ENOSPC"},
    {FAULT_FLEECE, EDQUOT, "EDQUOT"},
    {FAULT_FLEECE, EIO, "EIO"},
    {FAULT_FLEECE, EROFS, "EROFS"},
    {FAULT_FLEECE, ESTALE, "ESTALE"},
    {FAULT_FLEECE, FAULT_INTERRUPT, "interrupt"},
    {FAULT_SOURCE, EIO, "EIO"},
    {FAULT_SOURCE, ENOSPC, "ENOSPC"},
    {FAULT_SOURCE, FAULT_INTERRUPT, "interrupt"},
    {FAULT_MEMORY, ENOMEM, "ENOMEM"},
};

struct instance {
	unsigned workload, error;
	bool durable, guest, all;
	enum end end;
	long nth;
};

static void name_of(const struct instance *c, char out[128])
{
	snprintf(out, 128, "%s:%s:%s:%s:%s:%s:%s:%ld", round_workloads[c->workload].name,
	         sides[errors[c->error].side], errors[c->error].name,
	         c->guest ? "guest" : "snapshot", c->durable ? "durable" : "plain",
	         c->all ? "all" : "once", ends[c->end], c->nth);
}

/* --- what a step may give --------------------------------------------------------------------- */

/* The error that it gives without any fault, by what went wrong before it. 0: none. */
static int due_error(struct round *r, const struct round_step *s)
{
	const struct round_tree *t = &r->model->live;
	struct round_snap *snap;

	if (s->op == ROUND_OPEN || s->op == ROUND_CLOSE)
		return 0;
	if (!r->store)
		return -EBADF;
	switch (s->op) {
	case ROUND_FREEZE:
		return round_find_snap(r, s->name) ? -EEXIST : 0;
	case ROUND_DROP:
	case ROUND_CHECKPOINT:
	case ROUND_RENAME_SNAP:
		snap = round_find_snap(r, s->name);
		return snap && snap->state != ROUND_COMING ? 0 : -ENOENT;
	case ROUND_READ:
		snap = round_find_snap(r, s->name);
		if (!snap || snap->state == ROUND_COMING)
			return -ENOENT;
		for (int i = 0; i < ROUND_FILES; i++)
			if (snap->may_break[i] || r->may_damage)
				return -EIO;
		return 0;
	case ROUND_RELEASE:
		snap = round_find_snap(r, s->name);
		if (!snap || snap->state == ROUND_COMING)
			return -ENOENT;
		/* the view may be broken, or a checkpoint's since a step that failed */
		for (int i = 0; i < ROUND_FILES; i++)
			if (snap->may_break[i] || r->may_damage || snap->data != ROUND_WHOLE)
				return -EIO;
		return 0;
	case ROUND_PULSE:
		return 0;
	case ROUND_CREATE:
		return round_find_name(t, s->name) < 0 ? 0 : -EEXIST;
	default:
		return round_find_name(t, s->name) < 0 ? -ENOENT : 0;
	}
}

static bool is_guests(enum round_op op)
{
	return (op >= ROUND_WRITE && op <= ROUND_UNLINK) || op == ROUND_SYNC;
}

/* Is the guest to get nothing of a fault in this step? */
static bool is_hidden(const struct instance *c, const struct round_step *s)
{
	return errors[c->error].error == FAULT_INTERRUPT ||
	       (is_guests(s->op) && !c->guest && errors[c->error].side == FAULT_FLEECE);
}

/* May a fault in this step break views? */
static bool may_break(const struct instance *c, const struct round_step *s)
{
	if (errors[c->error].error == FAULT_INTERRUPT)
		return false;
	/* an image that cannot be read is as good as lost; and what a checkpoint still has to give
	 * up is flushed, which is not tried again where it fails */
	if (s->op == ROUND_OPEN)
		return errors[c->error].side == FAULT_FLEECE &&
		       (errors[c->error].error == EIO || c->durable);
	return !c->guest;
}

/* An fsync that failed is not tried again: what is to be saved or flushed then fails, for this
 * disk, until the store is opened anew. */
static bool is_sick(const struct instance *c, const struct round_step *s, bool *sick, int file,
                    unsigned fired)
{
	int error = errors[c->error].error;

	if (s->op == ROUND_OPEN)
		memset(sick, 0, ROUND_FILES);
	if (!c->guest || error == EROFS || error == FAULT_INTERRUPT)
		return false;
	if (file == ROUND_ALL_FILES && (s->op != ROUND_OPEN || c->durable) && fired &&
	    errors[c->error].side == FAULT_FLEECE)
		memset(sick, true, ROUND_FILES);
	if (file < 0)
		return false;
	if (fired && errors[c->error].side == FAULT_FLEECE && (c->durable || s->op == ROUND_SYNC))
		sick[file] = true;
	return sick[file];
}

static void judge(struct round *r, const struct instance *c, const struct round_step *s, int due,
                  int e, unsigned fired)
{
	const char *name = s->name ? s->name : s->op == ROUND_OPEN ? "open" : "close";
	int error = errors[c->error].error;

	if (s->op == ROUND_ZERO && e == -EOPNOTSUPP)
		return;
	if (fired && !is_hidden(c, s)) {
		/* Anything but success must be an error of the fault's. */
		if (e && e != due && e != -error && e != -EIO && !(e == -ENOSPC && error == EDQUOT))
			round_complain(r, "%s: op %d gives %s", name, s->op, strerror(-e));
		return;
	}
	if (e && e != due)
		round_complain(r, "%s: op %d fails: %s%s", name, s->op, strerror(-e),
		               fired ? ", though its fault is not the guest's" : "");
	else if (!e && due && s->op != ROUND_READ && s->op != ROUND_FREEZE && s->op != ROUND_DROP &&
	         s->op != ROUND_RELEASE && s->op != ROUND_CHECKPOINT)
		round_complain(r, "%s: op %d succeeds and should not: %s", name, s->op,
		               strerror(-due));
}

/* --- one case --------------------------------------------------------------------------------- */

/* A snapshot more, made and used. */
static void use(struct round *r)
{
	static const struct round_step steps[] = {
	    {ROUND_FREEZE, "z"},
	    {ROUND_CREATE, "new"},
	    {ROUND_WRITE, "e", .off = 30, .len = 7000, .seed = 99},
	    {ROUND_WRITE, "new", .off = 0, .len = 3000, .seed = 98},
	    {ROUND_READ, "z"},
	};

	for (size_t i = 0; i < FF_ARRAY_SIZE(steps); i++) {
		const struct round_step *s = &steps[i];
		int due = due_error(r, s), e = round_step(r, s);

		if (e && e != due)
			round_complain(r, "afterwards op %d of %s gives %s", s->op, s->name,
			               e ? strerror(-e) : "no error");
	}
	round_verify(r, 0);
}

static void run_steps(struct round *r, const struct instance *c)
{
	const struct round_workload *w = &round_workloads[c->workload];
	bool sick[ROUND_FILES] = {false};

	r->may_come = c->all;
	for (size_t i = 0; i < w->count; i++) {
		const struct round_step *s = &w->steps[i];
		int due = due_error(r, s), e = round_step(r, s);
		unsigned fired = fault_fired();

		if (fired && may_break(c, s))
			round_may_break_by_step(r);
		if (s->op == ROUND_OPEN)
			r->may_damage = fired && errors[c->error].error == EIO;
		if (!is_sick(c, s, sick, r->model->step_file, fired))
			judge(r, c, s, due, e, fired);
		if (!fired)
			continue;
		fault_disarm();
		round_verify(r, 0);
		fault_rearm();
		if (s->op == ROUND_OPEN && e && !c->all) { /* it was but once */
			e = round_step(r, s);
			if (e)
				round_complain(r, "a second open fails: %s", strerror(-e));
		}
	}
}

static void arm(struct round *r, const struct instance *c)
{
	struct fault f = {errors[c->error].side, errors[c->error].error, c->all, c->nth};

	fault_arm(&f, r->fleece, r->source);
}

static unsigned open_files(void)
{
	DIR *d = opendir("/proc/self/fd");
	unsigned n = 0;

	while (d && readdir(d))
		n++;
	if (d)
		closedir(d);
	return n;
}

/* What was opened and allocated must have been given back. */
static void check_leaks(struct round *r, unsigned files)
{
	unsigned now = open_files();

	if (now != files)
		round_complain(r, "%u descriptors open before, %u after", files, now);
#ifdef __SANITIZE_ADDRESS__
	if (__lsan_do_recoverable_leak_check())
		round_complain(r, "memory leaks");
#endif
}

/* Never returns. */
static void child(struct round *r, const struct instance *c)
{
	unsigned files = open_files();
	int e;

	alarm(PATIENCE_S);
	arm(r, c);
	run_steps(r, c);
	r->may_come = false;
	if (c->end == HEALED) {
		fault_disarm();
		e = round_open(r);
		if (e)
			round_complain(r, "healed, it cannot be opened: %s", strerror(-e));
		if (r->store)
			use(r);
		e = round_close(r);
		if (e)
			round_complain(r, "healed, it cannot be closed: %s", strerror(-e));
		check_leaks(r, files);
	}
	_exit(0);
}

static void run_child(struct round *r, const struct instance *c)
{
	int status;
	pid_t pid = fork();

	if (pid == 0)
		child(r, c);
	if (pid < 0 || waitpid(pid, &status, 0) != pid)
		exit(99);
	if (WIFSIGNALED(status))
		round_complain(r, "%s",
		               WTERMSIG(status) == SIGALRM ? "it hangs"
		                                           : strsignal(WTERMSIG(status)));
	else if (WEXITSTATUS(status))
		round_complain(r, "it ended with status %d", WEXITSTATUS(status));
}

static void look_after(struct round *r)
{
	int e = round_open(r);

	if (e) {
		round_complain(r, "it cannot be opened again: %s", strerror(-e));
		return;
	}
	round_verify(r, 0);
	if (!round_find_snap(r, "z"))
		use(r);
	round_drop_all(r);
	if (r->store->space_used)
		round_complain(r, "%llu bytes are still counted",
		               (unsigned long long)r->store->space_used);
	e = round_close(r);
	if (e)
		round_complain(r, "it cannot be closed: %s", strerror(-e));
	round_verify(r, 0);
}

static unsigned run_case(struct round *r, const struct instance *c, const char *program)
{
	char name[128], label[256];

	name_of(c, name);
	snprintf(label, sizeof label, "%s --case=%s", program, name);
	r->label = label;
	r->config.durable = c->durable;
	r->config.policy = c->guest ? FF_BREAK_GUEST_WRITE : FF_BREAK_SNAPSHOT;
	round_reset(r);
	alarm(PATIENCE_S);
	run_child(r, c);
	look_after(r);
	alarm(0);
	if (r->model->complaints) /* what the store is in is unknown: a new process is better */
		_exit(1);
	return 0;
}

/* --- all of them ------------------------------------------------------------------------------ */

/* Calls of the workload that can give the error. */
static long count_calls(struct round *r, unsigned workload, unsigned error, bool durable)
{
	struct instance c = {.workload = workload, .error = error, .durable = durable};
	long *out =
	         mmap(NULL, sizeof *out, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0),
	     n;
	pid_t pid;
	int status;

	r->config.durable = durable;
	r->label = "counting";
	round_reset(r);
	pid = fork();
	if (pid == 0) {
		arm(r, &c);
		run_steps(r, &c);
		*out = fault_count();
		_exit(0);
	}
	if (waitpid(pid, &status, 0) != pid || status || r->model->complaints) {
		fprintf(stderr, "%s cannot be run\n", round_workloads[workload].name);
		exit(1);
	}
	n = *out;
	munmap(out, sizeof *out);
	return n;
}

enum { VARIANTS = 2 * 2 * 2 /* guest, all, end */ };

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
		for (unsigned e = 0; e < FF_ARRAY_SIZE(errors); e++)
			for (unsigned d = 0; d < 2; d++) {
				struct range *range = &p->ranges[p->count];

				if ((errors[e].side == FAULT_MEMORY) != memory)
					continue;
				p->count++;
				*range = (struct range){w, e, d, count_calls(r, w, e, d), p->total};
				p->total += range->calls * VARIANTS;
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
	    .nth = in / VARIANTS + 1,
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
		run_case(&r, &w->board->now[number], w->program);
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

			name_of(&w->board->now[i], name);
			fprintf(stderr, "%s --case=%s: afterwards: %s\n", w->program, name,
			        strsignal(WTERMSIG(status)));
		}
		if (atomic_fetch_add(&w->board->failed, 1) < 40) {
			pids[i] = start_worker(w, i);
			left++;
		}
	}
}

static bool parse_case(const char *text, struct instance *c)
{
	char name[128], *copy = strdup(text), *end = strrchr(copy, ':');

	if (end)
		c->nth = atol(end + 1);
	for (c->workload = 0; c->workload < round_workload_count; c->workload++)
		for (c->error = 0; c->error < FF_ARRAY_SIZE(errors); c->error++)
			for (unsigned v = 0; v < 2 * VARIANTS; v++) {
				c->durable = v & 1;
				c->guest = v & 2;
				c->all = v & 4;
				c->end = v & 8 ? KILLED : HEALED;
				name_of(c, name);
				if (strcmp(name, text) == 0) {
					free(copy);
					return true;
				}
			}
	free(copy);
	return false;
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

		if (!parse_case(one, &c)) {
			fprintf(stderr, "%s: no such case\n", one);
			return 2;
		}
		round_init(&r, &config);
		pid_t pid = fork();
		if (pid == 0) {
			run_case(&r, &c, argv[0]);
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
