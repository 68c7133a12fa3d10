/*
 * Host clusters of an image: which are in use, on disk (refcounts) and in memory, and the tables
 * that are entered where they are first needed.
 *
 * Everything here that changes something holds alloc_lock, for a few small pwrites at most; data is
 * never written under it. Below it: fd_lock, and whatever the budget's function takes (which must
 * not call back into the image).
 *
 * A host cluster of the data area is: never allocated (at next and beyond) → allocated (below next,
 * refcount 0, being written by one save) → used (refcount 1) → released (refcount 0, its space
 * punched, not used again: no guest cluster is saved twice, so nothing would be gained). A save
 * that fails gives its clusters back: next moves down where they are the last, else they are kept
 * in a list for later saves.
 *
 * refs holds the refcount bits as they should be. A byte of refcounts is written from it, with the
 * neighbours' bits as they are, so that bytes need not be read. On disk a bit may be 1 where refs
 * has 0 (a write that failed when clearing it): a leak, which the next load mends. It is never the
 * other way round once anything refers to the cluster: first the refcount, then the reference.
 * (What a loss of power may leave is told in qcow2_image.c.)
 *
 *   refcount block: its own bit (in a block entered at creation), then the refcount table's entry;
 *                   then blocks has it
 *   L2 table:       block of its bit, its bit, then the L1 entry; then tables has it (release)
 *
 * Budget: a data cluster counts in full. A table counts one page whatever the cluster size: it is
 * sparse, and a page of it is all that 512 clusters of data need.
 */
#include <stdlib.h>
#include <string.h>

#include "cow/io.h"
#include "cow/qcow2_private.h"
#include "ff_log.h"
#include "ff_util.h"

#define ENTRIES_AT_ONCE 512u

int image_charge(struct ff_image *img, uint64_t bytes, bool must)
{
	int r = img->budget ? img->budget(img->budget_ctx, (int64_t)bytes, must) : 0;

	if (!r)
		atomic_fetch_add(&img->allocated, bytes);
	return r;
}

void image_charge_back(struct ff_image *img, uint64_t bytes)
{
	if (!bytes)
		return;
	atomic_fetch_sub(&img->allocated, bytes);
	if (img->budget)
		img->budget(img->budget_ctx, -(int64_t)bytes, true);
}

int image_refs_write(struct ff_image *img, uint64_t host, uint64_t n)
{
	static const uint8_t none[CLUSTERMAP_CHUNK_BITS / 8];
	uint64_t base = img->l.rb_first * img->l.cluster_size;
	uint64_t end = host + n;
	int fd, r = image_fd(img, &fd);

	host &= ~UINT64_C(7);
	while (!r && host < end) {
		uint64_t room = CLUSTERMAP_CHUNK_BITS - host % CLUSTERMAP_CHUNK_BITS;
		uint64_t bits = FF_MIN(end - host, room);
		const uint8_t *bytes = clustermap_bytes(&img->refs, host);

		r = io_pwrite(fd, bytes ? bytes : none, (size_t)ff_div_up(bits, 8),
		              base + host / 8);
		host += bits;
	}
	return r;
}

/* Sets bits whose refcount blocks are there. On error they stay set in refs: the caller takes them
 * back where nothing can refer to the clusters. */
static int refs_mark(struct ff_image *img, uint64_t host, uint64_t n)
{
	int r = img->pristine ? image_first_refs(img) : 0;

	if (r)
		return r;
	img->pristine = false;
	r = clustermap_reserve(&img->refs, host, n);
	if (r)
		return r;
	clustermap_set(&img->refs, host, n);
	return image_refs_write(img, host, n);
}

static int refs_unmark(struct ff_image *img, uint64_t host, uint64_t n)
{
	clustermap_clear(&img->refs, host, n);
	return image_refs_write(img, host, n);
}

int image_hook_blocks(struct ff_image *img, uint64_t first, uint64_t n)
{
	uint8_t entries[ENTRIES_AT_ONCE * 8];
	int fd, r = image_fd(img, &fd);

	while (!r && n) {
		uint64_t now = FF_MIN(n, (uint64_t)ENTRIES_AT_ONCE);

		for (uint64_t i = 0; i < now; i++)
			ff_put_be64(entries + i * 8,
			            (img->l.rb_first + first + i) * img->l.cluster_size);
		r = io_pwrite(fd, entries, (size_t)now * 8,
		              img->l.rt_first * img->l.cluster_size + first * 8);
		first += now;
		n -= now;
	}
	return r;
}

/* Enters N refcount blocks. Lock held. */
static int hook_blocks(struct ff_image *img, uint64_t first, uint64_t n)
{
	uint64_t cost = n * QCOW2_TABLE_CHARGE;
	int r = clustermap_reserve(&img->blocks, first, n);

	if (!r)
		r = image_charge(img, cost, false);
	if (r)
		return r;
	r = refs_mark(img, img->l.rb_first + first, n);
	if (!r)
		r = image_hook_blocks(img, first, n);
	if (r) {
		/* entries may be there, so the bits stay: a bit without an entry is a leak, an
		 * entry without its bit an error */
		image_charge_back(img, cost);
		return r;
	}
	clustermap_set(&img->blocks, first, n);
	return 0;
}

