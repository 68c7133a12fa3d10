/*
 * Space given back while a view is read: what is given up, by whom, and what must stay.
 */
#include <criterion/criterion.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "cow/engine.h"
#include "ff_log.h"
#include "ff_util.h"
#include "five.h"

enum { MIB = 1 << 20, BIG = 200 };

static bool released[SNAPS][CLUSTERS];

TestSuite(consume, .init = five_setup, .fini = five_teardown);

static void freeze(int i)
{
	five_freeze(i);
	memset(released[i], 0, sizeof released[i]);
}

static struct ff_snap *snap_of(int i)
{
	struct ff_snap *snap;

	cr_assert_eq(ff_snap_get(fx.store, five_name_of(i), &snap), 0);
	return snap;
}

static struct ff_reader *reader_of(const char *snapshot, const char *name)
{
	const struct ff_frozen *f;
	struct ff_reader *rd;
	struct ff_snap *snap;

	cr_assert_eq(ff_snap_get(fx.store, snapshot, &snap), 0);
	cr_assert_eq(ff_frozen_lookup(snap, ff_snap_root(snap), name, &f), 0);
	cr_assert_eq(ff_reader_open(snap, f, &rd), 0);
	ff_snap_put(snap);
	return rd;
}

static void give_up(int i, size_t off, size_t len)
{
	struct ff_reader *rd = reader_of(five_name_of(i), "disk");

	cr_assert_eq(ff_reader_release(rd, (off_t)off, (off_t)len), 0);
	ff_reader_close(rd);
	for (size_t c = ff_div_up(off, CLUSTER); c < CLUSTERS; c++)
		if ((c + 1) * CLUSTER <= off + len || off + len >= SIZE)
			released[i][c] = true;
}

/* Cluster by cluster: what was given up is an error, all else is right; holes and data are told
 * right; what changed is known. */
static void expect(int i)
{
	struct ff_reader *rd = reader_of(five_name_of(i), "disk");
	struct ff_snap *snap = snap_of(i);
	char buf[2 * CLUSTER];

	for (size_t c = 0; c < CLUSTERS; c++) {
		size_t off = c * CLUSTER, len = FF_MIN((size_t)CLUSTER, SIZE - off), got;
		int r = ff_reader_read(rd, buf, CLUSTER, (off_t)off, &got);
		bool known = false;
		off_t at;

		if (released[i][c]) {
			cr_assert_eq(r, -EIO, "s%d: cluster %zu can be read", i, c);
			cr_assert_eq(ff_reader_seek(rd, (off_t)off + 1, SEEK_DATA, &at), 0);
			cr_assert_eq(at, (off_t)off + 1);
		} else {
			cr_assert_eq(r, 0, "s%d: cluster %zu: %s", i, c, strerror(-r));
			cr_assert_eq(got, len);
			cr_assert_eq(memcmp(buf, views[i] + off, len), 0,
			             "s%d: cluster %zu is wrong", i, c);
		}
		for (struct link *l = snap->links[0]; l; l = atomic_load(&l->newer))
			known |= ff_image_marked(l->img, c);
		if (memcmp(views[i] + off, live + off, len) != 0)
			cr_assert(known, "s%d: cluster %zu changed, and is not known", i, c);
		cr_assert(!known || touched[i][c], "s%d: cluster %zu did not change", i, c);
	}
	ff_reader_close(rd);
	ff_snap_put(snap);
}

static uint64_t saved_in(int i)
{
	struct ff_snap *snap = snap_of(i);
	uint64_t bytes = ff_image_preserved(snap->links[0]->img);

	ff_snap_put(snap);
	return bytes;
}

static uint64_t released_of(const char *snapshot, const char *name)
{
	struct ff_disk_status st;
	const struct ff_frozen *f;
	struct ff_snap *snap;

	cr_assert_eq(ff_snap_get(fx.store, snapshot, &snap), 0);
	cr_assert_eq(ff_frozen_lookup(snap, ff_snap_root(snap), name, &f), 0);
	cr_assert_eq(ff_frozen_status(snap, f, &st), 0);
	cr_assert_eq(st.state, FF_VIEW_OK);
	ff_snap_put(snap);
	return st.released_bytes;
}

