/*
 * Comparing bytes: reads of any shape, whole files, and what SEEK_DATA and SEEK_HOLE tell.
 */
#include "model.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <sys/xattr.h>
#include <unistd.h>

static void differs(struct model *m, const struct content *c, uint64_t off, const uint8_t *got,
                    uint64_t at, const char *what)
{
	uint8_t want;

	content_read(c, at, &want, 1);
	fail(m, "%s: byte %llu (cluster %llu + %llu) of %llu is %02x, want %02x (read from %llu)",
	     what, (unsigned long long)at, (unsigned long long)(at / m->cluster),
	     (unsigned long long)(at % m->cluster), (unsigned long long)c->size, got[at - off],
	     want, (unsigned long long)off);
}

static void read_range(struct model *m, int fd, const struct content *c, uint64_t off, uint64_t len,
                       const char *what)
{
	uint64_t done = 0, want = off >= c->size ? 0 : c->size - off;
	int64_t at;
	ssize_t n;

	if (want > len)
		want = len;
	while (done < len) {
		n = pread(fd, m->buf2 + done, len - done, (off_t)(off + done));
		/* a part of what was asked for was given up: piece by piece, then */
		if (n < 0 && errno == EIO && m->eio_ok && done == 0) {
			if (len > 4096)
				for (uint64_t i = 0; i < len; i += 4096)
					read_range(m, fd, c, off + i,
					           len - i < 4096 ? len - i : 4096, what);
			return;
		}
		if (n < 0 && errno == EIO && m->eio_ok) {
			want = done;
			break;
		}
		if (n < 0)
			fail(m, "%s: read %llu+%llu: %s", what, (unsigned long long)off,
			     (unsigned long long)len, strerror(errno));
		if (n == 0)
			break;
		done += (uint64_t)n;
	}
	if (done != want)
		fail(m, "%s: read %llu+%llu gave %llu bytes, want %llu", what,
		     (unsigned long long)off, (unsigned long long)len, (unsigned long long)done,
		     (unsigned long long)want);
	at = content_diff(c, off, m->buf2, done);
	if (at >= 0)
		differs(m, c, off, m->buf2, (uint64_t)at, what);
	m->bytes_read += done;
}

static void mmap_range(struct model *m, int fd, const struct content *c, uint64_t off, uint64_t len,
                       const char *what)
{
	struct iovec from, to = {.iov_base = m->buf2};
	uint64_t skip = off % 4096;
	int64_t at;
	uint8_t *p;

	if (off >= c->size)
		return;
	if (len > c->size - off)
		len = c->size - off;
	from.iov_len = to.iov_len = len;
	p = mmap(NULL, len + skip, PROT_READ, MAP_SHARED, fd, (off_t)(off - skip));
	if (p == MAP_FAILED) {
		if (errno != ENODEV)
			fail(m, "%s: mmap: %s", what, strerror(errno));
		m->no_mmap++;
		return;
	}
	if (m->eio_ok) {
		munmap(p, len + skip);
		return;
	}
	/* By a system call, which says EFAULT where touching the page would end us by SIGBUS. */
	from.iov_base = p + skip;
	if (process_vm_readv(getpid(), &to, 1, &from, 1, 0) != (ssize_t)len)
		fail(m, "%s: mmap read %llu+%llu: %s", what, (unsigned long long)off,
		     (unsigned long long)len, strerror(errno));
	at = content_diff(c, off, m->buf2, len);
	if (at >= 0)
		differs(m, c, off, m->buf2, (uint64_t)at, what);
	munmap(p, len + skip);
	m->bytes_read += len;
}

void check_range(struct model *m, int fd, enum how how, const struct content *c, uint64_t off,
                 uint64_t len, const char *what)
{
	if (how == BY_MMAP)
		mmap_range(m, fd, c, off, len, what);
	else
		read_range(m, fd, c, off, len, what);
}

/* Where data begins at or after OFF, or the size where there is none. */
static uint64_t seek_to(struct model *m, int fd, int whence, uint64_t off, uint64_t size,
                        const char *what)
{
	off_t r = lseek(fd, (off_t)off, whence);

	if (r < 0 && errno == ENXIO && whence == SEEK_DATA)
		return size;
	if (r < 0)
		fail(m, "%s: lseek %llu whence %d: %s", what, (unsigned long long)off, whence,
		     strerror(errno));
	if ((uint64_t)r < off || (uint64_t)r > size)
		fail(m, "%s: lseek %llu whence %d gave %lld of %llu", what, (unsigned long long)off,
		     whence, (long long)r, (unsigned long long)size);
	return (uint64_t)r;
}

