/*
 * What was said of a view's clusters, zeros or not, to who made something up from it: see zeros.c.
 * It is kept beside the image, in REL-fleece-N.zeros, so that after a restart the same is said.
 *
 *      0   32  head: magic 8, version 4, zero 4, whose 8, XXH3-64 of these
 *     32       records, one after the other: XXH3-64 of the rest 8, chunk 8, kind 4, zero 4, then
 *              as many words of 64 clusters as the kind has: none (SAID_DATA, SAID_ZERO: all of
 *              the chunk is), those of which are zeros (SAID_BITS: all of the chunk is known), or
 *              those of which is known, then of which are zeros (SAID_SOME)
 *
 * All big-endian. WHOSE is a hash of the image's identity, of the disk's size in clusters and of
 * what tells the freeze from others that had the same number (known.c): a file of one of these,
 * put back here, would call zeros what is data now. Each checksum covers where its record stands
 * and whose it is. The last record of a chunk is the one that counts; it knows all that an earlier
 * one did.
 *
 * A file is only ever added to, and nothing is said before it stands there (where views are to
 * survive a loss of power: before it is durable). When most of it is records that count no more,
 * another is made with one for each chunk, REL-fleece-N.zero~, made durable if need be, and renamed
 * over it: the old one is there, or the new one. What a kill leaves of that goes at the next mount.
 *
 * So a record that is not whole, at the end, was never acted upon: it is cut off before the next is
 * added. One in the middle is damage; it and all after it count for nothing, with a warning, and so
 * does a head that is not ours: what is said anew may then differ, and what is made up from it.
 *
 * Frozen files do not depend on it. Images of .since do: what it calls zeros is left out of them,
 * unread. So it is believed of nobody else's freeze, and not if the images disagree (zeros.c).
 *
 * It counts in the budget, which may not refuse it: who copies what was frozen frees storage the
 * sooner, and this is little.
 *
 * No state but has_said, that there may be a file, and said_charged, what it counts for. Calls for
 * one image come one after the other.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

#include "cow/io.h"
#include "cow/names.h"
#include "cow/open_regular.h"
#include "cow/qcow2_private.h"
#include "cow/text_file.h"
#include "ff_log.h"
#include "ff_util.h"

enum {
	VERSION = 2, /* 1: WHOSE did not tell freezes apart */
	HEAD = 32,
	HEAD_SUM = 24,
	RECORD = 24, /* without its words */
	WORDS = FF_SAID_WORDS,
	WORD_BYTES = WORDS * 8,
	LONGEST = RECORD + 2 * WORD_BYTES,
	ROOM = 8 * LONGEST,
	CHARGED = 4096, /* what the budget counts, a multiple of this */
};

static const uint8_t magic[8] FF_NONSTRING = "fleezero";

static uint64_t whose(const struct ff_image *img, uint64_t freeze)
{
	const struct ff_image_desc *d = &img->desc;
	uint64_t words[] = {d->seq,
	                    d->disk_ino,
	                    (uint64_t)d->disk_btime_sec,
	                    d->disk_btime_nsec,
	                    d->cluster_size,
	                    img->l.clusters,
	                    freeze};

	return XXH3_64bits(words, sizeof words);
}

static void encode_head(uint64_t owner, uint8_t *buf)
{
	memset(buf, 0, HEAD);
	memcpy(buf, magic, sizeof magic);
	ff_put_be32(buf + 8, VERSION);
	ff_put_be64(buf + 16, owner);
	ff_put_be64(buf + HEAD_SUM, XXH3_64bits(buf, HEAD_SUM));
}

static size_t words_of(enum ff_said_kind kind)
{
	return kind == FF_SAID_SOME ? 2 * WORDS : kind == FF_SAID_BITS ? WORDS : 0;
}

static size_t record_size(enum ff_said_kind kind)
{
	return RECORD + words_of(kind) * 8;
}

