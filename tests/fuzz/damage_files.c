/*
 * The damage test: the files of FLEECE_DIR, made, damaged and put back. See damage.c.
 */
#include "tests/fuzz/damage.h"

#include <fcntl.h>
#include <ftw.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "cow/qcow2_format.h"
#include "ff_util.h"
#include "fuzz.h"

const char *const op_names[OPS] = {
    [FLIP] = "flip a bit",
    [FLIP_WORD] = "flip a bit of a word",
    [CUT] = "cut",
    [GROW] = "grow",
    [SCRIBBLE] = "scribble",
    [CLEAR_WORD] = "clear a word",
    [CLEAR_BLOCK] = "clear a block",
    [SWAP_WORDS] = "swap words",
    [CLEAR_ENTRY] = "clear an L2 entry",
    [ZERO_ENTRY] = "turn an L2 entry to zeros",
    [REPLACE] = "put another file in its place",
    [REMOVE] = "remove",
    [NO_FILE] = "put something else in its place",
};
struct damage t;
const char *const disk_names[DISKS] = {"a.img", "b.img", "sub/c.img", "holes.img"};
const size_t disk_sizes[DISKS] = {150001, 81920, 40000, DISK_MAX};

/* --- making it -------------------------------------------------------------------------------- */

struct ff_store *damage_open(int *error)
{
	struct ff_store_config config = {
	    .source_fd = t.source_fd,
	    .source_path = t.source,
	    .fleece_path = t.fleece,
	    .cluster_size = CS,
	};
	struct ff_store *store = NULL;

	*error = ff_store_open(&config, &store);
	return *error ? NULL : store;
}

/* Overwrites some of a disk, with zeros now and then. */
static void overwrite(struct ff_store *store, int disk)
{
	int fd = openat(t.source_fd, disk_names[disk], O_RDWR | O_CLOEXEC);
	struct ff_disk *d;

	FUZZ_CHECK(fd >= 0 && ff_disk_get(store, fd, &d) == 0);
	for (int i = 0; i < 4; i++) {
		size_t off = rng_below(&t.rng, disk_sizes[disk]), done;
		size_t want = 1 + rng_below(&t.rng, 3 * CS);
		size_t len = FF_MIN(want, disk_sizes[disk] - off);
		struct ff_change c = {.kind = FF_WRITE, .fd = fd, .off = (off_t)off, .len = len};

		if (rng_one_in(&t.rng, 4))
			memset(t.live[disk] + off, 0, len);
		else
			rng_fill(&t.rng, t.live[disk] + off, len);
		c.buf = t.live[disk] + off;
		FUZZ_CHECK(ff_disk_change(d, &c, &done) == 0 && done == len);
	}
	ff_disk_put(d);
	close(fd);
}

/* Gives up some clusters of each disk in the snapshot GIVING. */
static void give_up(struct ff_store *store)
{
	struct ff_snap *snap;

	FUZZ_CHECK(ff_snap_get(store, "s1", &snap) == 0);
	for (int d = 0; d < DISKS; d++) {
		size_t clusters = disk_sizes[d] / CS, first = rng_below(&t.rng, clusters);
		size_t n = 1 + rng_below(&t.rng, clusters - first);
		const struct ff_frozen *f;
		struct ff_reader *rd;

		FUZZ_CHECK(damage_find(snap, disk_names[d], &f) == 0 &&
		           ff_reader_open(snap, f, &rd) == 0);
		FUZZ_CHECK(ff_reader_release(rd, (off_t)(first * CS), (off_t)(n * CS)) == 0);
		ff_reader_close(rd);
		memset(&t.released[GIVING][d][first], true, n);
	}
	ff_snap_put(snap);
}

static void make_checkpoint(struct ff_store *store)
{
	struct ff_snap *snap;

	FUZZ_CHECK(ff_snap_get(store, "s2", &snap) == 0 && ff_snap_checkpoint(snap) == 0);
	ff_snap_put(snap);
}

static void make(void)
{
	struct ff_store *store;
	int error;

	for (int d = 0; d < DISKS; d++) {
		int fd = openat(t.source_fd, disk_names[d], O_CREAT | O_WRONLY | O_CLOEXEC, 0600);

		if (d < DISKS - 1)
			rng_fill(&t.rng, t.live[d], disk_sizes[d]);
		FUZZ_CHECK(fd >= 0 && ftruncate(fd, (off_t)disk_sizes[d]) == 0);
		if (d < DISKS - 1)
			FUZZ_CHECK(write(fd, t.live[d], disk_sizes[d]) == (ssize_t)disk_sizes[d]);
		close(fd);
	}
	store = damage_open(&error);
	FUZZ_CHECK(store != NULL);
	for (int s = 0; s < SNAPS; s++) {
		char name[8];

		snprintf(name, sizeof name, "s%d", s);
		FUZZ_CHECK(ff_store_freeze(store, name, 0) == 0);
		memcpy(t.views[s], t.live, sizeof t.live);
		for (int d = 0; d < DISKS; d++)
			overwrite(store, d);
		if (s == GIVING)
			give_up(store);
		if (s == GIVEN)
			make_checkpoint(store);
		for (int d = 0; d < DISKS; d++)
			overwrite(store, d);
	}
	FUZZ_CHECK(ff_store_close(store) == 0);
}

