/*
 * What since.c, since_file.c and since_json.c share.
 */
#ifndef FF_SINCE_H
#define FF_SINCE_H

#include <stdatomic.h>

#include "fusefs/derived.h"

/* An older snapshot, or nothing, that something is compared with: as long as a node needs it. */
struct since_pair {
	atomic_uint refs;
	struct ff_snap *old; /* a reference, or NULL */
	uint64_t naming;     /* tells OLD and its name from others; 0: nothing */
	uint64_t salt;       /* for st_ino */
	char name[FF_SNAP_NAME_MAX + 1];
};

struct since_pair *since_pair_ref(struct since_pair *pair);
void since_pair_put(void *pair);

/* What the engine is to compare for a node of NEW. */
struct ff_since_pair since_engine_pair(const struct fs *fs, struct ff_snap *new,
                                       const struct since_pair *pair);

/* Goes on with a hash, for st_ino. */
uint64_t since_hash(uint64_t seed, const char *s);

/* --- since_file.c --- */
/* What is called NAME in a directory, and what it is made from. */
struct since_found {
	const char *name, *stored;
	const struct ff_frozen *f;
	bool image;
};

/* For st_ino of the file that is called NAME in DIR, and is an image or ranges. */
uint64_t since_file_salt(const struct node *dir, const char *name, bool image);
int since_file_enter(struct fs *fs, struct node *dir, const struct since_found *what,
                     struct entry *out);

/* --- since_json.c --- */
#define SINCE_JSON "changes.json"
/* A reference to PAIR is taken. */
int since_json_enter(struct fs *fs, struct ff_snap *snap, struct since_pair *pair,
                     struct entry *out);

#endif
