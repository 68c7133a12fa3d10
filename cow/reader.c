/*
 * Frozen reads.
 *
 * A read resolves its clusters to owners (an image of the chain, zeros, or the live source) and
 * reads each run from its owner. What was read from the source is looked at again: if a cluster has
 * been marked meanwhile, a change of it may have been under way, and it is read anew from the image
 * that has it now. That loop ends, for a mark is never taken back. A view that broke during the
 * read gives EIO: the mark of breaking, too, is set before the change.
 *
 * Readers hold the `reads` barrier, which nobody but the freeing of links ever closes; they wait
 * for no writer and no writer waits for them.
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

#include "cow/engine.h"
#include "cow/io.h"
#include "ff_log.h"
#include "ff_util.h"

enum { PIECE = 1 << 20 };

struct ff_reader {
	struct ff_snap *snap;
	const struct ff_frozen *inode;
	struct link *link;         /* kept in its chain by snap->readers */
	bool flushed;              /* lock: snap->lock */
	pthread_mutex_t kept_lock; /* the following, a leaf */
	struct link *kept_of;
	uint64_t kept_cluster;
	char *kept;
};

int ff_reader_open(struct ff_snap *snap, const struct ff_frozen *f, struct ff_reader **out)
{
	struct ff_reader *rd;
	struct link *l;

	if (f->disk == TREE_TOO_DEEP)
		return -EIO;
	if (!S_ISREG(f->st.st_mode) || f->disk == TREE_NO_DISK)
		return -EINVAL;
	FF_GUARD(&snap->lock);
	if (snap->dropped)
		return -ESTALE;
	l = snap->links[f->disk];
	if (!l || atomic_load(&l->broken))
		return -EIO;
	rd = calloc(1, sizeof *rd);
	if (!rd)
		return -ENOMEM;
	rd->snap = ff_snap_ref(snap);
	rd->inode = f;
	rd->link = l;
	pthread_mutex_init(&rd->kept_lock, NULL);
	disk_use(l->disk);
	snap->readers++;
	snap->unflushed_readers++;
	*out = rd;
	return 0;
}

void ff_reader_flushed(struct ff_reader *rd)
{
	FF_GUARD(&rd->snap->lock);
	if (!rd->flushed) {
		rd->flushed = true;
		rd->snap->unflushed_readers--;
		pthread_cond_broadcast(&rd->snap->idle);
	}
}

void ff_reader_close(struct ff_reader *rd)
{
	struct ff_snap *snap = rd->snap;

	ff_reader_flushed(rd);
	disk_unuse(rd->link->disk); /* which the link keeps, as this reader does the link */
	disk_make_room(snap->store, rd->link->disk);
	pthread_mutex_lock(&snap->lock);
	snap->readers--;
	pthread_cond_broadcast(&snap->idle);
	pthread_mutex_unlock(&snap->lock);
	pthread_mutex_destroy(&rd->kept_lock);
	free(rd->kept);
	free(rd);
	ff_snap_put(snap);
}

/* Bytes [from, to) of the disk, all within clusters that OWNER has: whole clusters go straight to
 * BUF, parts through the kept cluster. */
static int read_owned(struct ff_reader *rd, struct link *owner, uint64_t from, uint64_t to,
                      char *buf)
{
	size_t size = ff_image_desc(owner->img)->cluster_size;
	int r;

	while (from < to) {
		uint64_t cluster = from / size, whole = (to - from) / size;
		size_t in = (size_t)(from % size), n;

		if (in == 0 && whole > 0) {
			n = (size_t)whole * size;
			r = ff_image_read(owner->img, cluster, whole, buf);
		} else {
			FF_GUARD(&rd->kept_lock);
			n = FF_MIN(size - in, (size_t)(to - from));
			r = 0;
			if (!rd->kept && !(rd->kept = malloc(size)))
				return -ENOMEM;
			if (rd->kept_of != owner || rd->kept_cluster != cluster) {
				rd->kept_of = NULL;
				r = ff_image_read(owner->img, cluster, 1, rd->kept);
			}
			if (!r) {
				rd->kept_of = owner;
				rd->kept_cluster = cluster;
				memcpy(buf, rd->kept + in, n);
			}
		}
		if (r == -ENODATA)
			ff_error("%s: cluster %llu should be saved here and is not",
			         ff_image_path(owner->img), (unsigned long long)cluster);
		if (r)
			return r == -ENOMEM ? r : -EIO;
		from += n;
		buf += n;
	}
	return 0;
}

