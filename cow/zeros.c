/*
 * Which clusters of a frozen view read as zeros, without a look at their bytes: zero clusters of
 * images, what lies beyond a newer link's end, holes of the source.
 *
 * The last may change though the bytes do not: zeros written over a hole are saved nowhere, and
 * what is read of space that was only allocated is data for as long as it is in the page cache. A
 * file that is made up with the answer in its layout must not change, not after a restart either:
 * who goes on then with a copy that was cut short would have a part of each. So each answer is kept
 * with its link, from the first time that it was asked for: two bits a cluster, in chunks that are
 * allocated when needed. One that is known altogether needs one bit, and none if it is all data or
 * all zeros. So it is at most twice what marks take of which some are in each chunk; it is asked
 * for clusters that changed between two snapshots, which have such marks, or for a whole image.
 *
 * They stand beside the image as well (qcow2_said.c), from before the first use that is made of
 * them: zeros_keep() puts there what is fresh, of whoever asked, and who makes something up lets
 * nobody see it before. What stands there is loaded when it is first asked for. All of it cannot
 * be given up while the view can be read, and goes when that is dropped or given up. Zeros are
 * saved as zeros: if an image has data where zeros were said to be, it is damaged, or not of this
 * freeze, and nothing of it counts.
 *
 * Only "zeros" needs proof; what is called data is read anyway. A hole of the source is one of the
 * view if the cluster is still the source's after the hole was seen (frozen readers reason in the
 * same way).
 *
 * A map's `lock` guards all of it, and is held while the source is asked for its extents: others
 * who want to know of the same disk wait for the same answer. Nobody else takes it.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>

#include "cow/changes.h"
#include "cow/names.h"
#include "ff_log.h"
#include "ff_util.h"

enum {
	KINDS = 512,
	SMALL = 65536, /* a file up to this long is never made anew to be shorter */
};
_Static_assert(FF_SAID_WORDS == CHANGES_WORDS, "a chunk is one on storage, too");

enum chunk_state {
	CHUNK_BITS, /* as bits say; without any: nothing is known */
	CHUNK_DATA, /* all of it is known to be data */
	CHUNK_ZERO, /* all of it is zeros */
};

struct chunk {
	uint64_t *known; /* CHANGES_WORDS; NULL: all is known */
	uint64_t zero[CHANGES_WORDS];
};

/* What the source said last: [from, to) is a hole, or has data. It stays true of what is still the
 * source's, for that was so ever since the freeze. */
struct extent {
	uint64_t from, to;
	bool hole;
};

struct zero_map {
	pthread_mutex_t lock; /* the following */
	size_t count;         /* constant */
	uint8_t *state;
	struct chunk **chunks;
	bool *fresh;     /* by chunk: something of it is not on storage yet */
	bool loaded;     /* what is on storage is here */
	uint64_t stored; /* where that ends */
	struct extent extent;
};

static void chunk_free(struct chunk *c)
{
	if (c)
		free(c->known);
	free(c);
}

static struct chunk *chunk_new(void)
{
	struct chunk *c = calloc(1, sizeof *c);

	if (c && !(c->known = calloc(CHANGES_WORDS, sizeof *c->known)))
		free(ff_take_ptr(&c));
	return c;
}

static void map_free(struct zero_map *m)
{
	for (size_t i = 0; m->chunks && i < m->count; i++)
		chunk_free(m->chunks[i]);
	free(m->chunks);
	free(m->state);
	free(m->fresh);
	pthread_mutex_destroy(&m->lock);
	free(m);
}

void zeros_forget(struct link *l)
{
	struct zero_map *m = atomic_exchange(&l->zeros, NULL);

	if (m)
		map_free(m);
}

void zeros_drop(struct link *l)
{
	zeros_forget(l);
	ff_image_said_forget(l->img);
}

static int map_of(struct link *l, struct zero_map **out)
{
	struct zero_map *m = atomic_load(&l->zeros), *none = NULL;

	if (!m) {
		m = calloc(1, sizeof *m);
		if (!m)
			return -ENOMEM;
		pthread_mutex_init(&m->lock, NULL);
		m->count = (size_t)ff_div_up(l->clusters, CHANGES_MAX);
		m->state = calloc(m->count + 1, 1);
		m->chunks = calloc(m->count + 1, sizeof *m->chunks);
		m->fresh = calloc(m->count + 1, sizeof *m->fresh);
		if (!m->state || !m->chunks || !m->fresh) {
			map_free(m);
			return -ENOMEM;
		}
		if (!atomic_compare_exchange_strong(&l->zeros, &none, m)) {
			map_free(m);
			m = none;
		}
	}
	*out = m;
	return 0;
}

