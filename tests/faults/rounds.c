/*
 * The workloads as they are, without any fault: all must succeed, and be seen right after each
 * single step, after a close and after a death; and the harness must see it when they are not.
 *
 *	rounds [--dir=DIR] [--every=N]
 *
 * --every=N: a death after every Nth step only, after another one in each of the four ways.
 */
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "ff_util.h"
#include "round.h"

static void run_all(struct round *r, const struct round_workload *w)
{
	for (size_t i = 0; i < w->count; i++) {
		const struct round_step *s = &w->steps[i];
		int e = round_step(r, s);

		if (e && !(s->op == ROUND_ZERO && e == -EOPNOTSUPP))
			round_complain(r, "%s failed: %s", s->name ? s->name : "", strerror(-e));
		round_verify(r, 0);
	}
}

/* The first COUNT steps by a process that then dies, in the middle of nothing. */
static void die_after(struct round *r, const struct round_workload *w, size_t count)
{
	int status = 0;
	pid_t pid = fork();

	if (pid == 0) {
		round_run(r, w->steps, count);
		_exit(0);
	}
	if (waitpid(pid, &status, 0) != pid || status)
		round_complain(r, "a child ended with status %x", (unsigned)status);
}

static void reopen(struct round *r)
{
	int e = round_open(r);

	if (e) {
		round_complain(r, "cannot be opened: %s", strerror(-e));
		return;
	}
	round_verify(r, 0);
	round_drop_all(r);
	e = round_close(r);
	if (e)
		round_complain(r, "cannot be closed: %s", strerror(-e));
	round_verify(r, 0);
}

/* Damages a byte where DIR/NAME has one. */
static void damage(struct round *r, const char *name)
{
	int fd = openat(r->source_fd, name, O_RDWR);
	char c = 0;

	if (fd < 0 || pread(fd, &c, 1, 100) != 1)
		_exit(99);
	c ^= 1;
	if (pwrite(fd, &c, 1, 100) != 1)
		_exit(99);
	close(fd);
}

/* What the harness must complain of. */
static unsigned blind(struct round *r)
{
	static const struct round_step steps[] = {{ROUND_OPEN}, {ROUND_FREEZE, "s1"}};
	unsigned bad = 0, seen;

	r->label = "wanted";
	round_run(r, steps, FF_ARRAY_SIZE(steps));
	damage(r, "a"); /* live, and through it the view */
	seen = round_verify(r, 0);
	bad += seen != 2;
	damage(r, "a");
	bad += round_verify(r, 0) != 0;
	r->model->snaps[0].broken[1] = true;
	bad += round_verify(r, 0) != 1;
	round_find_snap(r, "s1")->state = ROUND_FREE;
	bad += round_verify(r, 0) != 1; /* one too many */
	round_close(r);
	return bad;
}

int main(int argc, char **argv)
{
	struct round_config config = {.policy = FF_BREAK_GUEST_WRITE};
	unsigned wrong = 0, runs = 0, unseen = 0;
	struct round r;
	char label[80];
	size_t every = 1;

	for (int i = 1; i < argc; i++) {
		if (strncmp(argv[i], "--dir=", 6) == 0)
			config.dir = argv[i] + 6;
		else if (sscanf(argv[i], "--every=%zu", &every) != 1 || every < 1)
			errx(2, "usage: rounds [--dir=DIR] [--every=N]");
	}
	for (unsigned way = 0; way < 4; way++) {
		config.durable = way & 1;
		config.inside = way & 2;
		round_init(&r, &config);
		r.label = label;
		for (size_t i = 0; i < round_workload_count; i++) {
			const struct round_workload *w = &round_workloads[i];

			snprintf(label, sizeof label, "%s%s%s", w->name,
			         config.durable ? " durable" : "", config.inside ? " inside" : "");
			run_all(&r, w);
			round_close(&r);
			reopen(&r);
			wrong += r.model->complaints;
			for (size_t n = 1 + way % every; n <= w->count; n += every, runs++) {
				round_reset(&r);
				die_after(&r, w, n);
				reopen(&r);
				wrong += r.model->complaints;
			}
			round_reset(&r);
		}
		unseen += blind(&r);
		round_done(&r);
	}
	printf("%u rounds, %u complaints, %u faults not seen\n", runs, wrong, unseen);
	return wrong || unseen ? 1 : 0;
}
