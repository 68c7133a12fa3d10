/*
 * Frozen reads.
 *
 * A read goes in pieces of at most OWNERS_MAX clusters. Of each it asks the chain who owns its
 * clusters: an image, zeros, or the live source. First it reads what the source owns, with one call
 * for what lies close together, over what lies between, which is overwritten later. Then it asks
 * again: if a cluster has been marked meanwhile, a change of it may have been under way, and it is
 * the image's. What the images own is read last, so that once is enough: a mark is never taken
 * back. A view that broke during the read gives EIO: the mark of breaking, too, is set before the
 * change.
 *
 * Readers hold the `reads` barrier, which nobody but the freeing of links, and of what a view has
 * given up, ever closes; they wait for no writer and no writer waits for them.
 *
 * What was read of the source does not stay in the page cache where the kernel can do that: the
 * frozen file's own pages keep it, and a backup of all disks would else throw out twice its size
 * of what the host has use for. It is not read with O_DIRECT, though that would save a copy: the
 * kernel would hold the source's lock for as long as storage takes, and a write that needs it for
 * itself (one that fills a hole, or goes through the page cache) would wait for the reader.
 *
 * Whole clusters are read from images, since their checksums cover them. A reader keeps the last
 * cluster of a run for the next call, for clusters may be larger than requests.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "cow/consume.h"
#include "cow/device.h"
#include "cow/engine.h"
#include "cow/io.h"
#include "ff_log.h"
#include "ff_util.h"

enum {
	PIECE = 1 << 20,   /* read at a time, or the rest of one */
	EXPECTED = 32,     /* images that are told what they will be asked for */
	GAP = 64 << 10,    /* read over rather than begun anew after */
	PROBE = 128 << 10, /* of a sparse source: read before it is asked for holes again */
};
_Static_assert(PIECE / 4096 <= OWNERS_MAX, "a piece of the smallest clusters");

struct ff_reader {
	struct ff_hold hold;
	const struct ff_frozen *inode;
	struct link *link; /* kept in its chain by the hold */
	struct consumer consumer;
	bool sparse;               /* constant: the source had holes, and tells of them quickly */
	pthread_mutex_t kept_lock; /* the following, a leaf */
	struct link *kept_of;
	uint64_t kept_cluster;
	char *kept;
};

int ff_reader_open(struct ff_snap *snap, const struct ff_frozen *f, struct ff_reader **out)
{
	struct ff_reader *rd;
	struct link *l;

	if (f->disk == TREE_UNFROZEN)
		return -EIO;
	if (!S_ISREG(f->st.st_mode) || f->disk == TREE_NO_DISK)
		return -EINVAL;
	FF_GUARD(&snap->lock);
	if (snap->dropped)
		return -ESTALE;
	l = snap->links[f->disk];
	if (snap->checkpoint || !l || atomic_load(&l->broken))
		return -EIO;
	rd = calloc(1, sizeof *rd);
	if (!rd)
		return -ENOMEM;
	rd->inode = f;
	rd->link = l;
	rd->sparse = snap->store->knows_holes && !disk_is_device(l->disk) &&
	             (uint64_t)f->st.st_blocks < (uint64_t)f->st.st_size / 512;
	pthread_mutex_init(&rd->kept_lock, NULL);
	disk_use(l->disk);
	hold_begin(&rd->hold, snap);
	consumer_add(&rd->consumer, l);
	*out = rd;
	return 0;
}

void ff_reader_flushed(struct ff_reader *rd)
{
	ff_hold_flushed(&rd->hold);
}

void ff_reader_close(struct ff_reader *rd)
{
	ff_reader_flushed(rd);
	consumer_remove(&rd->consumer, rd->hold.snap);
	disk_unuse(rd->link->disk); /* which the link keeps, as this reader does the link */
	disk_make_room(rd->hold.snap->store, rd->link->disk);
	hold_end(&rd->hold);
	pthread_mutex_destroy(&rd->kept_lock);
	free(rd->kept);
	free(rd);
}

struct consumer *reader_consumer(struct ff_reader *rd, struct ff_snap **snap)
{
	*snap = rd->hold.snap;
	return &rd->consumer;
}

/* Has the view given up one of these clusters? */
static bool is_released(const struct link *l, uint64_t first, uint64_t count)
{
	bool released;

	return ff_image_has_ledger(l->img) &&
	       (ff_image_released_run(l->img, first, count, &released) < count || released);
}

