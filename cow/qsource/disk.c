/*
 * Layers of a disk.
 *
 * Each byte is the uppermost layer's that has it. So a read asks the layer for the run at its
 * offset; what is not there is asked of the layer beneath, as far as that reaches, and zeros past
 * its end, for a backing file may be shorter than what lies on it. The depth is bounded by
 * QS_LAYERS_MAX, and with it the recursion.
 */
#include "cow/qsource/disk.h"

#include <stdio.h>
#include <string.h>

#include "cow/qsource/unpack.h"
#include "ff_util.h"

struct layer {
	uint64_t size;
	bool raw;
	const struct qs_bytes *file;
	struct qs_image *image; /* NULL: raw */
};

struct qs_disk {
	qs_damaged damaged;
	void *ctx;
	struct qs_kept *kept;
	unsigned count;
	struct qs_cache *cache;
	struct qs_unpacked *unpacked;
	struct layer layers[QS_LAYERS_MAX];
};

int qs_disk_create(qs_damaged damaged, void *ctx, struct qs_kept *kept, struct qs_disk **out)
{
	struct qs_disk *d = calloc(1, sizeof *d);

	if (!d)
		return -ENOMEM;
	d->damaged = damaged;
	d->ctx = ctx;
	d->kept = kept;
	if (qs_cache_create(kept, &d->cache)) {
		free(d);
		return -ENOMEM;
	}
	*out = d;
	return 0;
}

void qs_disk_destroy(struct qs_disk *d)
{
	if (!d)
		return;
	for (unsigned i = 0; i < d->count; i++)
		free(d->layers[i].image);
	qs_unpacked_destroy(d->unpacked);
	qs_cache_destroy(d->cache);
	free(d);
}

static int add(struct qs_disk *d, const struct layer *l, char *why)
{
	if (d->count == QS_LAYERS_MAX) {
		snprintf(why, QS_WHY, "it has more than %d backing files", QS_LAYERS_MAX - 1);
		return -ELOOP;
	}
	d->layers[d->count++] = *l;
	return 0;
}

int qs_disk_add_image(struct qs_disk *d, const struct qs_bytes *file, const struct qs_head **head,
                      char *why)
{
	struct qs_image *image = calloc(1, sizeof *image);
	struct layer l = {.file = file, .image = image};
	int r = -ENOMEM;

	if (image)
		r = qs_image_open(file, d->count, image, why);
	else
		snprintf(why, QS_WHY, "no memory");
	if (!r) {
		l.size = image->head.size;
		r = add(d, &l, why);
	}
	if (r) {
		free(image);
		return r;
	}
	*head = &image->head;
	return 0;
}

void qs_disk_set_data(struct qs_disk *d, const struct qs_bytes *data)
{
	d->layers[d->count - 1].image->data = data;
}

int qs_disk_add_raw(struct qs_disk *d, const struct qs_bytes *file, char *why)
{
	return add(d, &(struct layer){.size = file->size, .file = file}, why);
}

int qs_disk_complete(struct qs_disk *d)
{
	size_t largest = 0;

	for (unsigned i = 0; i < d->count; i++)
		if (d->layers[i].image)
			largest = FF_MAX(largest, d->layers[i].image->head.cluster_size);
	return qs_unpacked_create(largest, d->kept, &d->unpacked);
}

uint64_t qs_disk_size(const struct qs_disk *d)
{
	return d->layers[0].size;
}

/* What the file has of LEN bytes at OFF, zeros for the rest. */
static int read_plain(const struct qs_bytes *file, uint8_t *buf, size_t len, uint64_t off)
{
	size_t have = off < file->size ? (size_t)FF_MIN(len, file->size - off) : 0;

	memset(buf + have, 0, len - have);
	return have ? file->read(file, buf, have, off) : 0;
}

/* A compressed cluster that is to be made. */
struct packed {
	const struct qs_image *image;
	const struct qs_run *run;
	bool torn; /* what is to be unpacked is no packed cluster */
};

static int make_unpacked(void *ctx, uint8_t *out, size_t size)
{
	struct packed *p = ctx;
	const struct qs_bytes *file = p->image->data;
	ff_autofree uint8_t *buf = malloc(p->run->packed);
	int r;

	if (!buf)
		return -ENOMEM;
	r = file->read(file, buf, p->run->packed, p->run->host);
	if (r)
		return r;
	r = qs_unpack(p->image->head.zstd, buf, p->run->packed, out, size);
	p->torn = r == -EIO;
	return r;
}

