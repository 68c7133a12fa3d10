/*
 * Operations on the bytes of live files. Each opens a file by one of its names, or uses a
 * descriptor held open, whose file may have no name any more.
 */
#include "model.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

struct target {
	struct inode *ino;
	int fd;
	bool own; /* close it after use */
	char name[NAME_LEN + 8];
};

static bool pick_held(struct model *m, struct target *t)
{
	unsigned start = (unsigned)rng_below(&m->rng, MAX_FDS);

	for (unsigned i = 0; i < MAX_FDS; i++) {
		struct open_file *f = &m->fds[(start + i) % MAX_FDS];

		if (f->fd < 0)
			continue;
		t->ino = f->ino;
		t->fd = f->fd;
		t->own = false;
		snprintf(t->name, sizeof t->name, "fd %d%s", f->fd,
		         f->ino->nlink ? "" : " (unlinked)");
		return true;
	}
	return false;
}

/* Some file, open with FLAGS; without special flags perhaps one that was open before. */
static bool target_get(struct model *m, int flags, struct target *t)
{
	struct inode *dir;
	struct ent *e;
	char path[PATH_LEN];

	if (flags == O_RDWR && rng_one_in(&m->rng, 3) && pick_held(m, t))
		return true;
	if (!tree_pick(m, m->root, I_REG, &dir, &e))
		return false;
	path_of(m->live, dir, e->name, path);
	t->ino = e->ino;
	t->own = true;
	snprintf(t->name, sizeof t->name, "%s", e->name);
	t->fd = open(path, flags | O_CLOEXEC);
	if (t->fd < 0)
		fail(m, "open %s with flags %#x: %s", path, (unsigned)flags, strerror(errno));
	return true;
}

static void target_put(struct model *m, struct target *t)
{
	if (t->own && close(t->fd) < 0)
		fail(m, "close %s: %s", t->name, strerror(errno));
}

static uint64_t limit_of(const struct model *m, const struct inode *ino)
{
	return ino->big ? m->big_max : m->file_max;
}

static uint64_t pick_len(struct model *m, uint64_t max_len)
{
	uint64_t n = (uint64_t)1 << rng_below(&m->rng, 21);

	switch (rng_below(&m->rng, 4)) {
	case 0:
		n = m->cluster * (1 + rng_below(&m->rng, 3)) + rng_below(&m->rng, 3) - 1;
		break;
	case 1:
		n = 512 * (1 + rng_below(&m->rng, 64));
		break;
	default:
		n += rng_below(&m->rng, n);
	}
	return n < max_len ? n : max_len;
}

static uint64_t pick_off(struct model *m, const struct inode *ino, uint64_t limit)
{
	static const int near[] = {-4096, -513, -512, -511, -1, 0, 0, 0, 1, 511, 512, 513, 4096};
	uint64_t off;

	if (ino->big)
		off = rng_below(&m->rng, 20) * (limit / 20) + rng_below(&m->rng, 65536);
	else
		off = rng_below(&m->rng, limit);
	if (rng_one_in(&m->rng, 2)) {
		off -= off % m->cluster;
		off += (uint64_t)(int64_t)near[rng_below(&m->rng, sizeof near / sizeof near[0])];
		if ((int64_t)off < 0)
			off = 0;
	} else if (rng_one_in(&m->rng, 3)) {
		off -= off % 512;
	}
	return off < limit ? off : limit - 1;
}

void pick_range(struct model *m, const struct inode *ino, uint64_t limit, uint64_t max_len,
                uint64_t *off, uint64_t *len)
{
	*off = pick_off(m, ino, limit);
	*len = pick_len(m, max_len);
	if (*len > limit - *off)
		*len = limit - *off;
}