/* --- what is on storage --- */

/* The last one of a chunk is the one that counts. */
static int take(void *ctx, const struct ff_said *said)
{
	struct zero_map *m = ctx;
	struct chunk **at = &m->chunks[said->chunk];

	chunk_free(ff_take_ptr(at));
	m->state[said->chunk] = said->kind == FF_SAID_DATA   ? CHUNK_DATA
	                        : said->kind == FF_SAID_ZERO ? CHUNK_ZERO
	                                                     : CHUNK_BITS;
	if (m->state[said->chunk] != CHUNK_BITS)
		return 0;
	if (!(*at = chunk_new()))
		return -ENOMEM;
	memcpy((*at)->zero, said->zero, sizeof(*at)->zero);
	if (said->kind == FF_SAID_SOME) {
		memcpy((*at)->known, said->known, sizeof(*at)->zero);
		for (unsigned w = 0; w < CHANGES_WORDS; w++)
			(*at)->zero[w] &= said->known[w];
	} else {
		free(ff_take_ptr(&(*at)->known));
	}
	return 0;
}

/* Numbers of snapshots come back; with the mount that made them they do not (known.c). Older
 * fleecefs told of none: then it is the time. L's snapshot is held, and stays L's for so long. */
static uint64_t freeze_of(const struct link *l)
{
	const struct ff_snap *snap = l->snap;

	return snap->made
	           ? snap->made
	           : (uint64_t)snap->created.tv_sec * 1000000000 + (uint64_t)snap->created.tv_nsec;
}

static void empty(struct zero_map *m)
{
	for (size_t i = 0; i < m->count; i++) {
		chunk_free(ff_take_ptr(&m->chunks[i]));
		m->state[i] = CHUNK_BITS;
	}
	m->stored = 0;
}

/* Looks at clusters that the image of OWNER has: of at most *COUNT, how many are alike, and what.
 */
static int look_owned(struct link *owner, uint64_t first, uint64_t *count, uint8_t *kind)
{
	uint8_t kinds[KINDS];
	uint64_t n = FF_MIN(*count, (uint64_t)KINDS), i = 0;
	int r = ff_image_kinds(owner->img, first, n, kinds);

	if (r)
		return r;
	while (i < n && kinds[i] == kinds[0])
		i++;
	*kind = kinds[0];
	*count = i;
	return 0;
}

/* Is one of these, which are said to be zeros, stored as data? */
static int disproved(struct link *l, uint64_t first, uint64_t end, bool *out)
{
	struct barrier *reads = l->disk->store->reads;
	unsigned token = barrier_enter(reads);
	int r = 0;

	while (first < end && !*out && !r) {
		uint8_t kind = FF_KIND_NONE;
		struct owner o;
		uint64_t n = chain_resolve(l, first, end - first, &o);

		if (o.kind == OWNER_LINK)
			r = look_owned(o.link, first, &n, &kind);
		*out = kind == FF_KIND_DATA;
		first += n;
	}
	barrier_exit(reads, token);
	return r == -ENOMEM ? r : r ? -EIO : 0;
}

/* Lock: the map's. */
static int any_disproved(struct zero_map *m, struct link *l, bool *out)
{
	int r = 0;

	*out = false;
	for (size_t i = 0; i < m->count && !r && !*out; i++) {
		const struct chunk *c = m->chunks[i];
		unsigned count = changes_count(l, i), at = 0, to;
		uint64_t base = (uint64_t)i * CHANGES_MAX;

		if (m->state[i] == CHUNK_ZERO)
			r = disproved(l, base, base + count, out);
		for (; c && !r && !*out && (at = bits_find(c->zero, at, count, true)) < count;
		     at = to) {
			to = bits_find(c->zero, at, count, false);
			r = disproved(l, base + at, base + to, out);
		}
	}
	return r;
}