Test(consume, a_range_is_given_up)
{
	freeze(0);
	five_change(0, 100000, 2);
	cr_assert_eq(saved_in(0), 25 * CLUSTER);
	give_up(0, 5000, 20000); /* clusters 2 to 5 */
	cr_assert_eq(saved_in(0), 21 * CLUSTER);
	cr_assert_eq(released_of("s0", "disk"), 4 * CLUSTER);
	expect(0);
	give_up(0, 150000, 50000);
	five_change(140000, 100000, 3);
	cr_assert_eq(saved_in(0), (21 + 25 - 11) * CLUSTER, "%llu",
	             (unsigned long long)saved_in(0));
	expect(0);
	give_up(0, 299000, 10000); /* with the end, which is no whole cluster */
	expect(0);
	for (int i = 0; i < 2; i++) {
		five_remount();
		expect(0);
	}
	cr_assert_eq(frozen_error(&fx, "s0", "disk"), -EIO);
	five_shell("qemu-img check -q $F/s0/disk-fleece-1.qcow2");
	cr_assert_eq(ff_store_drop(fx.store, "s0"), 0);
	cr_assert_eq(count_images(&fx), 0);
}

Test(consume, others_keep_what_they_need)
{
	freeze(0);
	five_change(0, 20000, 2);
	freeze(1);
	five_change(10000, 90000, 3);
	freeze(2);
	five_change(50000, 90000, 4);
	give_up(1, 0, 200000);
	expect(0);
	expect(1);
	expect(2);
	five_change(100000, 150000, 5);
	expect(0);
	expect(1);
	expect(2);
	cr_assert_eq(ff_store_drop(fx.store, "s0"), 0);
	cr_assert_eq(saved_in(1), 0, "it was s0's only");
	expect(1);
	expect(2);
	five_remount();
	expect(1);
	expect(2);
}

Test(consume, at_random)
{
	enum { GONE, WHOLE, GIVEN } state[SNAPS] = {GONE};
	unsigned x = 4321;

	for (int step = 0; step < 1200; step++) {
		struct ff_snap *snap;
		int i;

		x = x * 1103515245 + 12345;
		i = (int)((x >> 20) % SNAPS);
		switch ((x >> 16) % 9) {
		case 0:
			if (state[i] != GONE)
				cr_assert_eq(ff_store_drop(fx.store, five_name_of(i)), 0);
			state[i] = GONE;
			break;
		case 1:
		case 2:
			if (state[i] == GONE) {
				freeze(i);
				state[i] = WHOLE;
			}
			break;
		case 3:
			if (state[i] == WHOLE && x >> 30 == 0) {
				snap = snap_of(i);
				cr_assert_eq(ff_snap_checkpoint(snap), 0);
				ff_snap_put(snap);
				state[i] = GIVEN;
			}
			break;
		case 4:
			if (x >> 28 == 0)
				five_remount();
			break;
		case 5:
			if (state[i] == WHOLE)
				give_up(i, (x >> 8) % SIZE, 1 + (x >> 3) % 60000);
			break;
		default:
			five_change((x >> 8) % (SIZE - 9000), 1 + (x >> 4) % 9000,
			            (unsigned)step + 10);
		}
		for (int k = 0; k < SNAPS && step % 4 == 0; k++)
			if (state[k] == WHOLE)
				expect(k);
	}
}

/* --- by reading --------------------------------------------------------------------------------
 */

/* A disk of BIG MiB: every other of the first is data. */
static void make_big(void)
{
	int fd = openat(fx.source_fd, "big", O_CREAT | O_WRONLY, 0600);
	static char buf[MIB];

	cr_assert_geq(fd, 0);
	cr_assert_eq(ftruncate(fd, (off_t)BIG * MIB), 0);
	for (int i = 0; i < BIG; i += 2) {
		fill(buf, 8192, (unsigned)i);
		cr_assert_eq(pwrite(fd, buf, 8192, (off_t)i * MIB), 8192);
	}
	close(fd);
	freeze(0);
}

