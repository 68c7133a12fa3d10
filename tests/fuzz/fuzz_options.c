/*
 * The command line: an input is the arguments, separated by NUL or newline. What is accepted must
 * be within the ranges that the manual gives, the globs must be ones that end, and nothing may
 * leak.
 */
#include <fnmatch.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <fuse_log.h>

#include "ff_log.h"
#include "ff_util.h"
#include "fusefs/fuse_api.h"
#include "fusefs/options.h"
#include "fuzz.h"

enum { MAX_ARGS = 64 };

static void quiet(enum fuse_log_level level, const char *fmt, va_list ap)
{
}

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
	fuse_set_log_func(quiet);
	ff_log_threshold(FF_LOG_ERROR - 1);
	return 0;
}

static bool component(const char *s, size_t max)
{
	size_t n = strlen(s);

	return n >= 1 && n <= max && !strchr(s, '/') && strcmp(s, ".") && strcmp(s, "..") &&
	       strcmp(s, FF_HIDDEN_NAME);
}

static void check(const struct options *o)
{
	char name[256];

	FUZZ_CHECK(o->cluster_size >= 4096 && o->cluster_size <= 2 << 20);
	FUZZ_CHECK((o->cluster_size & (o->cluster_size - 1)) == 0);
	FUZZ_CHECK(o->policy == FF_BREAK_SNAPSHOT || o->policy == FF_BREAK_GUEST_WRITE);
	FUZZ_CHECK(o->cbw_timeout <= 86400);
	FUZZ_CHECK(o->fleece_limit <= INT64_MAX && o->fleece_reserve <= INT64_MAX);
	FUZZ_CHECK(o->max_threads <= 10000 && o->max_idle_threads <= 10000);
	FUZZ_CHECK(component(o->snapdir, 255));
	FUZZ_CHECK(!o->snapshot ||
	           (component(o->snapshot, FF_SNAP_NAME_MAX) && *o->snapshot != '.'));
	FUZZ_CHECK(!o->fleece_dir || *o->fleece_dir);
	FUZZ_CHECK(!o->debug || o->foreground);
	FUZZ_CHECK(o->help || o->version || (o->source && o->mountpoint));
	memset(name, 'a', sizeof name);
	name[sizeof name - 1] = '\0';
	for (size_t i = 0; i < o->exclude_count; i++) {
		FUZZ_CHECK(*o->exclude[i]);
		fnmatch(o->exclude[i], name, 0);
		fnmatch(o->exclude[i], "dir/disk.raw", 0);
	}
	for (size_t i = 0; i < o->device_count; i++) {
		FUZZ_CHECK(strncmp(o->device[i], "/dev/", 5) == 0);
		fnmatch(o->device[i], "/dev/vg0/vm-1", FNM_PATHNAME | FNM_PERIOD);
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct fuse_args args;
	struct options o;
	char *argv[MAX_ARGS + 1] = {"fleecefs"};
	int argc = 1;
	char *text = malloc(size + 1), *p = text;

	FUZZ_CHECK(text != NULL);
	memcpy(text, data, size);
	text[size] = '\0';
	for (size_t i = 0; i < size; i++)
		if (text[i] == '\n')
			text[i] = '\0';
	for (; p < text + size && argc < MAX_ARGS; p += strlen(p) + 1)
		argv[argc++] = p;
	if (options_parse(argc, argv, &o, &args) == 0)
		check(&o);
	options_free(&o);
	fuse_opt_free_args(&args);
	free(text);
	return 0;
}
