/*
 * Changes of a block device through the live file: what a file would do and a device does not.
 *
 * Its size is fixed: a write beyond the end is ENOSPC, one that reaches over it is cut there, and
 * to truncate to anything but the present size is EPERM.
 *
 * Zeros: fallocate(2) of a device wants whole blocks, which a guest's request need not be, and may
 * end up writing every zero, which takes its time. So a range is made of its ragged ends, which are
 * written, and of pieces short enough for a freeze, which waits for one, and not for the whole.
 * A view may so hold a part of a request that has not returned, as with any large write.
 *
 * Those calls use the claiming descriptor: the kernel throws dirty pages of the range away for the
 * one who holds the device, and for everybody else fails if there are any. That is safe, for the
 * zeros come after what these pages hold.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>

#include "cow/device.h"
#include "cow/io.h"
#include "ff_util.h"

enum { PIECE = 32 << 20 };

/* A piece that is not whole blocks. */
static int write_zeros(struct ff_disk *d, int fd, uint64_t off, uint64_t len)
{
	ff_autofree void *zeros = calloc(1, len);
	struct ff_change c = {
	    .kind = FF_WRITE, .fd = fd, .off = (off_t)off, .len = len, .buf = zeros};
	size_t done;
	int r = zeros ? preserve_change(d, &c, &done) : -ENOMEM;

	return r ? r : done == len ? 0 : -EIO;
}

/* Zeros [off, end) of the device. */
static int make_zeros(struct ff_disk *d, struct device *dev, int mode, uint64_t off, uint64_t end)
{
	int fd = device_claim_fd(dev), r = 0;
	unsigned block = 0;
	size_t done;

	if (fd < 0)
		return -EIO;
	r = device_block_size(fd, &block);
	while (!r && off < end) {
		uint64_t ragged = FF_MIN(ff_round_up(off, block), end) - off;
		uint64_t whole = FF_MIN(end - off, PIECE) / block * block;

		if (!ragged && !whole)
			ragged = end - off;
		if (ragged) {
			r = write_zeros(d, fd, off, ragged);
			off += ragged;
		} else {
			struct ff_change c = {.kind = FF_FALLOCATE,
			                      .fd = fd,
			                      .off = (off_t)off,
			                      .len = whole,
			                      .mode = mode};

			r = preserve_change(d, &c, &done);
			off += whole;
		}
	}
	return r;
}

static int change_zeros(struct ff_disk *d, struct device *dev, const struct ff_change *c,
                        uint64_t size)
{
	uint64_t off = (uint64_t)c->off, end = off + c->len;

	if (c->mode & FALLOC_FL_PUNCH_HOLE && !(c->mode & FALLOC_FL_KEEP_SIZE))
		return -EOPNOTSUPP;
	if (end > size && !(c->mode & FALLOC_FL_KEEP_SIZE))
		return -ENOSPC;
	/* A device has all its space: to allocate some is to do nothing. */
	if (!(c->mode & (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_ZERO_RANGE)))
		return end > size ? -ENOSPC : 0;
	return make_zeros(d, dev, c->mode | FALLOC_FL_KEEP_SIZE, off, FF_MIN(end, size));
}

int device_zero(int claim_fd, int mode, uint64_t off, uint64_t len)
{
	int r = io_fallocate(claim_fd, mode, off, len);

	/* A device that cannot throw away can be written. */
	if (r == -EOPNOTSUPP && mode & FALLOC_FL_PUNCH_HOLE)
		r = io_fallocate(claim_fd, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, off, len);
	return r;
}

int device_change(struct ff_disk *d, const struct ff_change *c, size_t *done)
{
	struct device *dev = disk_device(d);
	struct ff_change cut = *c;
	uint64_t size;
	int r = dev ? device_size(dev, &size) : -EIO;

	*done = 0;
	if (r)
		return guest_error(r);
	switch (c->kind) {
	case FF_TRUNCATE:
		return (uint64_t)c->off == size ? 0 : -EPERM;
	case FF_FALLOCATE:
		return change_zeros(d, dev, c, size);
	case FF_COPY:
		return -EOPNOTSUPP; /* the kernel copies between files only */
	case FF_WRITE:
		break;
	}
	if (c->len == 0)
		return 0;
	if (c->append || (uint64_t)c->off >= size)
		return -ENOSPC;
	cut.len = FF_MIN(c->len, size - (uint64_t)c->off);
	return preserve_change(d, &cut, done);
}
