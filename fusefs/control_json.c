/*
 * status.json. Its fields are told in fleecefs(8). jansson escapes what has to be, and keeps the
 * order; it takes UTF-8 alone, so names go through control_utf8().
 */
#include <errno.h>
#include <jansson.h>
#include <string.h>
#include <time.h>

#include "ff_util.h"
#include "fusefs/control.h"
#include "fusefs/fs.h"
#include "fusefs/options.h"

struct writer {
	double now;
	json_t *snapshots; /* array */
	json_t *disks;     /* of the snapshot whose turn it is: array, or NULL */
};

static void json_cleanup(json_t **j)
{
	json_decref(*j);
}

#define AUTO_JSON __attribute__((cleanup(json_cleanup))) json_t

static double seconds(struct timespec t)
{
	return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

/* A name of the user's. NULL: null, or no memory. */
static json_t *text(const char *s)
{
	ff_autofree char *utf8 = NULL;
	bool exact;

	if (!s)
		return json_null();
	utf8 = control_utf8(s, &exact);
	return utf8 ? json_string(utf8) : NULL;
}

int control_json_name(json_t *to, const char *key, const char *key_hex, const char *name)
{
	ff_autofree char *utf8 = NULL, *hex = NULL;
	bool exact;

	utf8 = control_utf8(name, &exact);
	if (!utf8 || json_object_set_new(to, key, json_string(utf8)) < 0)
		return -ENOMEM;
	if (exact)
		return 0;
	hex = control_hex(name);
	return hex && json_object_set_new(to, key_hex, json_string(hex)) == 0 ? 0 : -ENOMEM;
}

static json_t *number(uint64_t n)
{
	return json_integer((json_int_t)FF_MIN(n, (uint64_t)INT64_MAX));
}

/* Sets the fields that a disk and a snapshot have in common. */
static int set_sums(json_t *to, uint64_t frozen, uint64_t read, uint64_t preserved,
                    uint64_t allocated, const struct ff_waits *w)
{
	AUTO_JSON *sums =
	    json_pack("{s:o, s:o, s:o, s:o, s:o, s:o, s:o}", "frozen_bytes", number(frozen),
	              "read_bytes", number(read), "preserved_bytes", number(preserved),
	              "allocated_bytes", number(allocated), "saves", number(w->saves),
	              "longest_wait_us", number(w->longest_us), "p99_wait_us", number(w->p99_us));

	return sums && json_object_update(to, sums) == 0 ? 0 : -ENOMEM;
}

static const char *state_word(enum ff_view_state state)
{
	static const char *const words[] = {"ok", "checkpoint", "broken", "torn"};

	return words[state];
}

static int add_disk(void *ctx, const struct ff_disk_status *d)
{
	struct writer *w = ctx;
	AUTO_JSON *disk = json_object();
	int r = disk ? control_json_name(disk, "path", "path_hex", d->path) : -ENOMEM;

	if (!r && (json_object_set_new(disk, "state", json_string(state_word(d->state))) < 0 ||
	           json_object_set_new(disk, "reason", text(d->reason)) < 0))
		r = -ENOMEM;
	if (!r)
		r = set_sums(disk, d->frozen_bytes, d->read_bytes, d->preserved_bytes,
		             d->allocated_bytes, &d->waits);
	if (!r && !w->disks && !(w->disks = json_array()))
		r = -ENOMEM;
	if (!r && json_array_append(w->disks, disk) < 0)
		r = -ENOMEM;
	return r;
}

static int add_snap(void *ctx, const struct ff_snap_status *s)
{
	struct writer *w = ctx;
	AUTO_JSON *snap = json_object(), *rest = NULL;
	json_t *disks = w->disks ? ff_take_ptr(&w->disks) : json_array();
	double created = seconds(s->created);
	int r = snap && disks ? control_json_name(snap, "name", "name_hex", s->name) : -ENOMEM;

	if (!r) {
		rest = json_pack("{s:f, s:f, s:s, s:o, s:b, s:o, s:o}", "created", created,
		                 "age_seconds", FF_MAX(w->now - created, 0.0), "state",
		                 state_word(s->state), "reason", text(s->reason), "durable",
		                 s->durable, "open_files", number(s->open_files), "files",
		                 number(s->files));
		if (!rest || json_object_update(snap, rest) < 0)
			r = -ENOMEM;
	}
	if (!r)
		r = set_sums(snap, s->frozen_bytes, s->read_bytes, s->preserved_bytes,
		             s->allocated_bytes, &s->waits);
	if (!r && json_object_set(snap, "disks", disks) < 0)
		r = -ENOMEM;
	if (!r && json_array_append(w->snapshots, snap) < 0)
		r = -ENOMEM;
	json_decref(disks);
	return r;
}

static json_t *limit_of(const struct options *o)
{
	return o->fleece_limit ? number(o->fleece_limit) : json_null();
}

/* NULL without memory. */
static json_t *texts(char *const *list, size_t count)
{
	json_t *out = json_array();

	for (size_t i = 0; out && i < count; i++)
		if (json_array_append_new(out, text(list[i])) < 0) {
			json_decref(out);
			return NULL;
		}
	return out;
}

static json_t *options_object(const struct options *o)
{
	return json_pack(
	    "{s:i, s:s, s:i, s:o, s:o, s:o, s:o, s:b, s:o}", "cluster_size", (int)o->cluster_size,
	    "on_cbw_error", o->policy == FF_BREAK_SNAPSHOT ? "break-snapshot" : "break-guest-write",
	    "cbw_timeout_seconds", (int)o->cbw_timeout, "fleece_limit_bytes", limit_of(o),
	    "fleece_reserve_bytes", number(o->fleece_reserve), "exclude",
	    texts(o->exclude, o->exclude_count), "device", texts(o->device, o->device_count),
	    "durable", o->durable, "snapshot", text(o->snapshot));
}

static json_t *fleece_object(const struct options *o, const struct ff_store_status *st)
{
	double left = control_seconds_to_full(st->growth, (double)st->free_bytes);

	return json_pack("{s:o, s:o, s:o, s:o, s:f, s:o}", "used_bytes", number(st->used_bytes),
	                 "limit_bytes", limit_of(o), "reserve_bytes", number(o->fleece_reserve),
	                 "free_bytes", number(st->free_bytes), "rate_bytes_per_second", st->growth,
	                 "seconds_to_full", left < 0 ? json_null() : json_real(left));
}

static json_t *guest_object(const struct ff_store_status *st)
{
	return json_pack("{s:o, s:o, s:o, s:o, s:o}", "saves", number(st->waits.saves),
	                 "saved_bytes", number(st->saved_bytes), "longest_wait_us",
	                 number(st->waits.longest_us), "p99_wait_us", number(st->waits.p99_us),
	                 "failed_saves", number(st->failed));
}

int control_json(struct fs *fs, char **out, size_t *len)
{
	const struct options *o = fs->options;
	struct writer w = {.snapshots = json_array()};
	const struct ff_status_visitor visitor = {add_disk, add_snap, &w};
	struct ff_store_status st;
	struct timespec now;
	AUTO_JSON *top = NULL;
	int r = w.snapshots ? 0 : -ENOMEM;

	clock_gettime(CLOCK_REALTIME, &now);
	w.now = seconds(now);
	ff_store_status(fs->store, &st);
	if (!r)
		r = ff_store_visit(fs->store, &visitor);
	json_decref(w.disks);
	if (r) {
		json_decref(w.snapshots);
		return r;
	}
	top =
	    json_pack("{s:s, s:i, s:o, s:o, s:o, s:o, s:f, s:f, s:o, s:o, s:o, s:o}", "version",
	              FF_VERSION, "pid", (int)getpid(), "source", text(fs->source), "mountpoint",
	              text(fs->mountpoint), "fleece_dir", text(st.fleece_path), "snapdir",
	              text(fs->snapdir), "started", seconds(fs->started), "uptime_seconds",
	              control_uptime(fs), "options", options_object(o), "fleece",
	              fleece_object(o, &st), "guest", guest_object(&st), "snapshots", w.snapshots);
	*out = top ? json_dumps(top, JSON_INDENT(1) | JSON_REAL_PRECISION(16)) : NULL;
	if (!*out)
		return -ENOMEM;
	/* a last newline in the place of the NUL, which nobody needs */
	*len = strlen(*out);
	(*out)[(*len)++] = '\n';
	return 0;
}
