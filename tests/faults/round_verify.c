/*
 * Looks at what a round left: the live files past the store, the snapshots through it.
 */
#include "round.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "cow/engine.h"
#include "ff_util.h"

/* --- frozen ----------------------------------------------------------------------------------- */

int round_lookup(struct ff_snap *snap, const char *path, const struct ff_frozen **out)
{
	const struct ff_frozen *dir = ff_snap_root(snap);
	const char *slash = strchr(path, '/');
	int e = 0;

	if (slash)
		e = ff_frozen_lookup(snap, dir, "sub", &dir);
	return e ? e : ff_frozen_lookup(snap, dir, slash ? slash + 1 : path, out);
}

static size_t differs_at(const uint8_t *a, const uint8_t *b, size_t len)
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
	at = differs_at(bytes, want->bytes + off, FF_MIN(got, most));
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

/* --- the list of snapshots -------------------------------------------------------------------- */

struct listing {
	char names[ROUND_SNAPS + 2][FF_SNAP_NAME_MAX + 1];
	size_t count;
};

static int list_one(void *ctx, const char *name)
{
	struct listing *l = ctx;

	if (l->count < FF_ARRAY_SIZE(l->names))
		snprintf(l->names[l->count++], FF_SNAP_NAME_MAX + 1, "%s", name);
	return 0;
}

static bool listed(const struct listing *l, const char *name)
{
	for (size_t i = 0; i < l->count; i++)
		if (strcmp(l->names[i], name) == 0)
			return true;
	return false;
}

/* Which of the states it may be in is it in? */
static void settle_snap(struct round *r, struct round_snap *s, const struct listing *l,
                        unsigned tolerance, bool was_in_step)
{
	bool there = listed(l, s->name), moved = s->state == ROUND_MOVING && listed(l, s->to);

	if (s->state == ROUND_MOVING) {
		if (there == moved)
			round_complain(r, "%s, being renamed to %s: %s is there", s->name, s->to,
			               there ? "each" : "neither");
		if (moved)
			memcpy(s->name, s->to, sizeof s->name);
		s->state = there || moved ? ROUND_THERE : ROUND_FREE;
	} else if (s->state == ROUND_THERE && !there) {
		if (!s->refused && (!(tolerance & ROUND_MAY_VANISH) || s->durable))
			round_complain(r, "snapshot %s is not there", s->name);
		s->state = ROUND_FREE;
	} else if (!there) {
		if (s->state == ROUND_GOING || was_in_step || s->settling)
			s->state = ROUND_FREE;
	} else if (s->state == ROUND_COMING || was_in_step || s->settling) {
		s->state = ROUND_THERE; /* what failed may stay open until the next mount */
	}
	s->settling = false;
}

static void verify_snaps(struct round *r, unsigned tolerance, bool was_in_step)
{
	struct listing l = {.count = 0};

	ff_snap_each(r->store, list_one, &l);
	for (size_t i = 0; i < ROUND_SNAPS; i++)
		if (r->model->snaps[i].state != ROUND_FREE)
			settle_snap(r, &r->model->snaps[i], &l, tolerance, was_in_step);
	for (size_t i = 0; i < l.count; i++) {
		struct round_snap *s = round_find_snap(r, l.names[i]);

		if (!s)
			round_complain(r, "snapshot %s should not be there", l.names[i]);
		else
			round_read_snap(r, s, s->name, tolerance & ROUND_TORN && !s->durable, false,
			                false);
	}
}

/* --- live ------------------------------------------------------------------------------------- */

/* Reads NAME; -1: no such file. */
static off_t read_live(struct round *r, const char *name, uint8_t *out, ino_t *ino)
{
	int fd = openat(r->source_fd, name, O_RDONLY | O_NOFOLLOW | O_CLOEXEC);
	ssize_t n = -1;
	struct stat st;

	if (fd < 0)
		return -1;
	if (fstat(fd, &st) == 0)
		n = pread(fd, out, ROUND_BYTES + 1, 0);
	*ino = st.st_ino;
	close(fd);
	return n;
}

/* Is each byte one of the two, and the size? */
static bool is_mixture(const uint8_t *got, size_t size, const struct round_file *a,
                       const struct round_file *b)
{
	if (size != a->size && size != b->size)
		return false;
	for (size_t i = 0; i < size; i++)
		if ((i >= a->size || got[i] != a->bytes[i]) &&
		    (i >= b->size || got[i] != b->bytes[i]) && (i < a->size || got[i]))
			return false;
	return true;
}

/* Are the live files those of WANT, or (with OTHER) with bytes of either? Says what is not, if
 * TELL. What was read goes to WANT where it is a mixture. */