/* Lock: the map's. */
static int load(struct zero_map *m, struct link *l)
{
	ff_autofree char *path = NULL;
	bool bad = false;
	int r;

	if (m->loaded)
		return 0;
	r = ff_image_said_load(l->img, freeze_of(l), take, m, &m->stored);
	if (!r)
		r = any_disproved(m, l, &bad);
	if (r || bad)
		empty(m);
	if (bad) {
		path = names_beside(ff_image_path(l->img), FF_SAID_SUFFIX);
		ff_warning("%s: calls zeros what is stored as data, and counts for nothing: "
		           "copies of .since images may differ from older ones",
		           path ? path : ff_image_path(l->img));
	}
	m->loaded = !r;
	return r;
}

static struct ff_said said_of(const struct zero_map *m, size_t i)
{
	const struct chunk *c = m->chunks[i];

	return (struct ff_said){
	    .chunk = i,
	    .kind = m->state[i] == CHUNK_DATA   ? FF_SAID_DATA
	            : m->state[i] == CHUNK_ZERO ? FF_SAID_ZERO
	            : c->known                  ? FF_SAID_SOME
	                                        : FF_SAID_BITS,
	    .known = c ? c->known : NULL,
	    .zero = c ? c->zero : NULL,
	};
}

/* Is something known of chunk I, which (without ALL) does not stand on storage? Lock: the map's. */
static bool is_wanted(const struct zero_map *m, size_t i, bool all)
{
	return m->fresh[i] || (all && (m->chunks[i] || m->state[i] != CHUNK_BITS));
}

/* What is known of each chunk, or only of the fresh ones. Lock: the map's. */
static int gather(const struct zero_map *m, bool all, struct ff_said **out, size_t *count)
{
	size_t n = 0;

	for (size_t i = 0; i < m->count; i++)
		n += is_wanted(m, i, all);
	*count = n;
	*out = calloc(n + 1, sizeof **out);
	if (!*out)
		return -ENOMEM;
	for (size_t i = 0; i < m->count; i++)
		if (is_wanted(m, i, all))
			(*out)[--n] = said_of(m, i);
	return 0;
}

/* Puts what is fresh on storage. When a file with nothing else would be less than half as long, it
 * is made anew. Lock: the map's. */
static int keep(struct zero_map *m, struct link *l, const struct ff_said *fresh, size_t count)
{
	bool durable = l->disk->store->cfg.durable || atomic_load(&l->disk->durable);
	uint64_t then = ff_image_said_size(m->stored, fresh, count);
	ff_autofree struct ff_said *all = NULL;
	size_t n;

	if (then > SMALL && gather(m, true, &all, &n) == 0 &&
	    then / 2 > ff_image_said_size(0, all, n) &&
	    ff_image_said_replace(l->img, freeze_of(l), &m->stored, all, n, durable) == 0)
		return 0;
	return ff_image_said_add(l->img, freeze_of(l), &m->stored, fresh, count, durable);
}

int zeros_keep(struct link *l)
{
	ff_autofree struct ff_said *said = NULL;
	struct zero_map *m = atomic_load(&l->zeros);
	size_t n;
	int r;

	if (!m)
		return 0;
	FF_GUARD(&m->lock);
	r = gather(m, false, &said, &n);
	if (r || !n)
		return r;
	r = keep(m, l, said, n);
	for (size_t i = 0; !r && i < m->count; i++)
		m->fresh[i] = false;
	return r;
}

/* --- finding out --- */

/* Asks the source about the byte at OFF, unless that is known. */
static int look(struct link *l, uint64_t off, struct extent *e)
{
	uint64_t data, hole;
	int r;

	if (off >= e->from && off < e->to)
		return 0;
	r = disk_seek(l->disk, off, SEEK_DATA, &data);
	if (r == -ENXIO || (!r && data > off)) {
		*e = (struct extent){off, r ? UINT64_MAX : data, true};
		return 0;
	}
	if (!r)
		r = disk_seek(l->disk, off, SEEK_HOLE, &hole);
	if (r == -ENXIO) { /* it became shorter just now */
		*e = (struct extent){off, UINT64_MAX, true};
		return 0;
	}
	if (!r)
		*e = (struct extent){off, FF_MAX(hole, off + 1), false};
	return r;
}

/* Of at most *COUNT clusters from FIRST on, which were the source's: how many are alike, and
 * whether they are zeros. *COUNT 0: they are the source's no more. */
