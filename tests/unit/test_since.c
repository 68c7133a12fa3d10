/*
 * What changed between two snapshots stays what it was said to be first: whatever saves of before
 * the newer snapshot are still under way when it is asked for, whatever holes of the source are
 * filled with zeros after it, whichever snapshots in between are dropped, and after a restart.
 *
 * The linker puts this file's io_pread() in the place of that of cow/io.h, to hold a save up.
 */
#include <criterion/criterion.h>
#include <errno.h>
#include <fcntl.h>
#include <glob.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "cow/changes.h"
#include "cow/io.h"
#include "ff_util.h"
#include "fixture.h"

enum { SIZE = 1 << 20, CLUSTER = 4096, ROOM = 4 << 20 };

struct image {
	size_t size;
	char *bytes;
};

static struct fixture fx;
static sem_t held, go_on, made;
static __thread bool hold_pread;

int __real_io_pread(int fd, void *buf, size_t len, uint64_t off, size_t *got);
int __wrap_io_pread(int fd, void *buf, size_t len, uint64_t off, size_t *got);

int __wrap_io_pread(int fd, void *buf, size_t len, uint64_t off, size_t *got)
{
	if (hold_pread) {
		hold_pread = false;
		sem_post(&held);
		sem_wait(&go_on);
	}
	return __real_io_pread(fd, buf, len, off, got);
}

static void setup(void)
{
	fixture_init(&fx, CLUSTER);
	fixture_file(&fx, "a", SIZE, 1);
	fixture_open(&fx);
	sem_init(&held, 0, 0);
	sem_init(&go_on, 0, 0);
	sem_init(&made, 0, 0);
}

static void teardown(void)
{
	fixture_done(&fx);
}

static void write_at(off_t off, size_t len, int with)
{
	char *buf = malloc(len);
	struct ff_disk *d;
	int fd = live_open(&fx, "a", &d);

	memset(buf, with, len);
	cr_assert_eq(live_write(d, fd, buf, len, off), 0);
	ff_disk_put(d);
	close(fd);
	free(buf);
}

static void punch(off_t off, size_t len)
{
	struct ff_change c = {.kind = FF_FALLOCATE,
	                      .mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
	                      .off = off,
	                      .len = len};
	struct ff_disk *d;
	size_t done;

	c.fd = live_open(&fx, "a", &d);
	cr_assert_eq(ff_disk_change(d, &c, &done), 0);
	ff_disk_put(d);
	close(c.fd);
}

/* What "a" is in NEW as against OLD; NULL: nothing. */
static int make(const char *new, const char *old, struct ff_since **out)
{
	struct ff_since_pair pair = {.old_name = old ? old : "-"};
	const struct ff_frozen *root, *f;
	enum ff_since_kind kind;
	const char *stored;
	int r;

	cr_assert_eq(ff_snap_get(fx.store, new, &pair.new), 0);
	if (old)
		cr_assert_eq(ff_snap_get(fx.store, old, &pair.old), 0);
	root = ff_snap_root(pair.new);
	cr_assert_eq(ff_since_find(pair.new, root, "a.qcow2", &kind, &stored, &f), 0);
	cr_assert_eq(kind, FF_SINCE_IMAGE);
	r = ff_since_make(&pair, root, stored, f, out);
	ff_snap_put(pair.new);
	if (old)
		ff_snap_put(pair.old);
	return r;
}

static struct image read_image(const char *new, const char *old)
{
	struct image img = {.bytes = malloc(ROOM)};
	struct ff_since_file *file;
	struct ff_since *s;
	size_t got;

	cr_assert_eq(make(new, old, &s), 0);
	img.size = (size_t)ff_since_image_size(s);
	cr_assert(img.size <= ROOM);
	cr_assert_eq(ff_since_open(s, &file), 0);
	/* in odd pieces */
	for (size_t at = 0; at < img.size; at += got)
		cr_assert_eq(ff_since_read_image(file, img.bytes + at, 10007, (off_t)at, &got), 0);
	ff_since_flushed(file);
	ff_since_close(file);
	ff_since_free(s);
	return img;
}

static void expect_same(struct image a, struct image b)
{
	cr_assert_eq(a.size, b.size);
	cr_assert_eq(memcmp(a.bytes, b.bytes, a.size), 0);
	free(b.bytes);
}

static void *write_held(void *ctx)
{
	hold_pread = true;
	write_at(0, 4 * CLUSTER, 'x');
	return NULL;
}

