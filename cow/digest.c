/*
 * The XXH128 of a frozen file: read once, as fast as it can be read, and kept with its snapshot,
 * by disk, for as long as that lives in this mount; a frozen disk does not change. Holes are hashed
 * without being read.
 *
 * Nothing is held while a disk is read but a reader of it, which counts as flushed from the start:
 * whoever asks keeps the snapshot himself. Two who ask at once for the same disk both read it.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

#include "cow/engine.h"
#include "ff_util.h"

enum { DIGEST_BLOCK = 1 << 20 };

struct digesting {
	struct ff_reader *reader;
	XXH3_state_t *state;
	char *buf;   /* DIGEST_BLOCK bytes */
	char *zeros; /* the same */
	uint64_t size;
	bool (*stop)(void *ctx);
	void *ctx;
};

static bool find_known(struct ff_snap *snap, uint32_t disk, uint8_t out[16])
{
	FF_GUARD(&snap->lock);
	if (!snap->digests || !snap->digests[disk].known)
		return false;
	memcpy(out, snap->digests[disk].bytes, 16);
	return true;
}

/* Without memory it is computed again the next time. */
static void keep(struct ff_snap *snap, uint32_t disk, const uint8_t bytes[16])
{
	FF_GUARD(&snap->lock);
	if (!snap->digests)
		snap->digests = calloc(snap->tree->disk_count, sizeof *snap->digests);
	if (!snap->digests)
		return;
	memcpy(snap->digests[disk].bytes, bytes, 16);
	snap->digests[disk].known = true;
}

/* Takes in [from, to), which is all data or all a hole. */
static int take_in(struct digesting *d, uint64_t from, uint64_t to, bool hole)
{
	while (from < to) {
		size_t len = (size_t)FF_MIN(to - from, (uint64_t)DIGEST_BLOCK), got = len;
		int r = 0;

		if (d->stop(d->ctx))
			return -EINTR;
		if (!hole)
			r = ff_reader_read(d->reader, d->buf, len, (off_t)from, &got);
		if (r)
			return r;
		if (got != len)
			return -EIO;
		XXH3_128bits_update(d->state, hole ? d->zeros : d->buf, len);
		from += len;
	}
	return 0;
}

static int take_all(struct digesting *d)
{
	uint64_t at = 0;
	int r = 0;

	while (at < d->size && !r) {
		off_t data, end;

		r = ff_reader_seek(d->reader, (off_t)at, SEEK_DATA, &data);
		if (r == -ENXIO)
			return take_in(d, at, d->size, true);
		if (!r)
			r = take_in(d, at, (uint64_t)data, true);
		if (!r)
			r = ff_reader_seek(d->reader, data, SEEK_HOLE, &end);
		if (!r)
			r = take_in(d, (uint64_t)data, (uint64_t)end, false);
		if (!r)
			at = (uint64_t)end;
	}
	return r;
}

static int compute(struct digesting *d, uint8_t out[16])
{
	XXH128_canonical_t canonical;
	int r;

	d->state = XXH3_createState();
	d->buf = aligned_alloc(4096, DIGEST_BLOCK);
	d->zeros = calloc(1, DIGEST_BLOCK);
	r = d->state && d->buf && d->zeros ? 0 : -ENOMEM;
	if (!r) {
		XXH3_128bits_reset(d->state);
		r = take_all(d);
	}
	if (!r) {
		XXH128_canonicalFromHash(&canonical, XXH3_128bits_digest(d->state));
		memcpy(out, canonical.digest, 16);
	}
	XXH3_freeState(d->state);
	free(d->buf);
	free(d->zeros);
	return r;
}

int ff_frozen_digest(struct ff_snap *snap, const struct ff_frozen *f, bool (*stop)(void *ctx),
                     void *ctx, uint8_t out[16])
{
	struct digesting d = {.size = (uint64_t)f->st.st_size, .stop = stop, .ctx = ctx};
	int r = ff_reader_open(snap, f, &d.reader);

	if (r)
		return r;
	ff_reader_flushed(d.reader);
	if (!find_known(snap, f->disk, out)) {
		r = compute(&d, out);
		if (!r)
			keep(snap, f->disk, out);
	}
	ff_reader_close(d.reader);
	return r;
}