static void switch_on(bool on)
{
	struct ff_snap *snap = snap_of(0);

	cr_assert_eq(ff_snap_consume(snap, NULL, on), 0);
	ff_snap_put(snap);
}

static int read_at(struct ff_reader *rd, off_t off, size_t len)
{
	static char buf[4 * MIB];
	size_t got = 0;
	int r = ff_reader_read(rd, buf, len, off, &got);

	if (!r)
		ff_reader_passed(rd, off, got);
	return r;
}

static void read_mib(struct ff_reader *rd, int from, int to)
{
	for (int i = from; i < to; i++)
		cr_assert_eq(read_at(rd, (off_t)i * MIB, MIB), 0, "MiB %d", i);
}

static uint64_t mib_given_up(void)
{
	return released_of("s0", "big") / MIB;
}

Test(consume, a_reader_gives_up_what_it_leaves_behind)
{
	struct ff_reader *rd, *slow;

	make_big();
	rd = reader_of("s0", "big");
	read_mib(rd, 0, BIG);
	cr_assert_eq(mib_given_up(), 0, "it was not switched on");
	ff_reader_close(rd);

	switch_on(true);
	rd = reader_of("s0", "big");
	read_mib(rd, 0, 71);
	cr_assert_eq(mib_given_up(), 0);
	read_mib(rd, 71, 100);
	cr_assert_geq(mib_given_up(), 32);
	cr_assert_leq(mib_given_up(), 36);
	cr_assert_eq(read_at(rd, (off_t)36 * MIB, MIB), 0, "less than 64 MiB behind");
	cr_assert_eq(read_at(rd, 0, MIB), -EIO);

	/* the slowest counts */
	slow = reader_of("s0", "big");
	read_mib(rd, 100, 150);
	cr_assert_leq(mib_given_up(), 36);
	read_mib(slow, 36, 110);
	read_mib(rd, 150, 160);
	cr_assert_leq(mib_given_up(), 46);
	cr_assert_geq(mib_given_up(), 40);
	ff_reader_close(slow);
	read_mib(rd, 160, BIG);
	cr_assert_geq(mib_given_up(), BIG - 64 - 16);
	cr_assert_leq(mib_given_up(), BIG - 64);
	cr_assert_eq(read_at(rd, 199 * MIB, MIB), 0);
	ff_reader_close(rd);
}

Test(consume, one_that_jumps_gives_nothing_up)
{
	struct ff_reader *rd;

	make_big();
	switch_on(true);
	rd = reader_of("s0", "big");
	/* the end first, as who looks for a partition table does */
	cr_assert_eq(read_at(rd, (off_t)(BIG - 1) * MIB, MIB), 0);
	for (int i = 0; i < BIG; i += 2)
		cr_assert_eq(read_at(rd, (off_t)i * MIB + 4096, 4096), 0);
	for (int i = BIG - 1; i >= 0; i--)
		cr_assert_eq(read_at(rd, (off_t)i * MIB, MIB), 0);
	cr_assert_eq(mib_given_up(), 0);
	read_mib(rd, 0, 10);
	ff_reader_close(rd);
	switch_on(false);
	rd = reader_of("s0", "big");
	read_mib(rd, 0, BIG);
	cr_assert_eq(mib_given_up(), 0);
	ff_reader_close(rd);
}

/* Requests of a kernel that reads ahead come in another order. */
Test(consume, requests_overtake_each_other)
{
	struct ff_reader *rd;

	make_big();
	switch_on(true);
	rd = reader_of("s0", "big");
	for (int i = 0; i + 4 <= BIG; i += 4) {
		static const int order[] = {2, 0, 3, 1};

		for (int k = 0; k < 4; k++)
			cr_assert_eq(read_at(rd, (off_t)(i + order[k]) * MIB, MIB), 0);
	}
	cr_assert_geq(mib_given_up(), BIG - 64 - 12);
	cr_assert_leq(mib_given_up(), BIG - 64);
	ff_reader_close(rd);
}