static void *make_image(void *ctx)
{
	*(struct image *)ctx = read_image("new", "old");
	sem_post(&made);
	return NULL;
}

Test(since, saves_under_way, .init = setup, .fini = teardown, .timeout = 60)
{
	struct image first;
	struct timespec soon;
	pthread_t writer, reader;

	cr_assert_eq(ff_store_freeze(fx.store, "old", 0), 0);
	pthread_create(&writer, NULL, write_held, NULL);
	sem_wait(&held);
	cr_assert_eq(ff_store_freeze(fx.store, "new", 0), 0);
	pthread_create(&reader, NULL, make_image, &first);
	clock_gettime(CLOCK_REALTIME, &soon);
	soon.tv_nsec += 300000000;
	soon.tv_sec += soon.tv_nsec / 1000000000;
	soon.tv_nsec %= 1000000000;
	cr_assert_neq(sem_timedwait(&made, &soon), 0, "not all was known yet");
	sem_post(&go_on);
	pthread_join(writer, NULL);
	pthread_join(reader, NULL);
	expect_same(first, read_image("new", "old"));
	free(first.bytes);
}

Test(since, zeros_over_holes, .init = setup, .fini = teardown, .timeout = 60)
{
	struct image first, whole;

	punch(100 * CLUSTER, 20 * CLUSTER);
	cr_assert_eq(ff_store_freeze(fx.store, "old", 0), 0);
	punch(0, 10 * CLUSTER);
	write_at(50 * CLUSTER, CLUSTER, 'x');
	cr_assert_eq(ff_store_freeze(fx.store, "new", 0), 0);
	first = read_image("new", "old");
	whole = read_image("new", NULL);
	/* what it takes: the header, three tables and an L2 table; the cluster with x */
	cr_assert_eq(first.size, 6 * CLUSTER);
	cr_assert_eq(whole.size, (5 + SIZE / CLUSTER - 30) * CLUSTER);
	write_at(0, 5 * CLUSTER, 0);
	write_at(100 * CLUSTER, 5 * CLUSTER, 0);
	expect_same(first, read_image("new", "old"));
	expect_same(whole, read_image("new", NULL));
	write_at(3 * CLUSTER, 4 * CLUSTER, 'y');
	write_at(50 * CLUSTER, CLUSTER, 'z');
	expect_same(first, read_image("new", "old"));
	expect_same(whole, read_image("new", NULL));
	/* saved by now, or zeros that are data */
	fixture_close(&fx);
	fixture_open(&fx);
	expect_same(first, read_image("new", "old"));
	expect_same(whole, read_image("new", NULL));
	free(first.bytes);
	free(whole.bytes);
}

/* The file that has what was said of the zeros of NEW's view. */
static void said_path(char *out, size_t size)
{
	snprintf(out, size, "%s/new/a-fleece-2.zeros", fx.fleece);
}

static off_t said_size(void)
{
	char path[200];
	struct stat st;

	said_path(path, sizeof path);
	return stat(path, &st) ? -errno : st.st_size;
}

/* A byte at OFF that is wrong, or the file cut there. */
static void damage_said(off_t off, bool cut)
{
	char path[200], byte;
	int fd;

	said_path(path, sizeof path);
	fd = open(path, O_RDWR);
	cr_assert(fd >= 0);
	cr_assert_eq(pread(fd, &byte, 1, off), 1);
	byte ^= 0x10;
	cr_assert_eq(cut ? ftruncate(fd, off) : pwrite(fd, &byte, 1, off) - 1, 0);
	close(fd);
}

/* A hole that is filled with zeros between two mounts, and a cluster with data that becomes one. */
static void turn_over(void)
{
	write_at(100 * CLUSTER, 5 * CLUSTER, 0);
	punch(110 * CLUSTER, 5 * CLUSTER);
}

static void two_views(void)
{
	write_at(110 * CLUSTER, 5 * CLUSTER, 0);
	punch(100 * CLUSTER, 10 * CLUSTER);
	cr_assert_eq(ff_store_freeze(fx.store, "old", 0), 0);
	write_at(50 * CLUSTER, CLUSTER, 'x');
	cr_assert_eq(ff_store_freeze(fx.store, "new", 0), 0);
}

