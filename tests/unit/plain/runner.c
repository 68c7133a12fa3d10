/* The runner behind the stand-in: see criterion/criterion.h beside this file. */
#include "criterion/criterion.h"

#include <fnmatch.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

enum { FAILED = 1, SKIPPED = 77, MAX_SUITES = 32 };

static struct plain_test *tests;
static struct {
	const char *suite;
	struct plain_options options;
} suites[MAX_SUITES];
static size_t suite_count;

void plain_register(struct plain_test *test)
{
	test->next = tests;
	tests = test;
}

void plain_register_suite(const char *suite, const struct plain_options *options)
{
	suites[suite_count].suite = suite;
	suites[suite_count++].options = *options;
}

void plain_fail(const char *file, int line, const char *what, const char *fmt, ...)
{
	va_list ap;

	fprintf(stderr, "%s:%d: failed: %s ", file, line, what);
	va_start(ap, fmt);
	vfprintf(stderr, fmt, ap);
	va_end(ap);
	fputc('\n', stderr);
	fflush(NULL);
	_exit(FAILED);
}

void plain_skip(const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	vfprintf(stderr, fmt, ap);
	va_end(ap);
	fputc('\n', stderr);
	_exit(SKIPPED);
}

static int run_one(const struct plain_test *t, const struct plain_options *o, void *param)
{
	int status;
	pid_t pid = fork();

	if (pid == 0) {
		if (o->init)
			o->init();
		t->run(param);
		if (o->fini)
			o->fini();
		exit(0); /* so that the sanitizer has its say */
	}
	if (pid < 0 || waitpid(pid, &status, 0) != pid)
		return FAILED;
	return WIFEXITED(status) ? WEXITSTATUS(status) : FAILED;
}

int main(int argc, char **argv)
{
	const char *filter = argc == 3 && strcmp(argv[1], "--filter") == 0 ? argv[2] : "*";
	unsigned tested = 0, failing = 0, skipped = 0;

	for (const struct plain_test *t = tests; t; t = t->next) {
		struct plain_params p = {0, 1, NULL};
		struct plain_options o = t->options;
		char full[200];

		snprintf(full, sizeof full, "%s/%s", t->suite, t->name);
		if (fnmatch(filter, full, 0) != 0)
			continue;
		for (size_t i = 0; i < suite_count; i++)
			if (strcmp(suites[i].suite, t->suite) == 0) {
				o.init = o.init ? o.init : suites[i].options.init;
				o.fini = o.fini ? o.fini : suites[i].options.fini;
			}
		if (t->params)
			p = t->params();
		for (size_t i = 0; i < p.count; i++) {
			int r = run_one(t, &o, (char *)p.params + i * p.size);

			tested++;
			skipped += r == SKIPPED;
			failing += r != 0 && r != SKIPPED;
			if (r && r != SKIPPED)
				fprintf(stderr, "%s::%s (parameter %zu) fails\n", t->suite, t->name,
				        i);
		}
	}
	printf("[====] Synthesis: Tested: %u | Passing: %u | Failing: %u | Skipped: %u\n", tested,
	       tested - failing - skipped, failing, skipped);
	return failing || !tested ? 1 : 0;
}
