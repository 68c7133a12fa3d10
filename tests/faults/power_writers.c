/*
 * The writers of the power loss test: threads that change the disks of power_world.c, and note
 * there what they began, what has returned, and what is synced, until the power is lost.
 *
 * Each writes only sectors that it owns: chunks of the first disks in turn, while the last disk,
 * which changes its size, is the first writer's alone. A write raises `begun` of its sectors, is
 * made, and raises `done`; a sync takes note of `done`, is made, and raises `synced` to that, which
 * another's sync may have passed already.
 *
 * The first writer changes small files too, and makes, drops and renames snapshots. It reads each
 * right after it was made: what it reads is checked against the generations, and is what any later
 * read must give. A snapshot's state says what is under way before the call, and what is so after
 * it, so that at a cut both outcomes are allowed of a call that had not returned, and only then.
 */
#include "power_world.h"

#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "cow/io.h"
#include "ff_util.h"

struct writer {
	struct world *w;
	unsigned number;
	struct emu_rng rng;
	int fds[DISKS];
	struct ff_disk *disks[DISKS];
	pthread_t thread;
};

static bool owns(const struct writer *t, unsigned disk, unsigned sector)
{
	if (disk == DISKS - 1)
		return t->number == 0;
	return sector / CHUNK % t->w->threads == t->number;
}

/* Raises the generations of what is about to be written. False: they are used up. */
static bool begin(struct world *w, unsigned disk, unsigned first, unsigned n, bool zero)
{
	for (unsigned i = first; i < first + n; i++)
		if (atomic_load(&w->sectors[disk][i].begun) >= GENERATIONS)
			return false;
	for (unsigned i = first; i < first + n; i++) {
		struct sector *s = &w->sectors[disk][i];
		unsigned g = atomic_load(&s->begun) + 1u;

		if (zero)
			atomic_fetch_or(&s->zero[g / 64], UINT64_C(1) << (g % 64));
		atomic_store(&s->begun, (uint8_t)g);
	}
	return true;
}

static void end(struct world *w, unsigned disk, unsigned first, unsigned n)
{
	for (unsigned i = first; i < first + n; i++)
		atomic_store(&w->sectors[disk][i].done, atomic_load(&w->sectors[disk][i].begun));
}

static void change(struct writer *t, unsigned disk, const struct ff_change *how, unsigned first,
                   unsigned n)
{
	struct ff_change c = *how;
	size_t done;
	int r;

	c.fd = t->fds[disk];
	r = ff_disk_change(t->disks[disk], &c, &done);
	if (r)
		complain(t->w, "a change of disk%u fails: %s", disk, strerror(-r));
	end(t->w, disk, first, n);
}

static void write_some(struct writer *t)
{
	struct world *w = t->w;
	unsigned disk = emu_random(&t->rng, DISKS), n = 1 + emu_random(&t->rng, CHUNK);
	unsigned first, most = disk == DISKS - 1 ? SECTORS / 2 : w->sizes[disk];
	char bytes[64 * SECTOR];
	bool zero = emu_random(&t->rng, 8) == 0;

	if (disk == DISKS - 1 && t->number)
		disk = 0, most = w->sizes[0];
	if (w->threads == 1 && emu_random(&t->rng, 4) == 0)
		n = 1 + emu_random(&t->rng, 64);
	first = emu_random(&t->rng, most);
	if (emu_random(&t->rng, 2))
		first = first % 64; /* some more often */
	n = FF_MIN(n, most - first);
	for (unsigned i = 0; i < n; i++)
		if (!owns(t, disk, first + i))
			n = i;
	if (!n || !begin(w, disk, first, n, zero))
		return;
	for (unsigned i = 0; i < n && !zero; i++)
		sector_fill(bytes + (size_t)i * SECTOR, disk, first + i,
		            atomic_load(&w->sectors[disk][first + i].begun));
	change(t, disk,
	       zero ? &(struct ff_change){.kind = FF_FALLOCATE,
	                                  .off = (off_t)first * SECTOR,
	                                  .len = (size_t)n * SECTOR,
	                                  .mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE}
	            : &(struct ff_change){.kind = FF_WRITE,
	                                  .off = (off_t)first * SECTOR,
	                                  .len = (size_t)n * SECTOR,
	                                  .buf = bytes},
	       first, n);
}

