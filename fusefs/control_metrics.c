/*
 * metrics: what status.json says, as OpenMetrics text 1.0. Its families are told in fleecefs(8).
 *
 * A family's samples must stand together, so everything is collected first and written after that.
 * Names are made UTF-8 for their labels; two that would become the same are told apart by a label
 * that has their bytes.
 */
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "ff_util.h"
#include "fusefs/control.h"
#include "fusefs/fs.h"
#include "fusefs/options.h"

/* What a snapshot or a disk has. */
struct row {
	char *labels; /* without braces; owned */
	enum ff_view_state state;
	uint64_t frozen, read, preserved, allocated;
	struct ff_waits waits;
	/* of a snapshot alone */
	double created;
	uint64_t open_files, files;
};

struct rows {
	struct row *list;
	size_t count, room;
};

struct writer {
	struct rows snaps, disks;
	size_t labelled; /* disks that know their snapshot's name */
};

static void rows_free(struct rows *rows)
{
	for (size_t i = 0; i < rows->count; i++)
		free(rows->list[i].labels);
	free(rows->list);
}

/* Takes labels over, also on failure. */
static int rows_add(struct rows *rows, const struct row *row)
{
	if (row->labels && rows->count == rows->room) {
		size_t room = rows->room ? 2 * rows->room : 64;
		struct row *list = reallocarray(rows->list, room, sizeof *list);

		if (list) {
			rows->list = list;
			rows->room = room;
		}
	}
	if (!row->labels || rows->count == rows->room) {
		free(row->labels);
		return -ENOMEM;
	}
	rows->list[rows->count++] = *row;
	return 0;
}

static void put_escaped(FILE *f, const char *s)
{
	for (; *s; s++)
		if (*s == '\n')
			fputs("\\n", f);
		else if (*s == '"' || *s == '\\')
			fprintf(f, "\\%c", *s);
		else
			putc(*s, f);
}

/* KEY="NAME", and KEY_hex where that is not all; malloc'd, or NULL. */
static char *label(const char *key, const char *name)
{
	ff_autofree char *utf8 = NULL, *hex = NULL;
	char *out = NULL;
	size_t len;
	bool exact;
	FILE *f;

	utf8 = control_utf8(name, &exact);
	hex = exact ? NULL : control_hex(name);
	f = utf8 && (exact || hex) ? open_memstream(&out, &len) : NULL;
	if (!f)
		return NULL;
	fprintf(f, "%s=\"", key);
	put_escaped(f, utf8);
	putc('"', f);
	if (!exact)
		fprintf(f, ",%s_hex=\"%s\"", key, hex);
	if (fclose(f) != 0) {
		free(out);
		return NULL;
	}
	return out;
}

static int add_disk(void *ctx, const struct ff_disk_status *d)
{
	struct writer *w = ctx;
	struct row row = {
	    .labels = label("disk", d->path),
	    .state = d->state,
	    .frozen = d->frozen_bytes,
	    .read = d->read_bytes,
	    .preserved = d->preserved_bytes,
	    .allocated = d->allocated_bytes,
	    .waits = d->waits,
	};

	return rows_add(&w->disks, &row);
}

static int add_snap(void *ctx, const struct ff_snap_status *s)
{
	struct writer *w = ctx;
	struct row row = {
	    .labels = label("snapshot", s->name),
	    .state = s->state,
	    .frozen = s->frozen_bytes,
	    .read = s->read_bytes,
	    .preserved = s->preserved_bytes,
	    .allocated = s->allocated_bytes,
	    .waits = s->waits,
	    .created = (double)s->created.tv_sec + (double)s->created.tv_nsec / 1e9,
	    .open_files = s->open_files,
	    .files = s->files,
	};

	for (; row.labels && w->labelled < w->disks.count; w->labelled++) {
		struct row *disk = &w->disks.list[w->labelled];
		char *both;

		if (asprintf(&both, "%s,%s", row.labels, disk->labels) < 0) {
			free(row.labels);
			return -ENOMEM;
		}
		free(disk->labels);
		disk->labels = both;
	}
	return rows_add(&w->snaps, &row);
}

