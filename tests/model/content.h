/*
 * The bytes of a file in the model: sparse, and cheap to copy for a snapshot.
 *
 * Blocks of 64 KiB are shared between copies and copied when one of them is written. A missing
 * block is zeros, and so is everything beyond the size. Not thread-safe. Running out of memory
 * ends the program.
 */
#ifndef TESTS_MODEL_CONTENT_H
#define TESTS_MODEL_CONTENT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define CONTENT_BLOCK 65536u

struct content_block;

struct content {
	uint64_t size;
	size_t count; /* length of blocks */
	struct content_block **blocks;
};

void content_copy(struct content *to, const struct content *from);
void content_free(struct content *c);

/* Sets the size; new bytes are zeros. */
void content_resize(struct content *c, uint64_t size);
/* Writes at OFF, growing the file where needed. */
void content_write(struct content *c, uint64_t off, const void *buf, size_t len);
/* Zeros what lies within the size. */
void content_zero(struct content *c, uint64_t off, uint64_t len);
/* LEN bytes from OFF; zeros beyond the size. */
void content_read(const struct content *c, uint64_t off, void *buf, size_t len);

/* The first of LEN bytes from OFF where BUF differs, or -1. */
int64_t content_diff(const struct content *c, uint64_t off, const void *buf, size_t len);
/* The first byte that is not zero from OFF and before END, or END. */
uint64_t content_next_nonzero(const struct content *c, uint64_t off, uint64_t end);
/* Does block number I hold anything? */
bool content_has_block(const struct content *c, size_t i);

#endif
