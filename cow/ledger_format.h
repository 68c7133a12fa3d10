/*
 * The bytes of an image's ledger, REL-fleece-N.dirty: which clusters changed though nothing is
 * saved of them, and which its view has given up. Pure functions, no I/O; the layout is drawn at
 * the top of ledger_format.c.
 */
#ifndef FF_COW_LEDGER_FORMAT_H
#define FF_COW_LEDGER_FORMAT_H

#include <stdbool.h>
#include <stdint.h>

#include "cow/qcow2_image.h"

#define LEDGER_SUFFIX "dirty" /* no longer than that of the image, which may fill a name */
#define LEDGER_SECTOR 512u
#define LEDGER_WORDS  63u                           /* of 64 clusters each, in a sector */
#define LEDGER_BITS   (LEDGER_WORDS * 64u)          /* clusters in a sector */
#define LEDGER_PAGE   4096u                         /* what the budget counts */
#define LEDGER_PER    (LEDGER_PAGE / LEDGER_SECTOR) /* sectors in a page */

/* Both parts have a bit for each cluster. */
enum ledger_part { LEDGER_CHANGED, LEDGER_RELEASED, LEDGER_PARTS };

/* Sectors of one part, of a disk of so many clusters: whole pages. */
uint64_t ledger_sectors(uint64_t clusters);
/* Where in the file sector I of a part begins. */
uint64_t ledger_offset(uint64_t clusters, enum ledger_part part, uint64_t i);
uint64_t ledger_file_size(uint64_t clusters);

/* BUF: LEDGER_SECTOR bytes, all written. */
void ledger_head_encode(const struct ff_image_desc *desc, uint64_t clusters, uint8_t *buf);
/* Is it the very head of this image's ledger? */
bool ledger_head_ok(const struct ff_image_desc *desc, uint64_t clusters, const uint8_t *buf);

/* The sector at OFFSET of the file, of LEDGER_WORDS words: cluster I is bit I % 64 of word I / 64.
 */
void ledger_sector_encode(const struct ff_image_desc *desc, uint64_t offset, const uint64_t *words,
                          uint8_t *buf);
/* -EINVAL: it is damaged. A sector of zeros was never written, and has no bits. */
int ledger_sector_decode(const struct ff_image_desc *desc, uint64_t offset, const uint8_t *buf,
                         uint64_t *words);
/* What the sector adds to the hash of an image's entries: see session.c. */
uint64_t ledger_sector_hash(uint64_t offset, const uint8_t *buf);

#endif