static uint64_t record_sum(uint64_t owner, uint64_t off, const uint8_t *buf, size_t size)
{
	uint64_t seed[] = {off, owner};

	return XXH3_64bits_withSeed(buf + 8, size - 8, XXH3_64bits(seed, sizeof seed));
}

static void encode(const struct ff_said *s, uint64_t owner, uint64_t off, uint8_t *buf)
{
	uint8_t *p = buf + RECORD;

	ff_put_be64(buf + 8, s->chunk);
	ff_put_be32(buf + 16, s->kind);
	ff_put_be32(buf + 20, 0);
	for (unsigned i = 0; s->kind == FF_SAID_SOME && i < WORDS; i++, p += 8)
		ff_put_be64(p, s->known[i]);
	for (unsigned i = 0; words_of(s->kind) && i < WORDS; i++, p += 8)
		ff_put_be64(p, s->zero[i]);
	ff_put_be64(buf, record_sum(owner, off, buf, record_size(s->kind)));
}

/* --- reading --- */

struct reading {
	struct ff_image *img;
	int fd;
	uint64_t owner, end; /* of the file */
	uint8_t buf[LONGEST];
	uint64_t known[WORDS], zero[WORDS];
};

/* The record at OFF; *SIZE 0: there is none that is whole. */
static int read_record(struct reading *rd, uint64_t off, struct ff_said *out, size_t *size)
{
	uint64_t chunks = ff_div_up(rd->img->l.clusters, (uint64_t)WORDS * 64);
	const uint8_t *p = rd->buf + RECORD;
	int r;

	*size = 0;
	if (rd->end - off < RECORD)
		return 0;
	r = io_pread_full(rd->fd, rd->buf, RECORD, off);
	if (r)
		return r;
	*out = (struct ff_said){.chunk = ff_be64(rd->buf + 8),
	                        .kind = ff_be32(rd->buf + 16),
	                        .known = rd->known,
	                        .zero = rd->zero};
	if (out->chunk >= chunks || out->kind >= FF_SAID_KINDS ||
	    rd->end - off < record_size(out->kind))
		return 0;
	r = io_pread_full(rd->fd, rd->buf + RECORD, words_of(out->kind) * 8, off + RECORD);
	if (r)
		return r;
	if (ff_be64(rd->buf) != record_sum(rd->owner, off, rd->buf, record_size(out->kind)))
		return 0;
	for (unsigned i = 0; out->kind == FF_SAID_SOME && i < WORDS; i++, p += 8)
		rd->known[i] = ff_be64(p);
	for (unsigned i = 0; words_of(out->kind) && i < WORDS; i++, p += 8)
		rd->zero[i] = ff_be64(p);
	*size = record_size(out->kind);
	return 0;
}

static int read_all(struct reading *rd, const char *path,
                    int (*fn)(void *ctx, const struct ff_said *said), void *ctx, uint64_t *end)
{
	uint64_t off = HEAD;
	struct ff_said said;
	size_t size;
	int r;

	for (;;) {
		r = read_record(rd, off, &said, &size);
		if (r || !size)
			break;
		r = fn(ctx, &said);
		if (r)
			break;
		off += size;
	}
	if (!r && off < rd->end)
		ff_warning("%s: is damaged, or was cut short, at %llu: from there on it counts for "
		           "nothing, and copies of .since images may differ from older ones",
		           path, (unsigned long long)off);
	if (!r)
		*end = off;
	return r;
}

