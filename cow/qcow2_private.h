/*
 * What the parts of one image share: qcow2_image.c (life, names, states; the essay is there),
 * qcow2_file.c (descriptors, flush), qcow2_alloc.c (host clusters, refcounts, tables),
 * qcow2_data.c (save, release), qcow2_read.c (read), qcow2_load.c (validation), qcow2_ledger.c
 * (changes without data), qcow2_clear.c (all data goes), qcow2_said.c (what was said of zeros).
 * Nothing else includes it.
 */
#ifndef FF_COW_QCOW2_PRIVATE_H
#define FF_COW_QCOW2_PRIVATE_H

#include <pthread.h>
#include <stdatomic.h>

#include "cow/clustermap.h"
#include "cow/ledger_format.h"
#include "cow/qcow2_format.h"
#include "cow/qcow2_image.h"

struct image_run {
	uint64_t first, count;
};

/* See qcow2_ledger.c. */
struct ledger {
	struct clustermap bits[LEDGER_PARTS]; /* lock-free; set under ledger_lock */
	uint64_t allocated;                   /* bytes of it that were charged; ledger_lock */
	atomic_uint_fast64_t released;        /* how many of that part are set */
};

struct ff_image {
	/* constant after create and load */
	int dirfd;
	char *path;
	char *sums_path;
	mode_t mode;
	struct qcow2_layout l;
	struct ff_image_desc desc;
	uint64_t loaded_hash; /* of the L2 entries, as they were when it was loaded */
	int (*budget)(void *ctx, int64_t bytes, bool must);
	void *budget_ctx;

	struct clustermap marks;  /* guest clusters; lock-free, see clustermap.c */
	struct clustermap tables; /* L2 tables that L1 points to; lock-free, set under alloc_lock */

	pthread_mutex_t fd_lock; /* opening and closing of the three descriptors, unlinked */
	atomic_int fd;           /* -1: not open; set under fd_lock, read without */
	atomic_int sums_fd;      /* the same */
	atomic_int ledger_fd;    /* the same; see qcow2_ledger.c */
	atomic_bool unlinked;    /* set under fd_lock, read without */

	pthread_mutex_t
	    head_lock; /* the fields up to the empty line, and the writing of cluster 0 */
	char *backing; /* what is on disk; a head itself is too large for all images */
	char format[QCOW2_FORMAT_MAX + 1]; /* of the backing file */
	bool marked_broken;                /* on disk */
	bool marked_ledger;                /* the same: it has a ledger */
	atomic_bool broken;                /* false to true; read without */

	pthread_mutex_t alloc_lock; /* the fields up to the empty line, refcounts and L1 on disk */
	struct clustermap blocks;   /* refcount blocks that the refcount table points to */
	struct clustermap refs;     /* host clusters in use: the refcount bits */
	bool pristine; /* nothing was allocated since it was made: refs may be empty, and are known
	                */
	uint64_t next; /* first host cluster that was never allocated */
	struct image_run *given_back; /* below next and not in use, left by failed saves */
	size_t given_back_count;

	atomic_uint_fast64_t allocated; /* bytes */
	atomic_uint_fast64_t preserved; /* clusters that are saved and not released */

	pthread_mutex_t ledger_lock;   /* making of the ledger, its bits; outside all others */
	struct ledger *_Atomic ledger; /* NULL, then set once under ledger_lock; read without */
	atomic_bool ledger_dirty;      /* written since its last flush began */

	atomic_bool has_said;              /* there may be a file of qcow2_said.c's */
	atomic_uint_fast64_t said_charged; /* bytes of it that were charged */

	atomic_uint_fast64_t ahead; /* bytes that were read ahead, in all: see qcow2_read.c */
	atomic_uint_fast64_t used;  /* bytes that were read because they were wanted, in all */

	atomic_uint_fast64_t writes; /* counts finished groups of writes; see ff_image_flush() */
	atomic_uint_fast64_t hooked; /* that of the group which the newest L1 entry belongs to */
	atomic_bool sums_created;    /* the directory has an entry which is not durable yet */
	atomic_bool sums_dirty;      /* written since their last flush began */
	pthread_mutex_t flush_lock;  /* the fields below; not held during the flush itself */
	pthread_cond_t flush_done;
	bool flush_running;
	uint64_t flushed; /* value of writes up to which all is durable */
	int flush_error;  /* the first failure of fdatasync: for good, for the pages are lost */
};