/* A piece: bytes [from, to) of the disk, to BUF, in COUNT clusters from FIRST on. */
struct piece {
	struct ff_reader *rd;
	size_t size; /* of a cluster */
	uint64_t from, to, first;
	unsigned count;
	char *buf;
	struct owner owner[OWNERS_MAX];
};

/* The bytes of cluster I that the piece has. */
static uint64_t begin_of(const struct piece *p, unsigned i)
{
	return FF_MAX(p->from, (p->first + i) * p->size);
}

static uint64_t end_of(const struct piece *p, unsigned i)
{
	return FF_MIN(p->to, (p->first + i + 1) * p->size);
}

static bool is_whole(const struct piece *p, unsigned i)
{
	return end_of(p, i) - begin_of(p, i) == p->size;
}

/* Where data begins in the source, from AT on; END: not before it. What cannot be asked has data.
 */
static uint64_t data_from(int fd, uint64_t at, uint64_t end)
{
	uint64_t data;
	int r = io_seek(fd, at, SEEK_DATA, &data);

	if (r == -ENXIO)
		return end;
	return r ? at : FF_MIN(FF_MAX(data, at), end);
}

/* Reads bytes [AT, END) of the source; *GOT fewer: those that it has. Holes are not read: the
 * kernel reads far ahead over them when somebody reads the data beside them, and would make pages
 * of zeros for that twice. The source is not asked where data end, which may be many extents on. */
static int read_source(const struct ff_reader *rd, int fd, char *buf, uint64_t at, uint64_t end,
                       size_t *got)
{
	uint64_t from = at;
	size_t n = 0, len = 0;
	int r = 0;

	if (!rd->sparse)
		return io_pread_once(fd, buf, (size_t)(end - at), at, got);
	while (!r && n == len && at < end) {
		uint64_t data = data_from(fd, at, end);

		memset(buf + (at - from), 0, (size_t)(data - at));
		n = len = (size_t)(FF_MIN(end, ff_round_up(data + 1, PROBE)) - data);
		if (len)
			r = io_pread_once(fd, buf + (data - from), len, data, &n);
		at = data + n;
	}
	*got = (size_t)(at - from);
	return r;
}

/* Reads what the source owns; *ANY: something. */
static int read_live(struct piece *p, bool *any)
{
	unsigned i = 0, last, gap = FF_MAX(GAP / p->size, 1);
	int fd, r = 0;

	*any = false;
	while (!r && i < p->count) {
		size_t got, len;

		if (p->owner[i].kind != OWNER_LIVE) {
			i++;
			continue;
		}
		last = i;
		for (unsigned k = i + 1; k < p->count && k - last <= gap; k++)
			if (p->owner[k].kind == OWNER_LIVE)
				last = k;
		len = (size_t)(end_of(p, last) - begin_of(p, i));
		r = disk_source(p->rd->link->disk, &fd);
		if (!r)
			r = read_source(p->rd, fd, p->buf + (begin_of(p, i) - p->from),
			                begin_of(p, i), begin_of(p, i) + len, &got);
		if (r && gap > 1) { /* perhaps what lies between cannot be read */
			gap = 1;
			r = 0;
			continue;
		}
		if (!r && got < len && disk_is_device(p->rd->link->disk))
			r = -EIO; /* see save_into() */
		if (!r)
			memset(p->buf + (begin_of(p, i) - p->from) + got, 0, len - got);
		*any = true;
		i = last + 1;
	}
	return r;
}

/* What was the source's, and is marked by now, has another owner. */
static void look_again(struct piece *p)
{
	struct owner now[OWNERS_MAX];

	/* The marks are to be read after the bytes. */
	atomic_thread_fence(memory_order_seq_cst);
	chain_owners(p->rd->link, p->first, p->count, now);
	for (unsigned i = 0; i < p->count; i++)
		if (p->owner[i].kind == OWNER_LIVE)
			p->owner[i] = now[i];
}

/* A cluster of which the piece has a part, by way of the one that is kept. */
static int read_part(struct piece *p, unsigned i, struct link *owner)
{
	struct ff_reader *rd = p->rd;
	uint64_t cluster = p->first + i, begin = begin_of(p, i);
	int r;

	FF_GUARD(&rd->kept_lock);
	if (!rd->kept && !(rd->kept = malloc(p->size)))
		return -ENOMEM;
	if (rd->kept_of != owner || rd->kept_cluster != cluster) {
		rd->kept_of = NULL;
		r = ff_image_read(owner->img, cluster, 1, rd->kept);
		if (r)
			return r;
		rd->kept_of = owner;
		rd->kept_cluster = cluster;
	}
	memcpy(p->buf + (begin - p->from), rd->kept + (begin - cluster * p->size),
	       (size_t)(end_of(p, i) - begin));
	return 0;
}