Test(since, same_size_other_bytes, .init = setup, .fini = teardown, .timeout = 60)
{
	struct image first;
	struct stat before;
	char path[200];

	two_views();
	first = read_image("new", NULL);
	turn_over();
	fixture_close(&fx);
	fixture_open(&fx);
	expect_same(first, read_image("new", NULL));
	/* more is known of the chunk now, and the same of what was said */
	free(read_image("new", "old").bytes);
	expect_same(first, read_image("new", NULL));
	free(first.bytes);
	/* it is beside the image for as long as there is a view to read */
	said_path(path, sizeof path);
	cr_assert_eq(stat(path, &before), 0);
	cr_assert_eq(ff_store_drop(fx.store, "new"), 0);
	cr_assert_eq(stat(path, &before), -1);
	cr_assert_eq(count_images(&fx), 1);
}

Test(since, piecewise, .init = setup, .fini = teardown, .timeout = 60)
{
	struct image first, whole;
	off_t size;

	two_views();
	first = read_image("new", "old");
	size = said_size();
	cr_assert(size > 0);
	fixture_close(&fx);
	fixture_open(&fx);
	whole = read_image("new", NULL);
	cr_assert(said_size() > size, "what is new of the chunk was not added");
	turn_over();
	size = said_size();
	fixture_close(&fx);
	fixture_open(&fx);
	expect_same(first, read_image("new", "old"));
	expect_same(whole, read_image("new", NULL));
	cr_assert_eq(said_size(), size, "what was known was added again");
	free(first.bytes);
	free(whole.bytes);
}

Test(since, damaged_zeros, .init = setup, .fini = teardown, .timeout = 60)
{
	static const struct {
		off_t off;
		bool cut;
	} cases[] = {{3, false}, {40, false}, {50, false}, {4200, false},
	             {10, true}, {32, true},  {60, true}};
	struct image again, once;

	two_views();
	free(read_image("new", "old").bytes);
	for (size_t i = 0; i < FF_ARRAY_SIZE(cases); i++) {
		fixture_close(&fx);
		damage_said(cases[i].off, cases[i].cut);
		fixture_open(&fx);
		/* it may be another one, but stays what it is then */
		again = read_image("new", "old");
		fixture_close(&fx);
		fixture_open(&fx);
		once = read_image("new", "old");
		expect_same(again, once);
		free(again.bytes);
	}
}

Test(since, no_place_for_zeros, .init = setup, .fini = teardown, .timeout = 60)
{
	struct ff_since *s;
	char path[200];

	two_views();
	said_path(path, sizeof path);
	cr_assert_eq(mkdir(path, 0700), 0);
	cr_assert_eq(make("new", NULL, &s), -EIO, "it could come out otherwise after a restart");
	cr_assert_eq(rmdir(path), 0);
	cr_assert_eq(make("new", NULL, &s), 0);
	ff_since_free(s);
	cr_assert(said_size() > 0, "what was found out before was not kept");
}

Test(since, full_budget, .init = setup, .fini = teardown, .timeout = 60)
{
	struct ff_store_status full, after;
	struct image first;

	two_views();
	ff_store_status(fx.store, &full);
	fixture_close(&fx);
	fx.config.fleece_limit = full.used_bytes;
	fixture_open(&fx);
	first = read_image("new", NULL);
	cr_assert(said_size() > 0);
	turn_over();
	fixture_close(&fx);
	fixture_open(&fx);
	expect_same(first, read_image("new", NULL));
	free(first.bytes);
	ff_store_status(fx.store, &after);
	cr_assert_gt(after.used_bytes, full.used_bytes, "it counts nevertheless");
	cr_assert_eq(ff_store_drop(fx.store, "old"), 0);
	cr_assert_eq(ff_store_drop(fx.store, "new"), 0);
	ff_store_status(fx.store, &after);
	cr_assert_eq(after.used_bytes, 0);
}

Test(since, budget_of_zeros, .init = setup, .fini = teardown, .timeout = 60)
{
	struct ff_store_status before, after;
	struct ff_snap *snap;

	two_views();
	ff_store_status(fx.store, &before);
	free(read_image("new", NULL).bytes);
	ff_store_status(fx.store, &after);
	cr_assert_gt(after.used_bytes, before.used_bytes);
	before = after;
	fixture_close(&fx);
	fixture_open(&fx);
	ff_store_status(fx.store, &after);
	cr_assert_eq(after.used_bytes, before.used_bytes);
	cr_assert_eq(ff_snap_get(fx.store, "new", &snap), 0);
	cr_assert_eq(ff_snap_checkpoint(snap), 0);
	ff_snap_put(snap);
	ff_store_status(fx.store, &after);
	cr_assert_lt(after.used_bytes, before.used_bytes);
	cr_assert_eq(said_size(), -ENOENT, "a checkpoint keeps what nobody can read");
	cr_assert_eq(ff_store_drop(fx.store, "old"), 0);
	cr_assert_eq(ff_store_drop(fx.store, "new"), 0);
	ff_store_status(fx.store, &after);
	cr_assert_eq(after.used_bytes, 0);
}

