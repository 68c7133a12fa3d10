/*
 * The format of a ledger. No state and no I/O.
 *
 *      0  512  head: magic 8, version 4, cluster_size 4, seq 8, disk_ino 8, btime_sec 8,
 *              btime_nsec 4, zero 4, clusters 8, zeros, XXH3-64 at 504
 *   4096       changed: sectors of 512 bytes, each 63 words of 64 clusters and an XXH3-64
 *    ...       released: as many sectors
 *
 * All big-endian. A sector is written as a whole, within a page, so that neither a process killed
 * in between nor storage that loses power leaves half of one; a sector that is neither right nor
 * all zeros is damage. What was never written is a hole. The checksum covers where the sector
 * stands and whose it is: one that strayed is damage, too.
 */
#include "cow/ledger_format.h"

#include <errno.h>
#include <string.h>

#include <xxhash.h>

#include "ff_util.h"

#define VERSION 1u
#define SUM_AT  504u

static const char magic[8] FF_NONSTRING = "fleeledg";

uint64_t ledger_sectors(uint64_t clusters)
{
	return ff_round_up(ff_div_up(clusters, LEDGER_BITS), LEDGER_PER);
}

uint64_t ledger_offset(uint64_t clusters, enum ledger_part part, uint64_t i)
{
	return LEDGER_PAGE + ((uint64_t)part * ledger_sectors(clusters) + i) * LEDGER_SECTOR;
}

uint64_t ledger_file_size(uint64_t clusters)
{
	return ledger_offset(clusters, LEDGER_PARTS, 0);
}

void ledger_head_encode(const struct ff_image_desc *desc, uint64_t clusters, uint8_t *buf)
{
	memset(buf, 0, LEDGER_SECTOR);
	memcpy(buf, magic, sizeof magic);
	ff_put_be32(buf + 8, VERSION);
	ff_put_be32(buf + 12, desc->cluster_size);
	ff_put_be64(buf + 16, desc->seq);
	ff_put_be64(buf + 24, desc->disk_ino);
	ff_put_be64(buf + 32, (uint64_t)desc->disk_btime_sec);
	ff_put_be32(buf + 40, desc->disk_btime_nsec);
	ff_put_be64(buf + 48, clusters);
	ff_put_be64(buf + SUM_AT, XXH3_64bits(buf, SUM_AT));
}

bool ledger_head_ok(const struct ff_image_desc *desc, uint64_t clusters, const uint8_t *buf)
{
	uint8_t want[LEDGER_SECTOR];

	ledger_head_encode(desc, clusters, want);
	return memcmp(want, buf, sizeof want) == 0;
}

static uint64_t sum_of(const struct ff_image_desc *desc, uint64_t offset, const uint8_t *buf)
{
	uint64_t whose[] = {offset, desc->seq, desc->disk_ino, (uint64_t)desc->disk_btime_sec};

	return XXH3_64bits_withSeed(buf, SUM_AT, XXH3_64bits(whose, sizeof whose));
}

void ledger_sector_encode(const struct ff_image_desc *desc, uint64_t offset, const uint64_t *words,
                          uint8_t *buf)
{
	for (unsigned i = 0; i < LEDGER_WORDS; i++)
		ff_put_be64(buf + i * 8, words[i]);
	ff_put_be64(buf + SUM_AT, sum_of(desc, offset, buf));
}

int ledger_sector_decode(const struct ff_image_desc *desc, uint64_t offset, const uint8_t *buf,
                         uint64_t *words)
{
	static const uint8_t none[LEDGER_SECTOR];

	if (memcmp(buf, none, sizeof none) == 0) {
		memset(words, 0, LEDGER_WORDS * 8);
		return 0;
	}
	if (ff_be64(buf + SUM_AT) != sum_of(desc, offset, buf))
		return -EINVAL;
	for (unsigned i = 0; i < LEDGER_WORDS; i++)
		words[i] = ff_be64(buf + i * 8);
	return 0;
}

uint64_t ledger_sector_hash(uint64_t offset, const uint8_t *buf)
{
	return XXH3_64bits_withSeed(buf, LEDGER_SECTOR, ~offset);
}
