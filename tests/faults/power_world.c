/*
 * Disks and snapshots for the power loss test, and what it knows of them.
 *
 * Three disks are written in sectors, each with a content that tells which write it came from (its
 * generation); a chunk of sectors belongs to one writer, so the writes of a sector have an order.
 * `begun` is raised before a write, `done` after it, `synced` after an fsync: of a sector on
 * storage nothing can be older than `synced` or newer than `begun`. The last disk changes its size.
 * Small files are removed and replaced. All of that is done by the writers, in power_writers.c.
 *
 * world_on_cut() notes what the test knows at the instant of the cut.
 */
#include "power_world.h"

#include <err.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "ff_util.h"

void complain(struct world *w, const char *fmt, ...)
{
	va_list args;

	if (w->violations++ >= 5)
		return;
	printf("  violation: ");
	va_start(args, fmt);
	vprintf(fmt, args);
	va_end(args);
	printf("\n");
}

static uint64_t mix(uint64_t x)
{
	x = (x ^ (x >> 31)) * UINT64_C(0x9e3779b97f4a7c15);
	return x ^ (x >> 29);
}

void sector_fill(char *out, unsigned disk, unsigned sector, unsigned generation)
{
	uint64_t words[SECTOR / 8] = {UINT64_C(0xf1ee000000000000) | disk, sector, generation};

	for (unsigned i = 3; i < FF_ARRAY_SIZE(words); i++)
		words[i] = mix(mix(disk * 1000003u + sector) + generation * 977u + i);
	memcpy(out, words, SECTOR);
}

int sector_read(const char *bytes, unsigned disk, unsigned sector)
{
	static const char zeros[SECTOR];
	char want[SECTOR];
	uint64_t generation;

	if (memcmp(bytes, zeros, SECTOR) == 0)
		return 0;
	memcpy(&generation, bytes + 16, 8);
	if (generation == 0 || generation > 255)
		return -1;
	sector_fill(want, disk, sector, (unsigned)generation);
	return memcmp(bytes, want, SECTOR) == 0 ? (int)generation : -1;
}

bool zero_between(const struct sector *s, unsigned from, unsigned to)
{
	for (unsigned g = from; g <= to; g++)
		if (atomic_load(&s->zero[g / 64]) >> (g % 64) & 1)
			return true;
	return false;
}

static void make_file(struct world *w, const char *name, unsigned disk, unsigned sectors,
                      unsigned data)
{
	char path[200], bytes[SECTOR];
	int fd;

	snprintf(path, sizeof path, "%s/%s", w->source, name);
	fd = open(path, O_WRONLY | O_CREAT | O_EXCL, 0644);
	if (fd < 0 || ftruncate(fd, (off_t)sectors * SECTOR))
		err(1, "%s", path);
	for (unsigned i = 0; i < data; i++) {
		sector_fill(bytes, disk, i, 1);
		if (pwrite(fd, bytes, SECTOR, (off_t)i * SECTOR) != SECTOR)
			err(1, "%s", path);
	}
	close(fd);
}

void world_begin(struct world *w)
{
	static const unsigned sizes[DISKS] = {512, 193, 256};
	unsigned data;
	char name[16];

	snprintf(w->source, sizeof w->source, "%s/source", w->root);
	snprintf(w->fleece, sizeof w->fleece, "%s/fleece", w->root);
	if (mkdir(w->source, 0755) || mkdir(w->fleece, 0700))
		err(1, "%s", w->root);
	for (unsigned d = 0; d < DISKS; d++) {
		w->sizes[d] = sizes[d];
		snprintf(name, sizeof name, "disk%u", d);
		data = d == 1 ? 0 : sizes[d] * 3 / 4; /* one is a hole: saves without data */
		make_file(w, name, d, sizes[d], data);
		for (unsigned i = 0; i < SECTORS; i++) {
			struct sector *s = &w->sectors[d][i];

			s->begun = s->done = s->synced = s->cut_begun = s->cut_synced = 1;
			s->zero[0] = i < data ? 0 : 2;
		}
	}
	for (w->small_made = 0; w->small_made < SMALL; w->small_made++) {
		snprintf(name, sizeof name, "small%u", w->small_made);
		make_file(w, name, 10 + w->small_made, 20, 20);
	}
}

static void forget_golden(struct snap_model *m)
{
	for (size_t i = 0; i < m->golden_count; i++)
		free(m->golden[i].bytes);
	free(m->golden);
	m->golden = NULL;
	m->golden_count = 0;
}

void world_end(struct world *w)
{
	for (unsigned i = 0; i < w->snap_count; i++)
		forget_golden(&w->snaps[i]);
}

void world_on_cut(void *world)
{
	struct world *w = world;

	for (unsigned d = 0; d < DISKS; d++)
		for (unsigned i = 0; i < SECTORS; i++) {
			struct sector *s = &w->sectors[d][i];

			s->cut_synced = atomic_load(&s->synced);
			s->cut_begun = atomic_load(&s->begun);
		}
	for (unsigned i = 0; i < SNAPS; i++) {
		w->snaps[i].cut_giving = atomic_load(&w->snaps[i].giving);
		w->snaps[i].cut_renaming = atomic_load(&w->snaps[i].renaming);
		w->snaps[i].cut_state = atomic_load(&w->snaps[i].state);
	}
	w->cut_active = w->active;
}

int world_open(struct world *w, bool durable)
{
	struct ff_store_config config = {
	    .source_path = w->source,
	    .fleece_path = w->one ? NULL : w->fleece,
	    .cluster_size = w->cluster,
	    .durable = durable,
	};
	int r;

	w->source_fd = open(w->source, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (w->source_fd < 0)
		err(1, "%s", w->source);
	config.source_fd = w->source_fd;
	w->durable = durable;
	r = ff_store_open(&config, &w->store);
	if (r)
		close(w->source_fd);
	w->active = !r;
	return r;
}

void world_close(struct world *w)
{
	int r;

	w->active = false;
	r = ff_store_close(w->store);
	if (r)
		complain(w, "ff_store_close: %s", strerror(-r));
	close(w->source_fd);
}