/* Sees to it that the refcount blocks of the host clusters are in the table. Lock held. */
static int need_blocks(struct ff_image *img, uint64_t host, uint64_t n)
{
	uint64_t first = host / img->l.per_block, end = (host + n - 1) / img->l.per_block + 1;
	int r = 0;

	while (!r && first < end) {
		bool there;
		uint64_t run = clustermap_run(&img->blocks, first, end - first, &there);

		if (!there)
			r = hook_blocks(img, first, run);
		first += run;
	}
	return r;
}

int image_refs_set(struct ff_image *img, uint64_t host, uint64_t n)
{
	FF_GUARD(&img->alloc_lock);
	int r = need_blocks(img, host, n);

	if (r)
		return r;
	r = refs_mark(img, host, n);
	if (r)
		refs_unmark(img, host, n); /* should this fail too: leaked until the next load */
	return r;
}

int image_refs_clear(struct ff_image *img, uint64_t host, uint64_t n)
{
	FF_GUARD(&img->alloc_lock);
	return refs_unmark(img, host, n);
}

static int write_l1(struct ff_image *img, uint64_t first, uint64_t n)
{
	uint8_t entries[ENTRIES_AT_ONCE * 8];
	int fd, r = image_fd(img, &fd);

	if (r)
		return r;
	for (uint64_t i = 0; i < n; i++)
		ff_put_be64(entries + i * 8,
		            QCOW2_COPIED | ((img->l.l2_first + first + i) * img->l.cluster_size));
	return io_pwrite(fd, entries, (size_t)n * 8,
	                 img->l.l1_first * img->l.cluster_size + first * 8);
}

/* Enters N L2 tables, at most ENTRIES_AT_ONCE. Lock held. */
static int hook_run(struct ff_image *img, uint64_t first, uint64_t n)
{
	uint64_t host = img->l.l2_first + first, cost = n * QCOW2_TABLE_CHARGE;
	int r = clustermap_reserve(&img->tables, first, n);

	if (!r)
		r = image_charge(img, cost, false);
	if (r)
		return r;
	r = need_blocks(img, host, n);
	if (!r)
		r = refs_mark(img, host, n);
	if (!r)
		r = write_l1(img, first, n);
	if (r) { /* the bits stay, as above */
		image_charge_back(img, cost);
		return r;
	}
	atomic_store(&img->hooked, atomic_fetch_add(&img->writes, 1) + 1);
	clustermap_set(&img->tables, first, n);
	return 0;
}

int image_hook_tables(struct ff_image *img, uint64_t first, uint64_t count)
{
	uint64_t t = first / img->l.per_table, end = (first + count - 1) / img->l.per_table + 1;
	bool there;
	int r = 0;

	if (clustermap_run(&img->tables, t, end - t, &there) == end - t && there)
		return 0;
	pthread_mutex_lock(&img->alloc_lock);
	while (!r && t < end) {
		uint64_t max = FF_MIN(end - t, (uint64_t)ENTRIES_AT_ONCE);
		uint64_t n = clustermap_run(&img->tables, t, max, &there);

		if (!there)
			r = hook_run(img, t, n);
		t += n;
	}
	pthread_mutex_unlock(&img->alloc_lock);
	return r;
}

/* A run of N clusters out of those given back; false: there is none as long. Lock held. */
static bool take_given_back(struct ff_image *img, uint64_t n, uint64_t *host)
{
	for (size_t i = 0; i < img->given_back_count; i++) {
		struct image_run *run = &img->given_back[i];

		if (run->count < n)
			continue;
		*host = run->first;
		run->first += n;
		run->count -= n;
		if (!run->count)
			*run = img->given_back[--img->given_back_count];
		return true;
	}
	return false;
}

int image_alloc(struct ff_image *img, uint64_t n, uint64_t *host)
{
	int r = image_charge(img, n * img->l.cluster_size, false);

	if (r)
		return r;
	pthread_mutex_lock(&img->alloc_lock);
	if (!take_given_back(img, n, host)) {
		if (n <= img->l.capacity - img->next) {
			*host = img->next;
			img->next += n;
		} else {
			r = -ENOSPC;
		}
	}
	pthread_mutex_unlock(&img->alloc_lock);
	if (r)
		image_charge_back(img, n * img->l.cluster_size);
	return r;
}

/* Moves next down over runs that end there. Lock held. */
static void lower_next(struct ff_image *img)
{
	for (size_t i = 0; i < img->given_back_count;) {
		struct image_run run = img->given_back[i];

		if (run.first + run.count != img->next) {
			i++;
			continue;
		}
		img->next = run.first;
		img->given_back[i] = img->given_back[--img->given_back_count];
		i = 0;
	}
}

void image_unalloc(struct ff_image *img, uint64_t host, uint64_t n)
{
	struct image_run *more;

	pthread_mutex_lock(&img->alloc_lock);
	more = realloc(img->given_back, (img->given_back_count + 1) * sizeof *more);
	if (more) { /* else they stay unused: a few numbers are lost, no space */
		img->given_back = more;
		more[img->given_back_count++] = (struct image_run){host, n};
		lower_next(img);
	}
	pthread_mutex_unlock(&img->alloc_lock);
	image_charge_back(img, n * img->l.cluster_size);
}
