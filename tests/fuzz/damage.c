/*
 * Damage to FLEECE_DIR, file by file, and what the next mount makes of it.
 *
 *   damage [--seed=N] [--rounds=N]
 *
 * Four snapshots of four disks are made, with writes after each; one gives up parts of its views,
 * the next becomes a checkpoint; and the store is closed. Each round damages one file: bits, words
 * and blocks of it, its length, its place. Then the store is opened, every view is read, and
 *   - each read gives the right bytes or an error, never anything else,
 *   - views that do not depend on the file are right,
 *   - where a view is lost, the log names the file,
 *   - every snapshot can be dropped, and nothing is left of it,
 * and all files are put back. One round in four looks like one after a killed daemon. A view
 * depends on its manifest and on the images, with the files beside them, of its disk in its own and
 * in all newer snapshots; on the record of the last end they all do.
 *
 * An L2 entry that is cleared on the storage, or becomes "zeros", cannot be told from one that was
 * written so, but for the record of a clean end, which has a hash of them. Wrong bytes are allowed
 * after a killed daemon, to the views that depend on an image whose L2 entries were changed, and to
 * no others; they are counted. So it is with bits of a ledger, but for single ones: these are seen.
 *
 * Of a checkpoint nothing can be read: it is right if all that changed since is known, lost if its
 * state says so.
 */
#include "tests/fuzz/damage.h"

#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "cow/engine.h"
#include "cow/manifest.h"
#include "ff_log.h"
#include "ff_util.h"
#include "fuzz.h"

static int log_fd, real_stderr;
static unsigned long undetected, lost_views, right_views;

/* --- looking ---------------------------------------------------------------------------------- */

enum outcome { RIGHT, LOST, WRONG };

int damage_find(struct ff_snap *snap, const char *path, const struct ff_frozen **out)
{
	const struct ff_frozen *at = ff_snap_root(snap);
	char copy[80], *rest = copy, *part;
	int r = 0;

	snprintf(copy, sizeof copy, "%s", path);
	while (!r && (part = strsep(&rest, "/")))
		r = ff_frozen_lookup(snap, at, part, &at);
	*out = at;
	return r;
}

static enum outcome read_all(struct ff_reader *reader, int s, int d)
{
	static uint8_t buf[DISK_MAX];
	enum outcome all = RIGHT;
	size_t step = rng_one_in(&t.rng, 4) ? 1000 + rng_below(&t.rng, 60000) : CS, got;
	off_t hole;
	int r;

	for (size_t at = 0; at < disk_sizes[d]; at += step) {
		size_t n = FF_MIN(step, disk_sizes[d] - at);

		r = ff_reader_read(reader, buf, step, (off_t)at, &got);
		FUZZ_CHECK(r == 0 || r == -EIO);
		if (r)
			all = LOST;
		else if (got != n || memcmp(buf, t.views[s][d] + at, n) != 0)
			return WRONG;
	}
	for (off_t at = 0; at < (off_t)disk_sizes[d]; at = hole) {
		off_t data;

		r = ff_reader_seek(reader, at, SEEK_DATA, &data);
		if (r == -EIO)
			return LOST;
		FUZZ_CHECK(r == 0 || r == -ENXIO);
		data = r ? (off_t)disk_sizes[d] : data;
		for (off_t i = at; i < data; i++)
			if (t.views[s][d][i])
				return WRONG;
		if (r)
			break;
		r = ff_reader_seek(reader, data, SEEK_HOLE, &hole);
		FUZZ_CHECK(r == 0 || r == -EIO);
		if (r)
			return LOST;
	}
	return all;
}

static enum outcome look_at_changes(struct ff_snap *snap, const struct ff_frozen *f, int s, int d)
{
	struct ff_disk_status st;

	FUZZ_CHECK(ff_frozen_status(snap, f, &st) == 0);
	if (st.state != FF_VIEW_CHECKPOINT)
		return LOST;
	for (size_t at = 0; at < disk_sizes[d]; at += CS) {
		size_t n = FF_MIN((size_t)CS, disk_sizes[d] - at);
		bool known = false;

		for (struct link *l = snap->links[f->disk]; l; l = atomic_load(&l->newer))
			known |= ff_image_marked(l->img, at / CS);
		if (!known && memcmp(t.views[s][d] + at, t.live[d] + at, n) != 0)
			return WRONG;
	}
	return RIGHT;
}

