/*
 * The ledger of an image: what is known of clusters that it does not hold.
 *
 * An image marks a cluster when it has saved it. Where nobody needs the old data any more (its
 * snapshot is a checkpoint, or its view has given up the cluster), the mark alone is worth having:
 * it says that the cluster has changed since the freeze. The ledger keeps such marks, a bit each,
 * in a file beside the image (ledger_format.c), and beside them those of clusters which the
 * image's own view has given up for good: reading them is an error from then on, whatever their
 * data may be elsewhere.
 *
 * A cluster of an image is, beyond what qcow2_image.c says:
 *     unmarked → marked, noted     (L2 entry 0; the bit "changed" stands on disk)
 *     saved → recorded → marked    (the bit is written first; then entry, refcount, space go)
 * and, independently of that, kept → released.
 * No bit is ever cleared. Both kinds are in memory as well, and a bit gets there only after it has
 * been written; so what a process that is killed leaves is what it acted upon. A bit that is on
 * disk alone was of a call that failed: it says "changed" of what may not have changed, or gives up
 * what its owner had asked to give up.
 *
 * Most images never have a ledger. The first bit makes one: file, head, then the flag in the
 * image's header, then the bit. An image that has the flag and no good ledger is as lost as one
 * without tables: what it would say of changes would be too little. A ledger without the flag is
 * what an interrupted call left, and made anew.
 *
 * Where views are promised to survive a loss of power, the file and its name are durable before
 * the flag is written, and the bit before its cluster is marked.
 *
 * Locks: ledger_lock is held while bits are written, and the ledger made; head_lock, alloc_lock (of
 * the budget) and fd_lock are below it. What is in memory is read without it.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>

#include "cow/io.h"
#include "cow/ledger_file.h"
#include "cow/names.h"
#include "cow/qcow2_private.h"
#include "ff_log.h"
#include "ff_util.h"

static int check_range(const struct ff_image *img, uint64_t first, uint64_t count)
{
	return first > img->l.clusters || count > img->l.clusters - first ? -EINVAL : 0;
}

static struct ledger *ledger_of(const struct ff_image *img)
{
	return atomic_load_explicit(&img->ledger, memory_order_acquire);
}

bool ff_image_has_ledger(const struct ff_image *img)
{
	return ledger_of(img) != NULL;
}

static void discard(struct ledger *g)
{
	for (unsigned i = 0; g && i < LEDGER_PARTS; i++)
		clustermap_fini(&g->bits[i]);
	free(g);
}

void image_ledger_free(struct ff_image *img)
{
	discard(atomic_exchange(&img->ledger, NULL));
}

static struct ledger *ledger_new(const struct ff_image *img)
{
	struct ledger *g = calloc(1, sizeof *g);
	int r = g ? 0 : -ENOMEM;

	for (unsigned i = 0; i < LEDGER_PARTS && !r; i++)
		r = clustermap_init(&g->bits[i], img->l.clusters);
	if (!r)
		return g;
	discard(g);
	return NULL;
}

int image_ledger_fd(struct ff_image *img, int *out)
{
	int fd = atomic_load_explicit(&img->ledger_fd, memory_order_acquire), r;

	if (fd < 0) {
		FF_GUARD(&img->fd_lock);
		fd = atomic_load_explicit(&img->ledger_fd, memory_order_relaxed);
		if (fd < 0) {
			r = ledger_open(img->dirfd, img->path, &img->desc, img->l.clusters, O_RDWR,
			                &fd);
			if (r) {
				ff_error("%s: its record of changes (." LEDGER_SUFFIX
				         ") cannot be used: %s",
				         img->path, r == -EINVAL ? "damaged" : strerror(-r));
				return r == -ENOENT || r == -EINVAL ? -EIO : r;
			}
			atomic_store_explicit(&img->ledger_fd, fd, memory_order_release);
		}
	}
	*out = fd;
	return 0;
}

/* --- making one -------------------------------------------------------------------------------
 */

static int make_file(struct ff_image *img, bool durable, int *out)
{
	ff_autofree char *path = names_beside(img->path, LEDGER_SUFFIX);
	uint8_t head[LEDGER_SECTOR];
	ff_autoclose int fd = -1;
	int r = path ? io_unlinkat(img->dirfd, path, 0) : -ENOMEM;

	if (!r || r == -ENOENT)
		r = io_open_beneath(img->dirfd, path, O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW,
		                    img->mode, &fd);
	if (r)
		return r;
	ledger_head_encode(&img->desc, img->l.clusters, head);
	r = io_truncate(fd, ledger_file_size(img->l.clusters));
	if (!r)
		r = io_pwrite(fd, head, sizeof head, 0);
	if (!r && durable)
		r = io_fsync(fd);
	if (!r && durable)
		r = image_sync_directory(img);
	if (r) {
		io_unlinkat(img->dirfd, path, 0);
		return r;
	}
	if (!durable)
		atomic_store(&img->sums_created, true);
	*out = ff_take_fd(&fd);
	return 0;
}

