#include "fixture.h"

#include <criterion/criterion.h>
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "ff_log.h"
#include "ff_util.h"

void fill(char *buf, size_t len, unsigned seed)
{
	uint64_t x = seed * UINT64_C(0x9e3779b97f4a7c15) + 1;

	for (size_t i = 0; i < len; i++) {
		x = x * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
		buf[i] = (char)(x >> 56);
	}
}

/* Put by the linker in the place of those of cow/io.h. Nothing here tells what storage would keep
 * after a loss of power (tests/faults does): to wait for it would take most of the time. */
int __wrap_io_fsync(int fd);
int __wrap_io_syncfs(int fd);

int __wrap_io_fsync(int fd)
{
	return fcntl(fd, F_GETFD) < 0 ? -errno : 0;
}

int __wrap_io_syncfs(int fd)
{
	return fcntl(fd, F_GETFD) < 0 ? -errno : 0;
}

void fixture_init(struct fixture *fx, uint32_t cluster_size)
{
	memset(fx, 0, sizeof *fx);
	strcpy(fx->root, "/var/tmp/fleecefs-unit-XXXXXX");
	cr_assert(mkdtemp(fx->root) != NULL);
	snprintf(fx->source, sizeof fx->source, "%s/source", fx->root);
	snprintf(fx->fleece, sizeof fx->fleece, "%s/fleece", fx->root);
	cr_assert_eq(mkdir(fx->source, 0755), 0);
	fx->source_fd = open(fx->source, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	cr_assert_geq(fx->source_fd, 0);
	fx->config = (struct ff_store_config){
	    .source_fd = fx->source_fd,
	    .source_path = fx->source,
	    .fleece_path = fx->fleece,
	    .cluster_size = cluster_size,
	};
	ff_log_threshold(FF_LOG_ERROR);
}

void fixture_open(struct fixture *fx)
{
	int r = ff_store_open(&fx->config, &fx->store);

	cr_assert_eq(r, 0, "ff_store_open: %s", strerror(-r));
}

void fixture_close(struct fixture *fx)
{
	int r = ff_store_close(fx->store);

	fx->store = NULL;
	cr_assert_eq(r, 0, "ff_store_close: %s", strerror(-r));
}

static int remove_one(const char *path, const struct stat *st, int type, struct FTW *ftw)
{
	return remove(path);
}

void fixture_done(struct fixture *fx)
{
	if (fx->store)
		fixture_close(fx);
	close(fx->source_fd);
	nftw(fx->root, remove_one, 16, FTW_DEPTH | FTW_PHYS);
}

void fixture_file(struct fixture *fx, const char *name, size_t size, unsigned seed)
{
	char *buf = malloc(size + 1);
	int fd = openat(fx->source_fd, name, O_CREAT | O_TRUNC | O_WRONLY, 0640);

	cr_assert(buf && fd >= 0);
	fill(buf, size, seed);
	cr_assert_eq(write(fd, buf, size), (ssize_t)size);
	close(fd);
	free(buf);
}

int live_open(struct fixture *fx, const char *name, struct ff_disk **disk)
{
	int fd = openat(fx->source_fd, name, O_RDWR | O_CLOEXEC);

	cr_assert_geq(fd, 0);
	cr_assert_eq(ff_disk_get(fx->store, fd, disk), 0);
	return fd;
}

int live_write(struct ff_disk *d, int fd, const void *buf, size_t len, off_t off)
{
	struct ff_change c = {.kind = FF_WRITE, .fd = fd, .off = off, .len = len, .buf = buf};
	size_t done = 0;
	int r = ff_disk_change(d, &c, &done);

	return r ? r : done == len ? 0 : -EIO;
}

static int find(struct fixture *fx, const char *snapshot, const char *name, struct ff_snap **snap,
                const struct ff_frozen **f)
{
	int r = ff_snap_get(fx->store, snapshot, snap);

	if (r)
		return r;
	r = ff_frozen_lookup(*snap, ff_snap_root(*snap), name, f);
	if (r)
		ff_snap_put(*snap);
	return r;
}

static void expect_reads(struct ff_reader *rd, const char *want, size_t len, size_t step)
{
	char *buf = malloc(step);
	size_t got;

	for (size_t at = 0; at < len; at += step) {
		int r = ff_reader_read(rd, buf, step, (off_t)at, &got);

		cr_assert_eq(r, 0, "read at %zu: %s", at, strerror(-r));
		cr_assert_eq(got, FF_MIN(step, len - at));
		if (memcmp(buf, want + at, got) == 0)
			continue;
		for (size_t i = 0; i < got; i++)
			cr_assert_eq(buf[i], want[at + i], "wrong byte at %zu, reads of %zu",
			             at + i, step);
	}
	cr_assert_eq(ff_reader_read(rd, buf, step, (off_t)len, &got), 0);
	cr_assert_eq(got, 0);
	free(buf);
}

static void expect_seeks(struct ff_reader *rd, const char *want, size_t len)
{
	off_t at = 0, data, hole;

	while (at < (off_t)len) {
		int r = ff_reader_seek(rd, at, SEEK_DATA, &data);

		if (r == -ENXIO)
			data = (off_t)len;
		else
			cr_assert_eq(r, 0);
		while (at < data && want[at] == 0)
			at++;
		cr_assert_eq(at, data, "data at %jd is said to be a hole", (intmax_t)at);
		if (r == -ENXIO)
			break;
		cr_assert_eq(ff_reader_seek(rd, data, SEEK_HOLE, &hole), 0);
		cr_assert_gt(hole, data);
		at = hole;
	}
	cr_assert_eq(ff_reader_seek(rd, (off_t)len, SEEK_DATA, &data), -ENXIO);
}

void expect_frozen(struct fixture *fx, const char *snapshot, const char *name, const char *want,
                   size_t len)
{
	static const size_t steps[] = {1 << 20, 10007, 512};
	const struct ff_frozen *f;
	struct ff_reader *rd;
	struct ff_snap *snap;
	struct stat st;
	int r = find(fx, snapshot, name, &snap, &f);

	cr_assert_eq(r, 0, "%s/%s: %s", snapshot, name, strerror(-r));
	ff_frozen_stat(snap, f, &st);
	cr_assert_eq(st.st_size, (off_t)len);
	r = ff_reader_open(snap, f, &rd);
	cr_assert_eq(r, 0, "%s/%s: open: %s", snapshot, name, strerror(-r));
	for (size_t i = 0; i < FF_ARRAY_SIZE(steps); i++)
		if (len / steps[i] < 4000)
			expect_reads(rd, want, len, steps[i]);
	expect_seeks(rd, want, len);
	ff_reader_close(rd);
	ff_snap_put(snap);
}

int frozen_error(struct fixture *fx, const char *snapshot, const char *name)
{
	const struct ff_frozen *f;
	struct ff_reader *rd;
	struct ff_snap *snap;
	struct stat st;
	char buf[4096];
	size_t got;
	int r = find(fx, snapshot, name, &snap, &f);

	if (r)
		return r;
	ff_frozen_stat(snap, f, &st);
	r = ff_reader_open(snap, f, &rd);
	if (!r) {
		for (off_t at = 0; !r && at < st.st_size; at += sizeof buf)
			r = ff_reader_read(rd, buf, sizeof buf, at, &got);
		ff_reader_close(rd);
	}
	ff_snap_put(snap);
	return r;
}

static size_t images;

static int count_one(const char *path, const struct stat *st, int type, struct FTW *ftw)
{
	size_t n = strlen(path);

	images += n > 6 && strcmp(path + n - 6, ".qcow2") == 0;
	return 0;
}

size_t count_images(struct fixture *fx)
{
	images = 0;
	nftw(fx->fleece, count_one, 16, FTW_PHYS);
	return images;
}

size_t count_saved(struct fixture *fx, const char *snapshot, size_t number)
{
	struct ff_snap *snap;
	size_t n = 0;

	cr_assert_eq(ff_snap_get(fx->store, snapshot, &snap), 0);
	for (uint64_t i = 0; i < snap->links[number]->clusters; i++) {
		uint8_t kind = FF_KIND_NONE;

		if (ff_image_marked(snap->links[number]->img, i))
			cr_assert_eq(ff_image_kinds(snap->links[number]->img, i, 1, &kind), 0);
		n += kind != FF_KIND_NONE;
	}
	ff_snap_put(snap);
	return n;
}
