/*
 * SIGKILL at every boundary between two system calls.
 *
 * A child runs a workload of rounds under ptrace and is killed as the Nth call returns, for all N.
 * Then its parent opens the store: every frozen byte and all that was done before must be there,
 * and what was in the middle wholly done or wholly undone (of a write each byte old or new). With a
 * second number M the first process that opens the store again is killed too, as its Mth call
 * returns.
 *
 *	boundary [--seed=N] [--twice=N] [--all] [--jobs=N] [--dir=DIR]
 *	boundary --case=WORKLOAD:WAY:N:M [--all] [--dir=DIR]
 *
 * --twice: how many pairs (N, M), chosen by the seed. A call counts if it may change something: as
 * a read returns, the storage holds what it held before. With --all every call counts; and all N
 * are gone through durable, or with FLEECE_DIR inside SOURCE, as well, else one in STEP of them.
 */
#include <errno.h>
#include <getopt.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "cow/engine.h"
#include "ff_util.h"
#include "round.h"
#include "tests/model/rng.h"

enum { MAX_JOBS = 16, WAYS = 4 /* durable, inside */, STEP = 16 };

struct instance {
	unsigned workload, way;
	long first, second; /* calls; 0: it is not killed */
};

struct job {
	struct round r;
	const char *program;
	bool all;
	unsigned number, jobs;
	uint64_t seed;
	long twice, cases, failed;
	/* calls of the workload, and in opening it again after half of them, per workload and way
	 */
	long calls[8][WAYS], again[8][WAYS];
};

/* Calls after which the storage holds what it held before, or that do not return. Any other counts
 * as one that changes. */
static const long reads[] = {
    SYS_brk,           SYS_mmap,           SYS_munmap,      SYS_mprotect,
    SYS_madvise,       SYS_mremap,         SYS_close,       SYS_read,
    SYS_pread64,       SYS_preadv,         SYS_lseek,       SYS_fstat,
    SYS_newfstatat,    SYS_statx,          SYS_getdents64,  SYS_fstatfs,
    SYS_statfs,        SYS_fcntl,          SYS_flock,       SYS_readlinkat,
    SYS_fgetxattr,     SYS_flistxattr,     SYS_lgetxattr,   SYS_futex,
    SYS_clock_gettime, SYS_gettid,         SYS_getpid,      SYS_geteuid,
    SYS_getrandom,     SYS_rt_sigprocmask, SYS_sched_yield, SYS_clock_nanosleep,
    SYS_uname,         SYS_llistxattr,     SYS_fsync,       SYS_fdatasync,
    SYS_syncfs,        SYS_prlimit64,      SYS_getuid,      SYS_faccessat,
    SYS_exit,          SYS_exit_group,
};

/* The kernel sorts the calls of this process: it stops at the entry of those that count, and
 * nowhere else, which is many times faster than to stop at all. */
static int stop_at_calls(bool all)
{
	enum { EXITS = 2, MOST = FF_ARRAY_SIZE(reads) };
	const size_t first = all ? MOST - EXITS : 0, n = MOST - first;
	struct sock_filter code[MOST + 3];
	struct sock_fprog program = {.filter = code};

	code[program.len++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS,
	                                                   offsetof(struct seccomp_data, nr));
	for (size_t i = 0; i < n; i++)
		code[program.len++] = (struct sock_filter)BPF_JUMP(
		    BPF_JMP | BPF_JEQ | BPF_K, (uint32_t)reads[first + i], (uint8_t)(n - i), 0);
	code[program.len++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_TRACE);
	code[program.len++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0 ||
	    prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) < 0)
		return -errno;
	return 0;
}

/* Lets the thread TID go on, after a stop of STATUS. */
static void go_on(pid_t tid, int status, bool to_return)
{
	int sig = WSTOPSIG(status);

	/* what is ours, and the stop that a new thread begins with, is no signal to it */
	if (sig == SIGTRAP || sig == (SIGTRAP | 0x80) || sig == SIGSTOP)
		sig = 0;
	ptrace(to_return ? PTRACE_SYSCALL : PTRACE_CONT, tid, NULL, (long)sig);
}

/* Lets PID run until its NTH call has returned, and kills it then; 0: to its end. *COUNT: calls
 * that it made; those of other threads, which only write the time, do not count. Returns its wait
 * status. */
