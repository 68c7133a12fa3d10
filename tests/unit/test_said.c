/*
 * What was said of a view's zeros stands beside its image, and is said again after a restart,
 * whatever has become of the source's holes; and it is believed of that freeze alone, and of no
 * damaged file.
 */
#include <criterion/criterion.h>
#include <errno.h>
#include <fcntl.h>
#include <glob.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "cow/changes.h"
#include "ff_util.h"
#include "since_disk.h"

TestSuite(said, .init = since_setup, .fini = since_teardown, .timeout = 60);

/* The file that has what was said of the zeros of NEW's view. */
static void said_path(char *out, size_t size)
{
	snprintf(out, size, "%s/new/a-fleece-2.zeros", since_fx.fleece);
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
	since_write(100 * CLUSTER, 5 * CLUSTER, 0);
	since_punch(110 * CLUSTER, 5 * CLUSTER);
}

static void two_views(void)
{
	since_write(110 * CLUSTER, 5 * CLUSTER, 0);
	since_punch(100 * CLUSTER, 10 * CLUSTER);
	cr_assert_eq(ff_store_freeze(since_fx.store, "old", 0), 0);
	since_write(50 * CLUSTER, CLUSTER, 'x');
	cr_assert_eq(ff_store_freeze(since_fx.store, "new", 0), 0);
}

Test(said, same_size_other_bytes)
{
	struct image first;
	struct stat before;
	char path[200];

	two_views();
	first = since_image("new", NULL);
	turn_over();
	fixture_close(&since_fx);
	fixture_open(&since_fx);
	since_expect_same(first, since_image("new", NULL));
	/* more is known of the chunk now, and the same of what was said */
	free(since_image("new", "old").bytes);
	since_expect_same(first, since_image("new", NULL));
	free(first.bytes);
	/* it is beside the image for as long as there is a view to read */
	said_path(path, sizeof path);
	cr_assert_eq(stat(path, &before), 0);
	cr_assert_eq(ff_store_drop(since_fx.store, "new"), 0);
	cr_assert_eq(stat(path, &before), -1);
	cr_assert_eq(count_images(&since_fx), 1);
}

Test(said, piecewise)
{
	struct image first, whole;
	off_t size;

	two_views();
	first = since_image("new", "old");
	size = said_size();
	cr_assert(size > 0);
	fixture_close(&since_fx);
	fixture_open(&since_fx);
	whole = since_image("new", NULL);
	cr_assert(said_size() > size, "what is new of the chunk was not added");
	turn_over();
	size = said_size();
	fixture_close(&since_fx);
	fixture_open(&since_fx);
	since_expect_same(first, since_image("new", "old"));
	since_expect_same(whole, since_image("new", NULL));
	cr_assert_eq(said_size(), size, "what was known was added again");
	free(first.bytes);
	free(whole.bytes);
}

Test(said, damaged_zeros)
{
	static const struct {
		off_t off;
		bool cut;
	} cases[] = {{3, false}, {40, false}, {50, false}, {4200, false},
	             {10, true}, {32, true},  {60, true}};
	struct image again, once;

	two_views();
	free(since_image("new", "old").bytes);
	for (size_t i = 0; i < FF_ARRAY_SIZE(cases); i++) {
		fixture_close(&since_fx);
		damage_said(cases[i].off, cases[i].cut);
		fixture_open(&since_fx);
		/* it may be another one, but stays what it is then */
		again = since_image("new", "old");
		fixture_close(&since_fx);
		fixture_open(&since_fx);
		once = since_image("new", "old");
		since_expect_same(again, once);
		free(again.bytes);
	}
}

Test(said, no_place_for_zeros)
{
	struct ff_since *s;
	char path[200];

	two_views();
	said_path(path, sizeof path);
	cr_assert_eq(mkdir(path, 0700), 0);
	cr_assert_eq(since_make("new", NULL, &s), -EIO,
	             "it could come out otherwise after a restart");
	cr_assert_eq(rmdir(path), 0);
	cr_assert_eq(since_make("new", NULL, &s), 0);
	ff_since_free(s);
	cr_assert(said_size() > 0, "what was found out before was not kept");
}

