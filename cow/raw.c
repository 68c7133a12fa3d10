/*
 * Guests' disks, decoded from frozen images: what ff_raw_*() tell.
 *
 * An open disk is the layers of cow/qsource/disk.c over readers of frozen files, one for each file
 * of the chain. Everything in it is constant once it is open, but for the caches of the layers,
 * which have locks of their own; no lock of the engine is held while it reads. Each reader keeps
 * the snapshot. They count as flushed from the beginning: it is the caller who knows what its users
 * have closed.
 *
 * That a file is an image is told by its first bytes, and a guest may write those of a raw disk.
 * What it could gain by a forged image is to have another file of the snapshot shown as a part of
 * its disk. So nothing but the snapshot is within reach (raw_find.c), the reader must be allowed to
 * read that other file itself, and decoded disks are shown to those only who ask for them by a name
 * that is never listed. An image that does not say what format its backing file has is treated in
 * the way of QEMU, which looks at the first bytes: any other choice would show something else than
 * the guest had. It is said in the log, as is each format that only QEMU would know.
 *
 * A few megabytes of tables can make a disk of exabytes, through which a walk takes hours, in a
 * thread that guests need and on behalf of a process that cannot be killed meanwhile. So a walk
 * ends after some seconds, and what it has not seen counts as data, which it may: who reads it
 * finds zeros.
 *
 * Of libqcow: it reads a file by path or by its own I/O handles. Frozen bytes have a path only in
 * the mount that this process serves, where its threads would wait for each other; and the handles
 * belong to a library inside libqcow that has no header and promises no interface. It also keeps
 * tables of its own, for which ours, that are needed for holes and backing files anyway, would have
 * had to be read first. So it decodes nothing here; the tests compare with it.
 */
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "cow/qsource/disk.h"
#include "cow/raw_find.h"
#include "ff_log.h"
#include "ff_util.h"

enum { LOOK_SECONDS = 5, STEPS_A_LOOK = 64 };

/* A frozen file, of which QS_BYTES is the view that layers have. */
struct raw_file {
	struct qs_bytes bytes;
	struct ff_reader *reader;
	const struct ff_frozen *f;
	struct raw_file *next;
};

struct ff_raw {
	struct ff_snap *snap; /* kept by the readers */
	struct qs_disk *disk;
	struct raw_file *files;
	unsigned layers;
	char *paths[QS_LAYERS_MAX]; /* of the layers, for messages */
};

/* --- bytes of frozen files --- */

static int frozen_bytes(const struct qs_bytes *b, void *buf, size_t len, uint64_t off)
{
	const struct raw_file *file = FF_CONTAINER(b, struct raw_file, bytes);
	size_t got = 0;
	int r = ff_reader_read(file->reader, buf, len, (off_t)off, &got);

	return r ? r : got == len ? 0 : -EIO;
}

static int frozen_seek(const struct qs_bytes *b, uint64_t off, int whence, uint64_t *out)
{
	const struct raw_file *file = FF_CONTAINER(b, struct raw_file, bytes);
	off_t found = 0;
	int r = ff_reader_seek(file->reader, (off_t)off, whence, &found);

	if (!r)
		*out = (uint64_t)found;
	return r;
}

static int open_file(struct ff_snap *snap, const struct ff_frozen *f, struct raw_file *file)
{
	int r = ff_reader_open(snap, f, &file->reader);

	if (r)
		return r;
	ff_reader_flushed(file->reader);
	file->f = f;
	file->bytes = (struct qs_bytes){(uint64_t)f->st.st_size, frozen_bytes, frozen_seek};
	return 0;
}

/* The first bytes of F, at most SIZE. */
static int peek(struct ff_snap *snap, const struct ff_frozen *f, uint8_t *buf, size_t size,
                size_t *len)
{
	struct raw_file file;
	int r = open_file(snap, f, &file);

	if (r)
		return r;
	*len = (size_t)FF_MIN(size, file.bytes.size);
	if (*len)
		r = file.bytes.read(&file.bytes, buf, *len, 0);
	ff_reader_close(file.reader);
	return r;
}

bool ff_raw_is(struct ff_snap *snap, const struct ff_frozen *f)
{
	uint8_t buf[QS_PEEK];
	size_t len;

	if (!S_ISREG(f->st.st_mode) || f->st.st_size == 0)
		return false;
	return peek(snap, f, buf, sizeof buf, &len) || qs_is_image(buf, len);
}

int ff_raw_size(struct ff_snap *snap, const struct ff_frozen *f, uint64_t *size)
{
	uint8_t buf[QS_PEEK];
	size_t len;
	int r = peek(snap, f, buf, sizeof buf, &len);

	if (r == -ESTALE || r == -ENOMEM)
		return r;
	if (r || !qs_peek_size(buf, len, size))
		*size = (uint64_t)f->st.st_size;
	return 0;
}

/* --- opening --- */

struct opening {
	struct ff_raw *raw;
	const struct ff_raw_asker *asker;
	struct raw_place place; /* of the layer at hand */
	char why[QS_WHY];
};

