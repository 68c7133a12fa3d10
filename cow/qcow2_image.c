/*
 * One fleecing image: its life, its header and what its parts have in common. The format is drawn
 * in qcow2_format.c.
 *
 * No part of the file is mapped into memory. A mapping of a file that can be cut short, or whose
 * device can fail, brings SIGBUS; pread and pwrite bring an error. In memory is one bit a cluster,
 * "marked" (clustermap.c); what is stored for a marked cluster is read from the L2 tables, one
 * pread for a whole run. That costs one small system call a read and is simpler and safer than a
 * mapping.
 *
 * A guest cluster is: unmarked → marked, saved (L2 entry: data or zeros)
 *                     unmarked → marked, skipped (L2 entry 0; in memory only)
 *                     saved → released (L2 entry 0; the mark stays, in memory only)
 *                     saved → hollow   (L2 entry: zeros, though it had data; nobody reads it)
 * Marks are never taken back. A mark is set, with release, after everything that it stands for has
 * been written; whoever sees it, with acquire, finds data, checksum and entry in the page cache. An
 * L2 entry of a cluster that is not marked may be in the middle of being written and is not looked
 * at.
 *
 * Order of writes of a save (qcow2_data.c), so that a process killed between any two system calls
 * leaves an image without errors:
 *     data, checksums            into host clusters that nothing refers to
 *     first use of an L2 table   its refcount, then its L1 entry: an empty table is fine
 *     (fdatasync)                if the save is to be durable
 *     refcounts                  now they are leaked, which is harmless
 *     L2 entries                 one pwrite for a contiguous run: now they are saved
 *     (fdatasync)                if the save is to be durable
 *     marks                      in memory
 * Between two flushes any part may come to be on storage before the rest: the first sees to it that
 * no entry is there before what it stands for, not even of a save that never came to its end. The
 * refcounts are after it, though a loss of power may then leave entries without them, until the
 * next load (which does not need them to tell what is in use): were they before it, nearly every
 * kill of a process that saves durably would leave clusters leaked, for a flush takes a thousand
 * times as long as the two writes. A release goes the other way: L2 entries, refcounts, space. What
 * a killed process leaks is put right by the next load (qcow2_load.c).
 *
 * The header is rewritten, all 4 KiB at once, to change the backing file's name or to set "broken".
 * Broken is for good: in memory at once; on disk with QEMU's "corrupt" bit beside our own flag, so
 * that qemu-img says it and no program writes to the image. (It can still be read, as it must be:
 * older snapshots that did not need the lost cluster read others through it.) Where the header
 * cannot be written the image is removed, or cut to nothing: neither can be taken for a whole one
 * later.
 *
 * What is checked on reading: data by checksum; offsets in L2 by bounds, and by the guest cluster's
 * number in the checksum; the header by its own. An entry that turned from 1 (zeros) into 0 on the
 * storage cannot be told from one that was never written.
 *
 * Locks: head_lock, alloc_lock, flush_lock are never held together; fd_lock is below them all. None
 * is held while data is read or written. What the ledger adds is told in qcow2_ledger.c.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cow/io.h"
#include "cow/ledger_file.h"
#include "cow/names.h"
#include "cow/open_regular.h"
#include "cow/qcow2_private.h"
#include "cow/rename_new.h"
#include "ff_log.h"
#include "ff_util.h"

int image_new(int dirfd, const char *path, struct ff_image **out)
{
	struct ff_image *img = calloc(1, sizeof *img);

	if (!img)
		return -ENOMEM;
	img->dirfd = dirfd;
	atomic_init(&img->fd, -1);
	atomic_init(&img->sums_fd, -1);
	atomic_init(&img->ledger_fd, -1);
	atomic_init(&img->writes, 1); /* what was there before us may not be durable */
	atomic_init(&img->hooked, 1);
	atomic_init(&img->sums_dirty, true);
	atomic_init(&img->ledger_dirty, true);
	pthread_mutex_init(&img->fd_lock, NULL);
	pthread_mutex_init(&img->head_lock, NULL);
	pthread_mutex_init(&img->alloc_lock, NULL);
	pthread_mutex_init(&img->flush_lock, NULL);
	pthread_mutex_init(&img->ledger_lock, NULL);
	pthread_cond_init(&img->flush_done, NULL);
	img->path = strdup(path);
	img->sums_path = names_beside(path, NAMES_SUMS);
	if (!img->path || !img->sums_path) {
		ff_image_free(img);
		return -ENOMEM;
	}
	*out = img;
	return 0;
}

