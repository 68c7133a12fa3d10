/*
 * Sparse contents with shared blocks. Invariants: count is size divided by the block size, rounded
 * up; bytes of the last block beyond the size are zero, so that growing needs no work. A block with
 * more than one reference is never written.
 */
#include "content.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct content_block {
	unsigned refs;
	uint8_t b[CONTENT_BLOCK];
};

static void *must(void *p)
{
	if (!p) {
		fprintf(stderr, "out of memory\n");
		abort();
	}
	return p;
}

static void block_put(struct content_block *b)
{
	if (b && --b->refs == 0)
		free(b);
}

void content_copy(struct content *to, const struct content *from)
{
	to->size = from->size;
	to->count = from->count;
	to->blocks = NULL;
	if (!from->count)
		return;
	to->blocks = must(malloc(from->count * sizeof *to->blocks));
	for (size_t i = 0; i < from->count; i++) {
		to->blocks[i] = from->blocks[i];
		if (to->blocks[i])
			to->blocks[i]->refs++;
	}
}

void content_free(struct content *c)
{
	for (size_t i = 0; i < c->count; i++)
		block_put(c->blocks[i]);
	free(c->blocks);
	memset(c, 0, sizeof *c);
}

/* Block I, ours alone. */
static uint8_t *block_own(struct content *c, size_t i)
{
	struct content_block *b = c->blocks[i], *n;

	if (b && b->refs == 1)
		return b->b;
	n = must(calloc(1, sizeof *n));
	n->refs = 1;
	if (b) {
		memcpy(n->b, b->b, CONTENT_BLOCK);
		block_put(b);
	}
	c->blocks[i] = n;
	return n->b;
}

void content_resize(struct content *c, uint64_t size)
{
	size_t count = (size_t)((size + CONTENT_BLOCK - 1) / CONTENT_BLOCK), i;

	if (size < c->size)
		content_zero(c, size, c->size - size);
	for (i = count; i < c->count; i++)
		block_put(c->blocks[i]);
	if (count != c->count) {
		if (count)
			c->blocks = must(realloc(c->blocks, count * sizeof *c->blocks));
		for (i = c->count; i < count; i++)
			c->blocks[i] = NULL;
	}
	if (!count) {
		free(c->blocks);
		c->blocks = NULL;
	}
	c->count = count;
	c->size = size;
}

static size_t in_block(uint64_t off, uint64_t len)
{
	uint64_t left = CONTENT_BLOCK - off % CONTENT_BLOCK;

	return (size_t)(len < left ? len : left);
}

void content_write(struct content *c, uint64_t off, const void *buf, size_t len)
{
	const uint8_t *p = buf;
	size_t n;

	if (!len)
		return;
	if (off + len > c->size)
		content_resize(c, off + len);
	for (; len; off += n, p += n, len -= n) {
		n = in_block(off, len);
		memcpy(block_own(c, (size_t)(off / CONTENT_BLOCK)) + off % CONTENT_BLOCK, p, n);
	}
}

void content_zero(struct content *c, uint64_t off, uint64_t len)
{
	size_t n, i;

	if (off >= c->size)
		return;
	if (len > c->size - off)
		len = c->size - off;
	for (; len; off += n, len -= n) {
		n = in_block(off, len);
		i = (size_t)(off / CONTENT_BLOCK);
		if (!c->blocks[i])
			continue;
		if (n == CONTENT_BLOCK) {
			block_put(c->blocks[i]);
			c->blocks[i] = NULL;
		} else {
			memset(block_own(c, i) + off % CONTENT_BLOCK, 0, n);
		}
	}
}

bool content_has_block(const struct content *c, size_t i)
{
	return i < c->count && c->blocks[i];
}

void content_read(const struct content *c, uint64_t off, void *buf, size_t len)
{
	uint8_t *p = buf;
	size_t n, i;

	for (; len; off += n, p += n, len -= n) {
		n = in_block(off, len);
		i = (size_t)(off / CONTENT_BLOCK);
		if (content_has_block(c, i))
			memcpy(p, c->blocks[i]->b + off % CONTENT_BLOCK, n);
		else
			memset(p, 0, n);
	}
}

static bool all_zero(const uint8_t *p, size_t n)
{
	return n == 0 || (p[0] == 0 && memcmp(p, p + 1, n - 1) == 0);
}

static int64_t first_diff(const uint8_t *a, const uint8_t *b, size_t n)
{
	size_t i = 0;

	while (i < n && (b ? a[i] == b[i] : a[i] == 0))
		i++;
	return (int64_t)i;
}

int64_t content_diff(const struct content *c, uint64_t off, const void *buf, size_t len)
{
	const uint8_t *p = buf, *b;
	uint64_t pos = off;
	size_t n, i;

	for (; len; pos += n, p += n, len -= n) {
		n = in_block(pos, len);
		i = (size_t)(pos / CONTENT_BLOCK);
		b = content_has_block(c, i) ? c->blocks[i]->b + pos % CONTENT_BLOCK : NULL;
		if (b ? memcmp(b, p, n) != 0 : !all_zero(p, n))
			return (int64_t)pos + first_diff(p, b, n);
	}
	return -1;
}

uint64_t content_next_nonzero(const struct content *c, uint64_t off, uint64_t end)
{
	uint64_t stop = end < c->size ? end : c->size;
	const uint8_t *p;
	size_t n, i;

	for (; off < stop; off += n) {
		n = in_block(off, stop - off);
		i = (size_t)(off / CONTENT_BLOCK);
		if (!c->blocks[i])
			continue;
		p = c->blocks[i]->b + off % CONTENT_BLOCK;
		if (!all_zero(p, n))
			return off + (uint64_t)first_diff(p, NULL, n);
	}
	return end;
}