/* A hole must read as zeros, and data and holes must take turns. READ: read what is said to be
 * data, up to some amount. */
static void check_holes(struct model *m, int fd, const struct content *c, bool read,
                        const char *what)
{
	uint64_t off = 0, data, hole, bad, left = 64u << 20, n;

	if (lseek(fd, (off_t)c->size, SEEK_DATA) >= 0 || errno != ENXIO)
		fail(m, "%s: SEEK_DATA at the end is not ENXIO", what);
	while (off < c->size) {
		data = seek_to(m, fd, SEEK_DATA, off, c->size, what);
		bad = content_next_nonzero(c, off, data);
		if (bad < data)
			fail(m, "%s: byte %llu is not zero, but SEEK_DATA from %llu went to %llu",
			     what, (unsigned long long)bad, (unsigned long long)off,
			     (unsigned long long)data);
		if (data >= c->size)
			break;
		hole = seek_to(m, fd, SEEK_HOLE, data, c->size, what);
		if (hole == data)
			fail(m, "%s: both data and hole at %llu", what, (unsigned long long)data);
		for (off = data; read && off < hole && left; off += n, left -= n) {
			n = hole - off < 1u << 20 ? hole - off : 1u << 20;
			n = n < left ? n : left;
			check_range(m, fd, BY_READ, c, off, n, what);
		}
		off = hole;
	}
}

/* From a place within. Between two looks the filesystem of SOURCE may write back, and may then find
 * data where it had a hole (ext4 zeroes what is around a small write): only what stays is wrong. */
static void check_seek_at(struct model *m, int fd, const struct content *c, const char *what)
{
	uint64_t off, data = 0, hole = 0, bad;

	if (!c->size)
		return;
	off = rng_below(&m->rng, c->size);
	for (int i = 0; i < 5; i++) {
		data = seek_to(m, fd, SEEK_DATA, off, c->size, what);
		bad = content_next_nonzero(c, off, data);
		if (bad < data)
			fail(m, "%s: byte %llu is not zero, but SEEK_DATA from %llu went to %llu",
			     what, (unsigned long long)bad, (unsigned long long)off,
			     (unsigned long long)data);
		hole = seek_to(m, fd, SEEK_HOLE, off, c->size, what);
		if (data == off || hole == off)
			return;
	}
	fail(m, "%s: %llu is in a hole for SEEK_DATA (%llu), not for SEEK_HOLE (%llu)", what,
	     (unsigned long long)off, (unsigned long long)data, (unsigned long long)hole);
}

static void check_stat(struct model *m, int fd, const struct content *c, const char *what)
{
	struct stat st;

	if (fstat(fd, &st) < 0)
		fail(m, "%s: fstat: %s", what, strerror(errno));
	if ((uint64_t)st.st_size != c->size)
		fail(m, "%s: size %lld, want %llu", what, (long long)st.st_size,
		     (unsigned long long)c->size);
	/* Backup tools take a file without blocks for one hole. */
	if (st.st_blocks == 0 && content_next_nonzero(c, 0, c->size) < c->size)
		fail(m, "%s: st_blocks is 0, but there is data", what);
}

static void read_whole(struct model *m, int fd, const struct content *c, const char *what)
{
	static const uint32_t sizes[] = {512,    4096,       10240,          65536,
	                                 131072, (1u << 20), (1u << 20) + 3, 3u << 20};
	uint64_t off, n = sizes[rng_below(&m->rng, 8)];

	if (n < 65536 && c->size > 200000)
		n = 65536;
	for (off = 0; off < c->size; off += n)
		check_range(m, fd, BY_READ, c, off, n, what);
	check_range(m, fd, BY_READ, c, c->size, 1, what);
}

/* The blocks that hold something, with a margin. */
static void read_big(struct model *m, int fd, const struct content *c, const char *what)
{
	for (size_t i = 0; i < c->count; i++) {
		uint64_t off = (uint64_t)i * CONTENT_BLOCK;

		if (content_has_block(c, i))
			check_range(m, fd, BY_READ, c, off > 5000 ? off - 5000 : 0,
			            CONTENT_BLOCK + 10000, what);
	}
	for (int i = 0; i < 4 && c->size; i++)
		check_range(m, fd, BY_READ, c, rng_below(&m->rng, c->size), 70000, what);
}

