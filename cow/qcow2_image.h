/*
 * One fleecing image: a standard qcow2 version 3 file, written by us alone, that holds the saved
 * clusters of one disk for one snapshot.
 *
 * A cluster number below is a guest cluster: byte offset in the disk divided by the cluster size.
 * All functions return 0 or -errno; all are thread-safe where not said otherwise. Two threads must
 * not save the same cluster at once (the claims of save.c see to that); everything else may
 * run side by side.
 */
#ifndef FF_COW_QCOW2_IMAGE_H
#define FF_COW_QCOW2_IMAGE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <time.h>

struct ff_image;

/* What an image says of itself, in a header extension of our own that other readers skip, so that
 * the images alone are enough to rebuild every chain. */
struct ff_image_desc {
	uint64_t seq;           /* number of the snapshot: newer is higher; unique per disk */
	uint64_t size;          /* exact size of the disk at the freeze, bytes */
	uint64_t disk_ino;      /* identity of the disk: inode number and birth time */
	int64_t disk_btime_sec; /* (0, 0 where the filesystem keeps none) */
	uint32_t disk_btime_nsec;
	uint32_t cluster_size; /* bytes, power of two, 4 KiB to 2 MiB; 0 never */
	bool broken;           /* the view of this disk in this snapshot is lost for good */
	bool durable;          /* each save is flushed before its cluster is overwritten */
	bool torn;             /* broken by a loss of power */
	uint8_t why; /* it broke: a number of reasons.c; 0: unknown, or it is not broken */
	bool ledger; /* it has a ledger beside it, as it was when it was loaded */
};

/* The smallest cluster size, not below WANTED, with which qcow2 can describe SIZE bytes within
 * QEMU's limits (L1 table 32 MiB, refcount table 8 MiB). -EFBIG. */
int ff_image_cluster_size(uint64_t size, uint32_t wanted, uint32_t *out);

/* Makes the file PATH (O_EXCL) below DIRFD with MODE and the given backing file (name as it is to
 * stand in the header, at most 1023 bytes else -ENAMETOOLONG; format "raw" or "qcow2"). The virtual
 * size is desc->size rounded up to 512. O(1) in the size of the disk. DIRFD and PATH must stay
 * valid for the image's life; PATH is copied, DIRFD is not duplicated. The descriptors are opened
 * when first needed, and again after ff_image_park(). */
int ff_image_create(int dirfd, const char *path, mode_t mode, const struct ff_image_desc *desc,
                    const char *backing, const char *backing_format, struct ff_image **out);

/* Opens an existing image of ours: validates header, tables and every entry, takes the saved
 * clusters into memory, mends refcounts that a killed process left too high. -EINVAL with a log
 * line naming the file and what is wrong with it. */
int ff_image_load(int dirfd, const char *path, struct ff_image **out);
/* Reads no more than the head of an image. -EINVAL with *WHY, a static text: it is none of ours. */
struct qcow2_head;
struct qcow2_layout;
int ff_image_head(int fd, struct qcow2_head *head, struct qcow2_layout *l, const char **why);

/* A hash of all L2 entries in the file, which says nothing of where they came from: now, and when
 * the image was loaded (0: it was made, not loaded). No other thread may change IMG meanwhile. */
int ff_image_entries_hash(struct ff_image *img, uint64_t *out);
uint64_t ff_image_loaded_hash(const struct ff_image *img);

/* Closes and frees; the file stays. No other thread may use IMG any more. */
void ff_image_free(struct ff_image *img);

/* Removes the image's files (and its checksums). The object remains usable until freed. */
int ff_image_unlink(struct ff_image *img);

/* Closes the descriptors until they are needed again. No other thread may use IMG meanwhile. */
void ff_image_park(struct ff_image *img);

/* Takes up to ROOM (of three) descriptors, of those that have LOWEST or a higher number, for the
 * caller to close: how many. They are opened again when needed. No other thread may use IMG. */
size_t ff_image_take_fds(struct ff_image *img, int lowest, int *out, size_t room);
/* The higher of its descriptors, or -1. */
int ff_image_highest_fd(const struct ff_image *img);

const struct ff_image_desc *ff_image_desc(const struct ff_image *img);
const char *ff_image_path(const struct ff_image *img);
/* Number of guest clusters, the last one perhaps partial. */
uint64_t ff_image_clusters(const struct ff_image *img);
/* The backing file's name as it stands in the header. Valid until the next set_backing. */
const char *ff_image_backing(const struct ff_image *img);
/* Is that file an image (format qcow2), and not the source (raw)? */
bool ff_image_backing_is_image(const struct ff_image *img);
/* Bytes of data clusters, and of tables, that the image has allocated; and those of them that it
 * had when it was made. */
