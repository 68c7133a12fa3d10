/*
 * Checkpoints: what they give up, what they keep, and what the snapshots beside them must not lose.
 */
#include <criterion/criterion.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "cow/engine.h"
#include "cow/ledger_format.h"
#include "cow/names.h"
#include "ff_log.h"
#include "ff_util.h"
#include "five.h"

TestSuite(checkpoint, .init = five_setup, .fini = five_teardown);

static int checkpoint(int i)
{
	struct ff_snap *snap;
	int r = ff_snap_get(fx.store, five_name_of(i), &snap);

	if (r)
		return r;
	r = ff_snap_checkpoint(snap);
	ff_snap_put(snap);
	return r;
}

static struct link *link_of(int i)
{
	struct ff_snap *snap;
	struct link *l;

	cr_assert_eq(ff_snap_get(fx.store, five_name_of(i), &snap), 0);
	l = snap->links[0];
	ff_snap_put(snap);
	return l;
}

/* What is known to have changed since snapshot I is all that differs, and nothing that was not
 * written to. */
static void expect_changes(int i)
{
	bool known[CLUSTERS] = {false};

	for (struct link *l = link_of(i); l; l = atomic_load(&l->newer))
		for (size_t c = 0; c < CLUSTERS; c++)
			known[c] |= ff_image_marked(l->img, c);
	for (size_t c = 0; c < CLUSTERS; c++) {
		size_t len = FF_MIN((size_t)CLUSTER, SIZE - c * CLUSTER);

		if (memcmp(views[i] + c * CLUSTER, live + c * CLUSTER, len) != 0)
			cr_assert(known[c], "s%d: cluster %zu changed, and is not known", i, c);
		if (known[c])
			cr_assert(touched[i][c], "s%d: cluster %zu was not written to", i, c);
	}
}

static void expect_checkpoint(int i)
{
	struct ff_disk_status st;
	const struct ff_frozen *f;
	struct ff_snap *snap;
	struct stat attr;

	cr_assert_eq(frozen_error(&fx, five_name_of(i), "disk"), -EIO);
	cr_assert_eq(ff_snap_get(fx.store, five_name_of(i), &snap), 0);
	cr_assert(ff_snap_is_checkpoint(snap));
	cr_assert_eq(ff_frozen_lookup(snap, ff_snap_root(snap), "disk", &f), 0);
	cr_assert_eq(ff_frozen_status(snap, f, &st), 0);
	cr_assert_eq(st.state, FF_VIEW_CHECKPOINT);
	cr_assert_null(st.reason);
	ff_frozen_stat(snap, f, &attr);
	cr_assert_eq(attr.st_size, SIZE);
	ff_snap_put(snap);
	expect_changes(i);
}

static uint64_t saved_in(int i)
{
	return ff_image_preserved(link_of(i)->img);
}

static uint64_t used(void)
{
	struct ff_store_status st;

	ff_store_status(fx.store, &st);
	return st.used_bytes;
}

Test(checkpoint, gives_its_data_up_and_copies_nothing_more)
{
	uint64_t before;
	struct stat st;

	five_freeze(0);
	before = used();
	five_change(0, 100000, 2);
	five_change(200000, 50000, 3);
	cr_assert_geq(saved_in(0), 150000);
	five_shell("test $(stat -c %b $F/s0/disk-fleece-1.qcow2) -gt 290");
	cr_assert_eq(checkpoint(0), 0);
	cr_assert_eq(saved_in(0), 0);
	expect_checkpoint(0);
	five_shell("test $(stat -c %b $F/s0/disk-fleece-1.qcow2) -lt 50");
	five_shell("qemu-img check -q $F/s0/disk-fleece-1.qcow2");
	cr_assert_eq(used(), before + 2 * LEDGER_PAGE);
	five_change(100000, 100000, 4);
	five_change(0, 4096, 5);
	cr_assert_eq(saved_in(0), 0);
	expect_checkpoint(0);
	for (int i = 0; i < 2; i++) {
		five_remount();
		expect_checkpoint(0);
		cr_assert_eq(saved_in(0), 0);
		cr_assert_eq(used(), before + 2 * LEDGER_PAGE);
	}
	five_change(250000, 50000, 6);
	expect_checkpoint(0);
	cr_assert_eq(checkpoint(0), 0, "it is one already");
	cr_assert_eq(ff_store_drop(fx.store, "s0"), 0);
	cr_assert_eq(count_images(&fx), 0);
	cr_assert_eq(used(), 0);
	cr_assert_neq(fstatat(AT_FDCWD, fx.fleece, &st, 0), -1);
	five_shell("test -z \"$(ls $F)\"");
}