/* Where the file at hand is, for messages; malloc'd. */
static char *path_of(const struct opening *o, const struct raw_place *place)
{
	return status_path_in(o->raw->snap->tree, place->dir, place->f);
}

static int add_file(struct opening *o, const struct ff_frozen *f, struct qs_bytes **out)
{
	struct raw_file *file = calloc(1, sizeof *file);
	int r = file ? open_file(o->raw->snap, f, file) : -ENOMEM;

	if (r) {
		free(file);
		snprintf(o->why, sizeof o->why, "%s", strerror(-r));
		return r;
	}
	file->next = o->raw->files;
	o->raw->files = file;
	*out = &file->bytes;
	return 0;
}

/* WHAT, which the image at hand names, is found at *OUT, or O->why tells of its name. */
static int find(struct opening *o, const char *what, const char *text, struct qs_name *name,
                struct raw_place *out)
{
	char why[QS_WHY];
	int r = qs_name_decode(text, name, why);

	if (!r)
		r = raw_find(o->raw->snap, o->asker, o->place.dir, name, out, why);
	if (r)
		snprintf(o->why, sizeof o->why, "its %s is \"%.100s\": %.120s", what, text, why);
	return r;
}

static int add_data_file(struct opening *o, const struct qs_head *head)
{
	struct raw_place place;
	struct qs_bytes *bytes;
	struct qs_name name;
	int r = find(o, "data file", head->data_file, &name, &place);

	if (!r && (place.f == o->place.f || (name.format[0] && strcmp(name.format, "raw")))) {
		snprintf(o->why, sizeof o->why, "its data file cannot be one");
		r = -EIO;
	}
	if (!r)
		r = add_file(o, place.f, &bytes);
	if (!r)
		qs_disk_set_data(o->raw->disk, bytes);
	return r;
}

/* Of a backing file whose format nobody tells. */
static int probe(struct opening *o, const struct raw_place *place, bool *is_image)
{
	ff_autofree char *path = path_of(o, place);
	uint8_t buf[QS_FOREIGN_PEEK];
	const char *foreign;
	size_t len;
	int r = peek(o->raw->snap, place->f, buf, sizeof buf, &len);

	if (r) {
		snprintf(o->why, sizeof o->why, "its backing file: %s", strerror(-r));
		return r;
	}
	foreign = qs_foreign_format(buf, len);
	if (foreign) {
		snprintf(o->why, sizeof o->why, "its backing file may be of the format %s",
		         foreign);
		return -ENOTSUP;
	}
	*is_image = qs_is_image(buf, len);
	ff_info("%s: it does not say of what format its backing file %s is: taken for %s, as "
	        "QEMU would",
	        o->raw->paths[o->raw->layers - 1], path ? path : "?", *is_image ? "qcow2" : "raw");
	return 0;
}

/* By what the image says, and what the name does. */
static int backing_format(struct opening *o, const struct qs_head *head, const struct qs_name *name,
                          const struct raw_place *place, bool *is_image)
{
	const char *format = head->format[0] ? head->format : name->format;

	if (head->format[0] && name->format[0] && strcmp(head->format, name->format) != 0) {
		snprintf(o->why, sizeof o->why, "it contradicts itself on its backing file");
		return -EIO;
	}
	if (!format[0])
		return probe(o, place, is_image);
	*is_image = strcmp(format, "qcow2") == 0;
	if (*is_image || strcmp(format, "raw") == 0)
		return 0;
	snprintf(o->why, sizeof o->why, "its backing file has the format \"%s\"", format);
	return -ENOTSUP;
}

static bool in_chain(const struct ff_raw *raw, const struct ff_frozen *f)
{
	for (const struct raw_file *file = raw->files; file; file = file->next)
		if (file->f == f)
			return true;
	return false;
}

/* Adds the file at hand. *HEAD: what it asks for, NULL if it is raw. */
static int add_layer(struct opening *o, bool is_image, const struct qs_head **head)
{
	struct ff_raw *raw = o->raw;
	struct qs_bytes *bytes;
	int r;

	*head = NULL;
	if (in_chain(raw, o->place.f)) {
		snprintf(o->why, sizeof o->why, "its backing files lead back to themselves");
		return -EIO;
	}
	r = add_file(o, o->place.f, &bytes);
	if (!r)
		r = is_image ? qs_disk_add_image(raw->disk, bytes, head, o->why)
		             : qs_disk_add_raw(raw->disk, bytes, o->why);
	if (r)
		return r;
	raw->paths[raw->layers] = path_of(o, &o->place);
	if (!raw->paths[raw->layers++])
		return -ENOMEM;
	if (!*head)
		return 0;
	if ((*head)->corrupt)
		ff_warning("%s: QEMU has marked it as corrupt: what is read of it may be wrong; "
		           "look with qemu-img check",
		           raw->paths[raw->layers - 1]);
	return (*head)->external ? add_data_file(o, *head) : 0;
}