static int read_packed(struct qs_disk *d, unsigned n, const struct qs_run *run, uint8_t *buf,
                       size_t len, uint64_t off)
{
	const struct qs_image *image = d->layers[n].image;
	size_t size = image->head.cluster_size;
	struct packed p = {.image = image, .run = run};
	int r = qs_unpacked_read(d->unpacked, n, off / size, size, make_unpacked, &p, off % size,
	                         len, buf);

	if (p.torn)
		d->damaged(d->ctx, n, off, "a compressed cluster cannot be unpacked");
	return r;
}

static int read_layer(struct qs_disk *d, unsigned n, uint8_t *buf, size_t len, uint64_t off);

static int read_run(struct qs_disk *d, unsigned n, const struct qs_run *run, uint8_t *buf,
                    size_t len, uint64_t off)
{
	if (run->bad) {
		d->damaged(d->ctx, n, off, run->bad);
		return -EIO;
	}
	switch (run->kind) {
	case QS_ZERO:
		memset(buf, 0, len);
		return 0;
	case QS_DATA:
		return read_plain(d->layers[n].image->data, buf, len, run->host);
	case QS_PACKED:
		return read_packed(d, n, run, buf, len, off);
	case QS_NONE:
		break;
	}
	return read_layer(d, n + 1, buf, len, off);
}

static int read_layer(struct qs_disk *d, unsigned n, uint8_t *buf, size_t len, uint64_t off)
{
	const struct layer *l = &d->layers[n];
	struct qs_run run;
	int r = 0;

	if (n >= d->count || off >= l->size) {
		memset(buf, 0, len);
		return 0;
	}
	if (len > l->size - off) {
		size_t have = (size_t)(l->size - off);

		memset(buf + have, 0, len - have);
		len = have;
	}
	if (!l->image)
		return read_plain(l->file, buf, len, off);
	for (size_t at = 0; at < len && !r; at += (size_t)run.len) {
		r = qs_map(l->image, d->cache, off + at, len - at, &run);
		if (!r)
			r = read_run(d, n, &run, buf + at, (size_t)run.len, off + at);
	}
	return r;
}

int qs_disk_read(struct qs_disk *d, void *buf, size_t len, uint64_t off)
{
	return read_layer(d, 0, buf, len, off);
}

/* The same for *LEN bytes of FILE at OFF, which may make them fewer. */
static int plain_extent(const struct qs_bytes *file, uint64_t off, bool *data, uint64_t *len)
{
	uint64_t next;
	int r;

	*data = false;
	if (off >= file->size)
		return 0;
	r = file->seek(file, off, SEEK_DATA, &next);
	if (r == -ENXIO)
		return 0;
	if (!r && next > off) {
		*len = FF_MIN(*len, next - off);
		return 0;
	}
	if (!r)
		r = file->seek(file, off, SEEK_HOLE, &next);
	if (r)
		return r;
	if (next <= off)
		return -EIO;
	*data = true;
	*len = FF_MIN(*len, next - off);
	return 0;
}

static int layer_extent(struct qs_disk *d, unsigned n, uint64_t off, bool *data, uint64_t *len)
{
	const struct layer *l = &d->layers[n];
	struct qs_run run;
	int r;

	*data = false;
	if (n >= d->count || off >= l->size)
		return 0;
	*len = FF_MIN(*len, l->size - off);
	if (!l->image)
		return plain_extent(l->file, off, data, len);
	r = qs_map(l->image, d->cache, off, *len, &run);
	if (r)
		return r;
	*len = run.len;
	*data = run.bad || run.kind == QS_PACKED;
	if (run.bad || run.kind == QS_PACKED || run.kind == QS_ZERO)
		return 0;
	if (run.kind == QS_DATA)
		return plain_extent(l->image->data, run.host, data, len);
	return layer_extent(d, n + 1, off, data, len);
}

int qs_disk_extent(struct qs_disk *d, uint64_t off, uint64_t max, bool *data, uint64_t *len)
{
	*len = FF_MIN(max, qs_disk_size(d) - off);
	return layer_extent(d, 0, off, data, len);
}