void check_file(struct model *m, const char *path, const struct content *c, const char *what)
{
	char name[PATH_LEN + 64];
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	bool big = c->size > 64u << 20;

	snprintf(name, sizeof name, "%s %s", what, path);
	if (fd < 0)
		fail(m, "%s: open: %s", name, strerror(errno));
	/* Otherwise the kernel's page cache would answer for the daemon. */
	if (rng_one_in(&m->rng, 2))
		posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
	check_stat(m, fd, c, name);
	if (big)
		read_big(m, fd, c, name);
	else
		read_whole(m, fd, c, name);
	check_holes(m, fd, c, big, name);
	if (close(fd) < 0)
		fail(m, "%s: close: %s", name, strerror(errno));
}

void check_given_up(struct model *m, const char *path)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);

	if (fd >= 0 || errno != EIO)
		fail(m, "%s is a checkpoint's: open: %s, want EIO", path,
		     fd < 0 ? strerror(errno) : "it could be opened");
}

bool is_given_up(struct model *m, const struct snap *s)
{
	char path[PATH_LEN], state[32];
	ssize_t n;

	snap_path(m, s->name, path);
	n = getxattr(path, "user.fleecefs.state", state, sizeof state - 1);
	if (n < 0)
		fail(m, "%s: state: %s", path, strerror(errno));
	state[n] = 0;
	if (strcmp(state, "ok") != 0 && strcmp(state, "checkpoint") != 0)
		fail(m, "%s: it is %s", path, state);
	return strcmp(state, "checkpoint") == 0;
}

static void check_one(struct model *m, struct inode *root, const char *base, bool frozen)
{
	struct inode *dir;
	struct ent *e;
	char path[PATH_LEN];
	enum how how = (enum how)rng_below(&m->rng, 3);
	uint64_t off, len;
	int fd;

	if (!tree_pick(m, root, I_REG, &dir, &e))
		return;
	path_of(base, dir, e->name, path);
	fd = open(path, O_RDONLY | O_CLOEXEC | (how == BY_DIRECT ? O_DIRECT : 0));
	if (fd < 0)
		fail(m, "open %s: %s", path, strerror(errno));
	pick_range(m, e->ino, e->ino->data.size + 5000, 1u << 20, &off, &len);
	/* What the file system below wants; frozen files take anything. */
	if (!frozen && how == BY_DIRECT) {
		off -= off % 4096;
		len = (len + 4095) / 4096 * 4096;
	}
	if (frozen && how != BY_DIRECT && rng_one_in(&m->rng, 2))
		posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
	check_range(m, fd, how, &e->ino->data, off, len, path);
	if (rng_one_in(&m->rng, 2))
		check_seek_at(m, fd, &e->ino->data, path);
	close(fd);
}

/* A file held open, live (perhaps without a name) or frozen. */
static void check_held(struct model *m, struct open_file *f, bool frozen)
{
	uint64_t off, len;
	struct stat st;

	if (f->fd < 0)
		return;
	pick_range(m, f->ino, f->ino->data.size + 100, 1u << 18, &off, &len);
	check_range(m, f->fd, BY_READ, &f->ino->data, off, len, "a file held open");
	if (fstat(f->fd, &st) < 0)
		fail(m, "fd %d: fstat: %s", f->fd, strerror(errno));
	if ((uint64_t)st.st_size != f->ino->data.size)
		fail(m, "fd %d: size %lld, want %llu", f->fd, (long long)st.st_size,
		     (unsigned long long)f->ino->data.size);
	if (st.st_nlink != f->ino->nlink)
		fail(m, "fd %d%s: %lu links, want %u", f->fd, frozen ? " (frozen)" : "",
		     (unsigned long)st.st_nlink, f->ino->nlink);
}

void check_somewhere(struct model *m)
{
	char base[PATH_LEN];
	struct snap *s;

	switch (rng_below(&m->rng, 6)) {
	case 0:
		check_one(m, m->root, m->live, false);
		break;
	case 1:
		check_held(m, &m->fds[rng_below(&m->rng, MAX_FDS)], false);
		break;
	case 2:
		check_held(m, &m->frozen[rng_below(&m->rng, MAX_FROZEN)], true);
		break;
	default:
		if (!m->nsnaps)
			return;
		s = m->snaps[rng_below(&m->rng, m->nsnaps)];
		snap_path(m, s->name, base);
		m->eio_ok = s->consumed;
		if (!s->given_up)
			check_one(m, s->root, base, true);
		m->eio_ok = false;
	}
}
