/*
 * The rules that manifests and images of a fleece directory obey together. They are those by which
 * recovery (cow/recover.c, cow/recover_load.c) makes chains of them; this only says what it finds.
 *
 *   a snapshot   has a manifest that can be used, unless it is damaged, and of each disk in it the
 * image that it names, with the number, identity and size that it says a chain      is the images
 * of one disk by age. Each names the next newer one as its backing file, the newest the source.
 * Hidden images (of dropped snapshots, or of a mkdir that did not end) may stand in between, or,
 * where no older image names them, apart a source     is where the newest image says, and as it was
 * when the last mount ended
 */
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "cow/ctl/structure.h"
#include "cow/io.h"
#include "ff_util.h"

struct checking {
	int fleece_fd;
	struct inventory *inv;
	const struct source *src;
	bool live;
	struct remarks *out;
	bool no_memory;
};

static void __attribute__((format(printf, 3, 4)))
remark(struct checking *c, bool damage, const char *fmt, ...)
{
	struct remarks *out = c->out;
	struct remark *list = realloc(out->list, (out->count + 1) * sizeof *list);
	char *text;
	va_list ap;

	if (list)
		out->list = list;
	va_start(ap, fmt);
	if (vasprintf(&text, fmt, ap) < 0)
		text = NULL;
	va_end(ap);
	if (!list || !text) {
		free(text);
		c->no_memory = true;
		return;
	}
	list[out->count++] = (struct remark){damage, text};
}

void remarks_free(struct remarks *r)
{
	for (size_t i = 0; i < r->count; i++)
		free(r->list[i].text);
	free(r->list);
	*r = (struct remarks){0};
}

static int by_text(const void *a, const void *b)
{
	return strcmp(((const struct remark *)a)->text, ((const struct remark *)b)->text);
}

void remarks_keep_common(struct remarks *a, const struct remarks *b)
{
	size_t n = 0;

	/* whoever has much to say twice has no haste */
	for (size_t i = 0; i < a->count; i++) {
		bool both = false;

		for (size_t k = 0; k < b->count && !both; k++)
			both = by_text(&a->list[i], &b->list[k]) == 0;
		if (both)
			a->list[n++] = a->list[i];
		else
			free(a->list[i].text);
	}
	a->count = n;
}

/* --- snapshots ----------------------------------------------------------------------------------
 */

static bool is_the_one(const struct inv_dir *d, const struct ff_frozen *f,
                       const struct inv_image *img)
{
	return img->desc.seq == d->manifest.seq && img->desc.disk_ino == f->st.st_ino &&
	       img->desc.disk_btime_sec == f->btime_sec &&
	       img->desc.disk_btime_nsec == f->btime_nsec &&
	       img->desc.size == (uint64_t)f->st.st_size;
}

static void check_disk(struct checking *c, size_t dir, uint32_t k)
{
	const struct inv_dir *d = &c->inv->dirs[dir];
	const struct tree *t = d->manifest.tree;
	const struct ff_frozen *f = &t->inodes[t->disks[k]];
	const struct inv_image *img;

	if (d->of_disk[k] == SIZE_MAX) {
		remark(c, true, "%s/%s: the fleecing image is missing", d->name, f->image);
		return;
	}
	img = &c->inv->images[d->of_disk[k]];
	if (img->error)
		remark(c, true, "%s: %s", img->path,
		       img->error == -EINVAL ? img->why : strerror(-img->error));
	else if (!is_the_one(d, f, img))
		remark(c, true, "%s: it is not the image that the manifest speaks of", img->path);
	else if (img->desc.broken)
		remark(c, true, "%s: this frozen view is lost: old data could not be saved",
		       img->path);
}

/* A view that the next mount gives up because of how the last one ended. */
static bool is_torn(const struct checking *c, const struct inv_dir *d)
{
	return !c->live && c->src->told && !d->manifest.durable &&
	       (c->src->ending == ENDED_TORN || c->src->ending == ENDED_FAILED);
}

/* One that the last mount did not have. */
static bool is_absent(const struct checking *c, const struct inv_dir *d)
{
	ff_autoclose int fd = -1;

	if (c->live || !c->src->known ||
	    io_openat(c->fleece_fd, d->name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW, 0, &fd))
		return false;
	return !known_has(c->src->known, d->manifest.made, d->manifest.seq, fd);
}