/* Changes the last disk's size: what is beyond is zeros from then on. */
static void resize(struct writer *t)
{
	unsigned size = emu_random(&t->rng, SECTORS / 2 + 1);

	if (begin(t->w, DISKS - 1, size, SECTORS - size, true))
		change(t, DISKS - 1,
		       &(struct ff_change){.kind = FF_TRUNCATE, .off = (off_t)size * SECTOR}, size,
		       SECTORS - size);
}

static void guest_sync(struct writer *t)
{
	struct world *w = t->w;
	unsigned disk = emu_random(&t->rng, DISKS);
	uint8_t done[SECTORS];
	int r;

	for (unsigned i = 0; i < SECTORS; i++)
		done[i] = atomic_load(&w->sectors[disk][i].done);
	r = ff_disk_sync(t->disks[disk], t->fds[disk], emu_random(&t->rng, 2));
	if (r)
		complain(w, "a sync of disk%u fails: %s", disk, strerror(-r));
	for (unsigned i = 0; i < SECTORS; i++) {
		_Atomic uint8_t *synced = &w->sectors[disk][i].synced;
		uint8_t now = atomic_load(synced);

		while (now < done[i] && !atomic_compare_exchange_weak(synced, &now, done[i]))
			;
	}
}

/* --- names and snapshots ---------------------------------------------------------------------- */

static void change_small(struct writer *t)
{
	struct world *w = t->w;
	char a[16], b[16];
	int r, fd;

	snprintf(a, sizeof a, "small%u", emu_random(&t->rng, w->small_made));
	snprintf(b, sizeof b, "small%u", emu_random(&t->rng, w->small_made));
	switch (emu_random(&t->rng, 4)) {
	case 0:
		r = ff_store_unlink(w->store, w->source_fd, a);
		break;
	case 1:
		r = ff_store_rename(w->store, w->source_fd, a, w->source_fd, b, 0);
		break;
	case 2:
		r = ff_store_rename(w->store, w->source_fd, a, w->source_fd, b, RENAME_EXCHANGE);
		break;
	default:
		if (w->small_made == 30)
			return;
		snprintf(a, sizeof a, "small%u", w->small_made++);
		ff_store_change_begin(w->store);
		r = io_openat(w->source_fd, a, O_RDWR | O_CREAT | O_EXCL, 0600, &fd);
		if (!r) {
			char bytes[SECTOR];

			sector_fill(bytes, 10 + w->small_made - 1, 0, 1);
			r = io_pwrite(fd, bytes, SECTOR, 0);
			close(fd);
		}
		ff_store_change_end(w->store);
	}
	if (r && r != -ENOENT)
		complain(w, "a change of %s fails: %s", a, strerror(-r));
}

static struct snap_model *pick(struct writer *t)
{
	struct world *w = t->w;

	for (unsigned i = 0, at = emu_random(&t->rng, SNAPS); i < SNAPS; i++, at = (at + 1) % SNAPS)
		if (atomic_load(&w->snaps[at].state) == SNAP_THERE)
			return &w->snaps[at];
	return NULL;
}

static unsigned alive(const struct world *w)
{
	unsigned n = 0;

	for (unsigned i = 0; i < w->snap_count; i++)
		n += atomic_load(&w->snaps[i].state) == SNAP_THERE;
	return n;
}

static void make_snap(struct writer *t)
{
	struct world *w = t->w;
	struct snap_model *m = &w->snaps[w->snap_count];
	int r;

	if (w->snap_count == SNAPS || alive(w) == ALIVE)
		return;
	snprintf(m->name, sizeof m->name, "s%u", w->snap_count++);
	m->durable = w->durable;
	m->losses = w->losses;
	for (unsigned d = 0; d < DISKS; d++)
		for (unsigned i = 0; i < SECTORS; i++)
			m->lowest[d][i] = atomic_load(&w->sectors[d][i].done);
	atomic_store(&m->state, SNAP_MAKING);
	r = ff_store_freeze(w->store, m->name, 0);
	for (unsigned d = 0; d < DISKS; d++)
		for (unsigned i = 0; i < SECTORS; i++)
			m->highest[d][i] = atomic_load(&w->sectors[d][i].begun);
	if (r) {
		complain(w, "mkdir of %s fails: %s", m->name, strerror(-r));
		atomic_store(&m->state, SNAP_GONE);
		return;
	}
	atomic_store(&m->state, SNAP_THERE);
	check_golden(w, m);
}

