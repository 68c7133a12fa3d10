/*
 * Reading old data for saves.
 *
 * Saves have descriptors of their own, apart from that of frozen readers, for the kernel reads
 * ahead by descriptor: the random reads of saves would spoil the sequential ones of a backup.
 *
 * A guest that goes past the page cache (O_DIRECT) seldom has anything of its disk in there, and a
 * page that was read into it for a save would be thrown out by the very write that asked for it. So
 * its old data are read past the page cache, too, but for those that are there already: in memory
 * they take a twentieth of the time. Where the kernel does not tell, through the page cache is
 * right more often.
 *
 * A guest that overwrites its disk from one end to the other is the exception: the page cache reads
 * ahead, while the guest's writes are under way.
 *
 * The memory for long runs is kept for the next ones, a few buffers for the whole store: fresh
 * memory costs as much as all copying of the data together.
 */
#include <errno.h>
#include <stdlib.h>

#include "cow/engine.h"
#include "cow/io.h"

enum { LONG = 256 << 10 };

/* Does this go on where the latest long save ended? */
static bool goes_on(struct ff_disk *d, uint64_t off, size_t len)
{
	return len >= LONG &&
	       atomic_exchange_explicit(&d->saved_end, off + len, memory_order_relaxed) == off;
}

static bool is_cached(int fd, uint64_t off, size_t len)
{
	uint64_t got;

	return io_cached(fd, off, len, &got) != 0 || got == len;
}

int old_data_read(struct ff_disk *d, bool direct, void *buf, size_t len, uint64_t off, size_t *got)
{
	int fd, r = disk_old_source(d, false, &fd);

	if (r)
		return r;
	if (direct && !goes_on(d, off, len) && !is_cached(fd, off, len)) {
		int direct_fd;

		r = disk_old_source(d, true, &direct_fd);
		if (!r)
			r = io_pread(direct_fd, buf, len, off, got);
		/* not for this filesystem, or for the last bytes of this file */
		if (r != -EINVAL)
			return r;
	}
	return io_pread(fd, buf, len, off, got);
}

void *old_data_buffer(struct ff_store *s)
{
	for (unsigned i = 0; i < OLD_DATA_BUFFERS; i++) {
		void *buf = atomic_exchange(&s->old_data[i], NULL);

		if (buf)
			return buf;
	}
	return aligned_alloc(4096, OLD_DATA_BYTES);
}

void old_data_buffer_back(struct ff_store *s, void *buf)
{
	for (unsigned i = 0; buf && i < OLD_DATA_BUFFERS; i++) {
		void *none = NULL;

		if (atomic_compare_exchange_strong(&s->old_data[i], &none, buf))
			return;
	}
	free(buf);
}

void old_data_free_buffers(struct ff_store *s)
{
	for (unsigned i = 0; i < OLD_DATA_BUFFERS; i++)
		free(atomic_exchange(&s->old_data[i], NULL));
}