/* What cluster 0 says now. */
static void current_head(const struct ff_image *img, struct qcow2_head *head)
{
	*head = (struct qcow2_head){.desc = img->desc};
	head->desc.broken = img->marked_broken;
	head->desc.ledger = img->marked_ledger;
	strcpy(head->backing, img->backing);
	strcpy(head->format, img->format);
}

int image_setup(struct ff_image *img, const struct qcow2_head *head, const struct qcow2_layout *l)
{
	int r;

	img->backing = strdup(head->backing);
	if (!img->backing)
		return -ENOMEM;
	strcpy(img->format, head->format);
	img->marked_broken = head->desc.broken;
	img->marked_ledger = head->desc.ledger;
	img->l = *l;
	img->desc = head->desc;
	img->next = l->data_first;
	atomic_init(&img->broken, head->desc.broken);
	atomic_init(&img->allocated, QCOW2_TABLE_CHARGE); /* the header */
	r = clustermap_init(&img->marks, l->clusters);
	if (!r)
		r = clustermap_init(&img->tables, l->l2_count);
	if (!r)
		r = clustermap_init(&img->blocks, l->rb_count);
	return r ? r : clustermap_init(&img->refs, l->capacity);
}

int image_first_refs(struct ff_image *img)
{
	const struct qcow2_layout *l = &img->l;
	uint64_t blocks = ff_div_up(l->l2_first, l->per_block);
	int r = clustermap_reserve(&img->refs, 0, l->l2_first);

	if (r)
		return r;
	clustermap_set(&img->refs, 0, l->rb_first + blocks);
	clustermap_set(&img->refs, l->l1_first, l->l1_count);
	return 0;
}

/* Refcounts and refcount table for what is there from the beginning: header, refcount table, L1 and
 * the blocks that cover these. */
static int write_first_refcounts(struct ff_image *img)
{
	const struct qcow2_layout *l = &img->l;
	uint64_t blocks = ff_div_up(l->l2_first, l->per_block);
	int r = image_first_refs(img);

	if (!r)
		r = clustermap_reserve(&img->blocks, 0, blocks);
	if (r)
		return r;
	clustermap_set(&img->blocks, 0, blocks);
	atomic_fetch_add(&img->allocated, blocks * QCOW2_TABLE_CHARGE);
	r = image_refs_write(img, 0, l->rb_first + blocks);
	if (!r)
		r = image_refs_write(img, l->l1_first, l->l1_count);
	return r ? r : image_hook_blocks(img, 0, blocks);
}

static int write_head(struct ff_image *img, const struct qcow2_head *head)
{
	uint8_t buf[QCOW2_HEAD_SIZE];
	ff_autoclose int own = -1;
	int fd = atomic_load_explicit(&img->fd, memory_order_acquire), r = 0;

	/* Every image of a chain has its header written now and then, by mkdir of all disks at
	 * once, and most have nothing else to do: that is no reason to keep them open. */
	if (fd < 0) {
		r = atomic_load(&img->unlinked) ? -ENOENT
		                                : open_regular(img->dirfd, img->path, O_RDWR, &own);
		fd = own;
	}
	if (r)
		return r;
	qcow2_head_encode(head, &img->l, buf);
	r = io_pwrite(fd, buf, sizeof buf, 0);
	atomic_fetch_add(&img->writes, 1);
	return r;
}

/* The header comes last; a file without one is no qcow2 image. */
static int write_new(struct ff_image *img, const struct qcow2_head *head)
{
	int fd, r = image_fd(img, &fd);

	if (!r)
		r = image_lock(fd, img->path);
	if (!r)
		r = io_truncate(fd, img->l.data_first * img->l.cluster_size);
	if (!r)
		r = write_first_refcounts(img);
	if (!r)
		r = write_head(img, head);
	img->pristine = r == 0;
	return r;
}