int ff_image_said_load(struct ff_image *img, uint64_t freeze,
                       int (*fn)(void *ctx, const struct ff_said *said), void *ctx, uint64_t *end)
{
	ff_autofree char *path = names_beside(img->path, FF_SAID_SUFFIX);
	ff_autofree struct reading *rd = malloc(sizeof *rd);
	uint8_t want[HEAD], head[HEAD];
	ff_autoclose int fd = -1;
	struct stat st;
	size_t got;
	int r;

	*end = 0;
	if (!path || !rd)
		return -ENOMEM;
	if (!atomic_load(&img->has_said))
		return 0;
	r = open_regular(img->dirfd, path, O_RDONLY, &fd);
	if (r == -ENOENT)
		return 0;
	if (text_is_foreign(r)) {
		ff_warning("%s: is no regular file, hence not fleecefs's, and made anew: copies of "
		           ".since images may differ from older ones",
		           path);
		return 0;
	}
	if (!r)
		r = io_fstat(fd, &st);
	if (!r)
		r = io_pread(fd, head, sizeof head, 0, &got);
	if (r) {
		ff_error("%s: cannot be read: %s", path, strerror(-r));
		return r == -ENOMEM ? r : -EIO;
	}
	encode_head(whose(img, freeze), want);
	if (got < HEAD || memcmp(head, want, HEAD) != 0) {
		ff_warning("%s: is damaged, or another image's, and made anew: copies of .since "
		           "images may differ from older ones",
		           path);
		return 0;
	}
	*rd = (struct reading){
	    .img = img, .fd = fd, .owner = whose(img, freeze), .end = (uint64_t)st.st_size};
	return read_all(rd, path, fn, ctx, end);
}

/* --- adding --- */

/* A new file, which has a head and no more. */
static int make_file(struct ff_image *img, uint64_t owner, const char *path, int *out)
{
	ff_autoclose int fd = -1;
	uint8_t head[HEAD];
	int r = io_unlinkat(img->dirfd, path, 0);

	if (!r || r == -ENOENT)
		r = io_open_beneath(img->dirfd, path, O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW,
		                    img->mode, &fd);
	if (!r) {
		encode_head(owner, head);
		r = io_pwrite(fd, head, sizeof head, 0);
	}
	*out = r ? -1 : ff_take_fd(&fd);
	return r;
}

/* *OUT: the file, which ends at *END from then on. */
static int open_to_add(struct ff_image *img, uint64_t owner, const char *path, uint64_t *end,
                       int *out)
{
	ff_autoclose int fd = -1;
	struct stat st;
	int r;

	if (*end) {
		r = open_regular(img->dirfd, path, O_RDWR, &fd);
		if (!r)
			r = io_fstat(fd, &st);
		if (!r && (uint64_t)st.st_size < *end)
			r = -EIO; /* somebody has cut it */
		if (!r && (uint64_t)st.st_size > *end)
			r = io_truncate(fd, *end);
	} else {
		r = make_file(img, owner, path, &fd);
		*end = HEAD;
	}
	*out = r ? -1 : ff_take_fd(&fd);
	return r;
}

static int write_records(uint64_t owner, int fd, uint64_t off, const struct ff_said *said,
                         size_t count)
{
	ff_autofree uint8_t *buf = malloc(ROOM);
	size_t used = 0;
	int r = buf ? 0 : -ENOMEM;

	for (size_t i = 0; !r && i < count; i++) {
		encode(&said[i], owner, off + used, buf + used);
		used += record_size(said[i].kind);
		if (i + 1 == count || used + LONGEST > ROOM) {
			r = io_pwrite(fd, buf, used, off);
			off += used;
			used = 0;
		}
	}
	return r;
}

/* The file has this size now: what that costs more, or less. */
static void charge(struct ff_image *img, uint64_t size)
{
	uint64_t now = ff_round_up(size, CHARGED), had = atomic_load(&img->said_charged);

	if (now > had)
		image_charge(img, now - had, true);
	else
		image_charge_back(img, had - now);
	atomic_store(&img->said_charged, now);
}

uint64_t ff_image_said_size(uint64_t end, const struct ff_said *said, size_t count)
{
	uint64_t size = FF_MAX(end, (uint64_t)HEAD);

	for (size_t i = 0; i < count; i++)
		size += record_size(said[i].kind);
	return size;
}

/* Should only the last step fail, *END stays beyond the end of what is there then: adding to it
 * fails, and the next of these makes it right. */
