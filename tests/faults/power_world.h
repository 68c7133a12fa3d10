/*
 * What a power loss test knows of its disks and snapshots: see power_world.c and power_writers.c.
 */
#ifndef FF_TEST_POWER_WORLD_H
#define FF_TEST_POWER_WORLD_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "emu_disk.h"
#include "ff_store.h"

enum {
	SECTOR = 512,
	CHUNK = 4, /* sectors that one writer owns */
	DISKS = 3,
	SMALL = 4, /* files that are removed and replaced */
	SECTORS = 512,
	SNAPS = 40,
	ALIVE = 5,
	GENERATIONS = 250,
};

enum snap_state { SNAP_NONE, SNAP_MAKING, SNAP_THERE, SNAP_DROPPING, SNAP_GONE };

struct golden {
	char name[16];
	size_t size;
	char *bytes;
	bool lost; /* was found to give EIO */
};

struct snap_model {
	_Atomic int state;
	int cut_state; /* at the cut */
	bool durable;
	unsigned losses;       /* of power, before it was made */
	char name[16], to[16]; /* TO: being renamed */
	_Atomic int renaming;  /* 1: from name to TO, 2: it has come to its end */
	int cut_renaming;
	_Atomic int giving; /* 1: it is being made a checkpoint, 2: it is one */
	int cut_giving;
	struct golden *golden;
	size_t golden_count;
	uint8_t lowest[DISKS][SECTORS], highest[DISKS][SECTORS];
};

/* A sector's content is a function of its number and of its generation: how often it was written.
 */
struct sector {
	_Atomic uint8_t begun, done, synced;
	uint8_t cut_begun, cut_synced;
	_Atomic uint64_t zero[4]; /* generations that are zeros */
};

struct world {
	char root[128], source[160], fleece[160];
	bool one; /* FLEECE_DIR is in SOURCE */
	unsigned threads;
	uint32_t cluster;
	struct emu_rng rng;
	struct ff_store *store;
	bool durable; /* the option of the present mount */
	int source_fd;
	bool active, cut_active; /* the mount is open and was not being opened or closed */
	unsigned ops, small_made;
	unsigned sizes[DISKS]; /* sectors, of new */
	struct sector sectors[DISKS][SECTORS];
	struct snap_model snaps[SNAPS];
	unsigned snap_count;
	atomic_uint turn; /* operations of the first thread so far */
	unsigned violations;
	unsigned losses; /* of power, so far */
	bool mixed;      /* with and without `durable` in turn */
	bool manifests[SNAPS];
};

void world_begin(struct world *w);
/* Removes what the frozen contents took. */
void world_end(struct world *w);
/* Opens the store with or without `durable`. */
int world_open(struct world *w, bool durable);
void world_close(struct world *w);
/* For emu_cut_in(): notes what is known at the cut. */
void world_on_cut(void *world);

void complain(struct world *w, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

/* --- power_writers.c --- */
/* W->ops random operations of the first thread, the others writing meanwhile; ends early at a cut.
 */
void world_work(struct world *w, struct emu_rng *rng);

/* --- power_check.c --- */
/* What the first writer does right after a freeze. */
void check_golden(struct world *w, struct snap_model *m);
/* After the power loss, before the store is opened: the sources, against what fsync promised. From
 * here on, the model is that of the cut. */
void check_sources(struct world *w);
/* The names that must be listed, since their manifests are there. */
void check_note_manifests(struct world *w);
/* The snapshots of the open store against the model. */
void check_snaps(struct world *w);
/* Drops all and looks for leftovers. */
void check_drop_all(struct world *w);
/* A sum of all the files in SOURCE's root. */
uint64_t check_sum(struct world *w);

void sector_fill(char *out, unsigned disk, unsigned sector, unsigned generation);
/* The generation of a sector's content, 0: zeros, -1: neither. */
int sector_read(const char *bytes, unsigned disk, unsigned sector);
bool zero_between(const struct sector *s, unsigned from, unsigned to);

#endif
