/*
 * One case: its steps are run by a child, each is judged by the fault, and its parent looks after
 * it.
 */
#include "nth_case.h"

#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/lsan_interface.h>
#endif

#include "cow/engine.h"
#include "fault_calls.h"
#include "ff_util.h"

enum { PATIENCE_S = 120 };

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

const unsigned case_errors = FF_ARRAY_SIZE(errors);

bool case_is_memory(unsigned error)
{
	return errors[error].side == FAULT_MEMORY;
}

void case_name(const struct instance *c, char out[128])
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
		if (!snap || snap->state == ROUND_COMING)
			return -ENOENT;
		return s->op == ROUND_CHECKPOINT && r->may_damage ? -EIO : 0;
	case ROUND_READ:
	case ROUND_SINCE:
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
	else if (!e && due && s->op != ROUND_READ && s->op != ROUND_SINCE &&
	         s->op != ROUND_FREEZE && s->op != ROUND_DROP && s->op != ROUND_RELEASE &&
	         s->op != ROUND_CHECKPOINT)
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
	round_end(r);
}

void case_run(struct round *r, const struct instance *c, const char *program)
{
	char name[128], label[256];

	case_name(c, name);
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
}

long case_calls(struct round *r, unsigned workload, unsigned error, bool durable)
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

bool case_parse(const char *text, struct instance *c)
{
	char name[128], *copy = strdup(text), *end = strrchr(copy, ':');

	if (end)
		c->nth = atol(end + 1);
	for (c->workload = 0; c->workload < round_workload_count; c->workload++)
		for (c->error = 0; c->error < FF_ARRAY_SIZE(errors); c->error++)
			for (unsigned v = 0; v < 2 * CASE_VARIANTS; v++) {
				c->durable = v & 1;
				c->guest = v & 2;
				c->all = v & 4;
				c->end = v & 8 ? KILLED : HEALED;
				case_name(c, name);
				if (strcmp(name, text) == 0) {
					free(copy);
					return true;
				}
			}
	free(copy);
	return false;
}