static int drive(pid_t pid, long nth, long *count)
{
	const long options =
	    PTRACE_O_TRACESYSGOOD | PTRACE_O_EXITKILL | PTRACE_O_TRACESECCOMP | PTRACE_O_TRACECLONE;
	int status;
	pid_t tid;

	*count = 0;
	if (waitpid(pid, &status, 0) != pid || !WIFSTOPPED(status) ||
	    ptrace(PTRACE_SETOPTIONS, pid, NULL, options) < 0) {
		perror("ptrace");
		exit(99);
	}
	go_on(pid, status, false);
	while ((tid = waitpid(-1, &status, __WALL)) > 0) {
		if (!WIFSTOPPED(status)) {
			if (tid == pid)
				return status;
			continue;
		}
		if (tid == pid && status >> 8 == (SIGTRAP | PTRACE_EVENT_SECCOMP << 8))
			++*count;
		if (tid == pid && WSTOPSIG(status) == (SIGTRAP | 0x80))
			kill(pid, SIGKILL); /* the return of the Nth */
		else
			go_on(tid, status, tid == pid && nth && *count == nth);
	}
	perror("waitpid");
	exit(99);
}

/* Runs the workload, or with W NULL only opens the store, in a child that is killed. */
static long run_and_kill(struct job *j, const struct round_workload *w, long nth)
{
	int status;
	long count;
	pid_t pid = fork();

	if (pid == 0) {
		ptrace(PTRACE_TRACEME, 0, NULL, NULL);
		raise(SIGSTOP);
		if (stop_at_calls(j->all))
			_exit(98);
		if (w)
			round_run(&j->r, w->steps, w->count);
		else
			round_open(&j->r);
		_exit(0);
	}
	if (pid < 0)
		exit(99);
	status = drive(pid, nth, &count);
	if (WIFSIGNALED(status) ? WTERMSIG(status) != SIGKILL || count != nth : status != 0)
		round_complain(&j->r, "the child ended with status %#x", (unsigned)status);
	return count;
}

/* A snapshot more must work as well. */
static void use(struct round *r)
{
	static const struct round_step steps[] = {
	    {ROUND_FREEZE, "z"},
	    {ROUND_WRITE, "d", .off = 30, .len = 7000, .seed = 99},
	    {ROUND_READ, "z"},
	};

	for (size_t i = 0; i < FF_ARRAY_SIZE(steps); i++) {
		int e = round_find_name(&r->model->live, "d") < 0 && i == 1
		            ? 0
		            : round_step(r, &steps[i]);

		if (e)
			round_complain(r, "afterwards op %d gives %s", steps[i].op, strerror(-e));
	}
}

static void look_after(struct round *r)
{
	int e = round_open(r);

	if (e) {
		round_complain(r, "it cannot be opened again: %s", strerror(-e));
		return;
	}
	round_verify(r, ROUND_MIXED);
	use(r);
	round_verify(r, 0);
	round_end(r);
}

static void prepare(struct job *j, const struct instance *c, char label[200])
{
	j->r.config.durable = c->way & 1;
	j->r.config.inside = c->way & 2;
	j->r.config.policy = FF_BREAK_GUEST_WRITE;
	snprintf(label, 200, "%s --case=%s:%u:%ld:%ld%s", j->program,
	         round_workloads[c->workload].name, c->way, c->first, c->second,
	         j->all ? " --all" : "");
	j->r.label = label;
	round_reset(&j->r);
}

static void run_case(struct job *j, const struct instance *c)
{
	char label[200];
	int status = 0;
	pid_t pid;

	prepare(j, c, label);
	run_and_kill(j, &round_workloads[c->workload], c->first);
	if (c->second)
		run_and_kill(j, NULL, c->second);
	/* In a process of its own: what is wrong may end it. */
	pid = fork();
	if (pid == 0) {
		alarm(60);
		look_after(&j->r);
		_exit(0);
	}
	if (pid < 0 || waitpid(pid, &status, 0) != pid || status)
		round_complain(&j->r, "afterwards: status %#x", (unsigned)status);
	j->cases++;
	j->failed += j->r.model->complaints != 0;
}

/* How many calls there are. */
static void count_calls(struct job *j)
{
	char label[200];

	for (unsigned w = 0; w < round_workload_count; w++)
		for (unsigned way = 0; way < WAYS; way++) {
			struct instance c = {.workload = w, .way = way};

			prepare(j, &c, label);
			j->calls[w][way] = run_and_kill(j, &round_workloads[w], 0);
			if (j->r.model->complaints)
				exit(99);
			prepare(j, &c, label);
			run_and_kill(j, &round_workloads[w], j->calls[w][way] / 2);
			j->again[w][way] = run_and_kill(j, NULL, 0);
			if (j->r.model->complaints)
				exit(99);
		}
}