static void write_all(struct model *m, struct target *t, const uint8_t *buf, uint64_t len,
                      uint64_t off)
{
	ssize_t n;
	uint64_t done;

	for (done = 0; done < len; done += (uint64_t)n) {
		n = pwrite(t->fd, buf + done, len - done, (off_t)(off + done));
		if (n <= 0)
			fail(m, "write %s %llu+%llu: %s", t->name, (unsigned long long)off,
			     (unsigned long long)len, n ? strerror(errno) : "nothing written");
	}
	content_write(&t->ino->data, off, buf, len);
}

static uint64_t write_max(const struct inode *ino)
{
	return ino->big ? 65536 : 1u << 20;
}

static void fill(struct model *m, uint64_t len)
{
	rng_fill(&m->rng, m->buf, len);
	/* Now and then with zeros inside. */
	if (rng_one_in(&m->rng, 4)) {
		uint64_t a = rng_below(&m->rng, len), b = rng_below(&m->rng, len - a) + 1;

		memset(m->buf + a, 0, b);
	}
}

enum source_of_bytes { NEW, SAME, ZEROS };

static bool do_write(struct model *m, enum source_of_bytes from)
{
	struct target t;
	uint64_t off, len;

	if (!target_get(m, O_RDWR, &t))
		return false;
	pick_range(m, t.ino, limit_of(m, t.ino), write_max(t.ino), &off, &len);
	if (from == SAME)
		content_read(&t.ino->data, off, m->buf, len);
	else if (from == ZEROS)
		memset(m->buf, 0, len);
	else
		fill(m, len);
	note(m, "write %s %llu+%llu kind %d", t.name, (unsigned long long)off,
	     (unsigned long long)len, (int)from);
	write_all(m, &t, m->buf, len, off);
	target_put(m, &t);
	return true;
}

bool op_write(struct model *m)
{
	return do_write(m, NEW);
}

bool op_write_same(struct model *m)
{
	return do_write(m, SAME);
}

bool op_write_zeros(struct model *m)
{
	return do_write(m, ZEROS);
}

bool op_write_direct(struct model *m)
{
	struct target t;
	uint64_t off, len;

	if (!target_get(m, O_RDWR | O_DIRECT, &t))
		return false;
	pick_range(m, t.ino, limit_of(m, t.ino) - 4096, write_max(t.ino), &off, &len);
	off -= off % 4096;
	len = (len + 4095) / 4096 * 4096;
	fill(m, len);
	note(m, "direct write %s %llu+%llu", t.name, (unsigned long long)off,
	     (unsigned long long)len);
	write_all(m, &t, m->buf, len, off);
	target_put(m, &t);
	return true;
}

bool op_append(struct model *m)
{
	struct target t;
	uint64_t len, size;
	ssize_t n;

	if (!target_get(m, O_WRONLY | O_APPEND, &t))
		return false;
	size = t.ino->data.size;
	len = pick_len(m, 1u << 17);
	if (size + len > limit_of(m, t.ino)) {
		target_put(m, &t);
		return false;
	}
	fill(m, len);
	note(m, "append %s %llu at %llu", t.name, (unsigned long long)len,
	     (unsigned long long)size);
	n = write(t.fd, m->buf, len);
	if (n != (ssize_t)len)
		fail(m, "append to %s: %s", t.name, n < 0 ? strerror(errno) : "short");
	content_write(&t.ino->data, size, m->buf, len);
	target_put(m, &t);
	return true;
}

bool op_open_trunc(struct model *m)
{
	struct target t;

	if (!target_get(m, O_WRONLY | O_TRUNC, &t))
		return false;
	note(m, "open with O_TRUNC %s of %llu bytes", t.name, (unsigned long long)t.ino->data.size);
	content_resize(&t.ino->data, 0);
	if (rng_one_in(&m->rng, 2)) {
		uint64_t len = pick_len(m, write_max(t.ino));

		fill(m, len);
		write_all(m, &t, m->buf, len, 0);
	}
	target_put(m, &t);
	return true;
}

