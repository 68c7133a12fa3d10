/*
 * What must hold before and after the loss of power. See power_world.c.
 *
 * A frozen view that was read once must read the same ever after. One that the cut caught in its
 * mkdir or rmdir is there, then right, or not there at all. Views of snapshots that are not durable
 * give EIO after a loss of power, or are right where it came after a clean end.
 */
#include <dirent.h>
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <xxhash.h>

#include "cow/engine.h"
#include "ff_util.h"
#include "power_world.h"

/* --- frozen contents -------------------------------------------------------------------------- */

static int read_frozen(struct ff_snap *snap, const struct ff_frozen *f, size_t size, char *buf)
{
	struct ff_reader *rd;
	size_t got = 0;
	int r = ff_reader_open(snap, f, &rd);

	if (r)
		return r;
	r = ff_reader_read(rd, buf, size, 0, &got);
	ff_reader_close(rd);
	return r ? r : got == size ? 0 : -ENODATA;
}

/* Is every sector of a frozen disk one that it could have had at the freeze? */
static void check_bounds(struct world *w, const struct snap_model *m, unsigned disk,
                         const char *bytes, size_t size)
{
	static const char zeros[SECTOR];

	for (unsigned i = 0; i < SECTORS; i++) {
		const char *at = (size_t)i * SECTOR < size ? bytes + (size_t)i * SECTOR : zeros;
		int g = sector_read(at, disk, i);
		unsigned lo = m->lowest[disk][i], hi = m->highest[disk][i];

		if (g < 0 || (g == 0 && !zero_between(&w->sectors[disk][i], lo, hi)) ||
		    (g > 0 && ((unsigned)g < lo || (unsigned)g > hi)))
			complain(w, "%s/disk%u: sector %u holds generation %d, not one of %u to %u",
			         m->name, disk, i, g, lo, hi);
	}
}

static void take_golden(struct world *w, struct snap_model *m, struct ff_snap *snap)
{
	const struct ff_frozen *f;
	const char *name;
	struct stat st;

	for (size_t i = 0; !ff_frozen_entry(snap, ff_snap_root(snap), i, &name, &f); i++) {
		struct golden *g;
		int r;

		ff_frozen_stat(snap, f, &st);
		if (!S_ISREG(st.st_mode))
			continue;
		m->golden = realloc(m->golden, (m->golden_count + 1) * sizeof *g);
		if (!m->golden)
			err(1, "no memory");
		g = &m->golden[m->golden_count++];
		*g = (struct golden){.size = (size_t)st.st_size};
		snprintf(g->name, sizeof g->name, "%s", name);
		g->bytes = malloc(g->size + 1);
		if (!g->bytes)
			err(1, "no memory");
		r = read_frozen(snap, f, g->size, g->bytes);
		if (r)
			complain(w, "%s/%s, just made: %s", m->name, name, strerror(-r));
		else if (strncmp(name, "disk", 4) == 0)
			check_bounds(w, m, (unsigned)(name[4] - '0'), g->bytes, g->size);
	}
}

void check_golden(struct world *w, struct snap_model *m)
{
	struct ff_snap *snap;
	int r = ff_snap_get(w->store, m->name, &snap);

	if (r) {
		complain(w, "%s is not there after its mkdir: %s", m->name, strerror(-r));
		return;
	}
	take_golden(w, m, snap);
	ff_snap_put(snap);
}

/* --- before the store is opened --------------------------------------------------------------- */

static char *read_source(struct world *w, const char *name, size_t room)
{
	char path[440], *bytes = calloc(1, room);
	int fd;

	snprintf(path, sizeof path, "%s/%s", w->source, name);
	fd = open(path, O_RDONLY);
	if (fd < 0 || !bytes || read(fd, bytes, room) < 0)
		err(1, "%s", path);
	close(fd);
	return bytes;
}

/* The newest generation of zeros up to TO. */
static unsigned newest_zero(const struct sector *s, unsigned to)
{
	while (to > 1 && !zero_between(s, to, to))
		to--;
	return to;
}

