/*
 * A cache of pieces of tables: SETS sets of WAYS pieces, 2 MiB when all are in use and may be. A
 * piece is known by its layer, offset and length; the bytes cannot change, so nothing is ever out
 * of date. The file is read without the lock: two threads that miss the same piece both read it.
 *
 * Pieces are copied to whoever asks. That costs less than to count users, and leaves no state but
 * the table itself, which is under the lock.
 */
#include "cow/qsource/cache.h"

#include <string.h>

#include "ff_util.h"

enum { SETS = 128, WAYS = 4 };

struct piece {
	uint64_t off;
	unsigned layer;
	uint32_t len;  /* 0: none */
	uint64_t used; /* when last */
	uint8_t *data; /* QS_SLICE bytes, NULL until first used */
};

struct qs_cache {
	struct qs_kept *kept; /* constant */
	pthread_mutex_t lock; /* the rest */
	uint64_t clock;
	struct piece sets[SETS][WAYS];
};

int qs_cache_create(struct qs_kept *kept, struct qs_cache **out)
{
	struct qs_cache *c = calloc(1, sizeof *c);

	if (!c)
		return -ENOMEM;
	c->kept = kept;
	pthread_mutex_init(&c->lock, NULL);
	*out = c;
	return 0;
}

void qs_cache_destroy(struct qs_cache *c)
{
	if (!c)
		return;
	for (size_t s = 0; s < SETS; s++)
		for (size_t w = 0; w < WAYS; w++)
			qs_kept_free(c->kept, c->sets[s][w].data, QS_SLICE);
	pthread_mutex_destroy(&c->lock);
	free(c);
}

static struct piece *set_of(struct qs_cache *c, unsigned layer, uint64_t off)
{
	uint64_t x =
	    (off / 512 + layer * UINT64_C(0x632be59bd9b4e019)) * UINT64_C(0x9e3779b97f4a7c15);

	return c->sets[(x >> 32) % SETS];
}

static bool find(struct qs_cache *c, unsigned layer, uint64_t off, size_t len, uint8_t *buf)
{
	struct piece *set = set_of(c, layer, off);

	FF_GUARD(&c->lock);
	for (size_t w = 0; w < WAYS; w++)
		if (set[w].len == len && set[w].off == off && set[w].layer == layer) {
			memcpy(buf, set[w].data, len);
			set[w].used = ++c->clock;
			return true;
		}
	return false;
}

/* Without memory, or if enough is kept, it is just not kept. */
static void keep(struct qs_cache *c, unsigned layer, uint64_t off, size_t len, const uint8_t *buf)
{
	struct piece *set = set_of(c, layer, off), *p = set;

	FF_GUARD(&c->lock);
	for (size_t w = 1; w < WAYS; w++)
		if (set[w].used < p->used)
			p = &set[w];
	if (!p->data && !(p->data = qs_kept_alloc(c->kept, QS_SLICE)))
		return;
	memcpy(p->data, buf, len);
	p->layer = layer;
	p->off = off;
	p->len = (uint32_t)len;
	p->used = ++c->clock;
}

int qs_cache_read(struct qs_cache *c, const struct qs_bytes *file, unsigned layer, uint64_t off,
                  size_t len, uint8_t *buf)
{
	int r;

	if (find(c, layer, off, len, buf))
		return 0;
	r = file->read(file, buf, len, off);
	if (!r)
		keep(c, layer, off, len, buf);
	return r;
}