/* --- qcow2_image.c --- */
int image_new(int dirfd, const char *path, struct ff_image **out);
/* Takes DESC and the layout, makes the maps. */
int image_setup(struct ff_image *img, const struct qcow2_head *head, const struct qcow2_layout *l);

/* Says in the header that there is a ledger. */
int image_set_ledger_flag(struct ff_image *img);
/* Puts the refcounts of an image in which nothing is allocated into memory. -ENOMEM. */
int image_first_refs(struct ff_image *img);

/* --- qcow2_file.c --- */
/* The image's descriptor, opened if it has to be. */
int image_fd(struct ff_image *img, int *out);
/* The checksum file's. CREATE: made if it is missing or not this image's; else -EIO then. */
int image_sums_fd(struct ff_image *img, bool create, int *out);
/* Opens it if it is there and right; silent if not. */
void image_keep_sums(struct ff_image *img);
/* Makes all L1 entries durable; at once, if they are. */
int image_flush_tables(struct ff_image *img);
/* Makes the directory entries of new files beside the image durable. */
int image_sync_directory(struct ff_image *img);
/* Takes the lock that keeps QEMU off. */
int image_lock(int fd, const char *path);

/* --- qcow2_alloc.c --- */
/* N contiguous host clusters for data, charged to the budget, not yet counted as used on disk. */
int image_alloc(struct ff_image *img, uint64_t n, uint64_t *host);
/* Gives them back; their refcounts must be 0. */
void image_unalloc(struct ff_image *img, uint64_t host, uint64_t n);
/* Sets or clears refcounts of host clusters, on disk and in memory; unchanged on error. */
int image_refs_set(struct ff_image *img, uint64_t host, uint64_t n);
int image_refs_clear(struct ff_image *img, uint64_t host, uint64_t n);
/* Sees to it that the L2 tables of the guest clusters are in L1. */
int image_hook_tables(struct ff_image *img, uint64_t first, uint64_t count);
/* Writes the refcount bits of [HOST, HOST + N) as they are in memory. Lock held, or img private. */
int image_refs_write(struct ff_image *img, uint64_t host, uint64_t n);
/* Enters the refcount blocks [FIRST, FIRST + N) into the refcount table. Same rule. */
int image_hook_blocks(struct ff_image *img, uint64_t first, uint64_t n);
/* Asks the budget for BYTES, and counts them as allocated. MUST: it may not refuse. */
int image_charge(struct ff_image *img, uint64_t bytes, bool must);
void image_charge_back(struct ff_image *img, uint64_t bytes);

/* Byte offset of a guest cluster's L2 entry. */
static inline uint64_t image_l2_offset(const struct ff_image *img, uint64_t cluster)
{
	return img->l.l2_first * img->l.cluster_size + cluster * 8;
}

/* --- qcow2_ledger.c --- */
/* The ledger's descriptor, opened if it has to be. */
int image_ledger_fd(struct ff_image *img, int *out);
/* Takes over what the ledger says, if the header says that there is one, and adds to *HASH. */
int image_ledger_load(struct ff_image *img, uint64_t *hash);
/* Adds what the ledger's file says to *HASH. */
int image_ledger_hash(struct ff_image *img, uint64_t *hash);
void image_ledger_free(struct ff_image *img);

/* --- qcow2_said.c --- */
/* Counts the file beside the image, if there is one. -ENOMEM. */
int image_said_look(struct ff_image *img);

/* --- qcow2_read.c --- */
#define IMAGE_ENTRIES 512u /* most clusters of one image_entries() */
/* What is stored for COUNT clusters: HOST[] (0: no data) and KINDS[]. Those that are not marked, or
 * not WANTED (NULL: all are), are FF_KIND_NONE. -EIO, logged: an entry is damaged. */
int image_entries(struct ff_image *img, uint64_t first, uint64_t count, const uint8_t *wanted,
                  uint64_t *host, uint8_t *kinds);

#endif