/* What a file says is of one freeze: a file of another, of the same number and name, is not this
 * one's. */
Test(since, zeros_of_another_freeze, .init = setup, .fini = teardown, .timeout = 60)
{
	static char data[10 * CLUSTER];
	struct image first, again;
	char path[200], kept[200];

	snprintf(path, sizeof path, "%s/s/a-fleece-1.zeros", fx.fleece);
	snprintf(kept, sizeof kept, "%s/kept", fx.root);
	punch(0, sizeof data);
	cr_assert_eq(ff_store_freeze(fx.store, "s", 0), 0);
	first = read_image("s", NULL);
	cr_assert_eq(rename(path, kept), 0);
	cr_assert_eq(ff_store_drop(fx.store, "s"), 0);
	fixture_close(&fx);
	fixture_open(&fx);
	write_at(0, sizeof data, 'x');
	cr_assert_eq(ff_store_freeze(fx.store, "s", 0), 0);
	fixture_close(&fx);
	cr_assert_eq(rename(kept, path), 0);
	fixture_open(&fx);
	again = read_image("s", NULL);
	cr_assert_eq(again.size, first.size + sizeof data);
	memset(data, 'x', sizeof data);
	cr_assert(memmem(again.bytes, again.size, data, sizeof data) != NULL);
	free(first.bytes);
	free(again.bytes);
}

/* So is not what an image that has data contradicts. */
Test(since, zeros_that_are_data, .init = setup, .fini = teardown, .timeout = 60)
{
	static const enum ff_said_kind kinds[] = {FF_SAID_ZERO, FF_SAID_BITS, FF_SAID_SOME};
	uint64_t bits[FF_SAID_WORDS] = {1 << 7}; /* the cluster that is saved, and no other */
	struct image first, again;
	struct ff_snap *snap;

	cr_assert_eq(ff_store_freeze(fx.store, "new", 0), 0);
	first = read_image("new", NULL);
	write_at(7 * CLUSTER, CLUSTER, 'x');
	for (size_t i = 0; i < FF_ARRAY_SIZE(kinds); i++) {
		struct ff_said said = {.kind = kinds[i], .known = bits, .zero = bits};
		uint64_t end = 0;

		fixture_close(&fx);
		fixture_open(&fx);
		cr_assert_eq(ff_snap_get(fx.store, "new", &snap), 0);
		cr_assert_eq(
		    ff_image_said_add(snap->links[0]->img, snap->made, &end, &said, 1, false), 0);
		ff_snap_put(snap);
		again = read_image("new", NULL);
		expect_same(first, again);
	}
	free(first.bytes);
}

/* What nothing is known of is not zeros, whatever the file says. */
Test(since, zeros_of_the_unknown, .init = setup, .fini = teardown, .timeout = 60)
{
	uint64_t known[FF_SAID_WORDS] = {1 << 3}, zero[FF_SAID_WORDS] = {1 << 7};
	struct ff_said said = {.kind = FF_SAID_SOME, .known = known, .zero = zero};
	struct image first, again;
	struct ff_snap *snap;
	uint64_t end = 0;

	cr_assert_eq(ff_store_freeze(fx.store, "new", 0), 0);
	first = read_image("new", NULL);
	fixture_close(&fx);
	fixture_open(&fx);
	cr_assert_eq(ff_snap_get(fx.store, "new", &snap), 0);
	cr_assert_eq(ff_image_said_add(snap->links[0]->img, snap->made, &end, &said, 1, false), 0);
	ff_snap_put(snap);
	again = read_image("new", NULL);
	expect_same(first, again);
	free(first.bytes);
}

