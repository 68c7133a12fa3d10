/*
 * snapshots/NEW/.since/OLD/changes.json: which ranges of which disks changed, for programs. Its
 * fields are told in fleecefs(8).
 *
 * It is written anew at each open, and comes out the same; at the first lookup, which anybody may
 * make, it is only counted, to learn its size. One of more than JSON_MOST bytes is refused, for a
 * daemon that dies of want of memory takes guests along. A disk of which it cannot be known what
 * changed, or whose view is lost, makes the file unreadable (EIO; the log says which): a list
 * without it would look like a whole one. It tells names and sizes of files that not everybody may
 * see, so it is for the owner of the snapshot's root alone.
 */
#include <fcntl.h>
#include <jansson.h>
#include <linux/fuse.h>
#include <stdio.h>
#include <string.h>

#include "ff_log.h"
#include "ff_util.h"
#include "fusefs/control.h"
#include "fusefs/frozen_walk.h"
#include "fusefs/since.h"

enum { SALT_JSON = 4, JSON_MOST = 256 << 20 };

/* Node of one. */
struct json_made {
	struct since_pair *pair; /* a reference */
	size_t size;
};

/* An open one. */
struct json_file {
	struct derived_file file;
	char *content;
	size_t size;
};

/* Where it is written to. */
struct json_sink {
	char *content; /* NULL: it is only counted */
	size_t size;   /* the most that it takes */
	size_t used;
	bool full; /* it was more */
};

struct json_writer {
	struct frozen_walk walk;
	struct ff_since_pair pair;
	FILE *out;
	bool first; /* nothing stands before the next element */
};

static void put_separator(struct json_writer *w)
{
	fputs(w->first ? "\n  " : ",\n  ", w->out);
	w->first = false;
}

/* The members of a disk but for its ranges, without the braces' end. */
static int put_head(struct json_writer *w, const struct ff_frozen *f, const struct ff_since *s)
{
	json_t *disk = json_object();
	const char *was = ff_since_old_path(s);
	char *text = NULL;
	struct stat st;
	int r = disk ? control_json_name(disk, "path", "path_hex", w->walk.path) : -ENOMEM;

	ff_frozen_stat(w->walk.snap, f, &st);
	if (!r && json_object_set_new(disk, "size", json_integer(st.st_size)) < 0)
		r = -ENOMEM;
	if (!r && json_object_set_new(disk, "new", json_boolean(!was)) < 0)
		r = -ENOMEM;
	if (!r && was && strcmp(was, w->walk.path) != 0)
		r = control_json_name(disk, "renamed_from", "renamed_from_hex", was);
	if (!r && json_object_set_new(disk, "changed_bytes",
	                              json_integer((json_int_t)ff_since_changed(s))) < 0)
		r = -ENOMEM;
	if (!r && !(text = json_dumps(disk, JSON_COMPACT)))
		r = -ENOMEM;
	if (!r)
		fprintf(w->out, "%.*s,\"ranges\":[", (int)strlen(text) - 1, text);
	free(text);
	json_decref(disk);
	return r;
}

static void put_range(struct json_writer *w, const struct ff_since_run *run)
{
	if (!run->len)
		return;
	put_separator(w);
	fprintf(w->out, " {\"offset\":%llu,\"length\":%llu,\"zero\":%s}",
	        (unsigned long long)run->off, (unsigned long long)run->len,
	        run->zero ? "true" : "false");
}

static int put_ranges(struct json_writer *w, struct ff_since_file *file)
{
	struct ff_since_run run = {0}, next;
	uint64_t at = 0;
	int r;

	w->first = true;
	while ((r = ff_since_next(file, at, true, &next)) == 0) {
		if (ferror(w->out))
			return -EFBIG;
		at = next.off + next.len;
		if (run.len && run.off + run.len == next.off && run.zero == next.zero) {
			run.len += next.len;
			continue;
		}
		put_range(w, &run);
		run = next;
	}
	put_range(w, &run);
	fputs("]}", w->out);
	w->first = false;
	return r == -ENXIO ? 0 : r;
}

static int put_disk(struct frozen_walk *walk, const struct ff_frozen *dir, const char *name,
                    const struct ff_frozen *f)
{
	struct json_writer *w = FF_CONTAINER(walk, struct json_writer, walk);
	struct ff_since_file *file;
	struct ff_since *s;
	int r = ff_since_make(&w->pair, dir, name, f, &s);

	if (r < 0)
		return r;
	put_separator(w);
	r = ff_since_open(s, &file);
	if (r == 0) {
		ff_since_flushed(file);
		r = put_head(w, f, s);
		if (r == 0)
			r = put_ranges(w, file);
		ff_since_close(file);
	}
	ff_since_free(s);
	return r;
}

static int put_deleted(void *ctx, const char *path)
{
	struct json_writer *w = ctx;
	json_t *disk = json_object();
	int r = disk ? control_json_name(disk, "path", "path_hex", path) : -ENOMEM;

	put_separator(w);
	if (r == 0 && json_dumpf(disk, w->out, JSON_COMPACT) < 0)
		r = -ENOMEM;
	json_decref(disk);
	return r;
}

