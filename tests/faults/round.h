/*
 * A round: a small SOURCE and FLEECE_DIR in a fresh directory, a table of steps that is run on them
 * by one thread through include/ff_store.h, and an exact model of what must be seen after each.
 *
 * The model is shared memory: a child that runs the steps may be killed, or leave, at any moment,
 * and its parent knows how far it came. While a step is under way the model has both what was
 * before it and what is to be after it; round_verify() takes either, and from then on that is what
 * the model holds, so a round can go on after any end.
 *
 *	struct round r;
 *
 *	round_init(&r, &config);
 *	pid = fork();
 *	if (pid == 0) {
 *		round_run(&r, workload->steps, workload->count);
 *		_exit(0);
 *	}
 *	… it ends somehow …
 *	if (round_open(&r) == 0)
 *		round_verify(&r, 0);
 *	round_drop_all(&r);
 *	wrong = r.model->complaints;
 *	round_done(&r);
 *
 * What a frozen view may be, strictly: right. Whoever injects a fault says which views may break by
 * it, with round_may_break(); those may give EIO from then on, and once they have been seen broken
 * they must stay so. No tolerance ever allows wrong bytes, or a wrong size.
 */
#ifndef FF_TEST_ROUND_H
#define FF_TEST_ROUND_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "ff_store.h"

enum {
	ROUND_FILES = 9,         /* inodes */
	ROUND_NAMES = 8,         /* the names that steps may use, see round_names[] */
	ROUND_SNAPS = 6,         /* at one time */
	ROUND_BYTES = 112 << 10, /* the most that a file may have */
	ROUND_UNITS = (112 << 10) / 4096,
};

/* "a" 80 KiB of data; "sub/b" 40001 bytes with holes; "c" and its hard link "sub/c2", 16 KiB, the
 * second half a hole; "d" 20480 bytes, which begin with zeros; "e" 700 bytes. "new", "sub/new": no
 * such file yet. */
extern const char *const round_names[ROUND_NAMES];

enum round_op {
	ROUND_OPEN,        /* the store; nothing if it is open */
	ROUND_CLOSE,       /* nothing if it is closed */
	ROUND_FREEZE,      /* mkdir name */
	ROUND_DROP,        /* rmdir name */
	ROUND_RENAME_SNAP, /* name → to */
	ROUND_CHECKPOINT,  /* of the snapshot `name` */
	ROUND_RELEASE,     /* len bytes at off of the file `to` in the snapshot `name` */
	ROUND_WRITE,       /* len bytes at off, made from seed; 0: zeros */
	ROUND_REWRITE,     /* the bytes that are there, at off, len */
	ROUND_APPEND,
	ROUND_TRUNCATE, /* to off bytes */
	ROUND_PUNCH,
	ROUND_ZERO,   /* FALLOC_FL_ZERO_RANGE; tmpfs does not have it */
	ROUND_COPY,   /* len bytes at off from the offset seed of the file `to` */
	ROUND_CREATE, /* an empty file */
	ROUND_RENAME, /* name → to, over what is there */
	ROUND_UNLINK,
	ROUND_SYNC,  /* fsync */
	ROUND_READ,  /* all of the snapshot `name` */
	ROUND_SINCE, /* the same, and the images that are made up from it */
	ROUND_PULSE, /* ff_store_pulse() */
};

struct round_step {
	enum round_op op;
	const char *name;
	const char *to;
	uint32_t off, len, seed;
};

struct round_workload {
	const char *name;
	const struct round_step *steps;
	size_t count;
};

extern const struct round_workload round_workloads[];
extern const size_t round_workload_count;

struct round_config {
	enum ff_cbw_policy policy;
	bool durable;
	bool inside;           /* FLEECE_DIR is the default one, in SOURCE */
	uint32_t cluster_size; /* 0: 4096 */
	const char *dir;       /* where to make the directory; NULL: /dev/shm, or /tmp */
};

struct round_file {
	bool used;
	uint32_t size;
	uint8_t bytes[ROUND_BYTES];
};

struct round_tree {
	int8_t names[ROUND_NAMES]; /* the file that has it, or -1 */
	struct round_file files[ROUND_FILES];
};

/* A snapshot in the middle of a step is COMING (there and right, or not there), GOING (the same) or
 * MOVING (by either name). */
enum round_state { ROUND_FREE, ROUND_THERE, ROUND_COMING, ROUND_GOING, ROUND_MOVING };

/* GIVING: given up or not, and then the data is there. */
enum round_data { ROUND_WHOLE, ROUND_GIVING, ROUND_GIVEN };

struct round_snap {
	enum round_state state;
	enum round_data data;
	char name[16], to[16];
	bool durable;
	bool refused;                /* mkdir failed: it may be there, and may be gone later */
	bool settling;               /* it is GOING or COMING since before the last open */
	bool may_break[ROUND_FILES]; /* a fault allows it */
	bool broken[ROUND_FILES];    /* it was seen: must stay so */
	/* by 4 KiB: what a view has given up, or may have */
	enum round_data released[ROUND_FILES][ROUND_UNITS];
	struct round_tree tree;
	uint64_t made[ROUND_FILES]; /* a hash of the image made up from it, once it was read */
};

