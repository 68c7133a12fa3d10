/*
 * The full image that is made up from a frozen file: it reads as that file, and once it was seen it
 * is the same each time, whatever fails and whoever is killed in between.
 */
#include "round.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

#include "ff_util.h"

enum { MOST = 64 << 20, OFFSET_BITS = 0x00fffffe };

/* An offset of a table entry, without its flags. */
static uint64_t offset_at(const uint8_t *image, uint64_t at)
{
	return ff_be64(image + at) & ((uint64_t)OFFSET_BITS << 32 | 0xfffffe00);
}

/* Where the image has the guest cluster G: 0, it reads as zeros. */
static uint64_t host_of(const uint8_t *image, uint64_t g)
{
	uint64_t per_table = (UINT64_C(1) << ff_be32(image + 20)) / 8;
	uint64_t table = offset_at(image, ff_be64(image + 40) + g / per_table * 8);

	return table ? offset_at(image, table + g % per_table * 8) : 0;
}

static void check_image(struct round *r, const uint8_t *image, uint64_t size,
                        const struct round_file *want, const char *what)
{
	uint64_t cs = UINT64_C(1) << ff_be32(image + 20);

	if (ff_be64(image + 24) != ff_round_up(want->size, 512))
		round_complain(r, "%s: its image has another size", what);
	for (uint64_t g = 0; g * cs < want->size; g++) {
		uint64_t host = host_of(image, g), n = FF_MIN(cs, want->size - g * cs);
		const uint8_t *bytes = want->bytes + g * cs;
		size_t i = 0;

		while (i < n && bytes[i] == (host && host + i < size ? image[host + i] : 0))
			i++;
		if (i < n)
			round_complain(r, "%s: WRONG BYTES in its image, at %ju", what,
			               (uintmax_t)(g * cs + i));
	}
}

static int read_image(struct ff_since *s, uint8_t *image, size_t size)
{
	struct ff_since_file *file;
	size_t got = 0;
	int e = ff_since_open(s, &file);

	if (e)
		return e;
	e = ff_since_read_image(file, image, size, 0, &got);
	ff_since_flushed(file);
	ff_since_close(file);
	return !e && got != size ? -EPROTO : e;
}

/* Makes and reads it. */
static int make_image(struct ff_snap *snap, const char *path, uint8_t **image, size_t *size)
{
	const struct ff_frozen *dir = ff_snap_root(snap), *f;
	const char *slash = strchr(path, '/'), *stored;
	struct ff_since_pair pair = {.new = snap, .old_name = "-"};
	enum ff_since_kind kind;
	struct ff_since *s;
	char name[32];
	int e = slash ? ff_frozen_lookup(snap, dir, "sub", &dir) : 0;

	snprintf(name, sizeof name, "%s.qcow2", slash ? slash + 1 : path);
	if (!e)
		e = ff_since_find(snap, dir, name, &kind, &stored, &f);
	if (!e)
		e = ff_since_make(&pair, dir, stored, f, &s);
	if (e)
		return e;
	*size = (size_t)FF_MIN(ff_since_image_size(s), (uint64_t)MOST);
	*image = malloc(*size);
	e = *image ? read_image(s, *image, *size) : -ENOMEM;
	ff_since_free(s);
	return e;
}

int round_since_file(struct round *r, struct round_snap *s, struct ff_snap *snap, int name,
                     const char *what)
{
	int file = s->tree.names[name], e;
	ff_autofree uint8_t *image = NULL;
	uint64_t hash;
	size_t size;

	e = ROUND_ENGINE(make_image(snap, round_names[name], &image, &size));
	if (e)
		return e;
	check_image(r, image, size, &s->tree.files[file], what);
	hash = XXH3_64bits(image, size) | 1;
	if (s->made[file] && s->made[file] != hash)
		round_complain(r, "%s: its image has CHANGED", what);
	s->made[file] = hash;
	return 0;
}