/* One that could not be removed when it failed must not fail all that come after it. */
static int open_unfinished(int dirfd, mode_t mode, int *out)
{
	const int flags = O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW;
	int r = io_openat(dirfd, NAMES_UNFINISHED, flags, mode, out);

	if (r != -EEXIST)
		return r;
	r = io_unlinkat(dirfd, NAMES_UNFINISHED, 0);
	return r ? r : io_openat(dirfd, NAMES_UNFINISHED, flags, mode, out);
}

int ff_image_create(int dirfd, const char *path, mode_t mode, const struct ff_image_desc *desc,
                    const char *backing, const char *backing_format, struct ff_image **out)
{
	struct qcow2_head head = {.desc = *desc};
	struct qcow2_layout l;
	struct ff_image *img;
	int fd, r = qcow2_layout(desc->size, desc->cluster_size, &l);

	if (!r)
		r = qcow2_head_set_backing(&head, backing, backing_format);
	if (!r)
		r = image_new(dirfd, path, &img);
	if (r)
		return r;
	img->mode = mode & 0777;
	r = image_setup(img, &head, &l);
	if (!r)
		r = open_unfinished(dirfd, img->mode, &fd);
	if (r) {
		ff_image_free(img);
		return r;
	}
	atomic_store(&img->fd, fd);
	r = write_new(img, &head);
	if (!r)
		r = rename_new(dirfd, NAMES_UNFINISHED, dirfd, path);
	if (r) {
		io_unlinkat(dirfd, NAMES_UNFINISHED, 0);
		ff_image_free(img);
		return r;
	}
	*out = img;
	return 0;
}

static void close_files(struct ff_image *img)
{
	atomic_int *const at[] = {&img->fd, &img->sums_fd, &img->ledger_fd};

	for (size_t i = 0; i < FF_ARRAY_SIZE(at); i++) {
		int fd = atomic_exchange(at[i], -1);

		if (fd >= 0)
			close(fd);
	}
}

void ff_image_free(struct ff_image *img)
{
	if (!img)
		return;
	close_files(img);
	clustermap_fini(&img->marks);
	clustermap_fini(&img->tables);
	clustermap_fini(&img->blocks);
	clustermap_fini(&img->refs);
	pthread_mutex_destroy(&img->fd_lock);
	pthread_mutex_destroy(&img->head_lock);
	pthread_mutex_destroy(&img->alloc_lock);
	pthread_mutex_destroy(&img->flush_lock);
	pthread_mutex_destroy(&img->ledger_lock);
	image_ledger_free(img);
	pthread_cond_destroy(&img->flush_done);
	free(img->given_back);
	free(img->path);
	free(img->backing);
	free(img->sums_path);
	free(img);
}

/* Removes what lies beside it by that name. R: of what was removed before, which wins. */
static int unlink_beside(const struct ff_image *img, const char *suffix, int r)
{
	ff_autofree char *path = names_beside(img->path, suffix);
	int e = path ? io_unlinkat(img->dirfd, path, 0) : -ENOMEM;

	return r ? r : e == -ENOENT ? 0 : e;
}

int ff_image_unlink(struct ff_image *img)
{
	int fd, r, beside;

	/* who still reads must find the files open; nothing to read is no reason to keep them */
	image_fd(img, &fd);
	image_keep_sums(img);
	FF_GUARD(&img->fd_lock);
	atomic_store(&img->unlinked, true);
	/* the image last: while it is there, it leads to the others */
	beside = unlink_beside(img, NAMES_SUMS, 0);
	if (ff_image_has_ledger(img))
		beside = unlink_beside(img, LEDGER_SUFFIX, beside);
	if (atomic_load(&img->has_said))
		beside = unlink_beside(img, FF_SAID_SUFFIX, beside);
	r = io_unlinkat(img->dirfd, img->path, 0);
	return r && r != -ENOENT ? r : beside;
}

void ff_image_park(struct ff_image *img)
{
	if (!atomic_load(&img->unlinked)) /* else they could not be opened again */
		close_files(img);
	if (img->pristine) /* most images of a tree of many files stay so */
		clustermap_empty(&img->refs);
}

int ff_image_highest_fd(const struct ff_image *img)
{
	int files = FF_MAX(atomic_load(&img->fd), atomic_load(&img->sums_fd));

	return FF_MAX(files, atomic_load(&img->ledger_fd));
}