Test(said, full_budget)
{
	struct ff_store_status full, after;
	struct image first;

	two_views();
	ff_store_status(since_fx.store, &full);
	fixture_close(&since_fx);
	since_fx.config.fleece_limit = full.used_bytes;
	fixture_open(&since_fx);
	first = since_image("new", NULL);
	cr_assert(said_size() > 0);
	turn_over();
	fixture_close(&since_fx);
	fixture_open(&since_fx);
	since_expect_same(first, since_image("new", NULL));
	free(first.bytes);
	ff_store_status(since_fx.store, &after);
	cr_assert_gt(after.used_bytes, full.used_bytes, "it counts nevertheless");
	cr_assert_eq(ff_store_drop(since_fx.store, "old"), 0);
	cr_assert_eq(ff_store_drop(since_fx.store, "new"), 0);
	ff_store_status(since_fx.store, &after);
	cr_assert_eq(after.used_bytes, 0);
}

Test(said, budget_of_zeros)
{
	struct ff_store_status before, after;
	struct ff_snap *snap;

	two_views();
	ff_store_status(since_fx.store, &before);
	free(since_image("new", NULL).bytes);
	ff_store_status(since_fx.store, &after);
	cr_assert_gt(after.used_bytes, before.used_bytes);
	before = after;
	fixture_close(&since_fx);
	fixture_open(&since_fx);
	ff_store_status(since_fx.store, &after);
	cr_assert_eq(after.used_bytes, before.used_bytes);
	cr_assert_eq(ff_snap_get(since_fx.store, "new", &snap), 0);
	cr_assert_eq(ff_snap_checkpoint(snap), 0);
	ff_snap_put(snap);
	ff_store_status(since_fx.store, &after);
	cr_assert_lt(after.used_bytes, before.used_bytes);
	cr_assert_eq(said_size(), -ENOENT, "a checkpoint keeps what nobody can read");
	cr_assert_eq(ff_store_drop(since_fx.store, "old"), 0);
	cr_assert_eq(ff_store_drop(since_fx.store, "new"), 0);
	ff_store_status(since_fx.store, &after);
	cr_assert_eq(after.used_bytes, 0);
}

/* What a file says is of one freeze: a file of another, of the same number and name, is not this
 * one's. */
Test(said, zeros_of_another_freeze)
{
	static char data[10 * CLUSTER];
	struct image first, again;
	char path[200], kept[200];

	snprintf(path, sizeof path, "%s/s/a-fleece-1.zeros", since_fx.fleece);
	snprintf(kept, sizeof kept, "%s/kept", since_fx.root);
	since_punch(0, sizeof data);
	cr_assert_eq(ff_store_freeze(since_fx.store, "s", 0), 0);
	first = since_image("s", NULL);
	cr_assert_eq(rename(path, kept), 0);
	cr_assert_eq(ff_store_drop(since_fx.store, "s"), 0);
	fixture_close(&since_fx);
	fixture_open(&since_fx);
	since_write(0, sizeof data, 'x');
	cr_assert_eq(ff_store_freeze(since_fx.store, "s", 0), 0);
	fixture_close(&since_fx);
	cr_assert_eq(rename(kept, path), 0);
	fixture_open(&since_fx);
	again = since_image("s", NULL);
	cr_assert_eq(again.size, first.size + sizeof data);
	memset(data, 'x', sizeof data);
	cr_assert(memmem(again.bytes, again.size, data, sizeof data) != NULL);
	free(first.bytes);
	free(again.bytes);
}

