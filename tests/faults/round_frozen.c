/*
 * Compares what a snapshot shows with the model: its names, bytes and holes, what it has given up,
 * and, of a checkpoint, what it knows to have changed.
 */
#include "round.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "cow/engine.h"
#include "ff_util.h"

int round_lookup(struct ff_snap *snap, const char *path, const struct ff_frozen **out)
{
	const struct ff_frozen *dir = ff_snap_root(snap);
	const char *slash = strchr(path, '/');
	int e = 0;

	if (slash)
		e = ff_frozen_lookup(snap, dir, "sub", &dir);
	return e ? e : ff_frozen_lookup(snap, dir, slash ? slash + 1 : path, out);
}

size_t round_differs_at(const uint8_t *a, const uint8_t *b, size_t len)
{
	size_t i = 0;

	while (i < len && a[i] == b[i])
		i++;
	return i;
}

/* LEN bytes at OFF must be the model's, or an error. */
static int read_part(struct round *r, struct ff_reader *rd, const struct round_file *want,
                     const char *what, uint32_t off, uint32_t len)
{
	static uint8_t bytes[ROUND_BYTES + 1];
	uint32_t most = off < want->size ? FF_MIN(len, want->size - off) : 0;
	size_t got = 0, at;
	int e = ROUND_ENGINE(ff_reader_read(rd, bytes, len, off, &got));

	if (e)
		return e;
	at = round_differs_at(bytes, want->bytes + off, FF_MIN(got, most));
	if (got != most)
		round_complain(r, "%s: %zu bytes read at %u, not %u", what, got, off, most);
	else if (at < most)
		round_complain(r, "%s: WRONG BYTES from %zu on", what, off + at);
	return 0;
}

/* What is said to be a hole must be zeros. */
static int check_holes(struct round *r, struct ff_reader *rd, const struct round_file *want,
                       const char *what)
{
	off_t at = 0, data, hole;
	int e;

	while (at < want->size) {
		e = ROUND_ENGINE(ff_reader_seek(rd, at, SEEK_DATA, &data));
		if (e == -ENXIO)
			data = want->size;
		else if (e)
			return e;
		for (off_t i = at; i < data; i++)
			if (want->bytes[i]) {
				round_complain(r, "%s: data at %jd is called a hole", what,
				               (intmax_t)i);
				return 0;
			}
		if (e)
			break;
		e = ROUND_ENGINE(ff_reader_seek(rd, data, SEEK_HOLE, &hole));
		if (e)
			return e;
		if (hole <= data) {
			round_complain(r, "%s: a hole at %jd where data begin", what,
			               (intmax_t)hole);
			return 0;
		}
		at = hole;
	}
	return 0;
}

/* Piece by piece: what was given up is an error, and nothing else is. */
static int read_released(struct round *r, struct ff_reader *rd, const struct round_file *want,
                         const enum round_data *released, const char *what)
{
	for (uint32_t u = 0; u < ROUND_UNITS && u * 4096 < want->size; u++) {
		int e = read_part(r, rd, want, what, u * 4096, 4096);
		off_t at = -1;
		int seek;

		if (!e && released[u] == ROUND_GIVEN)
			round_complain(r, "%s: was given up at %u, and can be read", what,
			               u * 4096);
		if (e && (released[u] == ROUND_WHOLE || e != -EIO))
			return e;
		seek = e ? ROUND_ENGINE(ff_reader_seek(rd, u * 4096, SEEK_DATA, &at)) : -EIO;
		if (seek == -ENXIO || (!seek && at != u * 4096))
			round_complain(r, "%s: what was given up at %u is called a hole", what,
			               u * 4096);
	}
	return 0;
}

static bool any_released(const enum round_data *released)
{
	for (int u = 0; u < ROUND_UNITS; u++)
		if (released[u] != ROUND_WHOLE)
			return true;
	return false;
}

static int read_file(struct round *r, struct ff_snap *snap, const struct ff_frozen *f,
                     const struct round_file *want, const enum round_data *released,
                     const char *what)
{
	struct ff_reader *rd;
	struct stat st;
	int e;

	ff_frozen_stat(snap, f, &st);
	if (st.st_size != want->size)
		round_complain(r, "%s: has %jd bytes, not %u", what, (intmax_t)st.st_size,
		               want->size);
	e = ROUND_ENGINE(ff_reader_open(snap, f, &rd));
	if (e)
		return e;
	if (any_released(released)) {
		e = read_released(r, rd, want, released, what);
	} else {
		e = read_part(r, rd, want, what, 0, ROUND_BYTES + 1);
		if (!e)
			e = read_part(r, rd, want, what, want->size / 3, 5000);
		if (!e)
			e = check_holes(r, rd, want, what);
	}
	round_in_engine = true;
	ff_reader_close(rd);
	round_in_engine = false;
	return e;
}