/* --- writing --- */

struct family {
	const char *name, *type, *unit; /* unit NULL: none; else the name ends with it */
	const char *help;
};

static void put_family(FILE *f, const struct family *m)
{
	fprintf(f, "# TYPE fleecefs_%s %s\n", m->name, m->type);
	if (m->unit)
		fprintf(f, "# UNIT fleecefs_%s %s\n", m->name, m->unit);
	fprintf(f, "# HELP fleecefs_%s %s\n", m->name, m->help);
}

static const char *suffix(const struct family *m)
{
	return strcmp(m->type, "counter") == 0 ? "_total" : "";
}

/* A whole number as such, else to the microsecond. */
static void put_value(FILE *f, double value)
{
	fprintf(f, value == (double)(int64_t)value ? " %.0f\n" : " %.6f\n", value);
}

static void put_one(FILE *f, const struct family *m, double value)
{
	put_family(f, m);
	fprintf(f, "fleecefs_%s%s", m->name, suffix(m));
	put_value(f, value);
}

static void put_states(FILE *f, const char *of, const struct rows *rows, const char *help)
{
	static const char *const words[] = {"ok", "checkpoint", "broken", "torn"};

	fprintf(f, "# TYPE fleecefs_%s_state stateset\n# HELP fleecefs_%s_state %s\n", of, of,
	        help);
	for (size_t i = 0; i < rows->count; i++)
		for (size_t k = 0; k < FF_ARRAY_SIZE(words); k++)
			fprintf(f, "fleecefs_%s_state{%s,fleecefs_%s_state=\"%s\"} %d\n", of,
			        rows->list[i].labels, of, words[k], k == rows->list[i].state);
}

/* What snapshots and disks have in common, in the order of struct row. */
static double value_of(const struct row *r, size_t what)
{
	switch (what) {
	case 0:
		return (double)r->frozen;
	case 1:
		return (double)r->read;
	case 2:
		return (double)r->preserved;
	case 3:
		return (double)r->allocated;
	case 4:
		return (double)r->waits.saves;
	case 5:
		return (double)r->waits.longest_us / 1e6;
	case 6:
		return (double)r->waits.p99_us / 1e6;
	case 7:
		return r->created;
	case 8:
		return (double)r->open_files;
	default:
		return (double)r->files;
	}
}

static void put_rows(FILE *f, const struct rows *rows, const struct family *families, size_t count)
{
	for (size_t what = 0; what < count; what++) {
		const struct family *m = &families[what];

		put_family(f, m);
		for (size_t i = 0; i < rows->count; i++) {
			fprintf(f, "fleecefs_%s%s{%s}", m->name, suffix(m), rows->list[i].labels);
			put_value(f, value_of(&rows->list[i], what));
		}
	}
}

static void put_snapshots(FILE *f, const struct rows *snaps)
{
	static const struct family families[] = {
	    {"snapshot_frozen_bytes", "gauge", "bytes", "Sizes of the frozen files."},
	    {"snapshot_read_bytes", "counter", "bytes", "Given to readers of the frozen files."},
	    {"snapshot_preserved_bytes", "gauge", "bytes", "Old data that its images hold."},
	    {"snapshot_allocated_bytes", "gauge", "bytes", "Space that its images take."},
	    {"snapshot_saves", "counter", NULL, "Guest operations that had to save to it first."},
	    {"snapshot_longest_wait_seconds", "gauge", "seconds",
	     "Longest that one of these was delayed."},
	    {"snapshot_p99_wait_seconds", "gauge", "seconds",
	     "99 of 100 of these were not delayed longer."},
	    {"snapshot_created_timestamp_seconds", "gauge", "seconds", "When it was made."},
	    {"snapshot_open_files", "gauge", NULL, "Frozen files that are open."},
	    {"snapshot_files", "gauge", NULL, "Frozen regular files."},
	};

	put_states(f, "snapshot", snaps, "The worst state of its disks.");
	put_rows(f, snaps, families, FF_ARRAY_SIZE(families));
}

