/*
 * The bytes of a fleecing image and of its checksum file: where everything is, and how it is
 * written. Pure functions, no I/O; the layout is drawn at the top of qcow2_format.c.
 */
#ifndef FF_COW_QCOW2_FORMAT_H
#define FF_COW_QCOW2_FORMAT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "cow/qcow2_image.h"

#define QCOW2_HEAD_SIZE      4096u /* bytes of cluster 0 that carry everything */
#define QCOW2_BACKING_MAX    1023u
#define QCOW2_FORMAT_MAX     15u
#define QCOW2_CLUSTER_MIN    4096u
#define QCOW2_CLUSTER_MAX    (2u << 20)
#define QCOW2_COPIED         (UINT64_C(1) << 63)
#define QCOW2_ZERO           UINT64_C(1) /* the L2 entry of a cluster of zeros */
#define QCOW2_TABLE_CHARGE   4096u       /* what a table counts for in the budget: see there */
#define QCOW2_SUMS_HEAD_SIZE 64u

/* Positions and counts in host clusters, cluster 0 being the header. */
struct qcow2_layout {
	uint32_t cluster_size;
	uint64_t size;      /* virtual size, bytes, a multiple of 512 */
	uint64_t clusters;  /* guest clusters */
	uint64_t per_table; /* entries of an L1, L2 or refcount table cluster */
	uint64_t per_block; /* clusters that a refcount block covers */
	uint64_t rt_first;  /* refcount table */
	uint64_t rt_count;
	uint64_t rb_first; /* refcount blocks */
	uint64_t rb_count;
	uint64_t l1_first;
	uint64_t l1_count;
	uint64_t l1_entries;
	uint64_t l2_first; /* L2 tables, one flat array of 8-byte entries by guest cluster */
	uint64_t l2_count;
	uint64_t data_first; /* end of the metadata */
	uint64_t capacity;   /* host clusters that the refcount blocks cover */
};

/* What cluster 0 says. Strings are NUL-terminated, empty: none. */
struct qcow2_head {
	struct ff_image_desc desc;
	char backing[QCOW2_BACKING_MAX + 1];
	char format[QCOW2_FORMAT_MAX + 1];
};

/* -EINVAL: not a cluster size; -EFBIG: too large a disk for it. */
int qcow2_layout(uint64_t size, uint32_t cluster_size, struct qcow2_layout *out);

/* The head of an image that is not a fleecing image, with a backing file that is a qcow2 image or
 * (empty) none, of at most QCOW2_BACKING_MAX bytes. BUF: QCOW2_HEAD_SIZE bytes, all written. */
void qcow2_plain_head_encode(const struct qcow2_layout *l, const char *backing, uint8_t *buf);

/* BUF: QCOW2_HEAD_SIZE bytes, all written. The head must be one that has a layout, L. */
void qcow2_head_encode(const struct qcow2_head *head, const struct qcow2_layout *l, uint8_t *buf);
/* -EINVAL, with *WHY saying what is wrong (static), unless BUF is exactly what encode would write.
 */
int qcow2_head_decode(const uint8_t *buf, struct qcow2_head *head, struct qcow2_layout *l,
                      const char **why);

/* Sets a name in HEAD; NULL or empty: none. -ENAMETOOLONG, -EINVAL. */
int qcow2_head_set_backing(struct qcow2_head *head, const char *backing, const char *format);

/* The host byte offset in an L2 entry, or 0 for unallocated and zero clusters; *KIND says which it
 * is. -EINVAL: not an entry that we write, or one that points outside [data_first, end). */
int qcow2_entry_decode(const struct qcow2_layout *l, uint64_t entry, uint64_t end, uint64_t *host,
                       enum ff_image_kind *kind);

/* What one L2 entry adds to the hash of all of them: the sum, modulo 2^64. */
uint64_t qcow2_entry_hash(uint64_t entry, uint64_t cluster);

/* The head of the checksum file, QCOW2_SUMS_HEAD_SIZE bytes. */
void qcow2_sums_head_encode(const struct ff_image_desc *desc, uint8_t *buf);
bool qcow2_sums_head_ok(const struct ff_image_desc *desc, const uint8_t *buf);
/* Where in the checksum file the entry of host cluster HOST is. */
uint64_t qcow2_sum_offset(const struct qcow2_layout *l, uint64_t host);
/* The checksum of one cluster of data. The guest cluster's number goes into it, so that a table
 * entry which leads to some other cluster's data is found out. */
uint64_t qcow2_sum(const void *data, uint32_t cluster_size, uint64_t guest);

/* Are all SIZE bytes zero? SIZE: a multiple of 64, not 0. */
bool qcow2_is_zero(const void *data, size_t size);

#endif