static int keep_one(const char *path, const struct stat *st, int type, struct FTW *ftw)
{
	struct file *f = &t.files[t.file_count];
	struct qcow2_layout l;
	struct qcow2_head head;
	const char *why;
	int fd;

	if (!S_ISREG(st->st_mode))
		return 0;
	FUZZ_CHECK(t.file_count < FILES);
	snprintf(f->path, sizeof f->path, "%s", path + strlen(t.fleece) + 1);
	f->len = (size_t)st->st_size;
	f->data = malloc(f->len + 1);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	FUZZ_CHECK(fd >= 0 && read(fd, f->data, f->len) == (ssize_t)f->len);
	close(fd);
	f->snap = f->disk = -1;
	if (sscanf(f->path, "s%d/", &f->snap) == 1)
		for (int d = 0; d < DISKS; d++)
			if (strncmp(f->path + 3, disk_names[d], strlen(disk_names[d])) == 0)
				f->disk = d;
	f->ledger = strstr(f->path, ".dirty") != NULL;
	if (f->len >= QCOW2_HEAD_SIZE && qcow2_head_decode(f->data, &head, &l, &why) == 0) {
		f->tables = l.l2_first * CS;
		f->tables_end = l.data_first * CS;
	}
	t.file_count++;
	return 0;
}

static int remove_one(const char *path, const struct stat *st, int type, struct FTW *ftw)
{
	return ftw->level ? remove(path) : 0;
}

static void write_file(const char *path, const uint8_t *data, size_t len)
{
	char full[300];
	int fd;

	snprintf(full, sizeof full, "%s/%s", t.fleece, path);
	for (char *p = full + strlen(t.fleece) + 1; (p = strchr(p, '/')); *p++ = '/') {
		*p = '\0';
		mkdir(full, 0700);
	}
	fd = open(full, O_CREAT | O_TRUNC | O_WRONLY | O_CLOEXEC, 0600);
	FUZZ_CHECK(fd >= 0 && write(fd, data, len) == (ssize_t)len);
	close(fd);
}

/* What the last round noted on SOURCE's side of views that were lost: see cow/lost.c. */
static int remove_note(const char *path, const struct stat *st, int type, struct FTW *ftw)
{
	return strncmp(path + ftw->base, ".lost-", 6) == 0 ? remove(path) : 0;
}

void damage_restore(void)
{
	nftw(t.source, remove_note, 16, FTW_PHYS);
	nftw(t.fleece, remove_one, 16, FTW_DEPTH | FTW_PHYS);
	for (size_t i = 0; i < t.file_count; i++)
		write_file(t.files[i].path, t.files[i].data, t.files[i].len);
}

/* --- damaging --------------------------------------------------------------------------------- */

/* The place of a word of eight bytes, mostly one that is not zero or the next. */
static size_t a_word(const struct file *f, const uint8_t *data)
{
	static const uint8_t zeros[8];
	size_t words = f->len / 8, at = rng_below(&t.rng, words);

	if (!rng_one_in(&t.rng, 8))
		for (size_t n = 0; n < words && memcmp(data + at * 8, zeros, 8) == 0; n++)
			at = (at + 1) % words;
	/* the tables are what hurts most */
	if (f->tables && rng_one_in(&t.rng, 2))
		at = f->tables / 8 + rng_below(&t.rng, 48);
	return (at + rng_one_in(&t.rng, 4)) % words * 8;
}

/* The place of an L2 entry that is not 0; 0: there is none. */
static size_t an_entry(const struct file *f, const uint8_t *data)
{
	static const uint8_t zeros[8];
	size_t n = (FF_MIN(f->tables_end, f->len) - FF_MIN(f->tables, f->len)) / 8;
	size_t from = n ? rng_below(&t.rng, n) : 0;

	for (size_t i = 0; i < n; i++) {
		size_t at = f->tables + (from + i) % n * 8;

		if (memcmp(data + at, zeros, 8) != 0)
			return at;
	}
	return 0;
}

