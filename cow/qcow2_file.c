/*
 * The files of an image: the image itself, its checksums and, where there is one, its ledger.
 *
 * Descriptors: closed → open, when first needed, under fd_lock; open → closed by ff_image_park()
 * and ff_image_free(), when no other thread uses the image. An open descriptor is found without the
 * lock (acquire), so it is published only when it is ready: locked against QEMU, head of the
 * checksum file written or checked.
 *
 * QEMU, when it opens an image for writing, refuses if somebody holds a lock on byte 201 ("I do not
 * share writing"). We hold a shared OFD lock there. Opening for reading stays possible.
 *
 * The checksum file is made by the first save that has data. Its head names the image; a file that
 * is not this image's is of no use, so such a save replaces it: what was in it reads as absent
 * then, and absent is a mismatch. Reads never replace it.
 *
 * Flush: `writes` is incremented after each finished group of pwrites and before these are
 * acknowledged. A flush reads it, syncs, then sets `flushed` to what it read: all that was
 * acknowledged before the flush began is durable. Callers whose writes a running flush does not
 * cover wait for it and share the next. After a failed fdatasync the kernel has dropped the pages,
 * a later success would mean nothing: the error stays.
 */
#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <string.h>

#include "cow/io.h"
#include "cow/open_regular.h"
#include "cow/qcow2_private.h"
#include "ff_log.h"
#include "ff_util.h"

#define QEMU_UNSHARE_WRITE 201 /* byte whose lock means: others must not write */

int image_lock(int fd, const char *path)
{
	int r = io_lock_shared(fd, QEMU_UNSHARE_WRITE);

	if (r == -EAGAIN || r == -EACCES) {
		ff_error("%s: another program has locked it; end that program", path);
		return -EBUSY;
	}
	/* a filesystem without locks cannot keep QEMU off, which is no reason not to save there */
	return 0;
}

int image_fd(struct ff_image *img, int *out)
{
	int fd = atomic_load_explicit(&img->fd, memory_order_acquire), r;

	if (fd < 0) {
		FF_GUARD(&img->fd_lock);
		fd = atomic_load_explicit(&img->fd, memory_order_relaxed);
		if (fd < 0) {
			ff_autoclose int fresh = -1;

			r = open_regular(img->dirfd, img->path, O_RDWR, &fresh);
			if (!r)
				r = image_lock(fresh, img->path);
			if (r) {
				ff_error("%s: cannot be opened: %s%s", img->path, strerror(-r),
				         r == -EMFILE ? "; raise the limit of open files" : "");
				return r;
			}
			fd = ff_take_fd(&fresh);
			atomic_store_explicit(&img->fd, fd, memory_order_release);
		}
	}
	*out = fd;
	return 0;
}

/* Opens the checksum file and checks its head. -EINVAL: it is not this image's. */
static int open_sums(struct ff_image *img, int *out)
{
	ff_autoclose int fd = -1;
	uint8_t head[QCOW2_SUMS_HEAD_SIZE];
	size_t got;
	int r = open_regular(img->dirfd, img->sums_path, O_RDWR, &fd);

	if (!r)
		r = io_pread(fd, head, sizeof head, 0, &got);
	if (r)
		return r;
	if (got < sizeof head || !qcow2_sums_head_ok(&img->desc, head))
		return -EINVAL;
	*out = ff_take_fd(&fd);
	return 0;
}

static int create_sums(struct ff_image *img, int *out)
{
	ff_autoclose int fd = -1;
	uint8_t head[QCOW2_SUMS_HEAD_SIZE];
	int r = io_unlinkat(img->dirfd, img->sums_path, 0);

	if (r && r != -ENOENT)
		return r;
	r = io_open_beneath(img->dirfd, img->sums_path, O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW,
	                    img->mode, &fd);
	if (r)
		return r;
	qcow2_sums_head_encode(&img->desc, head);
	r = io_pwrite(fd, head, sizeof head, 0);
	if (r || img->unlinked)
		io_unlinkat(img->dirfd, img->sums_path, 0);
	if (r)
		return r;
	atomic_store(&img->sums_created, true);
	*out = ff_take_fd(&fd);
	return 0;
}

int image_sums_fd(struct ff_image *img, bool create, int *out)
{
	int fd = atomic_load_explicit(&img->sums_fd, memory_order_acquire), r;

	if (fd < 0) {
		FF_GUARD(&img->fd_lock);
		fd = atomic_load_explicit(&img->sums_fd, memory_order_relaxed);
		if (fd < 0) {
			r = open_sums(img, &fd);
			if (create && (r == -ENOENT || r == -EINVAL)) {
				if (r == -EINVAL)
					ff_warning("%s: is damaged and made anew; clusters saved "
					           "before cannot be read any more",
					           img->sums_path);
				r = create_sums(img, &fd);
			}
			if (r) {
				ff_error("%s: the checksums of %s cannot be used: %s",
				         img->sums_path, img->path,
				         r == -EINVAL ? "damaged" : strerror(-r));
				return r == -ENOENT || r == -EINVAL ? -EIO : r;
			}
			atomic_store_explicit(&img->sums_fd, fd, memory_order_release);
		}
	}
	*out = fd;
	return 0;
}