/* Killed before it was forgotten, as a checkpoint and as a dropped snapshot whose image stays. */
Test(since, zeros_left_by_a_kill, .init = setup, .fini = teardown, .timeout = 60)
{
	struct ff_store_status before, after;
	char path[200], kept[200], hidden[200];
	struct ff_snap *snap;
	glob_t found;

	snprintf(kept, sizeof kept, "%s/kept", fx.root);
	snprintf(hidden, sizeof hidden, "%s/.dropped-*/a-fleece-2.qcow2", fx.fleece);
	said_path(path, sizeof path);
	two_views();
	write_at(20 * CLUSTER, CLUSTER, 'y');
	free(read_image("new", NULL).bytes);
	cr_assert_eq(link(path, kept), 0);
	cr_assert_eq(ff_snap_get(fx.store, "new", &snap), 0);
	cr_assert_eq(ff_snap_checkpoint(snap), 0);
	ff_snap_put(snap);
	ff_store_status(fx.store, &before);
	fixture_close(&fx);
	cr_assert_eq(link(kept, path), 0);
	fixture_open(&fx);
	cr_assert_eq(said_size(), -ENOENT);
	ff_store_status(fx.store, &after);
	cr_assert_eq(after.used_bytes, before.used_bytes);
	cr_assert_eq(ff_store_drop(fx.store, "new"), 0);
	ff_store_status(fx.store, &before);
	fixture_close(&fx);
	cr_assert_eq(glob(hidden, 0, NULL, &found), 0, "the older view needs it");
	strcpy(strrchr(strcpy(path, found.gl_pathv[0]), '.'), ".zeros");
	globfree(&found);
	cr_assert_eq(link(kept, path), 0);
	fixture_open(&fx);
	cr_assert_eq(access(path, F_OK), -1);
	ff_store_status(fx.store, &after);
	cr_assert_eq(after.used_bytes, before.used_bytes);
}

/* Something else in its place: it is made anew, and counts for what it takes. */
Test(since, strange_zeros, .init = setup, .fini = teardown, .timeout = 60)
{
	struct ff_store_status before, after;
	char path[200], other[200];
	struct stat st;
	int fd;

	said_path(path, sizeof path);
	snprintf(other, sizeof other, "%s/other", fx.root);
	two_views();
	ff_store_status(fx.store, &before);
	fixture_close(&fx);
	fd = open(path, O_RDWR | O_CREAT | O_EXCL, 0600);
	cr_assert(fd >= 0 && !ftruncate(fd, (off_t)1 << 42) && !close(fd));
	fixture_open(&fx);
	ff_store_status(fx.store, &after);
	cr_assert_eq(after.used_bytes, before.used_bytes);
	free(read_image("new", NULL).bytes);
	cr_assert_lt(said_size(), 1 << 20);
	fixture_close(&fx);
	cr_assert(rename(path, other) == 0 && symlink("../../other", path) == 0);
	fixture_open(&fx);
	free(read_image("new", NULL).bytes);
	cr_assert(lstat(path, &st) == 0 && S_ISREG(st.st_mode));
	fixture_close(&fx);
	cr_assert(unlink(path) == 0 && mkfifo(path, 0600) == 0);
	fixture_open(&fx);
	free(read_image("new", NULL).bytes);
	cr_assert(lstat(path, &st) == 0 && S_ISREG(st.st_mode));
	cr_assert(stat(other, &st) == 0 && st.st_size > 0);
}

/* Whether cluster AT of the newest view is said to be zeros, which is kept at once. */
static bool ask(struct link *l, unsigned at)
{
	uint64_t wanted[CHANGES_WORDS] = {0}, zero[CHANGES_WORDS];

	bits_set(wanted, at % CHANGES_MAX, at % CHANGES_MAX + 1);
	disk_use(l->disk);
	cr_assert_eq(zeros_bits(l, at / CHANGES_MAX, wanted, zero), 0);
	cr_assert_eq(zeros_keep(l), 0);
	disk_unuse(l->disk);
	return bits_find(zero, 0, CHANGES_MAX, true) == at % CHANGES_MAX;
}

/* One cluster more each time, again and again: the file does not grow for ever, and says the same
 * when the source would say something else. */