/* So is not what an image that has data contradicts. */
Test(said, zeros_that_are_data)
{
	static const enum ff_said_kind kinds[] = {FF_SAID_ZERO, FF_SAID_BITS, FF_SAID_SOME};
	uint64_t bits[FF_SAID_WORDS] = {1 << 7}; /* the cluster that is saved, and no other */
	struct image first, again;
	struct ff_snap *snap;

	cr_assert_eq(ff_store_freeze(since_fx.store, "new", 0), 0);
	first = since_image("new", NULL);
	since_write(7 * CLUSTER, CLUSTER, 'x');
	for (size_t i = 0; i < FF_ARRAY_SIZE(kinds); i++) {
		struct ff_said said = {.kind = kinds[i], .known = bits, .zero = bits};
		uint64_t end = 0;

		fixture_close(&since_fx);
		fixture_open(&since_fx);
		cr_assert_eq(ff_snap_get(since_fx.store, "new", &snap), 0);
		cr_assert_eq(
		    ff_image_said_add(snap->links[0]->img, snap->made, &end, &said, 1, false), 0);
		ff_snap_put(snap);
		again = since_image("new", NULL);
		since_expect_same(first, again);
	}
	free(first.bytes);
}

/* What nothing is known of is not zeros, whatever the file says. */
Test(said, zeros_of_the_unknown)
{
	uint64_t known[FF_SAID_WORDS] = {1 << 3}, zero[FF_SAID_WORDS] = {1 << 7};
	struct ff_said said = {.kind = FF_SAID_SOME, .known = known, .zero = zero};
	struct image first, again;
	struct ff_snap *snap;
	uint64_t end = 0;

	cr_assert_eq(ff_store_freeze(since_fx.store, "new", 0), 0);
	first = since_image("new", NULL);
	fixture_close(&since_fx);
	fixture_open(&since_fx);
	cr_assert_eq(ff_snap_get(since_fx.store, "new", &snap), 0);
	cr_assert_eq(ff_image_said_add(snap->links[0]->img, snap->made, &end, &said, 1, false), 0);
	ff_snap_put(snap);
	again = since_image("new", NULL);
	since_expect_same(first, again);
	free(first.bytes);
}

/* Killed before it was forgotten, as a checkpoint and as a dropped snapshot whose image stays. */
Test(said, zeros_left_by_a_kill)
{
	struct ff_store_status before, after;
	char path[200], kept[200], hidden[200];
	struct ff_snap *snap;
	glob_t found;

	snprintf(kept, sizeof kept, "%s/kept", since_fx.root);
	snprintf(hidden, sizeof hidden, "%s/.dropped-*/a-fleece-2.qcow2", since_fx.fleece);
	said_path(path, sizeof path);
	two_views();
	since_write(20 * CLUSTER, CLUSTER, 'y');
	free(since_image("new", NULL).bytes);
	cr_assert_eq(link(path, kept), 0);
	cr_assert_eq(ff_snap_get(since_fx.store, "new", &snap), 0);
	cr_assert_eq(ff_snap_checkpoint(snap), 0);
	ff_snap_put(snap);
	ff_store_status(since_fx.store, &before);
	fixture_close(&since_fx);
	cr_assert_eq(link(kept, path), 0);
	fixture_open(&since_fx);
	cr_assert_eq(said_size(), -ENOENT);
	ff_store_status(since_fx.store, &after);
	cr_assert_eq(after.used_bytes, before.used_bytes);
	cr_assert_eq(ff_store_drop(since_fx.store, "new"), 0);
	ff_store_status(since_fx.store, &before);
	fixture_close(&since_fx);
	cr_assert_eq(glob(hidden, 0, NULL, &found), 0, "the older view needs it");
	strcpy(strrchr(strcpy(path, found.gl_pathv[0]), '.'), ".zeros");
	globfree(&found);
	cr_assert_eq(link(kept, path), 0);
	fixture_open(&since_fx);
	cr_assert_eq(access(path, F_OK), -1);
	ff_store_status(since_fx.store, &after);
	cr_assert_eq(after.used_bytes, before.used_bytes);
}