static void drop_snap_of(struct writer *t)
{
	struct snap_model *m = pick(t);
	int r;

	if (!m)
		return;
	atomic_store(&m->state, SNAP_DROPPING);
	r = ff_store_drop(t->w->store, m->name);
	if (r)
		complain(t->w, "rmdir of %s fails: %s", m->name, strerror(-r));
	atomic_store(&m->state, SNAP_GONE);
}

static void rename_snap(struct writer *t)
{
	struct snap_model *m = pick(t);
	int r;

	if (!m || atomic_load(&m->renaming))
		return; /* once each */
	snprintf(m->to, sizeof m->to, "%.10s-new", m->name);
	atomic_store(&m->renaming, 1);
	r = ff_store_rename_snap(t->w->store, m->name, m->to);
	if (r)
		complain(t->w, "rename of %s fails: %s", m->name, strerror(-r));
	atomic_store(&m->renaming, 2);
	memcpy(m->name, m->to, sizeof m->name);
}

static void give_snap_up(struct writer *t)
{
	struct snap_model *m = pick(t);
	struct ff_snap *snap;
	int r;

	if (!m || ff_snap_get(t->w->store, m->name, &snap))
		return;
	if (!atomic_load(&m->giving))
		atomic_store(&m->giving, 1);
	r = ff_snap_checkpoint(snap);
	/* one that was not durable may have lost its manifest */
	if (r && (m->durable || m->losses == t->w->losses || r != -EIO))
		complain(t->w, "a checkpoint of %s fails: %s", m->name, strerror(-r));
	if (!r)
		atomic_store(&m->giving, 2);
	ff_snap_put(snap);
}

static void first_writers_turn(struct writer *t)
{
	unsigned what = emu_random(&t->rng, 40);

	if (what < 6)
		make_snap(t);
	else if (what < 9)
		drop_snap_of(t);
	else if (what < 10)
		rename_snap(t);
	else if (what < 13)
		change_small(t);
	else if (what < 15)
		resize(t);
	else if (what < 18)
		guest_sync(t);
	else if (what < 19)
		ff_store_pulse(t->w->store);
	else if (what < 21)
		give_snap_up(t);
	else
		write_some(t);
	atomic_fetch_add(&t->w->turn, 1);
}

static void *run(void *arg)
{
	struct writer *t = arg;

	while (!emu_is_cut() && atomic_load(&t->w->turn) < t->w->ops) {
		if (t->number == 0)
			first_writers_turn(t);
		else if (emu_random(&t->rng, 10) == 0)
			guest_sync(t);
		else
			write_some(t);
	}
	return NULL;
}

void world_work(struct world *w, struct emu_rng *rng)
{
	struct writer writers[4] = {0};

	atomic_store(&w->turn, 0);
	for (unsigned i = 0; i < w->threads; i++) {
		struct writer *t = &writers[i];

		t->w = w;
		t->number = i;
		t->rng.state = rng->state + i * 7919u;
		emu_random(&t->rng, 2);
		for (unsigned d = 0; d < DISKS; d++) {
			char name[16];
			int r;

			snprintf(name, sizeof name, "disk%u", d);
			t->fds[d] = openat(w->source_fd, name, O_RDWR | O_CLOEXEC);
			r = ff_disk_get(w->store, t->fds[d], &t->disks[d]);
			if (r)
				errx(1, "%s: %s", name, strerror(-r));
		}
	}
	emu_random(rng, 2);
	for (unsigned i = 1; i < w->threads; i++)
		pthread_create(&writers[i].thread, NULL, run, &writers[i]);
	run(&writers[0]);
	for (unsigned i = 1; i < w->threads; i++)
		pthread_join(writers[i].thread, NULL);
	for (unsigned i = 0; i < w->threads; i++)
		for (unsigned d = 0; d < DISKS; d++) {
			ff_disk_put(writers[i].disks[d]);
			close(writers[i].fds[d]);
		}
}