Test(since, zeros_made_smaller, .init = setup, .fini = teardown, .timeout = 60)
{
	struct ff_store_status empty, after;
	bool said[SIZE / CLUSTER], shrunk = false;
	unsigned far = CHANGES_MAX + 7; /* of another chunk, which is asked about only once */
	struct ff_snap *snap;
	char left[200];
	off_t last = 0;
	int fd;

	snprintf(left, sizeof left, "%s/a", fx.source);
	cr_assert_eq(truncate(left, (off_t)(far + 7) * CLUSTER), 0);
	two_views();
	ff_store_status(fx.store, &empty);
	cr_assert_eq(ff_snap_get(fx.store, "new", &snap), 0);
	cr_assert(ask(snap->links[0], far));
	for (unsigned i = 98; i < 118; i++) {
		said[i] = ask(snap->links[0], i);
		cr_assert_eq(said[i], i >= 100 && i < 110);
		cr_assert(said_size() <= 65536, "it only grows");
		shrunk |= said_size() < last;
		last = said_size();
	}
	cr_assert(shrunk);
	ff_snap_put(snap);
	ff_store_status(fx.store, &after);
	cr_assert_eq(after.used_bytes - empty.used_bytes, ff_round_up((uint64_t)last, 4096));
	turn_over();
	write_at((off_t)far * CLUSTER, CLUSTER, 0);
	fixture_close(&fx);
	snprintf(left, sizeof left, "%s/new/a-fleece-2.zero~", fx.fleece);
	fd = open(left, O_WRONLY | O_CREAT | O_EXCL, 0600);
	cr_assert(fd >= 0 && !close(fd));
	fixture_open(&fx);
	cr_assert_eq(access(left, F_OK), -1, "what a kill left stays");
	cr_assert_eq(ff_snap_get(fx.store, "new", &snap), 0);
	for (unsigned i = 98; i < 118; i++)
		cr_assert_eq(ask(snap->links[0], i), said[i]);
	cr_assert(ask(snap->links[0], far));
	ff_snap_put(snap);
	cr_assert_eq(said_size(), last);
}

/* Where it cannot be made smaller, it is added to. */
Test(since, zeros_stay_large, .init = setup, .fini = teardown, .timeout = 60)
{
	struct ff_snap *snap;
	char way[200];

	fixture_close(&fx);
	fx.config.durable = true;
	fixture_open(&fx);
	two_views();
	snprintf(way, sizeof way, "%s/new/a-fleece-2.zero~", fx.fleece);
	cr_assert_eq(mkdir(way, 0700), 0);
	cr_assert_eq(ff_snap_get(fx.store, "new", &snap), 0);
	for (unsigned i = 98; i < 118; i++)
		cr_assert_eq(ask(snap->links[0], i), i >= 100 && i < 110);
	cr_assert(said_size() > 65536);
	cr_assert_eq(rmdir(way), 0);
	ask(snap->links[0], 118);
	cr_assert(said_size() < 65536);
	ff_snap_put(snap);
}

Test(since, snapshots_between, .init = setup, .fini = teardown, .timeout = 60)
{
	static const char *const names[] = {"old", "one", "two", "three", "new"};
	struct image first;

	for (size_t i = 0; i < 5; i++) {
		cr_assert_eq(ff_store_freeze(fx.store, names[i], 0), 0);
		write_at((off_t)(i * 3) * CLUSTER + 5, 5 * CLUSTER, 'a' + (int)i);
		if (i == 1)
			punch(30 * CLUSTER, 3 * CLUSTER);
	}
	first = read_image("new", "old");
	cr_assert_eq(ff_store_drop(fx.store, "two"), 0);
	expect_same(first, read_image("new", "old"));
	cr_assert_eq(ff_store_drop(fx.store, "one"), 0);
	expect_same(first, read_image("new", "old"));
	fixture_close(&fx);
	fixture_open(&fx);
	expect_same(first, read_image("new", "old"));
	cr_assert_eq(ff_store_drop(fx.store, "three"), 0);
	expect_same(first, read_image("new", "old"));
	free(first.bytes);
}

Test(since, broken, .init = setup, .fini = teardown, .timeout = 60)
{
	struct ff_since *s;
	struct ff_disk *d;
	int fd;

	cr_assert_eq(ff_store_freeze(fx.store, "old", 0), 0);
	fd = live_open(&fx, "a", &d);
	cr_assert_eq(chain_break_all(d, "of a test"), 0);
	ff_disk_put(d);
	close(fd);
	write_at(0, CLUSTER, 'x');
	cr_assert_eq(ff_store_freeze(fx.store, "new", 0), 0);
	cr_assert_eq(make("new", "old", &s), -EIO);
	cr_assert_eq(make("new", NULL, &s), 0);
	ff_since_free(s);
}