bool op_truncate(struct model *m)
{
	struct target t;
	uint64_t size, limit;

	if (!target_get(m, O_RDWR, &t))
		return false;
	limit = limit_of(m, t.ino);
	size = t.ino->data.size;
	switch (rng_below(&m->rng, t.ino->big ? 3 : 6)) {
	case 0:
		size = pick_off(m, t.ino, limit);
		break;
	case 1:
		size += pick_len(m, m->cluster * 2);
		break;
	case 2:
		size -= size < m->cluster * 2 ? size : pick_len(m, m->cluster * 2);
		break;
	case 3:
		size = 0;
		break;
	default:
		size = size ? rng_below(&m->rng, size) : 1;
	}
	if (size > limit)
		size = limit;
	note(m, "truncate %s from %llu to %llu", t.name, (unsigned long long)t.ino->data.size,
	     (unsigned long long)size);
	if (ftruncate(t.fd, (off_t)size) < 0)
		fail(m, "truncate %s: %s", t.name, strerror(errno));
	content_resize(&t.ino->data, size);
	target_put(m, &t);
	return true;
}

static bool do_fallocate(struct model *m, int mode, uint64_t max_len)
{
	struct target t;
	uint64_t off, len;

	if (!target_get(m, O_RDWR, &t))
		return false;
	if (t.ino->big && !(mode & FALLOC_FL_PUNCH_HOLE))
		max_len = 65536;
	pick_range(m, t.ino, limit_of(m, t.ino), max_len, &off, &len);
	if (t.ino->big && (mode & FALLOC_FL_PUNCH_HOLE) && rng_one_in(&m->rng, 4))
		len = rng_below(&m->rng, limit_of(m, t.ino) - off) + 1;
	note(m, "fallocate %s mode %d %llu+%llu", t.name, mode, (unsigned long long)off,
	     (unsigned long long)len);
	if (fallocate(t.fd, mode, (off_t)off, (off_t)len) < 0) {
		if (errno != EOPNOTSUPP)
			fail(m, "fallocate %s mode %d: %s", t.name, mode, strerror(errno));
		target_put(m, &t);
		return true;
	}
	if (mode & (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_ZERO_RANGE))
		content_zero(&t.ino->data, off, len);
	if (!(mode & FALLOC_FL_KEEP_SIZE) && off + len > t.ino->data.size)
		content_resize(&t.ino->data, off + len);
	target_put(m, &t);
	return true;
}

bool op_punch(struct model *m)
{
	return do_fallocate(m, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 1u << 20);
}

bool op_zero_range(struct model *m)
{
	int keep = rng_one_in(&m->rng, 2) ? FALLOC_FL_KEEP_SIZE : 0;

	return do_fallocate(m, FALLOC_FL_ZERO_RANGE | keep, 1u << 19);
}

bool op_fallocate(struct model *m)
{
	return do_fallocate(m, rng_one_in(&m->rng, 2) ? FALLOC_FL_KEEP_SIZE : 0, 1u << 19);
}

static uint64_t copy_some(struct model *m, struct target *from, struct target *to, uint64_t in,
                          uint64_t out, uint64_t len)
{
	off_t i = (off_t)in, o = (off_t)out;
	ssize_t n = copy_file_range(from->fd, &i, to->fd, &o, len, 0);

	if (n < 0)
		fail(m, "copy_file_range %s %llu to %s %llu, %llu bytes: %s", from->name,
		     (unsigned long long)in, to->name, (unsigned long long)out,
		     (unsigned long long)len, strerror(errno));
	if ((uint64_t)n > len || (n == 0 && in < from->ino->data.size))
		fail(m, "copy_file_range of %llu bytes returned %zd", (unsigned long long)len, n);
	content_read(&from->ino->data, in, m->buf2, (size_t)n);
	content_write(&to->ino->data, out, m->buf2, (size_t)n);
	return (uint64_t)n;
}