/* All clusters from I on that OWNER has; they are nobody's after that. */
static int read_owned(struct piece *p, unsigned i, struct link *owner)
{
	uint8_t wanted[OWNERS_MAX];
	unsigned begin = i, end = i;
	int r = 0;

	memset(wanted, 0, sizeof wanted);
	for (; !r && i < p->count; i++) {
		if (p->owner[i].kind != OWNER_LINK || p->owner[i].link != owner)
			continue;
		if (is_whole(p, i)) {
			wanted[i] = 1;
			end = i + 1;
		} else {
			r = read_part(p, i, owner);
		}
		p->owner[i].kind = OWNER_LIVE;
	}
	while (begin < end && !wanted[begin])
		begin++;
	if (!r && begin < end)
		r = ff_image_read_wanted(owner->img, p->first + begin, end - begin, wanted + begin,
		                         p->buf + (begin_of(p, begin) - p->from));
	if (r == -ENODATA && !is_released(p->rd->link, p->first, p->count))
		ff_error("%s: a cluster should be saved here and is not: one of %u from %llu on",
		         ff_image_path(owner->img), p->count, (unsigned long long)p->first);
	return r && r != -ENOMEM ? -EIO : r;
}

/* Where several images have clusters of the piece: calls FN for the first that each has, for some
 * of them if they are very many. */
static void expect(const struct piece *p, void (*fn)(struct ff_image *, uint64_t))
{
	struct link *of[EXPECTED];
	uint64_t first[EXPECTED];
	unsigned n = 0, k;

	for (unsigned i = 0; i < p->count && n < EXPECTED; i++) {
		if (p->owner[i].kind != OWNER_LINK)
			continue;
		for (k = n; k > 0 && of[k - 1] != p->owner[i].link; k--)
			;
		if (k == 0) {
			of[n] = p->owner[i].link;
			first[n++] = p->first + i;
		}
	}
	for (k = 0; n > 1 && k < n; k++)
		fn(of[k]->img, first[k]);
}

static int read_piece(struct ff_reader *rd, uint64_t from, uint64_t to, char *buf)
{
	size_t size = ff_image_desc(rd->link->img)->cluster_size;
	struct piece p = {.rd = rd, .size = size, .from = from, .to = to, .buf = buf};
	bool any;
	int r;

	p.first = from / size;
	p.count = (unsigned)((to - 1) / size - p.first + 1);
	if (is_released(rd->link, p.first, p.count))
		return -EIO;
	chain_owners(rd->link, p.first, p.count, p.owner);
	expect(&p, ff_image_expect_entry);
	r = read_live(&p, &any);
	if (!r && any)
		look_again(&p);
	if (!r)
		expect(&p, ff_image_expect_data);
	for (unsigned i = 0; i < p.count && !r; i++)
		switch (p.owner[i].kind) {
		case OWNER_LINK:
			r = read_owned(&p, i, p.owner[i].link);
			break;
		case OWNER_ZERO:
			memset(buf + (begin_of(&p, i) - from), 0,
			       (size_t)(end_of(&p, i) - begin_of(&p, i)));
			break;
		case OWNER_LIVE:
			break;
		}
	return r;
}

int ff_reader_read(struct ff_reader *rd, void *buf, size_t len, off_t off, size_t *got)
{
	uint64_t size = (uint64_t)rd->inode->st.st_size, from = (uint64_t)off, to;
	struct barrier *reads = rd->hold.snap->store->reads;
	int r = 0;

	if (off < 0)
		return -EINVAL;
	*got = 0;
	to = from >= size ? from : from + FF_MIN(len, size - from);
	for (uint64_t at = from; at < to && !r;) {
		uint64_t end = FF_MIN(to, at - at % PIECE + PIECE);
		unsigned token = barrier_enter(reads);

		r = read_piece(rd, at, end, (char *)buf + (at - from));
		barrier_exit(reads, token);
		at = end;
	}
	if (r)
		disk_check_device(rd->link->disk, NULL);
	if (!r && atomic_load(&rd->link->broken))
		r = -EIO;
	if (!r) {
		*got = (size_t)(to - from);
		stats_read(rd->link, to - from);
	}
	return r;
}

