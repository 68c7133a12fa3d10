/*
 * The bytes of a guest's qcow2 image, as QEMU and others make them: the header and the entries of
 * L1 and L2 tables. Pure and total: any bytes give an answer or a reason why not. What our own
 * fleecing images look like is another, much narrower matter: see cow/qcow2_format.h.
 */
#ifndef FF_COW_QSOURCE_FORMAT_H
#define FF_COW_QSOURCE_FORMAT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define QS_MAGIC       0x514649fbu
#define QS_PEEK        112u  /* bytes that tell whether it is one, and how large its disk is */
#define QS_NAME_MAX    1023u /* of a backing or data file */
#define QS_FORMAT_MAX  15u
#define QS_WHY         256u /* bytes of a message, with its NUL */
#define QS_SUBCLUSTERS 32u

/* What the first cluster says. Strings are NUL-terminated, empty: none. */
struct qs_head {
	uint32_t version; /* 2 or 3 */
	unsigned cluster_bits;
	uint32_t cluster_size;
	uint64_t size; /* of the disk, bytes; any, at most INT64_MAX */
	uint64_t l1_offset;
	uint64_t l1_entries; /* those that the disk needs; the image has at least as many */
	unsigned entry_size; /* of the L2 tables: 8, or 16 with subclusters */
	uint64_t l2_entries; /* of each table */
	bool extended;       /* subclusters */
	bool zstd;           /* packed clusters are zstd's, not zlib's */
	bool corrupt;        /* QEMU found damage once, and has marked it */
	bool external;       /* the data are in another file */
	char backing[QS_NAME_MAX + 1];
	char format[QS_FORMAT_MAX + 1]; /* of the backing file */
	char data_file[QS_NAME_MAX + 1];
};

/* Do these first LEN bytes of a file begin a qcow2 image, of whatever version from 2 on? */
bool qs_is_image(const uint8_t *buf, size_t len);

/* The size of the disk if it is one that can be; false: that cannot be told. LEN as above. */
bool qs_peek_size(const uint8_t *buf, size_t len, uint64_t *size);

/* Bytes from the beginning of the file that qs_head_decode() wants, if the file has them; 0: it
 * will refuse whatever follows. */
size_t qs_head_wants(const uint8_t *buf, size_t len);

/* -EINVAL: damaged; -ENOTSUP: it has something that is not decoded here. WHY, QS_WHY bytes, then
 * says what. */
int qs_head_decode(const uint8_t *buf, size_t len, struct qs_head *out, char *why);

/* --- entries: none of these fails but by naming a static reason --- */

/* *OFFSET: of the L2 table, 0: there is none. NULL, or what is wrong. */
const char *qs_l1_decode(const struct qs_head *h, uint64_t entry, uint64_t *offset);

enum qs_kind {
	QS_NONE,   /* the backing file's, or zeros */
	QS_ZERO,   /* zeros whatever the backing file has */
	QS_DATA,   /* as it is at host */
	QS_PACKED, /* compressed; always a whole cluster */
};

struct qs_entry {
	enum qs_kind kind; /* with subclusters: DATA, PACKED, or NONE for one without a place */
	uint64_t host;     /* of DATA and PACKED: offset in the file */
	uint32_t packed;   /* of PACKED: bytes at most, from there on */
	uint32_t alloc,
	    zero; /* with subclusters: a bit for each, of a cluster that is not PACKED */
};

/* BITMAP: the other half of an extended entry, else 0. NULL, or what is wrong. */
const char *qs_l2_decode(const struct qs_head *h, uint64_t entry, uint64_t bitmap,
                         struct qs_entry *out);

/* Of subcluster I. */
enum qs_kind qs_subcluster(const struct qs_entry *e, unsigned i);

#endif