static void rename_back(struct snap_model *m, unsigned i, int renaming)
{
	atomic_store(&m->renaming, renaming);
	snprintf(m->name, sizeof m->name, renaming == 2 ? "s%u-new" : "s%u", i);
}

void check_sources(struct world *w)
{
	w->losses++;
	for (unsigned d = 0; d < DISKS; d++) {
		ff_autofree char *bytes = NULL;
		char name[16];

		snprintf(name, sizeof name, "disk%u", d);
		bytes = read_source(w, name, SECTORS * SECTOR);
		for (unsigned i = 0; i < SECTORS; i++) {
			struct sector *s = &w->sectors[d][i];
			int g = sector_read(bytes + (size_t)i * SECTOR, d, i);

			if (g < 0 || g > s->cut_begun || (g && g < s->cut_synced) ||
			    (!g && !zero_between(s, s->cut_synced, s->cut_begun)))
				complain(w,
				         "disk%u: sector %u holds generation %d; synced: %u, "
				         "written: %u",
				         d, i, g, s->cut_synced, s->cut_begun);
			g = g > 0 ? g : (int)newest_zero(s, s->cut_begun);
			atomic_store(&s->done, (uint8_t)g);
			atomic_store(&s->synced, (uint8_t)g);
		}
	}
	for (unsigned i = 0; i < w->snap_count; i++) {
		struct snap_model *m = &w->snaps[i];

		atomic_store(&m->state, m->cut_state);
		atomic_store(&m->giving, m->cut_giving);
		rename_back(m, i, m->cut_renaming);
	}
}

static int index_of(const char *name)
{
	int i;

	return sscanf(name, "s%d", &i) == 1 && i >= 0 && i < SNAPS ? i : -1;
}

void check_note_manifests(struct world *w)
{
	char path[400], fleece[200];
	const struct dirent *e;
	DIR *d;

	memset(w->manifests, 0, sizeof w->manifests);
	snprintf(fleece, sizeof fleece, w->one ? "%s/.fleecefs" : "%s",
	         w->one ? w->source : w->fleece);
	d = opendir(fleece);
	while (d && (e = readdir(d))) {
		snprintf(path, sizeof path, "%s/%.100s/manifest", fleece, e->d_name);
		if (index_of(e->d_name) >= 0 && access(path, F_OK) == 0)
			w->manifests[index_of(e->d_name)] = true;
	}
	if (d)
		closedir(d);
}

uint64_t check_sum(struct world *w)
{
	DIR *d = opendir(w->source);
	const struct dirent *e;
	uint64_t sum = 0;

	while (d && (e = readdir(d))) {
		ff_autofree char *bytes = NULL;

		if (e->d_name[0] == '.')
			continue;
		bytes = read_source(w, e->d_name, (size_t)SECTORS * SECTOR);
		sum += XXH3_64bits_withSeed(bytes, SECTORS * SECTOR,
		                            XXH3_64bits(e->d_name, strlen(e->d_name)));
	}
	if (d)
		closedir(d);
	return sum;
}

/* --- after ------------------------------------------------------------------------------------ */

/* Is this view to be right, or lost, or either? */
enum duty { RIGHT, LOST, EITHER };

static enum duty duty_of(const struct world *w, const struct snap_model *m, const struct golden *g)
{
	if (g->lost)
		return LOST;
	if (m->durable || m->losses == w->losses)
		return RIGHT;
	return w->cut_active && !w->mixed ? LOST : EITHER;
}

static int sector_of(const char *name, const char *bytes, size_t sector)
{
	bool disk = strncmp(name, "disk", 4) == 0;

	return disk ? sector_read(bytes + sector * SECTOR, (unsigned)(name[4] - '0'),
	                          (unsigned)sector)
	            : 0;
}

