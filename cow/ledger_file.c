/*
 * Reads ledgers; no state. Nothing in them is believed: the head must be the very one that we
 * write, each sector must match its checksum, no bit may stand beyond the disk's last cluster.
 */
#include "cow/ledger_file.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>

#include "cow/io.h"
#include "cow/names.h"
#include "cow/open_regular.h"
#include "ff_util.h"

enum { SCAN_BYTES = 65536 };

int ledger_open(int dirfd, const char *image_path, const struct ff_image_desc *desc,
                uint64_t clusters, int flags, int *out)
{
	ff_autofree char *path = names_beside(image_path, LEDGER_SUFFIX);
	uint8_t head[LEDGER_SECTOR];
	ff_autoclose int fd = -1;
	int r = path ? open_regular(dirfd, path, flags, &fd) : -ENOMEM;
	struct stat st;

	if (!r)
		r = io_fstat(fd, &st);
	if (r)
		return r;
	if ((uint64_t)st.st_size != ledger_file_size(clusters))
		return -EINVAL;
	r = io_pread_full(fd, head, sizeof head, 0);
	if (r)
		return r;
	if (!ledger_head_ok(desc, clusters, head))
		return -EINVAL;
	*out = ff_take_fd(&fd);
	return 0;
}

struct scan {
	const struct ff_image_desc *desc;
	uint64_t clusters;
	ledger_fn fn;
	void *ctx;
	uint64_t *hash, *bad;
};

static bool bits_beyond(const uint64_t *words, uint64_t first, uint64_t clusters)
{
	for (unsigned i = 0; i < LEDGER_WORDS; i++) {
		uint64_t at = first + i * 64;

		if (words[i] &&
		    (at >= clusters || (clusters - at < 64 && words[i] >> (clusters - at))))
			return true;
	}
	return false;
}

static int take_sector(struct scan *s, uint64_t off, const uint8_t *buf)
{
	uint64_t sectors = ledger_sectors(s->clusters), words[LEDGER_WORDS], any = 0;
	uint64_t i = (off - LEDGER_PAGE) / LEDGER_SECTOR;
	enum ledger_part part = i < sectors ? LEDGER_CHANGED : LEDGER_RELEASED;
	uint64_t first = (i % sectors) * LEDGER_BITS;
	int r = ledger_sector_decode(s->desc, off, buf, words);

	if (!r && bits_beyond(words, first, s->clusters))
		r = -EINVAL;
	if (r) {
		*s->bad = off;
		return r;
	}
	for (unsigned k = 0; k < LEDGER_WORDS; k++)
		any |= words[k];
	if (!any)
		return 0;
	*s->hash += ledger_sector_hash(off, buf);
	return s->fn ? s->fn(s->ctx, part, first, words) : 0;
}

int ledger_scan(int fd, const struct ff_image_desc *desc, uint64_t clusters, ledger_fn fn,
                void *ctx, uint64_t *hash, uint64_t *bad)
{
	struct scan s = {desc, clusters, fn, ctx, hash, bad};
	ff_autofree uint8_t *buf = malloc(SCAN_BYTES);
	uint64_t at = LEDGER_PAGE, end = ledger_file_size(clusters), hole;
	int r = buf ? 0 : -ENOMEM;

	while (!r && at < end) {
		r = io_seek(fd, at, SEEK_DATA, &at);
		if (r == -ENXIO)
			return 0;
		if (!r)
			r = io_seek(fd, at, SEEK_HOLE, &hole);
		hole = FF_MIN(ff_round_up(hole, LEDGER_SECTOR), end);
		for (at -= at % LEDGER_SECTOR; !r && at < hole;) {
			size_t len = (size_t)FF_MIN(hole - at, (uint64_t)SCAN_BYTES);

			r = io_pread_full(fd, buf, len, at);
			for (size_t i = 0; !r && i < len; i += LEDGER_SECTOR)
				r = take_sector(&s, at + i, buf + i);
			at += len;
		}
	}
	return r;
}