/* What a view has given up is an error, and no hole. */
static enum outcome read_parts(struct ff_reader *reader, int s, int d)
{
	static uint8_t buf[CS];
	enum outcome all = RIGHT;

	for (size_t at = 0; at < disk_sizes[d]; at += CS) {
		size_t n = FF_MIN((size_t)CS, disk_sizes[d] - at), got;
		int r = ff_reader_read(reader, buf, CS, (off_t)at, &got);
		off_t data = (off_t)at;

		FUZZ_CHECK(r == 0 || r == -EIO);
		if (t.released[s][d][at / CS]) {
			int seek = ff_reader_seek(reader, (off_t)at, SEEK_DATA, &data);

			if (!r || seek == -ENXIO || (!seek && data != (off_t)at))
				return WRONG;
		} else if (r) {
			all = LOST;
		} else if (got != n || memcmp(buf, t.views[s][d] + at, n) != 0) {
			return WRONG;
		}
	}
	return all;
}

static enum outcome look(struct ff_store *store, int s, int d)
{
	const struct ff_frozen *f;
	struct ff_reader *reader;
	struct ff_snap *snap;
	enum outcome o = LOST;
	struct stat st;
	char name[8];

	snprintf(name, sizeof name, "s%d", s);
	if (ff_snap_get(store, name, &snap))
		return LOST;
	if (damage_find(snap, disk_names[d], &f) == 0) {
		ff_frozen_stat(snap, f, &st);
		if (st.st_size != (off_t)disk_sizes[d]) {
			o = WRONG;
		} else if (ff_snap_is_checkpoint(snap)) {
			FUZZ_CHECK(s == GIVEN && ff_reader_open(snap, f, &reader) == -EIO);
			o = look_at_changes(snap, f, s, d);
		} else if (ff_reader_open(snap, f, &reader) == 0) {
			o = s == GIVING ? read_parts(reader, s, d) : read_all(reader, s, d);
			ff_reader_close(reader);
		}
	}
	ff_snap_put(snap);
	return o;
}

static bool depends(const struct file *f, bool killed, int s, int d)
{
	if (f->snap < 0)
		return strcmp(f->path, killed ? ".session" : ".clean") == 0 ||
		       strcmp(f->path, ".known") == 0;
	if (f->disk < 0) /* the manifest */
		return s == f->snap;
	return d == f->disk && s <= f->snap;
}

static bool log_names(const struct file *f)
{
	static char text[1 << 20];
	ssize_t n = pread(log_fd, text, sizeof text - 1, 0);
	const char *name = strrchr(f->path, '/');
	size_t len;

	name = name ? name + 1 : f->path;
	len = strlen(name);
	/* the checksums may be spoken of as those of the image */
	if (len > 5 && strcmp(name + len - 5, ".xxh3") == 0)
		len -= 5;
	if (len > 6 && strcmp(name + len - 6, ".dirty") == 0)
		len -= 6;
	text[n > 0 ? n : 0] = '\0';
	return memmem(text, strlen(text), name, len) != NULL;
}

static void log_begin(void)
{
	FUZZ_CHECK(ftruncate(log_fd, 0) == 0 && lseek(log_fd, 0, SEEK_SET) == 0);
	fflush(stderr);
	FUZZ_CHECK(dup2(log_fd, 2) == 2);
}

static void log_end(void)
{
	fflush(stderr);
	FUZZ_CHECK(dup2(real_stderr, 2) == 2);
}

static _Noreturn void fail(const char *what, const struct file *f, enum op op, int s, int d)
{
	static char text[1 << 16];
	ssize_t n = pread(log_fd, text, sizeof text - 1, 0);

	text[n > 0 ? n : 0] = '\0';
	log_end();
	fprintf(stderr, "%s: %s, %s", what, f->path, op_names[op]);
	if (s >= 0)
		fprintf(stderr, ", view s%d/%s", s, disk_names[d]);
	fprintf(stderr, "\nlog:\n%s(files are in %s)\n", text, t.root);
	exit(1);
}

static int first_name(void *ctx, const char *name)
{
	snprintf(ctx, FF_SNAP_NAME_MAX + 1, "%s", name);
	return 1;
}

static size_t left;

