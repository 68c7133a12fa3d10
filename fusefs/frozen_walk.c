/*
 * The walk of frozen_walk.h. Its depth is bounded by that of the frozen tree, whose paths are no
 * longer than PATH_MAX.
 */
#include "fusefs/frozen_walk.h"

#include <string.h>

#include "ff_util.h"

static int push_name(struct frozen_walk *w, const char *name)
{
	size_t n = strlen(name), need = w->len + n + 2;

	if (need > w->room) {
		char *p = realloc(w->path, need * 2);

		if (!p)
			return -ENOMEM;
		w->path = p;
		w->room = need * 2;
	}
	if (w->len)
		w->path[w->len++] = '/';
	memcpy(w->path + w->len, name, n + 1);
	w->len += n;
	return 0;
}

static int visit(struct frozen_walk *w, const struct ff_frozen *dir)
{
	size_t len = w->len;
	const struct ff_frozen *f;
	const char *name;
	int r;

	for (size_t i = 0; (r = ff_frozen_entry(w->snap, dir, i, &name, &f)) == 0; i++) {
		struct stat st;

		ff_frozen_stat(w->snap, f, &st);
		r = push_name(w, name);
		if (r == 0 && S_ISDIR(st.st_mode))
			r = visit(w, f);
		else if (r == 0 && S_ISREG(st.st_mode))
			r = w->file(w, dir, name, f);
		if (r != 0)
			return r;
		w->len = len;
		w->path[len] = '\0';
	}
	if (r == -ENOENT) /* past the last, or dropped meanwhile */
		return ff_snap_dropped(w->snap) ? -ESTALE : 0;
	return r;
}

int frozen_walk(struct frozen_walk *w)
{
	int r = visit(w, ff_snap_root(w->snap));

	free(ff_take_ptr(&w->path));
	return r;
}