static void check_snapshot(struct checking *c, size_t dir)
{
	const struct inv_dir *d = &c->inv->dirs[dir];
	const struct tree *t = d->manifest.tree;

	if (d->error == -ENOENT) {
		remark(c, true,
		       "%s/manifest: it is lost, and with it what the snapshot shows; images of "
		       "it are there",
		       d->name);
		return;
	}
	if (d->error) {
		remark(c, true, "%s/manifest: %s", d->name,
		       d->why && d->error == -EINVAL ? d->why : strerror(-d->error));
		return;
	}
	if (is_absent(c, d))
		remark(c, true,
		       "%s: it was not there when fleecefs was mounted last, and lacks what was "
		       "changed then",
		       d->name);
	if (is_torn(c, d))
		remark(c, true,
		       "%s: not durable, and power was lost, or a filesystem failed, before it "
		       "was on storage",
		       d->name);
	for (uint32_t k = 0; k < t->disk_count; k++)
		check_disk(c, dir, k);
	for (size_t i = d->first; i < d->first + d->count && !c->live; i++)
		if (!c->inv->images[i].named)
			remark(c, false, "%s: the manifest does not name it",
			       c->inv->images[i].path);
}

static void check_dirs(struct checking *c)
{
	size_t left = c->live ? 0 : c->inv->stray_count;

	for (size_t i = 0; i < c->inv->dir_count; i++) {
		const struct inv_dir *d = &c->inv->dirs[i];

		if (d->kind == INV_SNAPSHOT)
			check_snapshot(c, i);
		else if (c->live)
			continue;
		else if (d->kind == INV_UNMADE)
			remark(c, false, "%s: left by a mkdir that did not end", d->name);
		else if (d->kind == INV_FOREIGN)
			remark(c, false, "%s: no snapshot: it is left alone", d->name);
		else
			left++;
	}
	if (left)
		remark(c, false,
		       "%zu leftovers of dropped snapshots or interrupted work: see fleecectl gc",
		       left);
}

/* --- chains ------------------------------------------------------------------------------------
 */

/* Only for the sake of a view that is not lost anyway: of others no record is kept. */
static void check_source(struct checking *c, struct inv_image *const *chain, size_t n,
                         const struct inv_image *img)
{
	bool whole = false;
	struct stat st;

	for (size_t i = 0; i < n; i++)
		whole |= inventory_visible(c->inv, chain[i]) && !chain[i]->desc.broken;
	if (c->live || !whole)
		return;
	if (!source_is(img, img->backing, &st))
		remark(c, false, "%s: its source is not at %s now; the next mount looks for it",
		       img->path, img->backing);
	else if (source_changed(c->src, img, &st))
		remark(c, true,
		       "%s: %s was changed while fleecefs was not mounted: its frozen views are "
		       "lost",
		       img->path, img->backing);
}

/* Where image I of a chain of N leads. */
static void check_link(struct checking *c, struct inv_image **chain, size_t n, size_t i)
{
	bool lost, exact, older = true;
	struct inv_image *a = chain[i];
	const struct inv_image *next = inv_next(c->fleece_fd, c->inv, a, chain, n, &lost, &exact);

	if (lost) {
		remark(c, true, "%s: its backing file, %s, is missing or damaged", a->path,
		       a->backing);
		return;
	}
	if (next && next->desc.seq <= a->desc.seq) {
		remark(c, true, "%s: its backing file, %s, is not a newer image", a->path,
		       a->backing);
		return;
	}
	for (size_t k = i + 1; k < n && chain[k] != next; k++)
		if (inventory_visible(c->inv, chain[k])) {
			remark(c, true, "%s: its backing file is %s, but should be %s", a->path,
			       a->backing, chain[k]->path);
			older = false;
			break;
		}
	if (next && !exact && older)
		remark(c, false,
		       "%s: names its backing file by a path of before; the next mount sets it "
		       "right",
		       a->path);
	if (!next && older)
		check_source(c, chain, n, a);
}

static void check_chain(struct checking *c, struct inv_image **chain, size_t n)
{
	const struct inv_image *next = NULL;
	bool lost, exact;

	for (size_t i = 0; i < n; i++) {
		/* hidden, and no older image leads to it: it stands apart, and may be anything */
		if (!inventory_visible(c->inv, chain[i]) && next != chain[i])
			continue;
		check_link(c, chain, n, i);
		next = inv_next(c->fleece_fd, c->inv, chain[i], chain, n, &lost, &exact);
	}
}

int structure_check(int fleece_fd, struct inventory *inv, const struct source *src, bool live,
                    struct remarks *out)
{
	struct checking c = {fleece_fd, inv, src, live, out, false};
	ff_autofree struct inv_image **all = NULL;
	size_t n, first = 0;

	check_dirs(&c);
	if (!live && !src->path && inv->image_count)
		remark(
		    &c, false,
		    ".source: the SOURCE that it tells of is not found: whether that was changed "
		    "cannot be told");
	all = inventory_chains(inv, &n);
	if (!all)
		return -ENOMEM;
	for (size_t i = 1; i <= n; i++) {
		if (i < n && inv_same_disk(all[i], all[first]))
			continue;
		check_chain(&c, all + first, i - first);
		first = i;
	}
	return c.no_memory ? -ENOMEM : 0;
}