uint64_t ff_image_allocated(const struct ff_image *img);
uint64_t ff_image_first_allocated(const struct ff_image *img);
/* Bytes of the disk that are saved here and were not released, in whole clusters; those of zeros
 * count, though they take no space. */
uint64_t ff_image_preserved(const struct ff_image *img);

/* Rewrites the backing file's name, or the broken state, in place (one write within one page). */
int ff_image_set_backing(struct ff_image *img, const char *backing, const char *format);
int ff_image_set_broken(struct ff_image *img, uint8_t why);
/* When it is set broken, the header will say that power failed. Not thread-safe. */
void ff_image_set_torn(struct ff_image *img);
bool ff_image_is_broken(const struct ff_image *img);

/* Is the cluster marked, that is: saved here, or known to need no saving here (skip)? Acquire: who
 * sees the mark sees all that was written before it was set. Lock-free. */
bool ff_image_marked(const struct ff_image *img, uint64_t cluster);
/* Length of the run of clusters from FIRST, at most MAX, that are all marked or all unmarked;
 * *MARKED says which. At least 1. Beyond the last cluster: unmarked. */
uint64_t ff_image_run(const struct ff_image *img, uint64_t first, uint64_t max, bool *marked);

/* The marks of COUNT clusters as bits: see clustermap_bits(). */
void ff_image_marks(const struct ff_image *img, uint64_t first, unsigned count, uint64_t *out);

/* Marks clusters without saving them: nobody will need them from here. In memory only. */
int ff_image_skip(struct ff_image *img, uint64_t first, uint64_t count);

/* Saves COUNT whole clusters, with the disk's bytes at DATA (zeros beyond its end). WANTED, if not
 * NULL: COUNT flags, only clusters with a non-zero one are saved. Clusters of zeros become zero
 * clusters. Marks them, release, once the data, checksums and tables have been written; DURABLE:
 * and made durable. Nothing is marked on error (space may be left unused in the image).
 * ff_image_save_zeros() saves clusters known to be zero. */
int ff_image_save(struct ff_image *img, uint64_t first, uint64_t count, const void *data,
                  const uint8_t *wanted, bool durable);
int ff_image_save_zeros(struct ff_image *img, uint64_t first, uint64_t count, bool durable);

/* What is stored for a marked cluster. */
enum ff_image_kind {
	FF_KIND_NONE = 0, /* nothing: marked by ff_image_skip(), or released */
	FF_KIND_ZERO,
	FF_KIND_DATA,
};
int ff_image_kinds(struct ff_image *img, uint64_t first, uint64_t count, uint8_t *kinds);

/* Reads COUNT whole saved clusters to BUF and checks their checksums. -EIO, with a log line naming
 * image and offset, where one does not match. -ENODATA: one of them is FF_KIND_NONE. */
int ff_image_read(struct ff_image *img, uint64_t first, uint64_t count, void *buf);
/* The same for those of COUNT clusters that WANTED, COUNT flags, has a non-zero one for, each to
 * its place in BUF. Far faster than one call for each. */
int ff_image_read_wanted(struct ff_image *img, uint64_t first, uint64_t count,
                         const uint8_t *wanted, void *buf);

/* A marked cluster, or some close by, will be read soon: begins to read its table entry. Then,
 * which waits for the entry, its data and checksum. Hints: errors are left for the read. */
void ff_image_expect_entry(struct ff_image *img, uint64_t cluster);
void ff_image_expect_data(struct ff_image *img, uint64_t cluster);

/* Gives up what is stored for clusters that nobody reads here any more: table entries, refcounts,
 * disk space. The marks stay. */
int ff_image_release(struct ff_image *img, uint64_t first, uint64_t count);
/* The same of data alone, in an image that nobody reads: what was saved becomes zeros, by which it
 * still says that it has changed. Takes no space, as to record that first does. */
int ff_image_hollow(struct ff_image *img, uint64_t first, uint64_t count);

/* --- what is known without being saved: see qcow2_ledger.c --- */

/* Makes the ledger, if there is none: DURABLE: so that a loss of power does not leave a head that
 * speaks of it without it. What follows makes it as well, but durable only if itself is to be.
 * What is written so that space can be given back no budget refuses: all but ff_image_note(). */
int ff_image_make_ledger(struct ff_image *img, bool durable);
/* Marks clusters as changed since the freeze, though nothing is saved of them: no view needs them.
 * DURABLE: and makes that durable. Stands on disk before they are marked. */
