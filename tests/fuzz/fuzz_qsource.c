/*
 * A guest's qcow2 image. An input is a byte of modes and then the file: its bytes as they are, or,
 * with MODE_PIECES, pieces of it, each with its offset and length, in a file of up to 2^56 bytes,
 * so that tables of any size are within reach of a few bytes. Beneath it, with MODE_BACKING, lies a
 * raw file or the same image once more.
 *
 * Whatever the bytes are: no read leaves the file, every extent has a length, what is said to be a
 * hole reads as zeros, and a read gives the same bytes, or an error, however it is cut.
 */
#include <errno.h>
#include <string.h>

#include "cow/qsource/disk.h"
#include "cow/qsource/names.h"
#include "ff_util.h"
#include "fuzz.h"

enum { MODE_PIECES = 1, MODE_BACKING = 2, MODE_TWICE = 4, MODE_DATA_FILE = 8 };
enum { PIECES = 64, READ = 20000, STEPS = 200 };

struct piece {
	uint64_t off;
	size_t len;
	const uint8_t *data;
};

struct file {
	struct qs_bytes bytes;
	unsigned count;
	struct piece pieces[PIECES];
};

static int file_read(const struct qs_bytes *b, void *buf, size_t len, uint64_t off)
{
	const struct file *f = FF_CONTAINER(b, struct file, bytes);

	FUZZ_CHECK(len > 0 && off < b->size && len <= b->size - off);
	memset(buf, 0, len);
	for (unsigned i = 0; i < f->count; i++) {
		const struct piece *p = &f->pieces[i];
		uint64_t from = FF_MAX(p->off, off), to = FF_MIN(p->off + p->len, off + len);

		if (from < to)
			memcpy((uint8_t *)buf + (from - off), p->data + (from - p->off), to - from);
	}
	return 0;
}

/* Where pieces are, there are data. */
static int file_seek(const struct qs_bytes *b, uint64_t off, int whence, uint64_t *out)
{
	const struct file *f = FF_CONTAINER(b, struct file, bytes);
	uint64_t best = b->size;
	bool inside = false;

	FUZZ_CHECK(off < b->size);
	for (unsigned i = 0; i < f->count; i++) {
		const struct piece *p = &f->pieces[i];

		if (off >= p->off && off - p->off < p->len) {
			inside = true;
			best = FF_MIN(best, whence == SEEK_HOLE ? p->off + p->len : off);
		} else if (p->off > off && whence == SEEK_DATA && p->len > 0) {
			best = FF_MIN(best, p->off);
		}
	}
	if (whence == SEEK_DATA && best >= b->size)
		return -ENXIO;
	*out = whence == SEEK_HOLE && !inside ? off : FF_MIN(best, b->size);
	return 0;
}

static void make_file(struct file *f, struct input in, bool pieces)
{
	*f = (struct file){.bytes = {0, file_read, file_seek}};
	if (!pieces) {
		f->bytes.size = (uint64_t)(in.end - in.p);
		f->pieces[f->count++] = (struct piece){0, (size_t)(in.end - in.p), in.p};
		return;
	}
	f->bytes.size = input_take(&in, 7);
	while (in.p < in.end && f->count < PIECES) {
		struct piece p = {.off = input_take(&in, 6)};

		p.len = (size_t)input_take(&in, 2);
		p.len = FF_MIN(p.len, (size_t)(in.end - in.p));
		p.data = in.p;
		in.p += p.len;
		f->pieces[f->count++] = p;
	}
}

static void damaged(void *ctx, unsigned layer, uint64_t off, const char *why)
{
	FUZZ_CHECK(layer < *(unsigned *)ctx && why && *why);
}

static int read_both_ways(struct qs_disk *d, uint64_t off, size_t len, uint8_t *a, uint8_t *b)
{
	size_t step = len / 3 + 1;
	int r = qs_disk_read(d, a, len, off), again = 0;

	FUZZ_CHECK(r == 0 || r == -EIO || r == -ENOMEM);
	for (size_t at = 0; at < len && !again; at += step)
		again = qs_disk_read(d, b + at, FF_MIN(step, len - at), off + at);
	FUZZ_CHECK(r == again);
	FUZZ_CHECK(r || memcmp(a, b, len) == 0);
	return r;
}

static void use(struct qs_disk *d, struct input in)
{
	ff_autofree uint8_t *a = malloc(READ), *b = malloc(READ);
	uint64_t size = qs_disk_size(d), off = 0, len;
	bool data;

	FUZZ_CHECK(a && b);
	for (int i = 0; i < STEPS && off < size; i++, off += len) {
		if (qs_disk_extent(d, off, size - off, &data, &len))
			break;
		FUZZ_CHECK(len > 0 && len <= size - off);
		if (i % 8 && data)
			continue;
		if (read_both_ways(d, off, (size_t)FF_MIN(len, READ), a, b) || data)
			continue;
		for (size_t k = 0; k < FF_MIN(len, READ); k++)
			FUZZ_CHECK(a[k] == 0);
	}
	for (int i = 0; i < 4 && size > 0; i++) {
		off = input_take(&in, 8) % size;
		len = input_take(&in, 2) % READ + 1;
		read_both_ways(d, off, (size_t)FF_MIN(len, size - off), a, b);
	}
}

/* Adds an image and what it asks for, which is the same file again or a raw one. */
static int add(struct qs_disk *d, const struct file *image, const struct file *raw, unsigned mode,
               unsigned *layers)
{
	const struct qs_head *head;
	char why[QS_WHY] = "";
	struct qs_name name;
	int r = qs_disk_add_image(d, &image->bytes, &head, why);

	FUZZ_CHECK(r == 0 || *why);
	if (r)
		return r;
	++*layers;
	FUZZ_CHECK(head->l1_entries * 8 <= 32 << 20 && head->size <= INT64_MAX);
	if (head->external && !(mode & MODE_DATA_FILE))
		return -ENOENT;
	if (head->external)
		qs_disk_set_data(d, &raw->bytes);
	r = qs_name_decode(head->backing, &name, why);
	FUZZ_CHECK(r == 0 || (r == -ENOTSUP && *why));
	return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct input in = {data, data + size};
	unsigned mode = (unsigned)input_take(&in, 1), layers = 0;
	static struct file image, raw;
	struct qs_kept kept = {.max = 64 << 20};
	struct qs_disk *d;
	char why[QS_WHY];
	int r;

	make_file(&image, in, mode & MODE_PIECES);
	make_file(&raw, in, false);
	FUZZ_CHECK(qs_disk_create(damaged, &layers, &kept, &d) == 0);
	r = add(d, &image, &raw, mode, &layers);
	if (!r && mode & MODE_TWICE)
		r = add(d, &image, &raw, mode, &layers);
	if (!r && mode & MODE_BACKING) {
		r = qs_disk_add_raw(d, &raw.bytes, why);
		layers++;
	}
	if (!r && qs_disk_complete(d) == 0)
		use(d, in);
	qs_disk_destroy(d);
	FUZZ_CHECK(kept.bytes == 0);
	return 0;
}