/* Something else in its place: it is made anew, and counts for what it takes. */
Test(said, strange_zeros)
{
	struct ff_store_status before, after;
	char path[200], other[200];
	struct stat st;
	int fd;

	said_path(path, sizeof path);
	snprintf(other, sizeof other, "%s/other", since_fx.root);
	two_views();
	ff_store_status(since_fx.store, &before);
	fixture_close(&since_fx);
	fd = open(path, O_RDWR | O_CREAT | O_EXCL, 0600);
	cr_assert(fd >= 0 && !ftruncate(fd, (off_t)1 << 42) && !close(fd));
	fixture_open(&since_fx);
	ff_store_status(since_fx.store, &after);
	cr_assert_eq(after.used_bytes, before.used_bytes);
	free(since_image("new", NULL).bytes);
	cr_assert_lt(said_size(), 1 << 20);
	fixture_close(&since_fx);
	cr_assert(rename(path, other) == 0 && symlink("../../other", path) == 0);
	fixture_open(&since_fx);
	free(since_image("new", NULL).bytes);
	cr_assert(lstat(path, &st) == 0 && S_ISREG(st.st_mode));
	fixture_close(&since_fx);
	cr_assert(unlink(path) == 0 && mkfifo(path, 0600) == 0);
	fixture_open(&since_fx);
	free(since_image("new", NULL).bytes);
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
Test(said, zeros_made_smaller)
{
	struct ff_store_status empty, after;
	bool said[SIZE / CLUSTER], shrunk = false;
	unsigned far = CHANGES_MAX + 7; /* of another chunk, which is asked about only once */
	struct ff_snap *snap;
	char left[200];
	off_t last = 0;
	int fd;

	snprintf(left, sizeof left, "%s/a", since_fx.source);
	cr_assert_eq(truncate(left, (off_t)(far + 7) * CLUSTER), 0);
	two_views();
	ff_store_status(since_fx.store, &empty);
	cr_assert_eq(ff_snap_get(since_fx.store, "new", &snap), 0);
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
	ff_store_status(since_fx.store, &after);
	cr_assert_eq(after.used_bytes - empty.used_bytes, ff_round_up((uint64_t)last, 4096));
	turn_over();
	since_write((off_t)far * CLUSTER, CLUSTER, 0);
	fixture_close(&since_fx);
	snprintf(left, sizeof left, "%s/new/a-fleece-2.zero~", since_fx.fleece);
	fd = open(left, O_WRONLY | O_CREAT | O_EXCL, 0600);
	cr_assert(fd >= 0 && !close(fd));
	fixture_open(&since_fx);
	cr_assert_eq(access(left, F_OK), -1, "what a kill left stays");
	cr_assert_eq(ff_snap_get(since_fx.store, "new", &snap), 0);
	for (unsigned i = 98; i < 118; i++)
		cr_assert_eq(ask(snap->links[0], i), said[i]);
	cr_assert(ask(snap->links[0], far));
	ff_snap_put(snap);
	cr_assert_eq(said_size(), last);
}

/* Where it cannot be made smaller, it is added to. */
Test(said, zeros_stay_large)
{
	struct ff_snap *snap;
	char way[200];

	fixture_close(&since_fx);
	since_fx.config.durable = true;
	fixture_open(&since_fx);
	two_views();
	snprintf(way, sizeof way, "%s/new/a-fleece-2.zero~", since_fx.fleece);
	cr_assert_eq(mkdir(way, 0700), 0);
	cr_assert_eq(ff_snap_get(since_fx.store, "new", &snap), 0);
	for (unsigned i = 98; i < 118; i++)
		cr_assert_eq(ask(snap->links[0], i), i >= 100 && i < 110);
	cr_assert(said_size() > 65536);
	cr_assert_eq(rmdir(way), 0);
	ask(snap->links[0], 118);
	cr_assert(said_size() < 65536);
	ff_snap_put(snap);
}