Test(checkpoint, older_snapshots_keep_what_they_need)
{
	five_freeze(0);
	five_change(0, 50000, 2);
	five_freeze(1);
	five_change(20000, 80000, 3);
	cr_assert_eq(checkpoint(1), 0);
	/* s0 needs what lies beyond 50000 */
	cr_assert_gt(saved_in(1), 0);
	cr_assert_leq(saved_in(1), 60000);
	five_expect(0);
	five_change(150000, 10000, 4);
	five_expect(0);
	expect_checkpoint(1);
	expect_changes(0);
	five_remount();
	five_expect(0);
	expect_checkpoint(1);
	cr_assert_eq(ff_store_drop(fx.store, "s0"), 0);
	cr_assert_eq(saved_in(1), 0, "only s0 needed that");
	expect_checkpoint(1);
	five_change(250000, 10000, 5);
	cr_assert_eq(saved_in(1), 0);
	expect_checkpoint(1);
}

/* Of a dropped one, for the oldest: a checkpoint between the two has no use for it. */
Test(checkpoint, what_lies_beyond_goes_with_who_needed_it)
{
	uint64_t before;

	five_freeze(0);
	five_freeze(1);
	before = used();
	five_change(0, 20000, 2);
	five_freeze(2);
	five_change(100000, 150000, 3);
	cr_assert_eq(ff_store_drop(fx.store, "s2"), 0);
	cr_assert_eq(checkpoint(1), 0);
	five_expect(0);
	cr_assert_eq(count_images(&fx), 3);
	cr_assert_eq(ff_store_drop(fx.store, "s0"), 0);
	cr_assert_eq(count_images(&fx), 1);
	cr_assert_leq(used(), before);
	expect_checkpoint(1);
}

Test(checkpoint, newer_snapshots_are_as_before)
{
	five_freeze(0);
	five_change(0, 50000, 2);
	cr_assert_eq(checkpoint(0), 0);
	five_change(40000, 50000, 3);
	five_freeze(1);
	five_change(60000, 50000, 4);
	five_expect(1);
	expect_checkpoint(0);
	cr_assert_eq(checkpoint(1), 0);
	five_change(200000, 50000, 5);
	expect_checkpoint(0);
	expect_checkpoint(1);
	/* what changed while s1 was the newest is s0's to know */
	cr_assert_eq(ff_store_drop(fx.store, "s1"), 0);
	cr_assert_eq(count_images(&fx), 1);
	expect_checkpoint(0);
	five_change(100000, 50000, 6);
	expect_checkpoint(0);
	five_remount();
	expect_checkpoint(0);
}

Test(checkpoint, one_that_is_read_is_busy)
{
	const struct ff_frozen *f;
	struct ff_reader *rd;
	struct ff_snap *snap;
	char buf[100];
	size_t got;

	five_freeze(0);
	five_change(0, 5000, 2);
	cr_assert_eq(ff_snap_get(fx.store, "s0", &snap), 0);
	cr_assert_eq(ff_frozen_lookup(snap, ff_snap_root(snap), "disk", &f), 0);
	cr_assert_eq(ff_reader_open(snap, f, &rd), 0);
	cr_assert_eq(checkpoint(0), -EBUSY);
	cr_assert_not(ff_snap_is_checkpoint(snap));
	cr_assert_eq(ff_reader_read(rd, buf, sizeof buf, 0, &got), 0);
	ff_reader_close(rd);
	ff_snap_put(snap);
	five_expect(0);
	cr_assert_eq(checkpoint(0), 0);
	expect_checkpoint(0);
	cr_assert_eq(checkpoint(1), -ENOENT);
}

Test(checkpoint, at_random)
{
	enum { GONE, WHOLE, GIVEN_UP } state[SNAPS] = {GONE};
	unsigned x = 12345;

	for (int step = 0; step < 1500; step++) {
		int i;

		x = x * 1103515245 + 12345;
		i = (int)((x >> 20) % SNAPS);
		switch ((x >> 16) % 8) {
		case 0:
			if (state[i] != GONE) {
				cr_assert_eq(ff_store_drop(fx.store, five_name_of(i)), 0);
				state[i] = GONE;
			}
			break;
		case 1:
		case 2:
			if (state[i] == GONE) {
				five_freeze(i);
				state[i] = WHOLE;
			}
			break;
		case 3:
			if (state[i] == WHOLE) {
				cr_assert_eq(checkpoint(i), 0);
				state[i] = GIVEN_UP;
			}
			break;
		case 4:
			if (x >> 28 == 0)
				five_remount();
			break;
		default:
			five_change((x >> 8) % (SIZE - 9000), 1 + (x >> 4) % 9000,
			            (unsigned)step + 10);
		}
		for (int k = 0; k < SNAPS && step % 4 == 0; k++) {
			if (state[k] == WHOLE) {
				five_expect(k);
				expect_changes(k);
			} else if (state[k] == GIVEN_UP) {
				expect_checkpoint(k);
			}
		}
	}
	for (int k = 0; k < SNAPS; k++)
		if (state[k] != GONE)
			cr_assert_eq(ff_store_drop(fx.store, five_name_of(k)), 0);
	cr_assert_eq(count_images(&fx), 0);
	cr_assert_eq(used(), 0);
}