/* Bytes [from, to) of the disk as frozen, of any mixture of owners. */
static int read_span(struct ff_reader *rd, uint64_t from, uint64_t to, char *buf);

static int read_live(struct ff_reader *rd, uint64_t from, uint64_t to, char *buf)
{
	size_t got, size = ff_image_desc(rd->link->img)->cluster_size;
	struct owner o;
	int fd, r = disk_source(rd->link->disk, &fd);

	if (!r)
		r = io_pread(fd, buf, (size_t)(to - from), from, &got);
	if (r)
		return r;
	memset(buf + got, 0, (size_t)(to - from) - got);
	/* The marks are to be read after the bytes. */
	atomic_thread_fence(memory_order_seq_cst);
	for (uint64_t at = from; at < to;) {
		uint64_t first = at / size;
		uint64_t n = chain_resolve(rd->link, first, (to - 1) / size - first + 1, &o);
		uint64_t end = FF_MIN(to, (first + n) * size);

		if (o.kind != OWNER_LIVE) {
			r = read_span(rd, at, end, buf + (at - from));
			if (r)
				return r;
		}
		at = end;
	}
	return 0;
}

static int read_span(struct ff_reader *rd, uint64_t from, uint64_t to, char *buf)
{
	size_t size = ff_image_desc(rd->link->img)->cluster_size;
	int r = 0;

	while (from < to && !r) {
		uint64_t first = from / size, end;
		struct owner o;
		uint64_t n = chain_resolve(rd->link, first, (to - 1) / size - first + 1, &o);

		end = FF_MIN(to, (first + n) * size);
		switch (o.kind) {
		case OWNER_LINK:
			r = read_owned(rd, o.link, from, end, buf);
			break;
		case OWNER_LIVE:
			r = read_live(rd, from, end, buf);
			break;
		case OWNER_ZERO:
			memset(buf, 0, (size_t)(end - from));
			break;
		}
		buf += end - from;
		from = end;
	}
	return r;
}

int ff_reader_read(struct ff_reader *rd, void *buf, size_t len, off_t off, size_t *got)
{
	uint64_t size = (uint64_t)rd->inode->st.st_size, from = (uint64_t)off, to;
	struct barrier *reads = rd->snap->store->reads;
	int r = 0;

	if (off < 0)
		return -EINVAL;
	*got = 0;
	to = from >= size ? from : from + FF_MIN(len, size - from);
	for (uint64_t at = from; at < to && !r;) {
		uint64_t end = FF_MIN(to, at + PIECE);
		unsigned token = barrier_enter(reads);

		r = read_span(rd, at, end, (char *)buf + (at - from));
		barrier_exit(reads, token);
		at = end;
	}
	if (!r && atomic_load(&rd->link->broken))
		r = -EIO;
	if (!r)
		*got = (size_t)(to - from);
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
			if (kinds[i] == want) {
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
	int fd, r = disk_source(rd->link->disk, &fd);

	if (r)
		return r;
	r = io_seek(fd, at, whence, out);
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
	int r;

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

int ff_reader_seek(struct ff_reader *rd, off_t off, int whence, off_t *out)
{
	uint64_t size = (uint64_t)rd->inode->st.st_size, at = (uint64_t)off, end, found;
	struct barrier *reads = rd->snap->store->reads;
	int r;

	if (whence != SEEK_DATA && whence != SEEK_HOLE)
		return -EINVAL;
	if (off < 0 || at >= size)
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