static int look_live(struct link *l, uint64_t first, uint64_t *count, struct extent *e, bool *zero)
{
	size_t size = ff_image_desc(l->img)->cluster_size;
	uint64_t end, still;
	struct owner o;
	int r = look(l, first * size, e);

	if (r)
		return r;
	*zero = e->hole && e->to - first * size >= size;
	if (!*zero) {
		end = e->hole ? first + 1 : ff_div_up(e->to, size);
		*count = FF_MIN(*count, end - first);
		return 0;
	}
	*count = FF_MIN(*count, e->to / size - first);
	atomic_thread_fence(memory_order_seq_cst);
	still = chain_resolve(l, first, *count, &o);
	*count = o.kind == OWNER_LIVE ? FF_MIN(*count, still) : 0;
	return 0;
}

/* Looks at the clusters [first, end), whose bits begin with BASE's. The caller has the barrier
 * `reads`. */
static int find_out(struct link *l, uint64_t base, uint64_t first, uint64_t end, struct extent *e,
                    struct chunk *c)
{
	while (first < end) {
		struct owner o;
		uint64_t n = chain_resolve(l, first, end - first, &o);
		uint8_t kind = FF_KIND_ZERO;
		bool zero = true;
		int r = 0;

		if (o.kind == OWNER_LIVE)
			r = look_live(l, first, &n, e, &zero);
		else if (o.kind == OWNER_LINK)
			r = look_owned(o.link, first, &n, &kind);
		zero &= kind == FF_KIND_ZERO;
		if (r)
			return r == -ENOMEM ? r : -EIO;
		if (zero)
			bits_set(c->zero, (unsigned)(first - base), (unsigned)(first - base + n));
		bits_set(c->known, (unsigned)(first - base), (unsigned)(first - base + n));
		first += n;
	}
	return 0;
}

/* One that is known altogether needs fewer bits, or none. */
static void pack(struct zero_map *m, size_t i, unsigned count)
{
	struct chunk *c = m->chunks[i];

	if (bits_find(c->known, 0, count, false) < count)
		return;
	free(ff_take_ptr(&c->known));
	if (bits_find(c->zero, 0, count, true) == count)
		m->state[i] = CHUNK_DATA;
	else if (bits_find(c->zero, 0, count, false) == count)
		m->state[i] = CHUNK_ZERO;
	if (m->state[i] != CHUNK_BITS)
		chunk_free(ff_take_ptr(&m->chunks[i]));
}

/* Makes what WANTED asks known. Lock: the map's. */
static int learn(struct zero_map *m, struct link *l, size_t i, unsigned count,
                 const uint64_t *wanted)
{
	struct barrier *reads = l->disk->store->reads;
	uint64_t base = (uint64_t)i * CHANGES_MAX, missing[CHANGES_WORDS];
	struct chunk *c;
	int r = 0;

	c = m->chunks[i];
	if (m->state[i] != CHUNK_BITS || (c && !c->known))
		return 0;
	for (unsigned w = 0; w < CHANGES_WORDS; w++)
		missing[w] = w * 64 >= count ? 0 : wanted[w] & ~(c ? c->known[w] : 0);
	if (bits_find(missing, 0, count, true) == count)
		return 0;
	if (!c && !(c = m->chunks[i] = chunk_new()))
		return -ENOMEM;
	m->fresh[i] = true;
	for (unsigned at = 0, to; !r && (at = bits_find(missing, at, count, true)) < count;
	     at = to) {
		unsigned token = barrier_enter(reads);

		to = bits_find(missing, at, count, false);
		r = find_out(l, base, base + at, base + to, &m->extent, c);
		barrier_exit(reads, token);
	}
	if (!r)
		pack(m, i, count);
	return r;
}

int zeros_bits(struct link *l, size_t chunk, const uint64_t *wanted, uint64_t *zero)
{
	struct zero_map *m;
	int r = map_of(l, &m);

	if (r)
		return r;
	if (chunk >= m->count)
		return -EINVAL;
	FF_GUARD(&m->lock);
	r = load(m, l);
	if (!r)
		r = learn(m, l, chunk, changes_count(l, chunk), wanted);
	for (unsigned w = 0; !r && w < CHANGES_WORDS; w++)
		zero[w] = m->state[chunk] == CHUNK_ZERO   ? wanted[w]
		          : m->state[chunk] == CHUNK_DATA ? 0
		          : m->chunks[chunk]              ? wanted[w] & m->chunks[chunk]->zero[w]
		                                          : 0;
	return r;
}
