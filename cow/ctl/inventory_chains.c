/*
 * The images of an inventory in the order of their chains, and where each one's backing file name
 * leads: see inventory.h. Nothing is read but symlinks.
 */
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cow/ctl/inventory.h"
#include "cow/io.h"
#include "cow/names.h"
#include "ff_util.h"

static int by_disk(const struct ff_image_desc *x, const struct ff_image_desc *y)
{
	int r = FF_ORDER(x->disk_ino, y->disk_ino);

	if (!r)
		r = FF_ORDER(x->disk_btime_sec, y->disk_btime_sec);
	return r ? r : FF_ORDER(x->disk_btime_nsec, y->disk_btime_nsec);
}

static int by_disk_and_age(const void *a, const void *b)
{
	const struct inv_image *x = *(struct inv_image *const *)a;
	const struct inv_image *y = *(struct inv_image *const *)b;
	int r = by_disk(&x->desc, &y->desc);

	return r ? r : FF_ORDER(x->desc.seq, y->desc.seq);
}

bool inv_same_disk(const struct inv_image *a, const struct inv_image *b)
{
	return by_disk(&a->desc, &b->desc) == 0;
}

struct inv_image **inventory_chains(struct inventory *inv, size_t *count)
{
	struct inv_image **list = calloc(inv->image_count + 1, sizeof *list);
	size_t n = 0;

	for (size_t i = 0; list && i < inv->image_count; i++)
		if (!inv->images[i].error)
			list[n++] = &inv->images[i];
	if (n)
		qsort(list, n, sizeof *list, by_disk_and_age);
	*count = n;
	return list;
}

/* The name in the head, or what it leads to where it is a symlink of ours (cow/chain.c). */
static const char *target_of(int fleece_fd, const struct inventory *inv, const struct inv_image *a,
                             char *buf)
{
	const char *base = strrchr(a->backing, '/');
	char path[PATH_MAX];

	if (!inv_ends_with(a->backing, ".backing"))
		return a->backing;
	snprintf(path, sizeof path, "%s/%s", inv->dirs[a->dir].name, base ? base + 1 : a->backing);
	return io_readlinkat(fleece_fd, path, buf, PATH_MAX) ? "" : buf;
}

/* Does NAME, as it stands in A's head, lead to B? */
static bool leads_to(const struct inventory *inv, const struct inv_image *a, const char *name,
                     const struct inv_image *b)
{
	size_t n = strlen(inv->dirs[a->dir].name) + 1;
	const char *dir = inv->dirs[b->dir].name;
	ff_autofree char *right = names_backing_image(a->path + n, dir, b->path + strlen(dir) + 1);

	/* through a symlink the path is absolute */
	return right &&
	       (strcmp(right, name) == 0 || (name[0] == '/' && inv_ends_with(name, b->path)));
}

struct inv_image *inv_next(int fleece_fd, const struct inventory *inv, const struct inv_image *a,
                           struct inv_image *const *chain, size_t n, bool *lost, bool *exact)
{
	char buf[PATH_MAX];
	const char *name, *at = NULL;
	uint64_t seq;

	*lost = false;
	*exact = true;
	if (a->raw)
		return NULL;
	name = target_of(fleece_fd, inv, a, buf);
	for (const char *p = name; (p = strstr(p, "-fleece-")); p++)
		at = p;
	seq = at ? strtoull(at + strlen("-fleece-"), NULL, 10) : 0;
	for (size_t i = 0; i < n; i++)
		if (inv_same_disk(chain[i], a) && chain[i]->desc.seq == seq) {
			*exact = leads_to(inv, a, name, chain[i]);
			return chain[i];
		}
	*lost = true;
	return NULL;
}
