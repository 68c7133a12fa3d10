/*
 * Which clusters are marked, for readers that take no lock.
 *
 * The map is an array of pointers to chunks of 32768 bits. A chunk is allocated when a bit in it is
 * first needed, so that the map of a 1 TiB disk with 4 KiB clusters is 64 KiB of pointers (zero
 * pages until touched) plus 4 KiB for each 128 MiB of the disk in which something was saved.
 *
 * States: a chunk pointer goes from NULL to its chunk once, by compare-and-swap; a loser frees its
 * own. Chunks live until clustermap_fini(). A bit changes by atomic or/and on its 64-bit word, so
 * neighbours in one word may be set by different threads at once.
 *
 * Order: bits are set with release and read with acquire, word by word. Who sees a bit sees what
 * its setter did before setting it. A run of several words is no snapshot: bits set meanwhile may
 * be seen or not, which is all that readers of a growing set need.
 *
 * There is no lock here.
 */
#include "cow/clustermap.h"

#include <assert.h>
#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "ff_util.h"

#define WORD_BITS 64u

typedef _Atomic uint64_t word_t;

int clustermap_init(struct clustermap *map, uint64_t size)
{
	map->size = size;
	map->chunk_count = (size_t)ff_div_up(size, CLUSTERMAP_CHUNK_BITS);
	map->chunk = calloc(map->chunk_count + 1, sizeof *map->chunk);
	return map->chunk ? 0 : -ENOMEM;
}

void clustermap_empty(struct clustermap *map)
{
	for (size_t i = 0; i < map->chunk_count; i++)
		free(atomic_exchange(&map->chunk[i], NULL));
}

void clustermap_fini(struct clustermap *map)
{
	if (!map->chunk)
		return;
	clustermap_empty(map);
	free(map->chunk);
	map->chunk = NULL;
}

/* The last chunk of a map has no more words than the map needs: small disks are many. */
static size_t chunk_words(const struct clustermap *map, size_t i)
{
	uint64_t bits = map->size - (uint64_t)i * CLUSTERMAP_CHUNK_BITS;

	return (size_t)ff_div_up(FF_MIN(bits, CLUSTERMAP_CHUNK_BITS), WORD_BITS);
}

static word_t *chunk_at(const struct clustermap *map, size_t i)
{
	return (word_t *)atomic_load_explicit(&map->chunk[i], memory_order_acquire);
}

int clustermap_reserve(struct clustermap *map, uint64_t first, uint64_t count)
{
	assert(first + count >= first && first + count <= map->size);
	if (!count)
		return 0;
	for (size_t i = first / CLUSTERMAP_CHUNK_BITS;
	     i <= (first + count - 1) / CLUSTERMAP_CHUNK_BITS; i++) {
		uint64_t *none = NULL, *fresh;

		if (chunk_at(map, i))
			continue;
		fresh = calloc(chunk_words(map, i), sizeof *fresh);
		if (!fresh)
			return -ENOMEM;
		if (!atomic_compare_exchange_strong_explicit(
		        &map->chunk[i], &none, fresh, memory_order_acq_rel, memory_order_acquire))
			free(fresh);
	}
	return 0;
}

/* N bits from bit BIT of a word. */
static uint64_t mask_of(unsigned bit, unsigned n)
{
	return (n == WORD_BITS ? ~UINT64_C(0) : (UINT64_C(1) << n) - 1) << bit;
}

static void change(struct clustermap *map, uint64_t first, uint64_t count, bool set)
{
	assert(first + count >= first && first + count <= map->size);
	while (count) {
		word_t *chunk = chunk_at(map, first / CLUSTERMAP_CHUNK_BITS);
		unsigned in_chunk = first % CLUSTERMAP_CHUNK_BITS;
		unsigned bit = in_chunk % WORD_BITS;
		unsigned n = (unsigned)FF_MIN(count, (uint64_t)(WORD_BITS - bit));

		assert(chunk || !set);
		if (set)
			atomic_fetch_or_explicit(&chunk[in_chunk / WORD_BITS], mask_of(bit, n),
			                         memory_order_release);
		else if (chunk)
			atomic_fetch_and_explicit(&chunk[in_chunk / WORD_BITS], ~mask_of(bit, n),
			                          memory_order_release);
		first += n;
		count -= n;
	}
}

