/*
 * The pressure test: its makers, who make snapshots, read them, rename and drop them, in random
 * order, while the threads of pressure.c change all that is frozen.
 *
 * A place for a snapshot is empty, or `made`, and only who holds its lock touches it: so what is
 * noted there of the first look holds until the drop, whoever made it. The numbers of changes that
 * had returned before a freeze and had begun after it are taken outside of that call, so that they
 * enclose it: a view must lie between them.
 */
#include "pressure_run.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <xxhash.h>

/* The frozen inode at PATH. */
static int find(struct ff_snap *snap, const char *path, const struct ff_frozen **out)
{
	const struct ff_frozen *f = ff_snap_root(snap);
	char copy[64], *rest = copy, *name;
	int r = 0;

	snprintf(copy, sizeof copy, "%s", path);
	while (!r && (name = strsep(&rest, "/")))
		r = ff_frozen_lookup(snap, f, name, &f);
	*out = f;
	return r;
}

/* Reads all of F, at most MAX bytes, in pieces of any size. */
static int read_frozen(struct maker *m, struct ff_snap *snap, const struct ff_frozen *f,
                       uint8_t *buf, size_t max, size_t *size)
{
	struct ff_reader *rd;
	struct stat st;
	size_t got = 1, at = 0;
	int r;

	ff_frozen_stat(snap, f, &st);
	if ((uint64_t)st.st_size > max)
		return -EFBIG;
	r = ff_reader_open(snap, f, &rd);
	if (r)
		return r;
	while (!r && at < (size_t)st.st_size && got > 0) {
		size_t len = 1 + rng_below(&m->rng, rng_one_in(&m->rng, 2) ? 1 << 18 : 9000);

		len = len < max - at ? len : max - at;
		r = ff_reader_read(rd, buf + at, len, (off_t)at, &got);
		at += got;
	}
	ff_reader_close(rd);
	*size = at;
	return r ? r : at == (size_t)st.st_size ? 0 : -EIO;
}

static uint64_t sum_of(const uint8_t *buf, size_t len)
{
	return XXH3_64bits(buf, len) | 1;
}

/* Reads disk K of a view to m->disks[k], and which directory it was in. */
static int read_disk(struct maker *m, struct ff_snap *snap, unsigned k, bool *in_b)
{
	struct pressure *p = m->p;
	const struct ff_frozen *f, *other;
	char a[32], b[32];
	size_t size;
	int r, found_a, found_b;

	disk_path(k, false, a);
	disk_path(k, true, b);
	found_a = find(snap, a, &f);
	found_b = find(snap, b, &other);
	if ((found_a == 0) == (found_b == 0)) {
		fprintf(stderr, "%s: is %s\n", a, found_a ? "missing" : "there twice");
		return -EIO;
	}
	*in_b = found_b == 0;
	r = read_frozen(m, snap, *in_b ? other : f, m->disks[k], disk_size(&p->shape, k), &size);
	if (!r && size != disk_size(&p->shape, k))
		r = -EIO;
	return r;
}

static int read_odd(struct maker *m, struct ff_snap *snap, unsigned i, struct odd_file *out,
                    uint64_t *sum)
{
	uint8_t buf[ODD_BLOCKS * ODD_BLOCK];
	const struct ff_frozen *f;
	char name[16];
	size_t size;
	int r;

	snprintf(name, sizeof name, "odd%u", i);
	memset(out, 0, sizeof *out);
	*sum = 0;
	r = find(snap, name, &f);
	if (r)
		return r == -ENOENT ? 0 : r;
	r = read_frozen(m, snap, f, buf, sizeof buf, &size);
	if (r)
		return r;
	*sum = sum_of(buf, size);
	return odd_decode(buf, size, out);
}

/* A view is wrong: is it so for good, or was it only what was read first? */
static void look_closer(struct maker *m, struct ff_snap *snap, struct place *pl)
{
	struct shape *s = &m->p->shape;
	bool in_b;

	for (unsigned k = 0; k < s->disks; k++) {
		uint64_t size = disk_size(s, k), at;
		uint8_t *first = malloc(size);

		if (!first)
			return;
		memcpy(first, m->disks[k], size);
		if (read_disk(m, snap, k, &in_b) == 0)
			for (at = 0; at < size; at += 512)
				if (memcmp(first + at, m->disks[k] + at, 512) != 0)
					fprintf(
					    stderr,
					    "%s: disk %u, sector at %llu: write %llu is now %llu\n",
					    pl->name, k, (unsigned long long)at,
					    (unsigned long long)*(uint64_t *)(void *)(first + at),
					    (unsigned long long)*(uint64_t *)(void *)(m->disks[k] +
					                                              at));
		free(first);
	}
}

/* The first look at a view: is it right? */
static int check_new(struct maker *m, struct place *pl, struct ff_snap *snap,
                     const uint64_t *before, const uint64_t *after)
{
	struct pressure *p = m->p;
	struct odd_state *state = calloc(1, sizeof *state);
	char why[400] = "";
	int r = state ? 0 : -ENOMEM;

	for (unsigned i = 0; i < ODD_FILES && !r; i++)
		r = read_odd(m, snap, i, &state->files[i], &pl->sum[MAX_DISKS + i]);
	if (r)
		snprintf(why, sizeof why, "a file that changes: %s", strerror(-r));
	for (unsigned k = 0; k < p->shape.disks && !r; k++) {
		r = read_disk(m, snap, k, &pl->in_b[k]);
		state->in_b[k] = pl->in_b[k];
		pl->sum[k] = sum_of(m->disks[k], disk_size(&p->shape, k));
		if (r)
			snprintf(why, sizeof why, "disk %u: %s", k, strerror(-r));
	}
	if (!r && (r = odd_check(&p->odd, state, before[MAX_WRITERS], after[MAX_WRITERS])))
		snprintf(why, sizeof why, "names, sizes and holes are of no one moment");
	if (!r)
		r = view_check(&p->shape, m->disks, before, after, why, sizeof why);
	if (r) {
		fprintf(stderr, "%s: %s\n", pl->name, why);
		look_closer(m, snap, pl);
	}
	free(state);
	return r;
}