static int count_left(const char *path, const struct stat *st, int type, struct FTW *ftw)
{
	left += ftw->level > 0 && strstr(path, ".qcow2") != NULL;
	return 0;
}

static void drop_all(struct ff_store *store, const struct file *f, enum op op)
{
	char name[FF_SNAP_NAME_MAX + 1];

	while (ff_snap_each(store, first_name, name))
		if (ff_store_drop(store, name))
			fail("it cannot be dropped", f, op, -1, 0);
	FUZZ_CHECK(ff_store_close(store) == 0);
	left = 0;
	nftw(t.fleece, count_left, 16, FTW_PHYS);
	/* what was put there by other hands, or is in nobody's manifest any more, may stay */
	if (left && op != REMOVE && op != NO_FILE && f->disk >= 0)
		fail("images are left after the drop", f, op, -1, 0);
}

static void round_of(const struct file *f, enum op op, bool killed)
{
	struct ff_store *store;
	bool in_tables, some_lost = false;
	char clean[120];
	int error;

	snprintf(clean, sizeof clean, "%s/.clean", t.fleece);
	if (killed)
		FUZZ_CHECK(unlink(clean) == 0);
	if (!damage_one(op, f, &in_tables))
		return;
	log_begin();
	store = damage_open(&error);
	if (!store) {
		if (f->snap >= 0 || !log_names(f))
			fail("the store does not open", f, op, -1, 0);
		log_end();
		return;
	}
	for (int s = 0; s < SNAPS; s++)
		for (int d = 0; d < DISKS; d++) {
			enum outcome o = look(store, s, d);

			if (o == WRONG && killed && in_tables && depends(f, killed, s, d))
				undetected++;
			else if (o == WRONG)
				fail("wrong bytes", f, op, s, d);
			if (o == LOST && !depends(f, killed, s, d))
				fail("a view that does not depend on it is lost", f, op, s, d);
			if (o != LOST && !killed && s == f->snap && d == f->disk &&
			    (op == CLEAR_ENTRY || op == ZERO_ENTRY))
				fail("it was not seen", f, op, s, d);
			some_lost |= o == LOST;
			lost_views += o == LOST;
			right_views += o == RIGHT;
		}
	/* a mark or a record that is not there is as one that never was, another boot in .session
	 * tells of a loss of power; and an entry that is gone unseen leads to a newer image that
	 * has given up the cluster, and names itself */
	if (some_lost && !log_names(f) &&
	    !(op == REMOVE && f->disk < 0 && !strstr(f->path, "/" MANIFEST_NAME)) &&
	    !(killed && in_tables) && strcmp(f->path, ".session") != 0)
		fail("the log does not name it", f, op, -1, 0);
	drop_all(store, f, op);
	log_end();
}

/* --- main ------------------------------------------------------------------------------------- */

int main(int argc, char **argv)
{
	unsigned long seed = (unsigned long)getpid() * 2654435761u ^ (unsigned long)time(NULL);
	unsigned long rounds = 1500;
	struct file *f;

	for (int i = 1; i < argc; i++)
		if (sscanf(argv[i], "--seed=%lu", &seed) != 1 &&
		    sscanf(argv[i], "--rounds=%lu", &rounds) != 1) {
			fprintf(stderr, "usage: damage [--seed=N] [--rounds=N]\n");
			return 2;
		}
	printf("seed %lu\n", seed);
	fflush(stdout);
	t.rng.s = seed;
	ff_log_threshold(FF_LOG_DEBUG); /* each line is looked for */
	log_fd = memfd_create("log", MFD_CLOEXEC);
	real_stderr = fcntl(2, F_DUPFD_CLOEXEC, 10);
	FUZZ_CHECK(log_fd >= 0 && real_stderr >= 0);
	damage_make();
	for (unsigned long i = 0; i < rounds; i++) {
		damage_restore();
		do
			f = &t.files[rng_below(&t.rng, t.file_count)];
		while (f->snap < 0 && !rng_one_in(&t.rng, 4));
		round_of(f, (enum op)rng_below(&t.rng, OPS),
		         rng_one_in(&t.rng, 4) && strcmp(f->path, ".clean") != 0);
	}
	printf("%lu rounds, %lu views right, %lu lost, %lu wrong by an L2 entry\n", rounds,
	       right_views, lost_views, undetected);
	damage_end();
	return 0;
}