static void put_something_else(const struct file *f)
{
	char full[300];

	snprintf(full, sizeof full, "%s/%s", t.fleece, f->path);
	FUZZ_CHECK(unlink(full) == 0);
	switch (rng_below(&t.rng, 3)) {
	case 0:
		FUZZ_CHECK(mkdir(full, 0700) == 0);
		break;
	case 1:
		FUZZ_CHECK(mkfifo(full, 0600) == 0);
		break;
	default:
		FUZZ_CHECK(symlink("/etc/passwd", full) == 0);
	}
}

/* Changes DATA, a copy with room for 8 KiB more. *FROM, *TO: what part. */
static void change(enum op op, const struct file *f, uint8_t *data, size_t *len, size_t *from,
                   size_t *to)
{
	uint8_t word[8];
	size_t at = 0, n = 8, low;

	switch (op) {
	case FLIP:
		n = 1;
		at = rng_below(&t.rng, f->len);
		data[at] ^= (uint8_t)(1 << rng_below(&t.rng, 8));
		break;
	case FLIP_WORD:
		at = a_word(f, data);
		data[at + (rng_one_in(&t.rng, 2) ? 7 : rng_below(&t.rng, 8))] ^=
		    (uint8_t)(1 << (rng_one_in(&t.rng, 2) ? 0 : rng_below(&t.rng, 8)));
		break;
	case CUT:
		at = *len = rng_below(&t.rng, f->len);
		n = f->len - at;
		break;
	case GROW:
		at = f->len;
		n = 1 + rng_below(&t.rng, 8000);
		rng_fill(&t.rng, data + at, n);
		*len += n;
		break;
	case SCRIBBLE:
		at = rng_below(&t.rng, f->len);
		n = 1 + rng_below(&t.rng, 64);
		n = FF_MIN(n, f->len - at);
		rng_fill(&t.rng, data + at, n);
		break;
	case CLEAR_WORD:
		at = a_word(f, data);
		memset(data + at, 0, 8);
		break;
	case CLEAR_BLOCK:
		at = rng_below(&t.rng, f->len) & ~(size_t)511;
		n = FF_MIN(512u, f->len - at);
		memset(data + at, 0, n);
		break;
	case CLEAR_ENTRY:
	case ZERO_ENTRY:
		at = an_entry(f, data);
		if (at) {
			memset(data + at, 0, 8);
			data[at + 7] = op == ZERO_ENTRY;
		}
		break;
	default:
		at = a_word(f, data);
		n = a_word(f, data);
		memcpy(word, data + at, 8);
		memcpy(data + at, data + n, 8);
		memcpy(data + n, word, 8);
		low = FF_MIN(at, n);
		n = FF_MAX(at, n) + 8 - low;
		at = low;
	}
	*from = at;
	*to = at + n;
}

bool damage_one(enum op op, const struct file *f, bool *in_tables)
{
	ff_autofree uint8_t *data = malloc(f->len + 8192);
	const struct file *other = &t.files[rng_below(&t.rng, t.file_count)];
	size_t len = f->len, from = 0, to = 0;
	char full[300];
	bool same;

	*in_tables = false;
	FUZZ_CHECK(data != NULL);
	memcpy(data, f->data, len);
	if (op == REMOVE) {
		snprintf(full, sizeof full, "%s/%s", t.fleece, f->path);
		return unlink(full) == 0;
	}
	if (op == NO_FILE) {
		put_something_else(f);
		return true;
	}
	if (op == REPLACE) {
		write_file(f->path, other->data, other->len);
		return other->len != len || memcmp(other->data, data, len) != 0;
	}
	if (len < 8)
		return false;
	change(op, f, data, &len, &from, &to);
	/* a sector without bits is as one that was never written */
	*in_tables = f->ledger ? op == CLEAR_BLOCK : to > f->tables && from < f->tables_end;
	same = len == f->len && memcmp(data, f->data, len) == 0;
	write_file(f->path, data, len);
	return !same;
}

/* --- all of it -------------------------------------------------------------------------------- */

void damage_make(void)
{
	snprintf(t.root, sizeof t.root, "%s/fleecefs-damage-XXXXXX",
	         access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp");
	FUZZ_CHECK(mkdtemp(t.root) != NULL);
	snprintf(t.source, sizeof t.source, "%s/source", t.root);
	snprintf(t.fleece, sizeof t.fleece, "%s/fleece", t.root);
	FUZZ_CHECK(mkdir(t.source, 0700) == 0);
	t.source_fd = open(t.source, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	FUZZ_CHECK(t.source_fd >= 0 && mkdirat(t.source_fd, "sub", 0700) == 0);
	make();
	nftw(t.fleece, keep_one, 16, FTW_PHYS);
}

void damage_end(void)
{
	for (size_t i = 0; i < t.file_count; i++)
		free(t.files[i].data);
	nftw(t.root, remove_one, 16, FTW_DEPTH | FTW_PHYS);
	rmdir(t.root);
}