int ff_image_note(struct ff_image *img, uint64_t first, uint64_t count, bool durable);
/* The same of what a newer image notes that is about to go; not durable before ff_image_flush(). */
int ff_image_take_over(struct ff_image *img, uint64_t first, uint64_t count);
/* Notes the same of clusters that are saved here, and are about to be given up; not durable before
 * ff_image_flush(). */
int ff_image_record(struct ff_image *img, uint64_t first, uint64_t count);
/* Gives up what is stored for clusters that were so recorded: see ff_image_release(). */
int ff_image_drop_recorded(struct ff_image *img, uint64_t first, uint64_t count);
/* Length of the run from FIRST, at most MAX, that is noted or recorded as changed, or is not. */
uint64_t ff_image_recorded_run(const struct ff_image *img, uint64_t first, uint64_t max, bool *set);
/* Is there anything of the kind? */
bool ff_image_has_ledger(const struct ff_image *img);

/* The view that the image was made for gives these clusters up: it must never read them again. */
int ff_image_give_up(struct ff_image *img, uint64_t first, uint64_t count, bool durable);
/* Bytes that it has, in whole clusters. */
uint64_t ff_image_released(const struct ff_image *img);
/* Has it? As runs, and as bits: see ff_image_run() and ff_image_marks(). */
uint64_t ff_image_released_run(const struct ff_image *img, uint64_t first, uint64_t max, bool *set);
void ff_image_released_bits(const struct ff_image *img, uint64_t first, unsigned count,
                            uint64_t *out);

/* Gives up all that is stored, tables too, once all of it has been recorded. Nobody may read here,
 * or save, at the same time or later; marks and ledger stay. */
int ff_image_clear(struct ff_image *img, bool durable);

/* --- what was said of the zeros of its view: see qcow2_said.c, zeros.c --- */

#define FF_SAID_SUFFIX     "zeros" /* no longer than that of the image, which may fill a name */
#define FF_SAID_NEW_SUFFIX "zero~" /* one that is to take its place */
#define FF_SAID_WORDS      512u    /* of 64 clusters each: a chunk */

enum ff_said_kind {
	FF_SAID_DATA, /* no cluster of the chunk is known to be zeros, and that is final */
	FF_SAID_ZERO, /* all of them are zeros */
	FF_SAID_BITS, /* those in ZERO are zeros, the others final */
	FF_SAID_SOME, /* the same of those in KNOWN */
	FF_SAID_KINDS
};

struct ff_said {
	uint64_t chunk;
	enum ff_said_kind kind;
	const uint64_t *known, *zero; /* FF_SAID_WORDS each, where the kind has them */
};

/* Calls FN for all that was added, in that order; *END is for what is to be added, 0: to a new
 * file. FREEZE, here and below, tells the freeze of the view from all others whose image had the
 * same number; what was added for another does not count. -EIO, logged: it cannot be read. None of
 * these at the same time as another. */
int ff_image_said_load(struct ff_image *img, uint64_t freeze,
                       int (*fn)(void *ctx, const struct ff_said *said), void *ctx, uint64_t *end);
/* Adds to it, at *END, which moves on. -ENOSPC, -EDQUOT, -ENOMEM or -EIO, logged: nothing counts as
 * added. */
int ff_image_said_add(struct ff_image *img, uint64_t freeze, uint64_t *end,
                      const struct ff_said *said, size_t count, bool durable);
/* Where a file that ends at END, 0: none, ends when these have been added. */
uint64_t ff_image_said_size(uint64_t end, const struct ff_said *said, size_t count);
/* Puts a file of these, which must be all that was ever added and more, in the place of one that is
 * longer. The old one is there, or the new one, whatever happens. Errors are logged; then
 * ff_image_said_add() may do for what is new. */
int ff_image_said_replace(struct ff_image *img, uint64_t freeze, uint64_t *end,
                          const struct ff_said *said, size_t count, bool durable);
/* Nobody will ask any more. */
void ff_image_said_forget(struct ff_image *img);

/* Makes all that was saved durable. Callers at the same time share one flush. */
int ff_image_flush(struct ff_image *img);

/* The error of writing it back, if there was one. Flushes nothing. */
int ff_image_written_back(struct ff_image *img);

/* Charges allocations to BUDGET: fn(ctx, bytes, must) is called before the image grows by BYTES
 * (or, when negative, after it shrank) and may refuse with -ENOSPC, but for what MUST be. Not
 * thread-safe: set it before use. */
void ff_image_set_budget(struct ff_image *img, int (*fn)(void *ctx, int64_t bytes, bool must),
                         void *ctx);

#endif
