/*
 * Looks at what a round left: the live files past the store, which snapshots there are; and at the
 * end that nothing is left of any. What a snapshot shows is looked at in round_frozen.c.
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
			round_complain(
			    r, "live %s: WRONG BYTES from %zu on (size %jd, not %u)",
			    round_names[i],
			    round_differs_at(bytes, f->bytes, FF_MIN((size_t)size, f->size)),
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