void image_keep_sums(struct ff_image *img)
{
	FF_GUARD(&img->fd_lock);
	int fd;

	if (atomic_load(&img->sums_fd) < 0 && !open_sums(img, &fd))
		atomic_store_explicit(&img->sums_fd, fd, memory_order_release);
}

int image_sync_directory(struct ff_image *img)
{
	ff_autofree char *copy = strdup(img->sums_path);
	ff_autoclose int fd = -1;
	int r;

	if (!copy)
		return -ENOMEM;
	r = io_open_beneath(img->dirfd, dirname(copy), O_RDONLY | O_DIRECTORY, 0, &fd);
	return r ? r : io_fsync(fd);
}

/* *LOST: the failure is one that a second try cannot mend. */
static int flush_sums(struct ff_image *img, bool *lost)
{
	int fd = -1, r = 0;

	if (!atomic_exchange(&img->sums_dirty, false))
		return 0;
	if (atomic_load(&img->sums_fd) >= 0) {
		r = io_fdatasync(atomic_load(&img->sums_fd));
		*lost = r != 0;
	} else if (!img->unlinked) {
		/* a parked file is opened again; one that was never made has nothing to flush */
		r = open_sums(img, &fd);
		if (!r) {
			r = io_fdatasync(fd);
			*lost = r != 0;
			close(fd);
		} else if (r == -ENOENT || r == -EINVAL) {
			r = 0;
		}
	}
	if (r)
		atomic_store(&img->sums_dirty, true);
	return r;
}

/* The same of the ledger. */
static int flush_ledger(struct ff_image *img, bool *lost)
{
	int fd, r;

	if (!ff_image_has_ledger(img) || !atomic_exchange(&img->ledger_dirty, false))
		return 0;
	r = image_ledger_fd(img, &fd);
	if (!r) {
		r = io_fdatasync(fd);
		*lost = r != 0;
	}
	if (r)
		atomic_store(&img->ledger_dirty, true);
	return r;
}

static int flush_files(struct ff_image *img, bool *lost)
{
	int fd, r;

	*lost = false;
	r = image_fd(img, &fd);
	if (!r)
		r = flush_sums(img, lost);
	if (!r)
		r = flush_ledger(img, lost);
	if (r)
		return r;
	r = io_fdatasync(fd);
	*lost = r != 0;
	if (!r && atomic_exchange(&img->sums_created, false)) {
		r = image_sync_directory(img);
		if (r)
			atomic_store(&img->sums_created, true);
	}
	return r;
}

/* Until the group NEED of writes is durable. One thread flushes; what the others finished before it
 * began goes along, the rest waits for the next turn. */
static int flush_to(struct ff_image *img, uint64_t need)
{
	int r = 0;

	pthread_mutex_lock(&img->flush_lock);
	while (!r && !img->flush_error && img->flushed < need) {
		uint64_t target;
		bool lost;

		if (img->flush_running) {
			pthread_cond_wait(&img->flush_done, &img->flush_lock);
			continue;
		}
		img->flush_running = true;
		pthread_mutex_unlock(&img->flush_lock);
		target = atomic_load(&img->writes);
		r = flush_files(img, &lost);
		pthread_mutex_lock(&img->flush_lock);
		img->flush_running = false;
		if (!r) {
			img->flushed = target;
		} else {
			ff_error("%s: cannot be made durable: %s", img->path, strerror(-r));
			if (lost)
				img->flush_error = r;
		}
		pthread_cond_broadcast(&img->flush_done);
	}
	if (!r && img->flushed < need)
		r = img->flush_error;
	pthread_mutex_unlock(&img->flush_lock);
	return r;
}

int ff_image_flush(struct ff_image *img)
{
	return flush_to(img, atomic_load(&img->writes));
}

int image_flush_tables(struct ff_image *img)
{
	return flush_to(img, atomic_load(&img->hooked));
}

int ff_image_written_back(struct ff_image *img)
{
	int fd, r;

	pthread_mutex_lock(&img->flush_lock);
	r = img->flush_error;
	pthread_mutex_unlock(&img->flush_lock);
	if (!r)
		r = image_fd(img, &fd);
	if (!r)
		r = io_writeback_error(fd);
	image_keep_sums(img);
	fd = atomic_load(&img->sums_fd);
	if (!r && fd >= 0)
		r = io_writeback_error(fd);
	if (!r && ff_image_has_ledger(img))
		r = image_ledger_fd(img, &fd);
	return r || !ff_image_has_ledger(img) ? r : io_writeback_error(fd);
}