static int add_layers(struct opening *o)
{
	const struct qs_head *head;
	bool is_image = true;
	int r;

	while ((r = add_layer(o, is_image, &head)) == 0 && head && head->backing[0]) {
		struct raw_place next;
		struct qs_name name;

		r = find(o, "backing file", head->backing, &name, &next);
		if (!r)
			r = backing_format(o, head, &name, &next, &is_image);
		if (r)
			return r;
		o->place = next;
	}
	return r ? r : qs_disk_complete(o->raw->disk);
}

/* Says why it could not be opened, and returns what its opener is to be told. */
static int refuse(struct opening *o, int r)
{
	ff_autofree char *path = path_of(o, &o->place);
	const char *p = path ? path : "?", *why = o->why[0] ? o->why : strerror(-r);

	switch (r) {
	case -ESTALE:
	case -ENOMEM:
		return r;
	case -EACCES:
		ff_warning("%s: not decoded for this caller: %s", p, why);
		return r;
	case -ENOTSUP:
		ff_error("%s: cannot be decoded: %s. Copy the frozen image itself, with all that "
		         "it needs, and open it with QEMU",
		         p, why);
		return -EOPNOTSUPP;
	default:
		ff_error("%s: cannot be decoded: %s. The frozen image itself can be copied; "
		         "qemu-img check tells of damage",
		         p, why);
		return -EIO;
	}
}

static void damaged(void *ctx, unsigned layer, uint64_t off, const char *why)
{
	const struct ff_raw *raw = ctx;

	ff_error("%s: damaged where the disk has offset %llu: %s", raw->paths[layer],
	         (unsigned long long)off, why);
}

int ff_raw_open(struct ff_snap *snap, const struct ff_frozen *dir, const struct ff_frozen *f,
                const struct ff_raw_asker *asker, struct ff_raw **out)
{
	struct opening o = {.asker = asker, .place = {dir, f}};
	struct ff_raw *raw = calloc(1, sizeof *raw);
	int r = -ENOMEM;

	if (!raw)
		return r;
	raw->snap = snap;
	o.raw = raw;
	r = qs_disk_create(damaged, raw, &snap->store->raw_kept, &raw->disk);
	if (!r)
		r = add_layers(&o);
	if (r) {
		r = refuse(&o, r);
		ff_raw_close(raw);
		return r;
	}
	*out = raw;
	return 0;
}

void ff_raw_close(struct ff_raw *raw)
{
	struct raw_file *next;

	qs_disk_destroy(raw->disk);
	for (unsigned i = 0; i < raw->layers; i++)
		free(raw->paths[i]);
	for (struct raw_file *file = raw->files; file; file = next) {
		next = file->next;
		ff_reader_close(file->reader);
		free(file);
	}
	free(raw);
}

/* --- reading --- */

int ff_raw_read(struct ff_raw *raw, void *buf, size_t len, off_t off, size_t *got)
{
	uint64_t size = qs_disk_size(raw->disk), from = (uint64_t)off;
	size_t n;
	int r = 0;

	if (off < 0)
		return -EINVAL;
	n = from < size ? (size_t)FF_MIN(len, size - from) : 0;
	if (n)
		r = qs_disk_read(raw->disk, buf, n, from);
	if (!r)
		*got = n;
	return r;
}

static time_t seconds(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec;
}

/* Has step I of a walk that is to stop at END gone too far? */
static bool too_late(unsigned i, time_t end)
{
	return i % STEPS_A_LOOK == 0 && seconds() >= end;
}

int ff_raw_seek(struct ff_raw *raw, off_t off, int whence, off_t *out)
{
	uint64_t size = qs_disk_size(raw->disk), at = (uint64_t)off, len;
	time_t end = seconds() + LOOK_SECONDS;
	bool data;

	if (whence != SEEK_DATA && whence != SEEK_HOLE)
		return -EINVAL;
	if (off < 0 || at >= size)
		return -ENXIO;
	for (unsigned i = 0; at < size; i++, at += len) {
		int r;

		if (too_late(i, end)) { /* the rest is data, as far as we know */
			*out = (off_t)(whence == SEEK_DATA ? at : size);
			return 0;
		}
		r = qs_disk_extent(raw->disk, at, size - at, &data, &len);
		if (r)
			return r;
		if (data == (whence == SEEK_DATA)) {
			*out = (off_t)at;
			return 0;
		}
	}
	if (whence == SEEK_DATA)
		return -ENXIO;
	*out = (off_t)size;
	return 0;
}

int ff_raw_blocks(struct ff_raw *raw, uint64_t *blocks)
{
	uint64_t size = qs_disk_size(raw->disk), at = 0, bytes = 0, len;
	time_t end = seconds() + LOOK_SECONDS;
	bool data;

	for (unsigned i = 0; at < size && !too_late(i, end); i++, at += len) {
		int r = qs_disk_extent(raw->disk, at, size - at, &data, &len);

		if (r)
			return r;
		bytes += data ? len : 0;
	}
	*blocks = ff_div_up(bytes + (size - at), 512);
	return 0;
}
