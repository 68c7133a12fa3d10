/*
 * Names of files in FLEECE_DIR. Pure functions; results are malloc'd, NULL when memory is out.
 */
#ifndef FF_COW_NAMES_H
#define FF_COW_NAMES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* REL-fleece-SEQ.qcow2, with parts shortened or marked by a hash where they would be too long or
 * would collide with a file of ours. */
char *names_image(const char *rel, uint64_t seq);

/* A fleecing image that is being made, in its snapshot's directory. Only one is at a time. */
#define NAMES_UNFINISHED "~unfinished"

/* A snapshot that is being made, in its directory: see freeze.c. */
#define NAMES_MAKING "~making"

/* What makes a snapshot a checkpoint: see checkpoint.c. */
#define NAMES_CHECKPOINT "~checkpoint"

/* What an image's checksums are called, in the place of "qcow2". */
#define NAMES_SUMS "xxh3"

/* All that may lie beside an image, by these; NULL after the last. None is longer than the image's
 * own, which may fill a name. */
extern const char *const names_suffixes[];

/* The path of what lies beside the image at PATH: its last ".qcow2", if it has one, gives way to a
 * dot and SUFFIX. */
char *names_beside(const char *path, const char *suffix);

/* The backing file name in FROM's header (a path below FLEECE_DIR/ANY) that leads to IMAGE below
 * FLEECE_DIR/DIR. */
char *names_backing_image(const char *from, const char *dir, const char *image);

/* Could a file of this name have been made by a freeze: an image, also an unfinished one, its
 * checksums, its ledger, what was said of its zeros, a symlink to a backing file, a manifest being
 * written, the mark of a snapshot that is being made, or a checkpoint's?
 */
bool names_ours(const char *name);

/* Does NAME, of LEN bytes, end with a hash, as a name that was too long does? */
bool names_looks_hashed(const char *name, size_t len);

/* That of an image alone. */
bool names_is_image(const char *name);

/* Is a directory of this name in FLEECE_DIR the filesystem's own, unless it has a manifest? */
bool names_is_systems(const char *name);

/* Has NFS given this name to a file that was unlinked and is open still? */
bool names_is_nfs_unlinked(const char *name);

/* A relative path below some directory that stays there: not absolute, no empty, "." or ".." part,
 * shorter than PATH_MAX. */
bool names_safe_path(const char *path);

#endif