static enum ff_view_state state_of(int i)
{
	struct ff_disk_status st;
	const struct ff_frozen *f;
	struct ff_snap *snap;

	cr_assert_eq(ff_snap_get(fx.store, five_name_of(i), &snap), 0);
	cr_assert_eq(ff_frozen_lookup(snap, ff_snap_root(snap), "disk", &f), 0);
	cr_assert_eq(ff_frozen_status(snap, f, &st), 0);
	ff_snap_put(snap);
	return st.state;
}

/* From here on nothing more is allocated. */
static void no_room(void)
{
	five_give_back();
	fixture_close(&fx);
	fx.config.fleece_limit = 1;
	fixture_open(&fx);
	disk_fd = live_open(&fx, "disk", &disk);
}

/* The save fails and the note does not: only who needed the data breaks. */
Test(checkpoint, survives_a_save_that_fails)
{
	five_freeze(0);
	five_change(0, 4096, 2);
	five_freeze(1);
	cr_assert_eq(checkpoint(1), 0);
	five_change(0, 4096, 3); /* s0 has that: there is a ledger now, with a page for all of it */
	cr_assert_eq(saved_in(1), 0);
	no_room();
	five_change(100000, 5000, 4);
	cr_assert_eq(state_of(0), FF_VIEW_BROKEN);
	expect_checkpoint(1);
	five_change(200000, 5000, 5);
	five_remount();
	cr_assert_eq(state_of(0), FF_VIEW_BROKEN);
	expect_checkpoint(1);
}

/* What there is room for is all taken: a checkpoint gives it back. */
Test(checkpoint, helps_when_there_is_no_room)
{
	uint64_t before;

	five_freeze(0);
	five_change(0, 100000, 2);
	before = used();
	no_room();
	cr_assert_eq(checkpoint(0), 0);
	cr_assert_eq(saved_in(0), 0);
	cr_assert_lt(used(), before - 80000);
	five_change(100000, 50000, 3);
	expect_checkpoint(0);
}

/* Neither can be had. */
Test(checkpoint, breaks_when_it_cannot_note)
{
	five_freeze(0);
	five_freeze(1);
	five_change(0, 9000, 2);
	cr_assert_eq(checkpoint(1), 0);
	no_room();
	five_change(0, 9000, 3); /* that is marked already */
	expect_checkpoint(1);
	five_change(100000, 5000, 3);
	cr_assert_eq(state_of(0), FF_VIEW_BROKEN);
	cr_assert_eq(state_of(1), FF_VIEW_BROKEN);
	five_remount();
	cr_assert_eq(state_of(1), FF_VIEW_BROKEN);
}

/* An image says in its head that it has a ledger. */
Test(checkpoint, is_lost_with_its_ledger)
{
	static const char *const harm[] = {
	    "rm $F/s0/disk-fleece-1.dirty",
	    "printf x | dd of=$F/s0/disk-fleece-1.dirty bs=1 seek=20 conv=notrunc status=none",
	    "printf x | dd of=$F/s0/disk-fleece-1.dirty bs=1 seek=4100 conv=notrunc status=none",
	    "truncate -s 4096 $F/s0/disk-fleece-1.dirty",
	    "truncate -s +512 $F/s0/disk-fleece-1.dirty",
	    /* a hole where bits were: the hash of a clean end tells */
	    "fallocate -p -o 4096 -l 4096 $F/s0/disk-fleece-1.dirty",
	    "mv $F/s0/disk-fleece-1.dirty $F/x; ln -s ../x $F/s0/disk-fleece-1.dirty",
	};

	for (size_t i = 0; i < FF_ARRAY_SIZE(harm); i++) {
		five_freeze(0);
		cr_assert_eq(checkpoint(0), 0);
		five_change(0, 100000, 2 + (unsigned)i);
		five_give_back();
		fixture_close(&fx);
		five_shell(harm[i]);
		fixture_open(&fx);
		disk_fd = live_open(&fx, "disk", &disk);
		cr_assert_eq(state_of(0), FF_VIEW_BROKEN, "%s", harm[i]);
		cr_assert_eq(ff_store_drop(fx.store, "s0"), 0);
		five_shell("rm -f $F/x; test -z \"$(ls $F)\"");
		five_give_back();
		fixture_close(&fx);
		five_shell("rm -rf $F"); /* numbers begin anew */
		fixture_open(&fx);
		disk_fd = live_open(&fx, "disk", &disk);
	}
}
