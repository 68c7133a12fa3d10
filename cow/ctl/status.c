/*
 * status: the mount's status.json as a table for 80 columns.
 *
 * SIGINT and SIGTERM are blocked while it watches and taken between two pictures, so that a picture
 * is always whole.
 */
#include <errno.h>
#include <getopt.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "cow/ctl/ctl.h"
#include "ff_util.h"

enum { COLUMNS = 80, NAME_COLUMNS = 22, DISKS_SHOWN = 8 };

#define HOME  "\033[H"
#define EOL   "\033[K"
#define BELOW "\033[J"

static void print_head(FILE *out, const struct place *p)
{
	const json_t *s = p->status;
	ff_autofree char *line = NULL;

	fprintf(out, "fleecefs %.20s, pid %.0f, up %s\n", json_text(s, "version"),
	        json_num(s, "pid"), text_span(json_num(s, "uptime_seconds")).s);
	if (asprintf(&line, "%s on %s", p->source_path, p->mountpoint) < 0)
		line = NULL;
	text_cut(out, line ? line : "", COLUMNS);
	fputc('\n', out);
}

/* What has been used of what may be: of the limit, or of what the filesystem has left. */
static void print_fleece(FILE *out, const struct place *p)
{
	const json_t *f = json_object_get(p->status, "fleece");
	double used = json_num(f, "used_bytes"), available = json_num(f, "free_bytes");
	double limit = json_num(f, "limit_bytes"), all = used + available;
	double part = all > 0 ? used / all : 1;

	fprintf(out, "fleece  %s %3.0f %%  %s used, %s free", text_bar(part, 20).s,
	        part < 1 ? part * 100 : 100, text_size(used).s, text_size(available).s);
	if (json_has(f, "limit_bytes"))
		fprintf(out, ", limit %s", text_size(limit).s);
	fputc('\n', out);
	if (json_has(f, "seconds_to_full"))
		fprintf(out, "        full in %s at %s/s\n",
		        text_span(json_num(f, "seconds_to_full")).s,
		        text_size(json_num(f, "rate_bytes_per_second")).s);
}

static void print_guest(FILE *out, const struct place *p)
{
	const json_t *g = json_object_get(p->status, "guest");

	fprintf(out, "guest   %.0f saves, %s; longest wait %s, 99 %% within %s; failed: %.0f\n",
	        json_num(g, "saves"), text_size(json_num(g, "saved_bytes")).s,
	        text_wait(json_num(g, "longest_wait_us")).s,
	        text_wait(json_num(g, "p99_wait_us")).s, json_num(g, "failed_saves"));
}

static bool is_checkpoint(const json_t *o)
{
	return strcmp(json_text(o, "state"), "checkpoint") == 0;
}

/* Nothing was lost, or nothing that was not given up on purpose. */
static bool is_ok(const json_t *o)
{
	return is_checkpoint(o) || strcmp(json_text(o, "state"), "ok") == 0;
}

/* Why it is not ok, and which of its disks are not. */
static void print_reasons(FILE *out, const json_t *snap)
{
	const json_t *disks = json_object_get(snap, "disks"), *d;
	unsigned shown = 0, more = 0;
	size_t i;

	if (json_has(snap, "reason")) {
		fputs("  ", out);
		text_cut(out, json_text(snap, "reason"), COLUMNS - 2);
		fputc('\n', out);
	}
	json_array_foreach(disks, i, d)
	{
		ff_autofree char *line = NULL;

		if (is_ok(d))
			continue;
		if (shown++ >= DISKS_SHOWN) {
			more++;
			continue;
		}
		if (asprintf(&line, "%s: %s%s%s", json_text(d, "path"), json_text(d, "state"),
		             json_has(d, "reason") ? ": " : "", json_text(d, "reason")) < 0)
			line = NULL;
		fputs("  ", out);
		text_cut(out, line ? line : "", COLUMNS - 2);
		fputc('\n', out);
	}
	if (more)
		fprintf(out, "  and %u more\n", more);
}