void clustermap_set(struct clustermap *map, uint64_t first, uint64_t count)
{
	change(map, first, count, true);
}

void clustermap_clear(struct clustermap *map, uint64_t first, uint64_t count)
{
	change(map, first, count, false);
}

bool clustermap_test(const struct clustermap *map, uint64_t cluster)
{
	word_t *chunk;
	unsigned in_chunk = cluster % CLUSTERMAP_CHUNK_BITS;

	if (cluster >= map->size)
		return false;
	chunk = chunk_at(map, cluster / CLUSTERMAP_CHUNK_BITS);
	return chunk && (atomic_load_explicit(&chunk[in_chunk / WORD_BITS], memory_order_acquire) >>
	                     (in_chunk % WORD_BITS) &
	                 1);
}

/* How many clusters from AT on, within its chunk, are all WANT; up to the chunk's end. */
static unsigned run_in_chunk(word_t *chunk, size_t words, unsigned at, bool want)
{
	unsigned i = at, end = (unsigned)words * WORD_BITS;

	if (!chunk)
		return want ? 0 : CLUSTERMAP_CHUNK_BITS - at;
	while (i < end) {
		uint64_t w = atomic_load_explicit(&chunk[i / WORD_BITS], memory_order_acquire);
		unsigned bit = i % WORD_BITS;

		/* after this, a set bit is one that ends the run */
		w = (want ? ~w : w) >> bit;
		if (w)
			return i + (unsigned)__builtin_ctzll(w) - at;
		i += WORD_BITS - bit;
	}
	return end - at;
}

uint64_t clustermap_run(const struct clustermap *map, uint64_t first, uint64_t max, bool *set)
{
	bool want = clustermap_test(map, first);
	uint64_t n = 0;

	while (n < max && first + n < map->size) {
		unsigned at = (first + n) % CLUSTERMAP_CHUNK_BITS;
		size_t i = (first + n) / CLUSTERMAP_CHUNK_BITS;
		unsigned got = run_in_chunk(chunk_at(map, i), chunk_words(map, i), at, want);

		n += got;
		if (at + got < CLUSTERMAP_CHUNK_BITS)
			break;
	}
	/* bits past the end of the map are clear, in its last chunk too */
	if (!want && first + n >= map->size)
		n = max;
	*set = want;
	/* a bit cleared between the two looks at it leaves 0: the answer was right when it was read
	 */
	return n ? FF_MIN(n, max) : 1;
}

/* Word I of the map. */
static uint64_t word_at(const struct clustermap *map, uint64_t i)
{
	uint64_t per_chunk = CLUSTERMAP_CHUNK_BITS / WORD_BITS;
	word_t *chunk;

	if (i / per_chunk >= map->chunk_count ||
	    i % per_chunk >= chunk_words(map, (size_t)(i / per_chunk)))
		return 0;
	chunk = chunk_at(map, (size_t)(i / per_chunk));
	return chunk ? atomic_load_explicit(&chunk[i % per_chunk], memory_order_acquire) : 0;
}

void clustermap_bits(const struct clustermap *map, uint64_t first, unsigned count, uint64_t *out)
{
	unsigned shift = first % WORD_BITS;

	for (unsigned done = 0; done < count; done += WORD_BITS) {
		uint64_t i = (first + done) / WORD_BITS;
		uint64_t w = word_at(map, i) >> shift;

		if (shift && count - done > WORD_BITS - shift)
			w |= word_at(map, i + 1) << (WORD_BITS - shift);
		if (count - done < WORD_BITS)
			w &= (UINT64_C(1) << (count - done)) - 1;
		out[done / WORD_BITS] = w;
	}
}

const uint8_t *clustermap_bytes(const struct clustermap *map, uint64_t first)
{
	word_t *chunk = chunk_at(map, first / CLUSTERMAP_CHUNK_BITS);

	return chunk ? (const uint8_t *)chunk + first % CLUSTERMAP_CHUNK_BITS / 8 : NULL;
}