static void put_disks(FILE *f, const struct rows *disks)
{
	static const struct family families[] = {
	    {"disk_frozen_bytes", "gauge", "bytes", "Size of the frozen file."},
	    {"disk_read_bytes", "counter", "bytes", "Given to its readers."},
	    {"disk_preserved_bytes", "gauge", "bytes", "Old data that its image holds."},
	    {"disk_allocated_bytes", "gauge", "bytes", "Space that its image takes."},
	    {"disk_saves", "counter", NULL, "Guest operations that had to save to it first."},
	    {"disk_longest_wait_seconds", "gauge", "seconds",
	     "Longest that one of these was delayed."},
	    {"disk_p99_wait_seconds", "gauge", "seconds",
	     "99 of 100 of these were not delayed longer."},
	};

	put_states(f, "disk", disks, "Can the frozen file be read?");
	put_rows(f, disks, families, FF_ARRAY_SIZE(families));
}

static void put_store(FILE *f, const struct fs *fs, const struct ff_store_status *st)
{
	const struct options *o = fs->options;
	double left = control_seconds_to_full(st->growth, (double)st->free_bytes);

#define PUT(name, type, unit, help, value)                                                         \
	put_one(f, &(const struct family){name, type, unit, help}, (double)(value))
	fprintf(f, "# TYPE fleecefs_build info\n# HELP fleecefs_build The program.\n"
	           "fleecefs_build_info{version=\"" FF_VERSION "\"} 1\n");
	PUT("start_timestamp_seconds", "gauge", "seconds", "When the mount was made.",
	    (double)fs->started.tv_sec + (double)fs->started.tv_nsec / 1e9);
	PUT("fleece_used_bytes", "gauge", "bytes", "Space that all fleecing images take.",
	    st->used_bytes);
	if (o->fleece_limit)
		PUT("fleece_limit_bytes", "gauge", "bytes", "The option fleece-limit.",
		    o->fleece_limit);
	PUT("fleece_reserve_bytes", "gauge", "bytes", "The option fleece-reserve.",
	    o->fleece_reserve);
	PUT("fleece_free_bytes", "gauge", "bytes", "What may still be used under both.",
	    st->free_bytes);
	PUT("fleece_growth_bytes_per_second", "gauge", "bytes_per_second",
	    "Average growth, over about the last minute.", st->growth);
	if (left >= 0)
		PUT("fleece_full_seconds", "gauge", "seconds",
		    "Until all is used, at the present rate.", left);
	PUT("guest_saves", "counter", NULL, "Guest operations that had to save old data first.",
	    st->waits.saves);
	PUT("guest_saved_bytes", "counter", "bytes", "Old data saved.", st->saved_bytes);
	PUT("guest_failed_saves", "counter", NULL,
	    "Guest operations whose old data could not be saved.", st->failed);
	PUT("guest_longest_wait_seconds", "gauge", "seconds",
	    "Longest that a guest operation was delayed by saving.", st->waits.longest_us / 1e6);
	PUT("guest_p99_wait_seconds", "gauge", "seconds",
	    "99 of 100 that saved were not delayed longer.", st->waits.p99_us / 1e6);
#undef PUT
}

int control_metrics(struct fs *fs, char **out, size_t *len)
{
	struct writer w = {0};
	const struct ff_status_visitor visitor = {add_disk, add_snap, &w};
	struct ff_store_status st;
	FILE *f = NULL;
	int r;

	ff_store_status(fs->store, &st);
	r = ff_store_visit(fs->store, &visitor);
	*out = NULL;
	if (!r && !(f = open_memstream(out, len)))
		r = -ENOMEM;
	if (!r) {
		put_store(f, fs, &st);
		put_snapshots(f, &w.snaps);
		put_disks(f, &w.disks);
		fputs("# EOF\n", f);
		if (fclose(f) != 0) {
			free(*out);
			r = -ENOMEM;
		}
	}
	rows_free(&w.snaps);
	rows_free(&w.disks);
	return r;
}
