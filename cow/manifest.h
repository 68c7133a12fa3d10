/*
 * The manifest of a snapshot: FLEECE_DIR/NAME/manifest, written once, atomically, after the freeze.
 * It holds the tree; what the images hold, they say themselves. Its presence is what makes a
 * snapshot: a directory without one is an interrupted mkdir.
 */
#ifndef FF_COW_MANIFEST_H
#define FF_COW_MANIFEST_H

#include <stdbool.h>
#include <stdint.h>

#include "cow/tree.h"

#define MANIFEST_NAME "manifest"

struct manifest {
	uint64_t seq;
	uint64_t made; /* the mount that made it: see known.c; 0: by a fleecefs that told none */
	bool ephemeral;
	bool durable;
	struct tree *tree;
};

/* Bytes of an encoded manifest; the caller frees *OUT. */
int manifest_encode(const struct manifest *m, void **out, size_t *len);
/* Checks and decodes; the caller frees out->tree. -EINVAL with *WHY, a static text, set. */
int manifest_decode(const void *buf, size_t len, struct manifest *out, const char **why);

int manifest_write(int dirfd, const struct manifest *m, bool sync);
/* WHERE names the snapshot in the log. */
int manifest_read(int dirfd, const char *where, struct manifest *out);

#endif