static bool live_is(struct round *r, struct round_tree *want, const struct round_tree *other,
                    bool tell)
{
	static uint8_t bytes[ROUND_BYTES + 1];
	ino_t inos[ROUND_FILES] = {0}, ino = 0;
	bool right = true;

	for (int i = 0; i < ROUND_NAMES; i++) {
		off_t size = read_live(r, round_names[i], bytes, &ino);
		int file = want->names[i];
		struct round_file *f = &want->files[FF_MAX(file, 0)];

		if (size < 0 && file < 0)
			continue;
		if (size < 0 || file < 0) {
			if (tell)
				round_complain(r, "live %s: %s", round_names[i],
				               size < 0 ? "is gone" : "should not be there");
			right = false;
			continue;
		}
		if (size == f->size && memcmp(bytes, f->bytes, f->size) == 0) {
			if (inos[file] && inos[file] != ino) {
				right = false;
				if (tell)
					round_complain(r, "live %s: not the same inode as before",
					               round_names[i]);
			}
			inos[file] = ino;
			continue;
		}
		if (other && size <= ROUND_BYTES && other->names[i] == file &&
		    is_mixture(bytes, (size_t)size, f, &other->files[file])) {
			memcpy(f->bytes, bytes, (size_t)size);
			f->size = (uint32_t)size;
			continue;
		}
		if (tell)
			round_complain(r, "live %s: WRONG BYTES from %zu on (size %jd, not %u)",
			               round_names[i],
			               differs_at(bytes, f->bytes, FF_MIN((size_t)size, f->size)),
			               (intmax_t)size, f->size);
		right = false;
	}
	return right;
}

static void check_live_names(struct round *r, const char *dir)
{
	const char *prefix = *dir == '.' ? "" : "sub/";
	int fd = openat(r->source_fd, dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	DIR *d = fdopendir(fd);
	struct dirent *e;

	while (d && (e = readdir(d))) {
		char path[sizeof e->d_name + 8];
		bool known = e->d_name[0] == '.' || strcmp(e->d_name, "sub") == 0;

		snprintf(path, sizeof path, "%s%s", prefix, e->d_name);
		for (int i = 0; i < ROUND_NAMES; i++)
			known |= strcmp(path, round_names[i]) == 0;
		if (!known)
			round_complain(r, "live %s: what is this?", path);
	}
	closedir(d);
}

static void verify_live(struct round *r, unsigned tolerance, bool was_in_step)
{
	struct round_model *m = r->model;
	bool mixed = was_in_step && (tolerance & ROUND_MIXED);

	check_live_names(r, ".");
	check_live_names(r, "sub");
	if (live_is(r, &m->live, NULL, !was_in_step))
		round_copy_tree(&m->next, &m->live);
	else if (was_in_step && live_is(r, &m->next, mixed ? &m->live : NULL, true))
		round_copy_tree(&m->live, &m->next);
}

unsigned round_verify(struct round *r, unsigned tolerance)
{
	unsigned before = r->model->complaints;
	bool was_in_step = r->model->in_step;

	r->model->in_step = false;
	if (!(tolerance & ROUND_NO_LIVE))
		verify_live(r, tolerance, was_in_step);
	if (r->store)
		verify_snaps(r, tolerance, was_in_step);
	return r->model->complaints - before;
}

/* --- the end ---------------------------------------------------------------------------------- */

/* Nothing but files of the store's own may be left in DIR of PARENT. */
static void check_left(struct round *r, int parent, const char *dir, const char *const *own)
{
	int fd = openat(parent, dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	DIR *d = fd < 0 ? NULL : fdopendir(fd);
	struct dirent *e;

	while (d && (e = readdir(d))) {
		bool known = strcmp(e->d_name, ".") == 0 || strcmp(e->d_name, "..") == 0;

		for (size_t i = 0; own[i]; i++)
			known |= strncmp(e->d_name, own[i], strlen(own[i])) == 0;
		if (!known)
			round_complain(r, "%s/%s is left when all snapshots are gone", dir,
			               e->d_name);
		if (strncmp(e->d_name, ".aside-", 7) == 0)
			check_left(r, fd, e->d_name, (const char *[]){NULL});
	}
	if (d)
		closedir(d);
}

unsigned round_drop_all(struct round *r)
{
	static const char *const own[] = {".lock",  ".session", ".source", ".clean",
	                                  ".alive", ".aside-",  ".known",  NULL};
	unsigned before = r->model->complaints;
	struct listing l = {.count = 0};

	ff_snap_each(r->store, list_one, &l);
	for (size_t i = 0; i < l.count; i++) {
		struct round_snap *s = round_find_snap(r, l.names[i]);
		int e = ROUND_ENGINE(ff_store_drop(r->store, l.names[i]));

		if (e)
			round_complain(r, "%s: cannot be dropped: %s", l.names[i], strerror(-e));
		if (s)
			s->state = ROUND_FREE;
	}
	check_left(r, AT_FDCWD, r->fleece, own);
	check_left(r, r->source_fd, FF_HIDDEN_NAME, own);
	return r->model->complaints - before;
}