static int put_all(struct json_writer *w)
{
	int r;

	fputs("{\"version\":1,\n \"disks\":[", w->out);
	w->first = true;
	r = frozen_walk(&w->walk);
	fputs("],\n \"deleted\":[", w->out);
	w->first = true;
	if (r == 0 && w->pair.old)
		r = ff_since_deleted(w->pair.new, w->pair.old, put_deleted, w);
	fputs("]}\n", w->out);
	return r;
}

/* A short count is an error of the stream's. */
static ssize_t sink_write(void *cookie, const char *buf, size_t len)
{
	struct json_sink *sink = cookie;

	if (sink->full || len > sink->size - sink->used) {
		sink->full = true;
		return 0;
	}
	if (sink->content)
		memcpy(sink->content + sink->used, buf, len);
	sink->used += len;
	return (ssize_t)len;
}

/* -EFBIG: SINK is too small. */
static int write_json(struct fs *fs, struct ff_snap *snap, const struct since_pair *pair,
                      struct json_sink *sink)
{
	struct json_writer w = {
	    .walk = {.snap = snap, .file = put_disk},
	    .pair = since_engine_pair(fs, snap, pair),
	};
	int r;

	w.out = fopencookie(sink, "w", (cookie_io_functions_t){.write = sink_write});
	if (!w.out)
		return -ENOMEM;
	r = put_all(&w);
	if (fclose(w.out) != 0 && r == 0)
		r = -ENOMEM;
	return sink->full ? -EFBIG : r;
}

/* --- the open file --- */

static struct json_file *file_of(struct handle *h)
{
	return FF_CONTAINER(h, struct json_file, file.h);
}

static int json_read(struct handle *h, void *buf, size_t size, off_t off, size_t *got)
{
	const struct json_file *j = file_of(h);

	*got = derived_copy(j->content, j->size, buf, size, off);
	return 0;
}

static void json_free(struct handle *h)
{
	struct json_file *j = file_of(h);

	derived_file_fini(&j->file);
	free(j->content);
	free(j);
}

static const struct handle_ops json_file_ops = {
    .read = json_read,
    .sync = derived_nothing_to_sync,
    .flush = derived_flush,
    .free = json_free,
};

static int json_open(struct fs *fs, struct node *node, int flags, struct handle **out)
{
	const struct json_made *made = node->made;
	struct json_file *j = calloc(1, sizeof *j);
	struct json_sink sink;
	int r;

	if (!j)
		return -ENOMEM;
	r = derived_file_init(&j->file, &json_file_ops, fs, node, flags);
	if (r < 0) {
		free(j);
		return r;
	}
	j->content = malloc(made->size);
	j->size = made->size;
	sink = (struct json_sink){.content = j->content, .size = made->size};
	r = j->content ? write_json(fs, node->snap, made->pair, &sink) : -ENOMEM;
	if (r == -EFBIG || (r == 0 && sink.used != made->size))
		r = -EIO; /* nothing of it changes */
	if (r < 0) {
		handle_free(&j->file.h);
		return r;
	}
	*out = &j->file.h;
	return 0;
}

/* --- the node --- */

static int json_getattr(struct fs *fs, struct node *node, struct handle *handle, struct stat *out)
{
	const struct json_made *made = node->made;

	derived_stat(node->snap, node->frozen, made->pair->salt + SALT_JSON, out);
	out->st_mode = S_IFREG | 0400;
	out->st_nlink = 1;
	out->st_size = (off_t)made->size;
	out->st_blocks = (blkcnt_t)ff_div_up(made->size, 512);
	return 0;
}

static const struct node_ops json_node_ops = {
    .denied = -EROFS,
    .lasting = true,
    .getattr = json_getattr,
    .open = json_open,
};

static void made_free(void *p)
{
	struct json_made *made = p;

	since_pair_put(made->pair);
	free(made);
}

static int enter_new(struct fs *fs, struct ff_snap *snap, struct since_pair *pair,
                     const uint64_t key[2], struct entry *out)
{
	struct json_made *made = calloc(1, sizeof *made);
	struct json_sink sink = {.size = JSON_MOST};
	int r;

	if (!made)
		return -ENOMEM;
	made->pair = since_pair_ref(pair);
	r = write_json(fs, snap, pair, &sink);
	if (r < 0) {
		if (r == -EFBIG)
			ff_error(SINCE_JSON
			         " since %s would be longer than %u MiB: read the sparse "
			         "files instead",
			         pair->name, JSON_MOST >> 20);
		made_free(made);
		return r == -ESTALE ? -ENOENT : r;
	}
	made->size = sink.used;
	return derived_enter(fs, &json_node_ops, snap, ff_snap_root(snap), key, made, made_free,
	                     out);
}

int since_json_enter(struct fs *fs, struct ff_snap *snap, struct since_pair *pair,
                     struct entry *out)
{
	const uint64_t key[2] = {(uintptr_t)snap, pair->naming};
	int r = 0;

	out->timeout = FS_FROZEN_TIMEOUT;
	if (!node_find(fs->nodes, &json_node_ops, key, &out->node))
		r = enter_new(fs, snap, pair, key, out);
	return r < 0 ? r : json_getattr(fs, out->node, NULL, &out->st);
}