/* What changed since the snapshot must be known: all that differs from the source now. */
static void check_changes(struct world *w, const struct snap_model *m, struct link *first,
                          const struct golden *g)
{
	ff_autofree char *now = read_source(w, g->name, (size_t)SECTORS * SECTOR);
	size_t size = ff_image_desc(first->img)->cluster_size;

	for (size_t at = 0; at < g->size; at += size) {
		size_t len = FF_MIN(size, g->size - at);
		bool known = false;

		for (struct link *l = first; l; l = atomic_load(&l->newer))
			known |= at / size >= l->clusters || ff_image_marked(l->img, at / size);
		if (!known && memcmp(g->bytes + at, now + at, len) != 0)
			complain(w, "%s/%s: changed at %zu, and not known; %s", m->name, g->name,
			         at, m->durable ? "durable" : "not durable");
	}
}

/* A file of a checkpoint. */
static void check_given(struct world *w, struct snap_model *m, struct ff_snap *snap,
                        struct golden *g, enum duty duty)
{
	const struct ff_frozen *f;
	struct ff_disk_status st;
	struct ff_reader *rd;
	int r = ff_frozen_lookup(snap, ff_snap_root(snap), g->name, &f);

	if (!r && ff_reader_open(snap, f, &rd) != -EIO)
		complain(w, "%s/%s is a checkpoint's, and can be opened", m->name, g->name);
	if (!r)
		r = ff_frozen_status(snap, f, &st);
	if (r ? duty == RIGHT : st.state != FF_VIEW_CHECKPOINT && duty == RIGHT)
		complain(w, "%s/%s: what changed is lost", m->name, g->name);
	else if (!r && st.state == FF_VIEW_CHECKPOINT && duty == LOST && g->size)
		complain(w, "%s/%s: a checkpoint still, though it is not durable", m->name,
		         g->name);
	else if (!r && st.state == FF_VIEW_CHECKPOINT && strncmp(g->name, "disk", 4) == 0)
		check_changes(w, m, snap->links[f->disk], g);
	g->lost |= !r && st.state > FF_VIEW_CHECKPOINT && duty != RIGHT;
}

static void check_view(struct world *w, struct snap_model *m, struct ff_snap *snap,
                       struct golden *g, enum duty duty)
{
	const struct ff_frozen *f;
	ff_autofree char *bytes = malloc(g->size + 1);
	struct stat st;
	int r = ff_frozen_lookup(snap, ff_snap_root(snap), g->name, &f);

	if (!bytes)
		err(1, "no memory");
	if (r && duty != RIGHT)
		return; /* its manifest is lost, and it shows nothing */
	if (r) {
		complain(w, "%s/%s is not there: %s", m->name, g->name, strerror(-r));
		return;
	}
	ff_frozen_stat(snap, f, &st);
	if ((size_t)st.st_size != g->size) {
		complain(w, "%s/%s: %jd bytes and not %zu", m->name, g->name, (intmax_t)st.st_size,
		         g->size);
		return;
	}
	r = read_frozen(snap, f, g->size, bytes);
	if (r && r != -EIO)
		complain(w, "%s/%s: %s", m->name, g->name, strerror(-r));
	else if (r && duty == RIGHT)
		complain(w, "%s/%s is lost", m->name, g->name);
	else if (!r && duty == LOST && g->size)
		complain(w, "%s/%s can be read, though it is not durable", m->name, g->name);
	else if (!r && memcmp(bytes, g->bytes, g->size) != 0)
		for (size_t i = 0; i < g->size; i++)
			if (bytes[i] != g->bytes[i]) {
				complain(w,
				         "%s/%s: wrong from sector %zu on (%d and not %d); %s, %u "
				         "losses of power since",
				         m->name, g->name, i / SECTOR,
				         sector_of(g->name, bytes, i / SECTOR),
				         sector_of(g->name, g->bytes, i / SECTOR),
				         m->durable ? "durable" : "not durable",
				         w->losses - m->losses);
				break;
			}
	g->lost |= r == -EIO && duty != RIGHT;
}