/* In a run that OWNER has saved: the first offset from AT on where data (or, with WHENCE SEEK_HOLE,
 * zeros) begin, or END. */
static int seek_owned(struct link *owner, uint64_t at, uint64_t end, int whence, uint64_t *out)
{
	size_t size = ff_image_desc(owner->img)->cluster_size;
	uint8_t kinds[512], want = whence == SEEK_DATA ? FF_KIND_DATA : FF_KIND_ZERO;

	while (at < end) {
		uint64_t first = at / size;
		uint64_t n = FF_MIN((end - 1) / size - first + 1, FF_ARRAY_SIZE(kinds));
		int r = ff_image_kinds(owner->img, first, n, kinds);

		if (r)
			return -EIO;
		for (uint64_t i = 0; i < n; i++)
			if (kinds[i] == FF_KIND_NONE) {
				return -EIO; /* given up just now */
			} else if (kinds[i] == want) {
				*out = FF_MAX(at, (first + i) * size);
				return 0;
			}
		at = FF_MIN(end, (first + n) * size);
	}
	*out = end;
	return 0;
}

/* The same where the source has the run. What it says counts only if it still has it after. */
static int seek_live(struct ff_reader *rd, uint64_t at, uint64_t end, int whence, uint64_t *out)
{
	int r = disk_seek(rd->link->disk, at, whence, out);

	if (r == -ENXIO) { /* nothing but a hole, or past the end: zeros */
		*out = whence == SEEK_DATA ? end : at;
		return 0;
	}
	*out = FF_MIN(*out, end);
	return r;
}

static int seek_step(struct ff_reader *rd, uint64_t at, uint64_t size, int whence, uint64_t *end,
                     uint64_t *out)
{
	size_t cluster = ff_image_desc(rd->link->img)->cluster_size;
	uint64_t first = at / cluster, count = (size - 1) / cluster - first + 1, n, again;
	struct owner o, after;
	bool released;
	int r;

	/* What was given up is no hole: whoever comes upon it is to get an error. */
	count = ff_image_released_run(rd->link->img, first, count, &released);
	if (released) {
		*end = FF_MIN(size, (first + count) * cluster);
		*out = whence == SEEK_DATA ? at : *end;
		return 0;
	}
	for (;;) {
		n = chain_resolve(rd->link, first, count, &o);
		*end = FF_MIN(size, (first + n) * cluster);
		if (o.kind == OWNER_ZERO) {
			*out = whence == SEEK_HOLE ? at : *end;
			return 0;
		}
		if (o.kind == OWNER_LINK)
			return seek_owned(o.link, at, *end, whence, out);
		r = seek_live(rd, at, *end, whence, out);
		if (r)
			return r;
		atomic_thread_fence(memory_order_seq_cst);
		/* Up to what was found, the source must have been the owner all the while. */
		count = FF_MIN(*out, *end - 1) / cluster - first + 1;
		again = chain_resolve(rd->link, first, count, &after);
		if (after.kind == OWNER_LIVE && again >= count)
			return 0;
	}
}

int reader_seek_below(struct ff_reader *rd, uint64_t at, uint64_t limit, int whence, off_t *out)
{
	uint64_t size = FF_MIN((uint64_t)rd->inode->st.st_size, limit), end, found;
	struct barrier *reads = rd->hold.snap->store->reads;
	int r;

	if (at >= size)
		return -ENXIO;
	while (at < size) {
		unsigned token = barrier_enter(reads);

		r = seek_step(rd, at, size, whence, &end, &found);
		barrier_exit(reads, token);
		if (r)
			return r;
		if (atomic_load(&rd->link->broken))
			return -EIO;
		if (found < end) {
			*out = (off_t)found;
			return 0;
		}
		at = end;
	}
	if (whence == SEEK_DATA)
		return -ENXIO;
	*out = (off_t)size;
	return 0;
}

int ff_reader_seek(struct ff_reader *rd, off_t off, int whence, off_t *out)
{
	if (whence != SEEK_DATA && whence != SEEK_HOLE)
		return -EINVAL;
	return off < 0 ? -ENXIO : reader_seek_below(rd, (uint64_t)off, UINT64_MAX, whence, out);
}