static int make_ledger(struct ff_image *img, bool durable, bool must, struct ledger **out)
{
	struct ledger *g = ledger_new(img);
	int fd = -1, r = g ? image_charge(img, LEDGER_PAGE, must) : -ENOMEM;

	if (r) {
		discard(g);
		return r;
	}
	g->allocated = LEDGER_PAGE;
	r = atomic_load(&img->unlinked) ? -ENOENT : make_file(img, durable, &fd);
	if (!r)
		r = image_set_ledger_flag(img);
	if (r) {
		if (fd >= 0)
			close(fd);
		image_charge_back(img, LEDGER_PAGE);
		discard(g);
		ff_error("%s: no record of changes can be made beside it: %s", img->path,
		         strerror(-r));
		return r;
	}
	atomic_store_explicit(&img->ledger_fd, fd, memory_order_release);
	atomic_store_explicit(&img->ledger, g, memory_order_release);
	*out = g;
	return 0;
}

/* --- bits -------------------------------------------------------------------------------------
 */

/* Is nothing set in the page of the file that has sector I of the part? */
static bool page_empty(const struct ff_image *img, const struct ledger *g, enum ledger_part part,
                       uint64_t i)
{
	uint64_t first = i / LEDGER_PER * LEDGER_PER * LEDGER_BITS, most = LEDGER_PER * LEDGER_BITS;
	bool set;

	if (first >= img->l.clusters)
		return true;
	return clustermap_run(&g->bits[part], first, most, &set) == most && !set;
}

/* Sets the bits [from, to) of sector I: on disk, then in memory. Lock: ledger_lock. */
static int set_in_sector(struct ff_image *img, struct ledger *g, enum ledger_part part, bool must,
                         uint64_t from, uint64_t to)
{
	uint64_t words[LEDGER_WORDS], i = from / LEDGER_BITS, base = i * LEDGER_BITS;
	uint64_t off = ledger_offset(img->l.clusters, part, i), cost = 0, fresh = 0;
	uint8_t buf[LEDGER_SECTOR];
	int fd, r = clustermap_reserve(&g->bits[part], from, to - from);

	if (!r && page_empty(img, g, part, i)) {
		r = image_charge(img, LEDGER_PAGE, must);
		cost = r ? 0 : LEDGER_PAGE;
	}
	if (!r)
		r = image_ledger_fd(img, &fd);
	if (!r) {
		clustermap_bits(&g->bits[part], base, LEDGER_BITS, words);
		for (uint64_t c = from; c < to; c++) {
			uint64_t bit = UINT64_C(1) << (c - base) % 64;

			fresh += !(words[(c - base) / 64] & bit);
			words[(c - base) / 64] |= bit;
		}
		ledger_sector_encode(&img->desc, off, words, buf);
		r = io_pwrite(fd, buf, sizeof buf, off);
	}
	if (r) {
		image_charge_back(img, cost);
		return r;
	}
	g->allocated += cost;
	if (part == LEDGER_RELEASED)
		atomic_fetch_add(&g->released, fresh);
	clustermap_set(&g->bits[part], from, to - from);
	return 0;
}

/* MUST: so that something can be given back. */
static int set_bits(struct ff_image *img, enum ledger_part part, uint64_t first, uint64_t count,
                    bool durable, bool must)
{
	uint64_t at = first, end = first + count;
	struct ledger *g;
	int r = 0;

	if (!count)
		return 0;
	pthread_mutex_lock(&img->ledger_lock);
	g = ledger_of(img);
	if (!g)
		r = make_ledger(img, durable, must, &g);
	while (!r && at < end) {
		uint64_t to = FF_MIN(end, (at / LEDGER_BITS + 1) * LEDGER_BITS);
		bool set;

		/* nothing is written where nothing is new */
		if (clustermap_run(&g->bits[part], at, to - at, &set) < to - at || !set)
			r = set_in_sector(img, g, part, must, at, to);
		at = to;
	}
	atomic_store(&img->ledger_dirty, true);
	pthread_mutex_unlock(&img->ledger_lock);
	atomic_fetch_add(&img->writes, 1);
	if (!r && durable)
		r = ff_image_flush(img);
	return r;
}

int ff_image_make_ledger(struct ff_image *img, bool durable)
{
	struct ledger *g;

	if (ledger_of(img))
		return 0;
	FF_GUARD(&img->ledger_lock);
	return ledger_of(img) ? 0 : make_ledger(img, durable, true, &g);
}

static int note(struct ff_image *img, uint64_t first, uint64_t count, bool durable, bool must)
{
	int r = check_range(img, first, count);

	if (!r)
		r = clustermap_reserve(&img->marks, first, count);
	if (!r)
		r = set_bits(img, LEDGER_CHANGED, first, count, durable, must);
	if (!r)
		clustermap_set(&img->marks, first, count);
	return r;
}