static void check_snap(struct world *w, unsigned i, bool must)
{
	struct snap_model *m = &w->snaps[i];
	int state = atomic_load(&m->state), renaming = atomic_load(&m->renaming);
	struct ff_snap *snap = NULL;
	bool given;

	for (int way = 0; way <= 2 && !snap; way += 2)
		/* a new name that was not promised to be durable may be lost */
		if (renaming == way || renaming == 1 || (renaming == 2 && !m->durable)) {
			char name[16];

			snprintf(name, sizeof name, way == 2 ? "s%u-new" : "s%u", i);
			if (ff_snap_get(w->store, name, &snap) == 0)
				rename_back(m, i, way);
		}
	if (!snap) {
		if (state == SNAP_THERE && (m->durable || must))
			complain(w, "%s is not listed", m->name);
		else if (must && state != SNAP_DROPPING && state != SNAP_GONE)
			complain(w, "%s has a manifest, and is not listed", m->name);
		atomic_store(&m->state, SNAP_GONE);
		return;
	}
	if (state == SNAP_GONE && m->durable)
		complain(w, "%s is listed, but was dropped", m->name);
	atomic_store(&m->state, SNAP_THERE);
	given = ff_snap_is_checkpoint(snap);
	if (given != (atomic_load(&m->giving) == 2) && atomic_load(&m->giving) != 1 &&
	    (m->durable || m->losses == w->losses))
		complain(w, "%s is %sa checkpoint", m->name, given ? "" : "not ");
	atomic_store(&m->giving, given ? 2 : 0);
	for (size_t k = 0; k < m->golden_count; k++)
		(given ? check_given : check_view)(w, m, snap, &m->golden[k],
		                                   duty_of(w, m, &m->golden[k]));
	ff_snap_put(snap);
}

static int check_known(void *ctx, const char *name)
{
	struct world *w = ctx;

	if (index_of(name) < 0 || (unsigned)index_of(name) >= w->snap_count)
		complain(w, "%s is listed, and was never made", name);
	return 0;
}

void check_snaps(struct world *w)
{
	ff_snap_each(w->store, check_known, w);
	for (unsigned i = 0; i < w->snap_count; i++)
		if (atomic_load(&w->snaps[i].state) != SNAP_NONE)
			check_snap(w, i, w->manifests[i]);
}

static int first_name(void *ctx, const char *name)
{
	snprintf(ctx, 300, "%s", name);
	return 1;
}

static unsigned leftovers;
static const char *leftover_root;
static const struct world *leftover_world;

/* Is it of a mkdir without `durable`? A cut may take the mark from its directory, and leave there
 * what is then none of ours by any sign. */
static bool may_be_left(const char *path)
{
	int i = index_of(path + strlen(leftover_root) + 1);

	return i >= 0 && leftover_world->losses > 0 && !leftover_world->snaps[i].durable;
}

static int look(const char *path, const struct stat *st, int type, struct FTW *ftw)
{
	const char *base = strrchr(path, '/') + 1;

	if ((base[0] == '.' && S_ISREG(st->st_mode) && strncmp(base, ".lost-", 6) != 0) ||
	    strcmp(path, leftover_root) == 0 || strncmp(base, ".aside-", 7) == 0 ||
	    strcmp(base, ".fleecefs") == 0 || may_be_left(path))
		return 0;
	printf("  left: %s\n", path);
	leftovers++;
	return 0;
}

void check_drop_all(struct world *w)
{
	char name[300], path[200];
	int r;

	while (ff_snap_each(w->store, first_name, name)) {
		r = ff_store_drop(w->store, name);
		if (r) {
			complain(w, "rmdir of %s fails: %s", name, strerror(-r));
			return;
		}
	}
	leftovers = 0;
	leftover_world = w;
	leftover_root = w->fleece;
	if (!w->one)
		nftw(w->fleece, look, 16, FTW_PHYS);
	snprintf(path, sizeof path, "%s/.fleecefs", w->source);
	leftover_root = path;
	nftw(path, look, 16, FTW_PHYS);
	if (leftovers)
		complain(w, "%u files are left after all snapshots were dropped", leftovers);
}
