/*
 * An image as it is on storage: see view.h. The format is drawn in cow/qcow2_format.c.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "cow/ctl/view.h"
#include "cow/io.h"
#include "cow/open_regular.h"
#include "cow/qcow2_image.h"
#include "ff_util.h"

#define SCAN_BYTES 65536u

static int open_image(int dirfd, const char *path, int *out, const char **why)
{
	int r = open_regular(dirfd, path, O_RDONLY, out);

	if (r == -EINVAL)
		*why = "it is not a regular file";
	return r;
}

int view_head(int dirfd, const char *path, struct qcow2_head *head, struct qcow2_layout *l,
              const char **why)
{
	ff_autoclose int fd = -1;
	int r = open_image(dirfd, path, &fd, why);

	return r ? r : ff_image_head(fd, head, l, why);
}

/* The checksum file stands beside the image. Without one the image can have no data. */
static int open_sums(int dirfd, const char *path, struct view *v)
{
	static const char image[] = ".qcow2";
	ff_autofree char *sums = NULL;
	uint8_t head[QCOW2_SUMS_HEAD_SIZE];
	size_t len = strlen(path), got = 0;
	int r;

	if (len > strlen(image) && strcmp(path + len - strlen(image), image) == 0)
		len -= strlen(image);
	if (asprintf(&sums, "%.*s.xxh3", (int)len, path) < 0) {
		sums = NULL;
		return -ENOMEM;
	}
	r = open_regular(dirfd, sums, O_RDONLY, &v->sums_fd);
	if (r == -ENOENT)
		return 0;
	if (!r)
		r = io_pread(v->sums_fd, head, sizeof head, 0, &got);
	v->sums_wrong = r || got < sizeof head || !qcow2_sums_head_ok(&v->head.desc, head);
	return r == -ENOMEM || r == -EMFILE ? r : 0;
}

int view_open(int dirfd, const char *path, struct view *out, const char **why)
{
	struct view v = {.fd = -1, .sums_fd = -1};
	struct stat st;
	int r = open_image(dirfd, path, &v.fd, why);

	if (!r)
		r = ff_image_head(v.fd, &v.head, &v.l, why);
	if (!r)
		r = io_fstat(v.fd, &st);
	if (!r) {
		v.file_size = (uint64_t)st.st_size;
		if (v.file_size / v.l.cluster_size < v.l.data_first) {
			*why = "it was cut short";
			r = -EINVAL;
		}
	}
	if (!r)
		r = open_sums(dirfd, path, &v);
	if (r) {
		view_close(&v);
		return r;
	}
	*out = v;
	return 0;
}

void view_close(struct view *v)
{
	if (v->fd >= 0)
		close(v->fd);
	if (v->sums_fd >= 0)
		close(v->sums_fd);
	v->fd = v->sums_fd = -1;
}

int view_end(const struct view *v, uint64_t *end)
{
	struct stat st;
	int r = io_fstat(v->fd, &st);

	if (!r)
		*end = FF_MIN((uint64_t)st.st_size / v->l.cluster_size, v->l.capacity);
	return r;
}

/* LEN bytes at OFF, a multiple of 8, of an area that begins at BASE. */
static int scan_piece(const struct view *v, uint64_t off, size_t len, uint64_t base, uint8_t *buf,
                      view_fn *fn, void *ctx)
{
	int r = io_pread_full(v->fd, buf, len, off);

	for (size_t i = 0; !r && i < len; i += 8) {
		uint64_t entry = ff_be64(buf + i);

		if (entry)
			r = fn(ctx, (off + i - base) / 8, entry);
	}
	return r;
}

int view_scan(const struct view *v, uint64_t first, uint64_t count, view_fn *fn, void *ctx)
{
	uint64_t cs = v->l.cluster_size, base = first * cs, end = base + count * cs;
	uint64_t at = base, data, hole;
	ff_autofree uint8_t *buf = malloc(SCAN_BYTES);
	int r = buf ? 0 : -ENOMEM;

	while (!r && at < end) {
		r = io_seek(v->fd, at, SEEK_DATA, &data);
		if (r == -ENXIO || (!r && data >= end))
			return 0;
		if (!r)
			r = io_seek(v->fd, data, SEEK_HOLE, &hole);
		if (r == -ENXIO) { /* punched just now */
			r = 0;
			at = data + 1;
			continue;
		}
		if (r)
			return r;
		hole = FF_MIN(ff_round_up(hole, 8), end);
		for (at = data & ~UINT64_C(7); !r && at < hole;) {
			size_t len = (size_t)FF_MIN(hole - at, (uint64_t)SCAN_BYTES);

			r = scan_piece(v, at, len, base, buf, fn, ctx);
			at += len;
		}
	}
	return r;
}

struct saved {
	const struct view *v;
	view_saved_fn *fn;
	void *ctx;
	uint64_t end;
};

static int on_entry(void *ctx, uint64_t cluster, uint64_t entry)
{
	struct saved *s = ctx;
	enum ff_image_kind kind;
	uint64_t host;

	if (cluster >= s->v->l.clusters ||
	    qcow2_entry_decode(&s->v->l, entry, s->end, &host, &kind))
		return 0;
	return s->fn(s->ctx, cluster, host);
}

int view_saved(const struct view *v, view_saved_fn *fn, void *ctx)
{
	struct saved s = {v, fn, ctx, v->l.capacity};

	return view_scan(v, v->l.l2_first, v->l.l2_count, on_entry, &s);
}