/* What the chain knows to have changed since the link FIRST was the newest must be all that differs
 * from the live file. What lies beyond the end of either is another matter. */
static void check_changes(struct round *r, struct link *first, const struct round_file *was,
                          const struct round_file *is, const char *what)
{
	uint32_t size = ff_image_desc(first->img)->cluster_size;
	uint32_t shared = FF_MIN(was->size, is->size);

	for (uint32_t at = 0; at < shared; at += size) {
		uint32_t len = FF_MIN(size, shared - at);
		bool known = false;

		for (struct link *l = first; l; l = atomic_load(&l->newer))
			known |= at / size >= l->clusters || ff_image_marked(l->img, at / size);
		if (!known && memcmp(was->bytes + at, is->bytes + at, len) != 0)
			round_complain(r, "%s: CHANGED at %u, and not known", what, at);
	}
}

/* A file of a checkpoint. */
static int check_given(struct round *r, struct ff_snap *snap, const struct ff_frozen *f,
                       const struct round_snap *s, int file, const char *what)
{
	const struct round_file *live = &r->model->live.files[file];
	struct ff_disk_status st;
	struct ff_reader *rd;
	int e = ROUND_ENGINE(ff_reader_open(snap, f, &rd));

	if (!e) {
		round_complain(r, "%s: is a checkpoint's, yet it can be opened", what);
		ff_reader_close(rd);
	}
	e = ff_frozen_status(snap, f, &st);
	if (e || st.state != FF_VIEW_CHECKPOINT)
		return e ? e : -EIO;
	if (live->used)
		check_changes(r, snap->links[f->disk], &s->tree.files[file], live, what);
	return 0;
}

/* The frozen directory must have the model's names, no more. */
static void check_names(struct round *r, struct ff_snap *snap, const struct round_tree *want,
                        const char *prefix)
{
	const struct ff_frozen *dir = ff_snap_root(snap), *f;
	size_t wanted = *prefix ? 0 : 1 /* "sub" */, i = 0;
	const char *name;

	if (*prefix && ff_frozen_lookup(snap, dir, "sub", &dir))
		return;
	while (ff_frozen_entry(snap, dir, i, &name, &f) == 0)
		i++;
	for (int k = 0; k < ROUND_NAMES; k++)
		wanted += want->names[k] >= 0 && (strchr(round_names[k], '/') != NULL) == !!*prefix;
	if (i != wanted)
		round_complain(r, "frozen directory %s/ has %zu names, not %zu", prefix, i, wanted);
}

int round_read_snap(struct round *r, struct round_snap *s, const char *name, bool torn,
                    bool tolerated, bool images)
{
	const struct ff_frozen *f;
	struct ff_snap *snap;
	char what[80];
	bool given;
	int e = ff_snap_get(r->store, name, &snap), first = 0;

	if (e)
		return e;
	e = r->may_damage ? round_lookup(snap, "c", &f) : 0;
	if (e == -EIO) {
		ff_snap_put(snap);
		return e;
	}
	given = ff_snap_is_checkpoint(snap);
	if (s->data != ROUND_GIVING && given != (s->data == ROUND_GIVEN))
		round_complain(r, "%s: is %sa checkpoint", name, given ? "" : "not ");
	s->data = given ? ROUND_GIVEN : s->data;
	check_names(r, snap, &s->tree, "");
	check_names(r, snap, &s->tree, "sub");
	for (int i = 0; i < ROUND_NAMES; i++) {
		int file = s->tree.names[i];

		if (file < 0)
			continue;
		snprintf(what, sizeof what, "%s/%s", name, round_names[i]);
		e = round_lookup(snap, round_names[i], &f);
		if (e) {
			round_complain(r, "%s: not found: %s", what, strerror(-e));
			continue;
		}
		e = given ? check_given(r, snap, f, s, file, what)
		          : read_file(r, snap, f, &s->tree.files[file], s->released[file], what);
		if (!e && !given && (images || s->made[file]) && !any_released(s->released[file]))
			e = round_since_file(r, s, snap, i, what);
		first = first ? first : e;
		if (!e && torn)
			round_complain(r, "%s: torn, yet it can be read", what);
		else if (!e && s->broken[file])
			round_complain(r, "%s: was broken, and can be read again", what);
		if (e && !tolerated && !torn && !(e == -EIO && s->may_break[file]))
			round_complain(r, "%s: cannot be read: %s", what, strerror(-e));
		if (e && !tolerated)
			s->broken[file] = true;
	}
	round_in_engine = true;
	ff_snap_put(snap);
	round_in_engine = false;
	return first;
}