bool op_copy_range(struct model *m)
{
	struct target from, to;
	uint64_t in, out, len, n;

	if (!target_get(m, O_RDWR, &from))
		return false;
	if (!target_get(m, O_RDWR, &to)) {
		target_put(m, &from);
		return false;
	}
	pick_range(m, to.ino, limit_of(m, to.ino), 1u << 19, &out, &len);
	in = pick_off(m, from.ino, limit_of(m, from.ino));
	if (from.ino->big || to.ino->big)
		len = len < 65536 ? len : 65536;
	if (in > from.ino->data.size)
		in = from.ino->data.size / 2;
	if (len > from.ino->data.size - in)
		len = from.ino->data.size - in;
	/* Overlapping ranges of one file are an error. */
	if (from.ino == to.ino && in < out + len && out < in + len)
		len = 0;
	if (len)
		note(m, "copy_file_range %s %llu to %s %llu, %llu bytes", from.name,
		     (unsigned long long)in, to.name, (unsigned long long)out,
		     (unsigned long long)len);
	for (n = 0; n < len;)
		n += copy_some(m, &from, &to, in + n, out + n, len - n);
	target_put(m, &from);
	target_put(m, &to);
	return len > 0;
}

bool op_mmap_write(struct model *m)
{
	struct target t;
	uint64_t off, len, skip;
	uint8_t *p;

	if (!target_get(m, O_RDWR, &t))
		return false;
	if (t.ino->data.size == 0) {
		target_put(m, &t);
		return false;
	}
	pick_range(m, t.ino, t.ino->data.size, 1u << 18, &off, &len);
	skip = off % 4096;
	note(m, "mmap write %s %llu+%llu", t.name, (unsigned long long)off,
	     (unsigned long long)len);
	p = mmap(NULL, len + skip, PROT_READ | PROT_WRITE, MAP_SHARED, t.fd, (off_t)(off - skip));
	if (p == MAP_FAILED) {
		if (errno != ENODEV)
			fail(m, "mmap %s: %s", t.name, strerror(errno));
		m->no_mmap++;
		target_put(m, &t);
		return true;
	}
	fill(m, len);
	memcpy(p + skip, m->buf, len);
	if (msync(p, len + skip, MS_SYNC) < 0)
		fail(m, "msync %s: %s", t.name, strerror(errno));
	if (munmap(p, len + skip) < 0)
		fail(m, "munmap %s: %s", t.name, strerror(errno));
	content_write(&t.ino->data, off, m->buf, len);
	target_put(m, &t);
	return true;
}

bool op_fsync(struct model *m)
{
	struct target t;
	bool data = rng_one_in(&m->rng, 2);

	if (!target_get(m, O_RDWR, &t))
		return false;
	note(m, "%s %s", data ? "fdatasync" : "fsync", t.name);
	if ((data ? fdatasync(t.fd) : fsync(t.fd)) < 0)
		fail(m, "fsync %s: %s", t.name, strerror(errno));
	target_put(m, &t);
	return true;
}

bool op_open(struct model *m)
{
	struct target t;

	for (unsigned i = 0; i < MAX_FDS; i++) {
		if (m->fds[i].fd >= 0)
			continue;
		if (!target_get(m, O_RDWR | O_NOATIME, &t))
			return false;
		note(m, "open %s as fd %d", t.name, t.fd);
		m->fds[i].fd = t.fd;
		m->fds[i].ino = t.ino;
		t.ino->refs++;
		return true;
	}
	return false;
}

static void close_held(struct model *m, struct open_file *f)
{
	if (close(f->fd) < 0)
		fail(m, "close fd %d: %s", f->fd, strerror(errno));
	f->fd = -1;
	inode_put(f->ino);
}

bool op_close(struct model *m)
{
	struct open_file *f = &m->fds[rng_below(&m->rng, MAX_FDS)];

	if (f->fd < 0)
		return false;
	note(m, "close fd %d", f->fd);
	close_held(m, f);
	return true;
}

void close_all(struct model *m)
{
	for (unsigned i = 0; i < MAX_FDS; i++)
		if (m->fds[i].fd >= 0)
			close_held(m, &m->fds[i]);
}
