#include "guestimg.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <criterion/criterion.h>

#include "cow/io.h"
#include "cow/qsource/names.h"
#include "ff_util.h"

static uint64_t next(uint64_t *rng)
{
	*rng = *rng * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
	return *rng >> 33;
}

unsigned guestimg_number(const char *variable, unsigned otherwise)
{
	const char *value = getenv(variable);

	return value ? (unsigned)strtoul(value, NULL, 10) : otherwise;
}

void guestimg_init(struct guestimg *g)
{
	memset(g, 0, sizeof *g);
	g->own.max = 64 << 20;
	g->kept = &g->own;
	strcpy(g->dir, "/tmp/fleecefs-guest-XXXXXX");
	cr_assert(mkdtemp(g->dir) != NULL);
	g->dirfd = open(g->dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	cr_assert(g->dirfd >= 0);
}

int guestimg_run(const struct guestimg *g, const char *fmt, ...)
{
	char cmd[3000], all[3200];
	va_list ap;
	int r;

	va_start(ap, fmt);
	cr_assert_lt(vsnprintf(cmd, sizeof cmd, fmt, ap), (int)sizeof cmd);
	va_end(ap);
	snprintf(all, sizeof all, "cd %s && { %s\n} >log 2>&1 || { cat log >&2; false; }", g->dir,
	         cmd);
	r = system(all);
	return WIFEXITED(r) ? WEXITSTATUS(r) : -1;
}

void guestimg_done(struct guestimg *g)
{
	char cmd[100];

	guestimg_close(g);
	close(g->dirfd);
	snprintf(cmd, sizeof cmd, "rm -rf %s", g->dir);
	cr_assert_eq(system(cmd), 0);
}

void guestimg_raw(const struct guestimg *g, const char *name, uint64_t size, uint64_t seed)
{
	int fd = openat(g->dirfd, name, O_CREAT | O_TRUNC | O_WRONLY | O_CLOEXEC, 0600);
	ff_autofree uint8_t *buf = malloc(1 << 20);
	uint64_t rng = seed * 77 + 1, len;

	cr_assert(fd >= 0 && buf && ftruncate(fd, (off_t)size) == 0);
	for (uint64_t at = 0; at < size; at += len) {
		unsigned kind = next(&rng) % 5;

		len = (next(&rng) % 64 + 1) << (9 + next(&rng) % 6);
		len = FF_MIN(FF_MIN(len, 1u << 20), size - at);
		if (kind == 0)
			continue; /* a hole */
		memset(buf, 0, len);
		for (uint64_t i = 0; kind == 1 && i < len; i++)
			buf[i] = (uint8_t)("guest "[i % 6] + at % 7);
		for (uint64_t i = 0; kind >= 3 && i < len; i++)
			buf[i] = (uint8_t)next(&rng);
		cr_assert_eq(pwrite(fd, buf, len, (off_t)at), (ssize_t)len);
	}
	close(fd);
}

uint8_t *guestimg_load(const struct guestimg *g, const char *name, size_t *size)
{
	int fd = openat(g->dirfd, name, O_RDONLY | O_CLOEXEC);
	struct stat st;
	uint8_t *buf;

	cr_assert(fd >= 0 && fstat(fd, &st) == 0, "%s", name);
	buf = malloc((size_t)st.st_size + 1);
	cr_assert(buf && io_pread_full(fd, buf, (size_t)st.st_size, 0) == 0);
	close(fd);
	*size = (size_t)st.st_size;
	return buf;
}

void guestimg_put(const struct guestimg *g, const char *name, uint64_t off, uint64_t v)
{
	int fd = openat(g->dirfd, name, O_RDWR | O_CLOEXEC);
	uint8_t b[8];

	ff_put_be64(b, v);
	cr_assert(fd >= 0 && pwrite(fd, b, 8, (off_t)off) == 8);
	close(fd);
}

/* --- bytes of a file --- */

static int file_read(const struct qs_bytes *b, void *buf, size_t len, uint64_t off)
{
	struct guest_file *f = FF_CONTAINER(b, struct guest_file, bytes);

	if (len == 0 || off > b->size || len > b->size - off)
		f->reads_bad++;
	return io_pread_full(f->fd, buf, len, off);
}

static int file_seek(const struct qs_bytes *b, uint64_t off, int whence, uint64_t *out)
{
	struct guest_file *f = FF_CONTAINER(b, struct guest_file, bytes);

	if (off >= b->size)
		f->reads_bad++;
	return io_seek(f->fd, off, whence, out);
}

static struct qs_bytes *add_file(struct guestimg *g, const char *name)
{
	struct guest_file *f = &g->file[g->files];
	struct stat st;

	cr_assert_lt(g->files, FF_ARRAY_SIZE(g->file));
	f->fd = openat(g->dirfd, name, O_RDONLY | O_CLOEXEC);
	cr_assert(f->fd >= 0 && fstat(f->fd, &st) == 0, "%s", name);
	f->bytes = (struct qs_bytes){(uint64_t)st.st_size, file_read, file_seek};
	g->files++;
	return &f->bytes;
}

static void damaged(void *ctx, unsigned layer, uint64_t off, const char *why)
{
	struct guestimg *g = ctx;

	snprintf(g->damage, sizeof g->damage, "%s", why);
}

int guestimg_open(struct guestimg *g, const char *name)
{
	const struct qs_head *head;
	struct qs_name n;
	bool raw = false;
	int r;

	cr_assert_eq(qs_disk_create(damaged, g, g->kept, &g->disk), 0);
	for (;;) {
		const struct qs_bytes *file = add_file(g, name);

		r = raw ? qs_disk_add_raw(g->disk, file, g->why)
		        : qs_disk_add_image(g->disk, file, &head, g->why);
		if (!r && !raw && head->external) {
			r = qs_name_decode(head->data_file, &n, g->why);
			if (!r)
				qs_disk_set_data(g->disk, add_file(g, n.path));
		}
		if (r || raw || !head->backing[0])
			break;
		r = qs_name_decode(head->backing, &n, g->why);
		if (r)
			break;
		name = n.path;
		raw = strcmp(n.format[0] ? n.format : head->format, "raw") == 0;
	}
	return r ? r : qs_disk_complete(g->disk);
}

void guestimg_close(struct guestimg *g)
{
	for (unsigned i = 0; i < g->files; i++) {
		cr_assert_eq(g->file[i].reads_bad, 0);
		close(g->file[i].fd);
	}
	g->files = 0;
	qs_disk_destroy(g->disk);
	g->disk = NULL;
}

/* --- comparing --- */

static void read_same(struct guestimg *g, const uint8_t *want, size_t off, size_t len, uint8_t *buf)
{
	memset(buf, 0xa5, len);
	cr_assert_eq(qs_disk_read(g->disk, buf, len, off), 0, "%zu bytes at %zu: %s", len, off,
	             g->damage);
	if (memcmp(buf, want + off, len) == 0)
		return;
	for (size_t i = 0; i < len; i++)
		cr_assert_eq(buf[i], want[off + i], "%zu bytes at %zu: byte %zu is %02x, not %02x",
		             len, off, off + i, buf[i], want[off + i]);
}

static void extents_same(struct guestimg *g, const uint8_t *want, size_t size, uint64_t *data)
{
	*data = 0;
	for (uint64_t off = 0, len; off < size; off += len) {
		bool is_data;

		cr_assert_eq(qs_disk_extent(g->disk, off, size - off, &is_data, &len), 0);
		cr_assert(len > 0 && len <= size - off);
		if (is_data)
			*data += len;
		for (uint64_t i = 0; !is_data && i < len; i++)
			cr_assert_eq(want[off + i], 0, "hole at %llu", (unsigned long long)off);
	}
}

void guestimg_compare(struct guestimg *g, const uint8_t *want, size_t size, uint64_t *data)
{
	static const size_t steps[] = {1 << 20, 65536, 10000, 4096};
	ff_autofree uint8_t *buf = malloc(1 << 20);
	uint64_t rng = size;

	cr_assert_eq(qs_disk_size(g->disk), size);
	for (size_t s = 0; s < FF_ARRAY_SIZE(steps); s++)
		for (size_t off = 0; off < size; off += steps[s])
			read_same(g, want, off, FF_MIN(steps[s], size - off), buf);
	for (int i = 0; i < 300 && size > 0; i++) {
		size_t off = next(&rng) % size, len = next(&rng) % 9000 + 1;

		read_same(g, want, off, FF_MIN(len, size - off), buf);
	}
	extents_same(g, want, size, data);
}