/* Every Nth is this job's. */
static void run_all(struct job *j)
{
	struct rng rng = {j->seed};
	long at = 0, part = (long)(j->seed % STEP);

	for (unsigned w = 0; w < round_workload_count; w++)
		for (unsigned way = 0; way < WAYS; way++)
			for (long n = 1; n <= j->calls[w][way]; n++)
				if ((j->all || way == 0 || n % STEP == part) &&
				    at++ % j->jobs == j->number)
					run_case(j, &(struct instance){w, way, n, 0});
	for (long i = 0; i < j->twice; i++) {
		struct instance c = {
		    .workload = (unsigned)rng_below(&rng, round_workload_count),
		    .way = (unsigned)rng_below(&rng, WAYS),
		};

		c.first = 1 + (long)rng_below(&rng, (uint64_t)j->calls[c.workload][c.way]);
		/* an opening after another N may have more calls, or fewer: then it ends */
		c.second = 1 + (long)rng_below(&rng, (uint64_t)j->again[c.workload][c.way] * 3 / 2);
		if (i % j->jobs == j->number)
			run_case(j, &c);
	}
}

static int run_jobs(struct job *j)
{
	long *results = mmap(NULL, 2 * sizeof(long) * MAX_JOBS, PROT_READ | PROT_WRITE,
	                     MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	long cases = 0, failed = 0;
	int status, ended = 0;

	for (j->number = 0; j->number < j->jobs; j->number++) {
		if (fork() != 0)
			continue;
		round_init(&j->r, &j->r.config);
		count_calls(j);
		run_all(j);
		round_done(&j->r);
		results[2 * j->number] = j->cases;
		results[2 * j->number + 1] = j->failed;
		_exit(0);
	}
	for (unsigned i = 0; i < j->jobs; i++)
		if (wait(&status) < 0 || status)
			ended = 1;
	for (unsigned i = 0; i < j->jobs; i++) {
		cases += results[2 * i];
		failed += results[2 * i + 1];
	}
	printf("%ld cases, %ld wrong%s\n", cases, failed, ended ? "; a job failed" : "");
	return failed || ended || !cases;
}

static int run_one(struct job *j, const char *text)
{
	struct instance c = {0};
	char name[32];

	if (sscanf(text, "%31[a-z]:%u:%ld:%ld", name, &c.way, &c.first, &c.second) != 4 ||
	    c.way >= WAYS)
		return 2;
	while (c.workload < round_workload_count &&
	       strcmp(name, round_workloads[c.workload].name) != 0)
		c.workload++;
	if (c.workload == round_workload_count)
		return 2;
	round_init(&j->r, &j->r.config);
	run_case(j, &c);
	round_done(&j->r);
	printf("%s\n", j->failed ? "wrong" : "right");
	return j->failed != 0;
}

static bool can_trace(void)
{
	pid_t pid = fork();
	int status;

	if (pid == 0) {
		if (ptrace(PTRACE_TRACEME, 0, NULL, NULL) < 0)
			_exit(1);
		raise(SIGSTOP);
		_exit(stop_at_calls(false) != 0);
	}
	if (waitpid(pid, &status, 0) != pid || !WIFSTOPPED(status))
		return false;
	ptrace(PTRACE_CONT, pid, NULL, NULL);
	return waitpid(pid, &status, 0) == pid && status == 0;
}

int main(int argc, char **argv)
{
	static const struct option options[] = {
	    {"seed", 1, NULL, 's'}, {"twice", 1, NULL, 't'}, {"all", 0, NULL, 'a'},
	    {"jobs", 1, NULL, 'j'}, {"dir", 1, NULL, 'd'},   {"case", 1, NULL, 'c'},
	    {NULL, 0, NULL, 0},
	};
	struct job j = {.program = argv[0], .seed = (uint64_t)time(NULL), .twice = 400, .jobs = 2};
	const char *one = NULL;
	int o;

	while ((o = getopt_long(argc, argv, "", options, NULL)) != -1) {
		if (o == 's')
			j.seed = strtoull(optarg, NULL, 0);
		else if (o == 't')
			j.twice = atol(optarg);
		else if (o == 'a')
			j.all = true;
		else if (o == 'j')
			j.jobs = (unsigned)FF_MAX(1, FF_MIN(atoi(optarg), MAX_JOBS));
		else if (o == 'd')
			j.r.config.dir = optarg;
		else if (o == 'c')
			one = optarg;
		else
			return 2;
	}
	if (!can_trace()) {
		printf("skipped: a process may not trace its children here\n");
		return 77;
	}
	if (one)
		return run_one(&j, one);
	printf("boundary: --seed=%llu --twice=%ld\n", (unsigned long long)j.seed, j.twice);
	fflush(stdout);
	return run_jobs(&j);
}
