/*
 * list: a line for each snapshot, from a mount's status.json, or from the files of a fleece
 * directory.
 */
#include <errno.h>
#include <getopt.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "cow/ctl/ctl.h"
#include "cow/ctl/source.h"
#include "cow/ctl/view.h"
#include "ff_util.h"

/* An array of objects {name, created, state, disks, preserved_bytes}. */
static int add(json_t *list, const char *name, double created, const char *state, double disks,
               double preserved)
{
	json_t *o = json_pack("{s:f, s:s, s:I, s:I}", "created", created, "state", state, "disks",
	                      (json_int_t)disks, "preserved_bytes", (json_int_t)preserved);

	if (!o)
		return -ENOMEM;
	if (json_set_name(o, "name", name)) {
		json_decref(o);
		return -ENOMEM;
	}
	return json_array_append_new(list, o) ? -ENOMEM : 0;
}

static int from_status(const struct place *p, json_t *list)
{
	const json_t *snaps = json_object_get(p->status, "snapshots"), *s;
	size_t i;
	int r = 0;

	json_array_foreach(snaps, i, s)
	{
		if (!r)
			r = add(list, json_text(s, "name"), json_num(s, "created"),
			        json_text(s, "state"), json_num(s, "files"),
			        json_num(s, "preserved_bytes"));
		if (!r && json_has(s, "name_hex"))
			json_object_set(json_array_get(list, json_array_size(list) - 1), "name_hex",
			                json_object_get(s, "name_hex"));
	}
	return r;
}

/* --- a fleece directory ------------------------------------------------------------------------
 */

static int count(void *ctx, uint64_t cluster, uint64_t host)
{
	++*(uint64_t *)ctx;
	return 0;
}

static double preserved(int fleece_fd, const struct inv_image *img)
{
	uint64_t clusters = 0;
	const char *why;
	struct view v;

	if (view_open(fleece_fd, img->path, &v, &why))
		return 0;
	view_saved(&v, count, &clusters);
	view_close(&v);
	return (double)clusters * v.l.cluster_size;
}

static const char *state_of(const struct inventory *inv, const struct inv_dir *d,
                            const struct source *src)
{
	if (d->error)
		return "damaged";
	if (src->told && !d->manifest.durable &&
	    (src->ending == ENDED_TORN || src->ending == ENDED_FAILED))
		return "torn";
	for (uint32_t k = 0; k < d->manifest.tree->disk_count; k++) {
		size_t i = d->of_disk[k];

		if (i == SIZE_MAX || inv->images[i].error || inv->images[i].desc.broken)
			return "broken";
	}
	return d->checkpoint ? "checkpoint" : "ok";
}

static int by_age(const void *a, const void *b)
{
	const struct inv_dir *x = *(const struct inv_dir *const *)a;
	const struct inv_dir *y = *(const struct inv_dir *const *)b;

	return FF_ORDER(x->manifest.seq, y->manifest.seq);
}

static int add_dir(int fleece_fd, const struct inventory *inv, const struct inv_dir *d,
                   const struct source *src, json_t *list)
{
	double bytes = 0;

	for (size_t i = d->first; i < d->first + d->count; i++)
		if (!inv->images[i].error)
			bytes += preserved(fleece_fd, &inv->images[i]);
	return add(list, d->name, (double)d->made.tv_sec + (double)d->made.tv_nsec / 1e9,
	           state_of(inv, d, src), d->error ? 0 : d->manifest.tree->disk_count, bytes);
}

static int from_files(struct place *p, json_t *list)
{
	ff_autofree const struct inv_dir **dirs = NULL;
	struct source src = {.fd = -1};
	struct inventory inv;
	size_t n = 0;
	int r = inventory_read(p->fleece_fd, &inv);

	if (r)
		return r;
	r = p->live ? 0 : source_find(p->fleece_fd, p->fleece_path, &inv, NULL, &src);
	dirs = calloc(inv.dir_count + 1, sizeof *dirs);
	if (!dirs)
		r = -ENOMEM;
	for (size_t i = 0; !r && i < inv.dir_count; i++)
		if (inv.dirs[i].kind == INV_SNAPSHOT)
			dirs[n++] = &inv.dirs[i];
	if (n)
		qsort(dirs, n, sizeof *dirs, by_age);
	for (size_t i = 0; !r && i < n; i++)
		r = add_dir(p->fleece_fd, &inv, dirs[i], &src, list);
	source_free(&src);
	inventory_free(&inv);
	return r;
}

/* --- showing -----------------------------------------------------------------------------------
 */

static void print(const json_t *list)
{
	const json_t *o;
	size_t i;

	if (json_array_size(list))
		printf("%-29s %-19s  %-10s %7s %10s\n", "SNAPSHOT", "CREATED", "STATE", "DISKS",
		       "PRESERVED");
	json_array_foreach(list, i, o)
	{
		time_t when = (time_t)json_num(o, "created");
		char text[32] = "?";
		struct tm tm;

		if (localtime_r(&when, &tm))
			strftime(text, sizeof text, "%Y-%m-%d %H:%M:%S", &tm);
		text_cell(stdout, json_text(o, "name"), 29);
		printf(" %-19s  ", text);
		text_cell(stdout, json_text(o, "state"), 10);
		printf(" %7.0f %10s\n", json_num(o, "disks"),
		       text_size(json_num(o, "preserved_bytes")).s);
	}
}

static int show(struct place *p, bool json)
{
	json_t *list = json_array();
	int r = !list ? -ENOMEM : p->status ? from_status(p, list) : from_files(p, list);

	if (!r && json) {
		json_dumpf(list, stdout, JSON_INDENT(1) | JSON_SORT_KEYS);
		fputc('\n', stdout);
	} else if (!r) {
		print(list);
	}
	json_decref(list);
	return r ? ctl_fail(p->fleece_path, r) : 0;
}

int cmd_list(int argc, char **argv)
{
	static const struct option options[] = {{"json", no_argument, NULL, 'j'}, {0}};
	struct place p = {.fleece_fd = -1};
	bool json = false;
	int c, r;

	while ((c = getopt_long(argc, argv, "j", options, NULL)) != -1) {
		if (c != 'j')
			return ctl_usage("list");
		json = true;
	}
	if (argc - optind > 1)
		return ctl_usage("list");
	r = place_any(argv[optind], &p);
	if (!r)
		r = show(&p, json);
	place_free(&p);
	return r;
}