size_t ff_image_take_fds(struct ff_image *img, int lowest, int *out, size_t room)
{
	size_t n = 0;

	if (atomic_load(&img->unlinked))
		return 0;
	if (n < room && atomic_load(&img->fd) >= lowest)
		out[n++] = atomic_exchange(&img->fd, -1);
	if (n < room && atomic_load(&img->sums_fd) >= lowest)
		out[n++] = atomic_exchange(&img->sums_fd, -1);
	if (n < room && atomic_load(&img->ledger_fd) >= lowest)
		out[n++] = atomic_exchange(&img->ledger_fd, -1);
	return n;
}

const struct ff_image_desc *ff_image_desc(const struct ff_image *img)
{
	return &img->desc;
}

const char *ff_image_path(const struct ff_image *img)
{
	return img->path;
}

uint64_t ff_image_clusters(const struct ff_image *img)
{
	return img->l.clusters;
}

const char *ff_image_backing(const struct ff_image *img)
{
	return img->backing;
}

bool ff_image_backing_is_image(const struct ff_image *img)
{
	return strcmp(img->format, "qcow2") == 0;
}

uint64_t ff_image_allocated(const struct ff_image *img)
{
	return atomic_load(&img->allocated);
}

uint64_t ff_image_first_allocated(const struct ff_image *img)
{
	return (1 + ff_div_up(img->l.l2_first, img->l.per_block)) * QCOW2_TABLE_CHARGE;
}

uint64_t ff_image_preserved(const struct ff_image *img)
{
	return atomic_load_explicit(&img->preserved, memory_order_relaxed) * img->l.cluster_size;
}

void ff_image_set_torn(struct ff_image *img)
{
	img->desc.torn = true;
}

void ff_image_set_budget(struct ff_image *img, int (*fn)(void *ctx, int64_t bytes, bool must),
                         void *ctx)
{
	img->budget = fn;
	img->budget_ctx = ctx;
}

bool ff_image_is_broken(const struct ff_image *img)
{
	return atomic_load(&img->broken);
}

int ff_image_set_backing(struct ff_image *img, const char *backing, const char *format)
{
	FF_GUARD(&img->head_lock);
	ff_autofree char *copy = strdup(backing ? backing : "");
	struct qcow2_head head;
	int r;

	if (!copy)
		return -ENOMEM;
	if (strcmp(copy, img->backing) == 0 && strcmp(format ? format : "", img->format) == 0)
		return 0;
	current_head(img, &head);
	r = qcow2_head_set_backing(&head, backing, format);
	if (!r)
		r = write_head(img, &head);
	if (r)
		return r;
	free(img->backing);
	img->backing = ff_take_ptr(&copy);
	strcpy(img->format, head.format);
	return 0;
}

int ff_image_set_broken(struct ff_image *img, uint8_t why)
{
	FF_GUARD(&img->head_lock);
	struct qcow2_head head;
	int r;

	atomic_store(&img->broken, true);
	if (img->marked_broken)
		return 0;
	current_head(img, &head);
	head.desc.broken = true;
	head.desc.torn = img->desc.torn;
	head.desc.why = img->desc.why = why;
	r = write_head(img, &head);
	img->marked_broken = r == 0;
	return r;
}

int image_set_ledger_flag(struct ff_image *img)
{
	FF_GUARD(&img->head_lock);
	struct qcow2_head head;
	int r;

	current_head(img, &head);
	head.desc.ledger = true;
	r = write_head(img, &head);
	img->marked_ledger = r == 0;
	return r;
}

bool ff_image_marked(const struct ff_image *img, uint64_t cluster)
{
	return clustermap_test(&img->marks, cluster);
}

uint64_t ff_image_run(const struct ff_image *img, uint64_t first, uint64_t max, bool *marked)
{
	return clustermap_run(&img->marks, first, max, marked);
}

void ff_image_marks(const struct ff_image *img, uint64_t first, unsigned count, uint64_t *out)
{
	clustermap_bits(&img->marks, first, count, out);
}

int ff_image_skip(struct ff_image *img, uint64_t first, uint64_t count)
{
	int r;

	if (first > img->l.clusters || count > img->l.clusters - first)
		return -EINVAL;
	r = clustermap_reserve(&img->marks, first, count);
	if (!r)
		clustermap_set(&img->marks, first, count);
	return r;
}