/* A program that knows holes reads data alone. */
Test(consume, holes_that_are_skipped_count_as_read)
{
	struct ff_reader *rd;
	off_t at = 0, hole;
	int reads = 0;

	make_big();
	switch_on(true);
	rd = reader_of("s0", "big");
	while (ff_reader_seek(rd, at, SEEK_DATA, &at) == 0) {
		cr_assert_eq(ff_reader_seek(rd, at, SEEK_HOLE, &hole), 0);
		cr_assert_eq(read_at(rd, at, (size_t)(hole - at)), 0);
		at = hole;
		reads++;
	}
	cr_assert_eq(reads, BIG / 2);
	cr_assert_geq(mib_given_up(), BIG - 64 - 12);
	ff_reader_close(rd);
}

/* The same by one that has several requests under way. */
Test(consume, requests_overtake_each_other_over_holes)
{
	static const int order[] = {5, 1, 7, 0, 3, 2, 6, 4};
	off_t at[BIG], hole, next = 0;
	struct ff_reader *rd;
	int n = 0;

	make_big();
	switch_on(true);
	rd = reader_of("s0", "big");
	for (; ff_reader_seek(rd, next, SEEK_DATA, &at[n]) == 0; next = hole, n++)
		cr_assert_eq(ff_reader_seek(rd, at[n], SEEK_HOLE, &hole), 0);
	for (int i = 0; i + 8 <= n; i += 8)
		for (int k = 0; k < 8; k++)
			cr_assert_eq(read_at(rd, at[i + order[k]], 8192), 0);
	cr_assert_geq(mib_given_up(), BIG - 64 - 24);
	cr_assert_leq(mib_given_up(), BIG - 64);
	ff_reader_close(rd);
}

/* --- beside each other -------------------------------------------------------------------------
 */

static atomic_bool stop;

static void *writer(void *arg)
{
	struct ff_disk *d;
	int fd = live_open(&fx, "big", &d);
	static char buf[CLUSTER];
	unsigned x = 1;

	memset(buf, 0x5a, sizeof buf);
	while (!atomic_load(&stop)) {
		x = x * 1103515245 + 12345;
		cr_assert_eq(live_write(d, fd, buf, sizeof buf, (off_t)(x >> 8) % BIG * MIB), 0);
	}
	ff_disk_put(d);
	close(fd);
	return NULL;
}

static void *dropper(void *arg)
{
	while (!atomic_load(&stop)) {
		cr_assert_eq(ff_store_freeze(fx.store, "other", 0), 0);
		cr_assert_eq(ff_store_drop(fx.store, "other"), 0);
	}
	return NULL;
}

/* The reader gets what was frozen or an error, though the disk is written to and chains change. */
Test(consume, while_others_write_freeze_and_drop)
{
	pthread_t threads[3];
	struct ff_reader *rd;
	static char buf[MIB], want[8192];
	size_t got;

	make_big();
	switch_on(true);
	rd = reader_of("s0", "big");
	atomic_store(&stop, false);
	pthread_create(&threads[0], NULL, writer, NULL);
	pthread_create(&threads[1], NULL, writer, NULL);
	pthread_create(&threads[2], NULL, dropper, NULL);
	for (int i = 0; i < BIG; i++) {
		cr_assert_eq(ff_reader_read(rd, buf, MIB, (off_t)i * MIB, &got), 0, "MiB %d", i);
		memset(want, 0, sizeof want);
		if (i % 2 == 0)
			fill(want, sizeof want, (unsigned)i);
		cr_assert_eq(memcmp(buf, want, sizeof want), 0, "MiB %d", i);
		ff_reader_passed(rd, (off_t)i * MIB, MIB);
		if (i >= 100)
			cr_assert_eq(ff_reader_read(rd, buf, 10, (off_t)(i - 80) * MIB, &got),
			             -EIO);
	}
	atomic_store(&stop, true);
	for (size_t i = 0; i < FF_ARRAY_SIZE(threads); i++)
		pthread_join(threads[i], NULL);
	ff_reader_close(rd);
	five_remount();
	cr_assert_geq(mib_given_up(), BIG - 64 - 8);
}