static int get(struct pressure *p, const struct place *pl, struct ff_snap **out)
{
	int r = ff_snap_get(p->store, pl->name, out);

	return r ? fail(p, "get", pl->name, r) : 0;
}

static int make_snapshot(struct maker *m, struct place *pl)
{
	uint64_t before[MAX_WRITERS + 1], after[MAX_WRITERS + 1];
	struct pressure *p = m->p;
	struct ff_snap *snap;
	int r;

	snprintf(pl->name, sizeof pl->name, "s%u", atomic_fetch_add(&p->names, 1));
	before[MAX_WRITERS] = atomic_load(&p->odd.returned);
	for (unsigned t = 0; t < p->shape.writers; t++)
		before[t] = atomic_load(&p->writers[t].returned);
	r = ff_store_freeze(p->store, pl->name, 0);
	for (unsigned t = 0; t < p->shape.writers; t++)
		after[t] = atomic_load(&p->writers[t].started);
	after[MAX_WRITERS] = atomic_load(&p->odd.started);
	if (r)
		return fail(p, "freeze", pl->name, r);
	pl->made = true;
	m->made++;
	r = get(p, pl, &snap);
	if (r)
		return r;
	r = check_new(m, pl, snap, before, after);
	ff_snap_put(snap);
	return r ? fail(p, "a new view", pl->name, r) : 0;
}

int check_again(struct maker *m, struct place *pl, bool all)
{
	struct pressure *p = m->p;
	struct odd_file odd;
	struct ff_snap *snap;
	uint64_t sum;
	bool in_b;
	int r = get(p, pl, &snap);

	if (r)
		return r;
	for (unsigned k = 0; k < p->shape.disks && !r; k++) {
		if (!all && !rng_one_in(&m->rng, 5))
			continue;
		r = read_disk(m, snap, k, &in_b);
		if (!r && (in_b != pl->in_b[k] ||
		           sum_of(m->disks[k], disk_size(&p->shape, k)) != pl->sum[k])) {
			fprintf(stderr, "%s: disk %u is not what it was\n", pl->name, k);
			r = -EIO;
		}
	}
	for (unsigned i = 0; i < ODD_FILES && !r; i++) {
		r = read_odd(m, snap, i, &odd, &sum);
		if (!r && sum != pl->sum[MAX_DISKS + i]) {
			fprintf(stderr, "%s: odd%u is not what it was\n", pl->name, i);
			r = -EIO;
		}
	}
	ff_snap_put(snap);
	m->read++;
	return r ? fail(p, "a view read again", pl->name, r) : 0;
}

static int rename_snapshot(struct maker *m, struct place *pl)
{
	struct pressure *p = m->p;
	char name[40];
	int r;

	snprintf(name, sizeof name, "s%u-was-%s", atomic_fetch_add(&p->names, 1), pl->name);
	name[24] = '\0';
	r = ff_store_rename_snap(p->store, pl->name, name);
	if (r)
		return fail(p, "rename", pl->name, r);
	memcpy(pl->name, name, sizeof name);
	return 0;
}

/* While a frozen file is open: refused. */
static int drop_in_use(struct maker *m, struct place *pl)
{
	const struct ff_frozen *f;
	struct ff_reader *rd;
	struct ff_snap *snap;
	char path[32];
	int r = get(m->p, pl, &snap);

	if (r)
		return r;
	disk_path(0, pl->in_b[0], path);
	r = find(snap, path, &f);
	if (!r)
		r = ff_reader_open(snap, f, &rd);
	if (!r) {
		r = ff_store_drop(m->p->store, pl->name) == -EBUSY ? 0 : -EBUSY;
		ff_reader_close(rd);
	}
	ff_snap_put(snap);
	return r ? fail(m->p, "a drop of a snapshot in use", pl->name, r) : 0;
}

int drop_snapshot(struct maker *m, struct place *pl)
{
	int r = rng_one_in(&m->rng, 4) ? check_again(m, pl, true) : 0;

	if (!r && rng_one_in(&m->rng, 8))
		r = drop_in_use(m, pl);
	if (r)
		return r;
	r = ff_store_drop(m->p->store, pl->name);
	if (r)
		return fail(m->p, "drop", pl->name, r);
	pl->made = false;
	return 0;
}

void *make_and_drop(void *arg)
{
	struct maker *m = arg;
	struct pressure *p = m->p;

	while (!atomic_load(&p->stop) && !atomic_load(&p->failed)) {
		struct place *pl = &p->places[rng_below(&m->rng, p->snapshots)];
		unsigned roll = (unsigned)rng_below(&m->rng, 10);

		if (pthread_mutex_trylock(&pl->lock))
			continue;
		if (!pl->made)
			make_snapshot(m, pl);
		else if (roll < 5)
			drop_snapshot(m, pl);
		else if (roll < 7)
			rename_snapshot(m, pl);
		else
			check_again(m, pl, false);
		pthread_mutex_unlock(&pl->lock);
	}
	return NULL;
}
