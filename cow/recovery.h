/*
 * What the parts of recovery share: recover_list.c (tells what is ours in FLEECE_DIR),
 * recover_load.c (reads it, step 1 and 2), recover_find.c (where disks are) and recover.c (makes
 * chains and judges them, step 3 to 5; the essay is there). Nothing else includes it.
 */
#ifndef FF_COW_RECOVERY_H
#define FF_COW_RECOVERY_H

#include "cow/ending.h"
#include "cow/engine.h"

/* An image, or the place where one should be (img NULL). */
struct found {
	uint64_t ino;
	int64_t btime_sec;
	uint32_t btime_nsec;
	uint64_t seq;
	struct ff_image *img;
	struct fleece_dir *dir;
	struct ff_snap *snap; /* NULL: hidden */
	size_t number;        /* of the disk in snap */
	bool durable;
	bool linked; /* img belongs to a link */
	bool apart;  /* hidden, and no longer in its chain: a drop that was cut short had taken it
	                out */
};

struct recovery {
	struct ff_store *store;
	struct found *found;
	size_t count, room;
	struct link **hidden;
	size_t hidden_count;
	enum ending ending;
	int64_t alive_until; /* a disk with a later ctime was changed after a killed daemon */
	struct ending_record *record;
	struct known *known;
	struct tree *source; /* of all of SOURCE, when a disk is not where it should be */
};

enum dir_kind {
	DIR_SNAPSHOT, /* it has a manifest, or has had one and still has images */
	DIR_UNMADE,   /* of a mkdir that was cut short */
	DIR_DROPPED,
	DIR_STRANGE, /* somebody else's; never in a list */
};

/* Directories of ours in FLEECE_DIR; the names and the list are malloc'd. */
struct names {
	struct {
		char *name;
		enum dir_kind kind;
	} * list;
	size_t count;
};

/* What is ours of what FLEECE_DIR holds; changes nothing. On error, too, the list is the
 * caller's. */
int recovery_list(struct ff_store *s, struct names *names);
/* Reads those directories: snapshots are published, images added to rc->found. */
int recovery_load(struct recovery *rc, const struct names *names);
/* Is the disk at PATH below SOURCE? *ST: of what is there. An error that may pass is returned. */
int recovery_is_at(struct ff_store *s, const char *path, const struct identity *id, struct stat *st,
                   bool *there);
/* Where the disk is: *OUT malloc'd, or NULL, with *ST of it. NEWEST: of its images. */
int recovery_find_source(struct recovery *rc, struct ff_image *newest, const struct identity *id,
                         struct stat *st, char **out);
/* A directory that we could not know to be one of ours. Any other that cannot be opened must not be
 * passed over: its snapshot would be missing, and its number given to another. */
bool recovery_is_gone(int error);

#endif