enum { ROUND_NO_FILE = -1, ROUND_ALL_FILES = -2 };

/* Shared by a round's processes. */
struct round_model {
	size_t steps;           /* begun */
	bool in_step;           /* the last of them has not ended */
	int step_file;          /* whose views it may break if a save fails, or ROUND_NO_FILE… */
	struct round_tree live; /* before the step in the middle */
	struct round_tree next; /* after it; the same as live without one */
	struct round_snap snaps[ROUND_SNAPS];
	unsigned complaints; /* what was seen wrong, each said on stderr */
};

struct round {
	struct round_config config;
	char root[64], source[80], fleece[96];
	int source_fd;
	struct ff_store *store; /* of this process; NULL: closed */
	struct round_model *model;
	const char *label; /* begins each complaint: how to run this very case again */
	bool may_come; /* nothing can be undone: a freeze that fails may be there after all, whole,
	                  when the store is opened again, and a snapshot have its new name */
	bool
	    may_damage; /* manifests could not be read: a snapshot may be EIO until the next open */
};

/* Is this thread inside the engine? For those who count or fail what it does there. */
extern _Thread_local volatile bool round_in_engine;

/* Makes directories, files and model; exits with a message where that is not possible. */
void round_init(struct round *r, const struct round_config *config);
/* As new, but for the shared memory and the directory's name: faster than done and init. The store
 * must not be open. */
void round_reset(struct round *r);
/* Removes all of it. The store must not be open. */
void round_done(struct round *r);

/* The engine's result, which may be an error without anything being wrong: then the model knows
 * that the step changed nothing (but a failed drop may have, and with may_come a freeze). Steps
 * that need an open store give -EBADF without it. */
int round_step(struct round *r, const struct round_step *step);
/* All the steps, whatever they give. Returns the number that gave an error. */
size_t round_run(struct round *r, const struct round_step *steps, size_t count);
int round_open(struct round *r);
int round_close(struct round *r);

/* From now on the views of the file FILE, in every snapshot there is, may be broken. */
void round_may_break(struct round *r, int file);
/* The same for all that a fault in the step which was begun last may break: the views of the disk
 * that it changes; none, if it is about snapshots; all, if it opens the store. */
void round_may_break_by_step(struct round *r);

enum {
	ROUND_MIXED = 1,      /* each byte that the step in the middle touches may be old or new */
	ROUND_NO_LIVE = 2,    /* live files are not looked at */
	ROUND_TORN = 4,       /* each view of a snapshot that is not durable must give EIO */
	ROUND_MAY_VANISH = 8, /* a snapshot that is not durable may be missing */
};

/* Looks at all live files, past the store, and at all snapshots, through it (if it is open), and
 * settles what was in the middle. Returns the number of complaints. */
unsigned round_verify(struct round *r, unsigned tolerance);
/* Drops every snapshot, then nothing may be left of any: neither in FLEECE_DIR nor aside. The store
 * must be open. Returns the number of complaints. */
unsigned round_drop_all(struct round *r);
/* Drops all, closes the store, and complains of what is left then. */
void round_end(struct round *r);

/* Says what is wrong and counts it. */
void round_complain(struct round *r, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

/* --- between the files of the harness --- */

/* What is called within is the engine's doing. */
#define ROUND_ENGINE(call)                                                                         \
	({                                                                                         \
		__typeof__(call) r_;                                                               \
		round_in_engine = true;                                                            \
		r_ = (call);                                                                       \
		round_in_engine = false;                                                           \
		r_;                                                                                \
	})

/* LEN bytes from SEED. */
void round_fill(uint8_t *out, size_t len, uint32_t seed);
int round_find_name(const struct round_tree *t, const char *name);
struct round_snap *round_find_snap(struct round *r, const char *name);
/* What the step writes: s->len bytes. */
void round_step_bytes(const struct round_tree *t, const struct round_step *s, uint8_t *out);
/* Makes the step's change of bytes in T, as far as DONE bytes; or of names. */
void round_apply_bytes(struct round_tree *t, const struct round_step *s, size_t done);
void round_apply_names(struct round *r, struct round_tree *t, const struct round_step *s);

void round_copy_file(struct round_tree *to, const struct round_tree *from, int file);
void round_copy_tree(struct round_tree *to, const struct round_tree *from);
/* Where they begin to differ; LEN: nowhere. */
size_t round_differs_at(const uint8_t *a, const uint8_t *b, size_t len);
/* Finds the frozen inode at PATH. */
int round_lookup(struct ff_snap *snap, const char *path, const struct ff_frozen **out);
/* Reads and compares a snapshot; the first error of a read, or 0. TOLERATED: any error is. IMAGES:
 * those that are made up from it, too; else those that were before. */
int round_read_snap(struct round *r, struct round_snap *snap, const char *name, bool torn,
                    bool tolerated, bool images);
/* That of the file which has the name of this number. */
int round_since_file(struct round *r, struct round_snap *s, struct ff_snap *snap, int name,
                     const char *what);

#endif