static void print_snapshot(FILE *out, const json_t *s)
{
	double frozen = json_num(s, "frozen_bytes"), read = json_num(s, "read_bytes");
	double part = frozen > 0 ? read / frozen : 0;

	part = part < 1 ? part : 1;
	text_cell(out, json_text(s, "name"), NAME_COLUMNS);
	fprintf(out, " %6s ", text_span(json_num(s, "age_seconds")).s);
	text_cell(out, is_checkpoint(s) ? "chkpt" : json_text(s, "state"), 6);
	fprintf(out, " %5s %9s %s %3.0f%% %6s\n", text_size(frozen).s,
	        text_size(json_num(s, "preserved_bytes")).s, text_bar(part, 10).s, part * 100,
	        text_wait(json_num(s, "longest_wait_us")).s);
	if (!is_ok(s))
		print_reasons(out, s);
}

static void print_table(FILE *out, const struct place *p)
{
	const json_t *snaps = json_object_get(p->status, "snapshots"), *s;
	size_t i;

	print_head(out, p);
	print_fleece(out, p);
	print_guest(out, p);
	if (json_array_size(snaps) == 0) {
		fputs("\nno snapshots\n", out);
		return;
	}
	fprintf(out, "\n%-*s %6s %-6s %5s %9s %-12s %4s %6s\n", NAME_COLUMNS, "SNAPSHOT", "AGE",
	        "STATE", "SIZE", "PRESERVED", "BACKUP", "READ", "WAIT");
	json_array_foreach(snaps, i, s) print_snapshot(out, s);
}

static int print_json(const struct place *p)
{
	fputs(p->status_text, stdout);
	return 0;
}

/* One picture over the one before: each line is cleared behind its end. */
static int redraw(const struct place *p)
{
	char *text = NULL;
	size_t len = 0;
	FILE *f = open_memstream(&text, &len);

	if (!f)
		return ctl_fail("status", -ENOMEM);
	print_table(f, p);
	if (fclose(f) || !text) {
		free(text);
		return ctl_fail("status", -ENOMEM);
	}
	fputs(HOME, stdout);
	for (char *line = text, *end; (end = strchr(line, '\n')); line = end + 1)
		printf("%.*s" EOL "\n", (int)(end - line), line);
	fputs(BELOW, stdout);
	free(text);
	return 0;
}

static int watch(struct place *p, double seconds, bool json)
{
	struct timespec wait = {(time_t)seconds, (long)((seconds - (double)(time_t)seconds) * 1e9)};
	bool terminal = isatty(STDOUT_FILENO);
	sigset_t signals;
	int r = 0;

	sigemptyset(&signals);
	sigaddset(&signals, SIGINT);
	sigaddset(&signals, SIGTERM);
	sigprocmask(SIG_BLOCK, &signals, NULL);
	if (terminal && !json)
		fputs(HOME BELOW, stdout);
	while (!r) {
		if (json) {
			r = print_json(p);
		} else if (terminal) {
			r = redraw(p);
		} else {
			print_table(stdout, p);
			fputc('\n', stdout);
		}
		if (fflush(stdout))
			return CTL_IO;
		if (r || sigtimedwait(&signals, NULL, &wait) > 0)
			break;
		r = place_reload(p);
	}
	return r;
}

int cmd_status(int argc, char **argv)
{
	static const struct option options[] = {
	    {"json", no_argument, NULL, 'j'}, {"watch", optional_argument, NULL, 'w'}, {0}};
	struct place p = {.fleece_fd = -1};
	bool json = false, watching = false;
	double seconds = 2;
	int c, r;

	while ((c = getopt_long(argc, argv, "jw::", options, NULL)) != -1) {
		char *end = NULL;

		if (c == 'j')
			json = true;
		else if (c == 'w')
			watching = true;
		else
			return ctl_usage("status");
		if (c != 'w' || !optarg)
			continue;
		seconds = strtod(optarg, &end);
		if (end == optarg || *end || !(seconds >= .1 && seconds <= 86400)) {
			ctl_error("--watch=%s: seconds, 0.1 to 86400", optarg);
			return ctl_usage("status");
		}
	}
	if (argc - optind > 1)
		return ctl_usage("status");
	r = place_mount(argv[optind], &p);
	if (!r && watching)
		r = watch(&p, seconds, json);
	else if (!r && json)
		r = print_json(&p);
	else if (!r)
		print_table(stdout, &p);
	place_free(&p);
	return r;
}