int ff_image_note(struct ff_image *img, uint64_t first, uint64_t count, bool durable)
{
	return note(img, first, count, durable, false);
}

int ff_image_take_over(struct ff_image *img, uint64_t first, uint64_t count)
{
	return note(img, first, count, false, true);
}

int ff_image_record(struct ff_image *img, uint64_t first, uint64_t count)
{
	uint64_t end = first + count, at = first, n;
	uint8_t kinds[IMAGE_ENTRIES];
	int r = check_range(img, first, count);

	for (; !r && at < end; at += n) {
		uint64_t i = 0, run;

		n = FF_MIN(end - at, (uint64_t)IMAGE_ENTRIES);
		r = ff_image_kinds(img, at, n, kinds);
		for (; !r && i < n; i += run) {
			bool saved = kinds[i] != FF_KIND_NONE;

			for (run = 1; i + run < n && (kinds[i + run] != FF_KIND_NONE) == saved;)
				run++;
			if (saved)
				r = set_bits(img, LEDGER_CHANGED, at + i, run, false, true);
		}
	}
	return r;
}

int ff_image_give_up(struct ff_image *img, uint64_t first, uint64_t count, bool durable)
{
	int r = check_range(img, first, count);

	return r ? r : set_bits(img, LEDGER_RELEASED, first, count, durable, true);
}

uint64_t ff_image_released(const struct ff_image *img)
{
	const struct ledger *g = ledger_of(img);

	return g ? atomic_load(&g->released) * img->l.cluster_size : 0;
}

static uint64_t run_of(const struct ff_image *img, enum ledger_part part, uint64_t first,
                       uint64_t max, bool *set)
{
	const struct ledger *g = ledger_of(img);

	if (g)
		return clustermap_run(&g->bits[part], first, max, set);
	*set = false;
	return max;
}

uint64_t ff_image_recorded_run(const struct ff_image *img, uint64_t first, uint64_t max, bool *set)
{
	return run_of(img, LEDGER_CHANGED, first, max, set);
}

uint64_t ff_image_released_run(const struct ff_image *img, uint64_t first, uint64_t max, bool *set)
{
	return run_of(img, LEDGER_RELEASED, first, max, set);
}

void ff_image_released_bits(const struct ff_image *img, uint64_t first, unsigned count,
                            uint64_t *out)
{
	const struct ledger *g = ledger_of(img);

	if (g)
		clustermap_bits(&g->bits[LEDGER_RELEASED], first, count, out);
	else
		memset(out, 0, (count + 63) / 64 * 8);
}

/* --- loading ----------------------------------------------------------------------------------
 */

struct load {
	struct ff_image *img;
	struct ledger *g;
};

static int take_words(void *ctx, enum ledger_part part, uint64_t first, const uint64_t *words)
{
	struct load *ld = ctx;
	struct ff_image *img = ld->img;
	uint64_t n = FF_MIN(LEDGER_BITS, img->l.clusters - first);
	int r = clustermap_reserve(&ld->g->bits[part], first, n);

	if (!r && page_empty(img, ld->g, part, first / LEDGER_BITS))
		ld->g->allocated += LEDGER_PAGE;
	if (!r && part == LEDGER_CHANGED)
		r = clustermap_reserve(&img->marks, first, n);
	for (uint64_t i = 0; !r && i < n; i++)
		if (words[i / 64] >> i % 64 & 1) {
			clustermap_set(&ld->g->bits[part], first + i, 1);
			if (part == LEDGER_CHANGED)
				clustermap_set(&img->marks, first + i, 1);
			else
				atomic_fetch_add(&ld->g->released, 1);
		}
	return r;
}

int image_ledger_load(struct ff_image *img, uint64_t *hash)
{
	struct load ld = {img, NULL};
	uint64_t bad = 0;
	int fd, r;

	if (!img->marked_ledger)
		return 0;
	ld.g = ledger_new(img);
	if (!ld.g)
		return -ENOMEM;
	ld.g->allocated = LEDGER_PAGE;
	r = image_ledger_fd(img, &fd);
	if (!r)
		r = ledger_scan(fd, &img->desc, img->l.clusters, take_words, &ld, hash, &bad);
	if (r == -EINVAL)
		ff_error("%s: its record of changes (." LEDGER_SUFFIX
		         ") is damaged at %llu: drop the snapshot to get rid of it",
		         img->path, (unsigned long long)bad);
	if (r) {
		discard(ld.g);
		return r;
	}
	atomic_fetch_add(&img->allocated, ld.g->allocated);
	atomic_store(&img->ledger, ld.g);
	return 0;
}

int image_ledger_hash(struct ff_image *img, uint64_t *hash)
{
	uint64_t bad;
	int fd, r;

	if (!ledger_of(img))
		return 0;
	r = image_ledger_fd(img, &fd);
	return r ? r : ledger_scan(fd, &img->desc, img->l.clusters, NULL, NULL, hash, &bad);
}
