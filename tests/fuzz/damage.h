/*
 * What the two parts of the damage test share: damage_files.c (makes FLEECE_DIR, damages its files,
 * puts them back) and damage.c (looks what comes of it; what is asked of it stands there).
 */
#ifndef FF_TESTS_DAMAGE_H
#define FF_TESTS_DAMAGE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/stat.h>

#include "ff_store.h"
#include "tests/model/rng.h"

enum { SNAPS = 4, DISKS = 4, DISK_MAX = 160 << 10, FILES = 96, CS = 4096 };
enum { GIVING = 1, GIVEN = 2 }; /* snapshots: one that has given up parts, a checkpoint */

enum op {
	FLIP,
	FLIP_WORD,
	CUT,
	GROW,
	SCRIBBLE,
	CLEAR_WORD,
	CLEAR_BLOCK,
	SWAP_WORDS,
	CLEAR_ENTRY,
	ZERO_ENTRY,
	REPLACE,
	REMOVE,
	NO_FILE,
	OPS,
};
struct file {
	char path[160]; /* below FLEECE_DIR */
	uint8_t *data;
	size_t len;
	int snap, disk; /* -1: all */
	size_t tables, tables_end;
	bool ledger;
};

struct damage {
	struct rng rng;
	char root[64], source[80], fleece[80];
	int source_fd;
	bool released[SNAPS][DISKS][DISK_MAX / CS];
	uint8_t live[DISKS][DISK_MAX], views[SNAPS][DISKS][DISK_MAX];
	struct file files[FILES];
	size_t file_count;
};

extern struct damage t;
extern const char *const op_names[OPS];
extern const char *const disk_names[DISKS];
extern const size_t disk_sizes[DISKS];

/* Makes a directory with a source and snapshots of it, and keeps all files of FLEECE_DIR. */
void damage_make(void);
/* Puts all files of FLEECE_DIR back. */
void damage_restore(void);
/* Damages one. False: nothing came of it. *IN_TABLES: L2 entries changed. */
bool damage_one(enum op op, const struct file *f, bool *in_tables);
/* Removes and frees everything. */
void damage_end(void);
/* Finds a frozen inode. */
int damage_find(struct ff_snap *snap, const char *path, const struct ff_frozen **out);
/* The store, or NULL and an error. */
struct ff_store *damage_open(int *error);

#endif