int ff_image_said_replace(struct ff_image *img, uint64_t freeze, uint64_t *end,
                          const struct ff_said *said, size_t count, bool durable)
{
	ff_autofree char *path = names_beside(img->path, FF_SAID_SUFFIX);
	ff_autofree char *new = names_beside(img->path, FF_SAID_NEW_SUFFIX);
	uint64_t size = ff_image_said_size(0, said, count), owner = whose(img, freeze);
	ff_autoclose int fd = -1;
	int r;

	if (!path || !new)
		return -ENOMEM;
	if (atomic_load(&img->unlinked))
		return -ENOENT;
	r = make_file(img, owner, new, &fd);
	if (!r)
		r = write_records(owner, fd, HEAD, said, count);
	if (!r && durable)
		r = io_fsync(fd);
	if (!r)
		r = io_renameat(img->dirfd, new, img->dirfd, path, 0);
	if (r)
		io_unlinkat(img->dirfd, new, 0);
	else if (durable)
		r = image_sync_directory(img);
	if (r) {
		ff_warning("%s: cannot be made smaller: %s", path, strerror(-r));
		return r;
	}
	charge(img, size);
	*end = size;
	return 0;
}

int ff_image_said_add(struct ff_image *img, uint64_t freeze, uint64_t *end,
                      const struct ff_said *said, size_t count, bool durable)
{
	ff_autofree char *path = names_beside(img->path, FF_SAID_SUFFIX);
	uint64_t size = ff_image_said_size(*end, said, count), at = *end;
	uint64_t owner = whose(img, freeze);
	ff_autoclose int fd = -1;
	int r = path ? 0 : -ENOMEM;

	if (!r && atomic_load(&img->unlinked))
		r = -ENOENT;
	if (!r) {
		atomic_store(&img->has_said, true);
		r = open_to_add(img, owner, path, &at, &fd);
	}
	if (!r)
		r = write_records(owner, fd, at, said, count);
	if (!r && durable)
		r = *end ? io_fdatasync(fd) : io_fsync(fd);
	if (!r && durable && !*end)
		r = image_sync_directory(img);
	if (r) {
		bool strange = r == -EISDIR || text_is_foreign(r);

		ff_error("%s: what was found out about zeros cannot be kept: %s",
		         path ? path : img->path,
		         strange ? "what is in its place is no regular file: move it away"
		                 : strerror(-r));
		return r == -ENOSPC || r == -EDQUOT || r == -ENOMEM ? r : -EIO;
	}
	charge(img, size);
	*end = size;
	return 0;
}

int image_said_look(struct ff_image *img)
{
	ff_autofree char *path = names_beside(img->path, FF_SAID_SUFFIX);
	ff_autofree char *new = names_beside(img->path, FF_SAID_NEW_SUFFIX);
	struct statx sx;
	int r = path && new ? io_statx(img->dirfd, path, &sx) : -ENOMEM;

	if (new)
		io_unlinkat(img->dirfd, new, 0); /* what a kill has left */
	/* what cannot be looked at may be one: then it is an error when somebody asks */
	atomic_store(&img->has_said, r != -ENOENT);
	if (!r && S_ISREG(sx.stx_mode)) {
		/* no more than what it takes: ours has no holes, another one may be all holes */
		uint64_t size = FF_MIN(sx.stx_size, sx.stx_blocks * 512);

		atomic_store(&img->said_charged, ff_round_up(size, CHARGED));
		atomic_fetch_add(&img->allocated, atomic_load(&img->said_charged));
	}
	return r == -ENOMEM ? r : 0;
}

void ff_image_said_forget(struct ff_image *img)
{
	ff_autofree char *path = names_beside(img->path, FF_SAID_SUFFIX);
	int r;

	if (!atomic_load(&img->has_said))
		return;
	r = path ? io_unlinkat(img->dirfd, path, 0) : -ENOMEM;
	if (r && r != -ENOENT)
		return; /* it goes with the image */
	atomic_store(&img->has_said, false);
	charge(img, 0);
}
