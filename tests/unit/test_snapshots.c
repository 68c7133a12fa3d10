/*
 * Many snapshots of one disk, dropped in any order; disks that lose their names; names of
 * snapshots; storage that is full.
 */
#include <criterion/criterion.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "ff_log.h"
#include "ff_util.h"
#include "five.h"

TestSuite(snapshots, .init = five_setup, .fini = five_teardown);

Test(snapshots, dropped_in_every_order)
{
	/* All 120 orders, a fresh set of snapshots each. */
	for (int order = 0; order < 120; order++) {
		bool alive[SNAPS] = {true, true, true, true, true};
		int rest = order;

		five_make();
		for (int left = SNAPS; left > 0; left--) {
			int pick = rest % left, i = 0;

			rest /= left;
			while (!alive[i] || pick-- > 0)
				i++;
			alive[i] = false;
			cr_assert_eq(ff_store_drop(fx.store, five_name_of(i)), 0);
			five_change((size_t)(order * 1009 % 200000), 9000, 30 + (unsigned)order);
			for (int k = 0; k < SNAPS; k++)
				if (alive[k])
					five_expect(k);
			if (order % 40 == 7)
				five_remount();
		}
		cr_assert_eq(count_images(&fx), 0, "order %d leaves images", order);
	}
}

Test(snapshots, an_image_that_nobody_needs_goes_at_once)
{
	five_freeze(0);
	five_change(0, 8192, 2);
	five_freeze(1);
	five_change(0, 4096, 3); /* in s0 already */
	cr_assert_eq(ff_store_drop(fx.store, "s1"), 0);
	cr_assert_eq(count_images(&fx), 1);
	five_change(100000, 4096, 4); /* saved in s0 itself again */
	five_expect(0);
	five_freeze(2);
	five_change(200000, 4096, 5); /* s0 needs this from s2 */
	cr_assert_eq(ff_store_drop(fx.store, "s2"), 0);
	cr_assert_eq(count_images(&fx), 2);
	five_expect(0);
	cr_assert_eq(ff_store_drop(fx.store, "s0"), 0);
	cr_assert_eq(count_images(&fx), 0);
}

/* A file NAME with the contents of SEED, put over the disk by a rename. */
static void replace_disk(unsigned seed)
{
	fixture_file(&fx, "new", 1000, seed);
	cr_assert_eq(ff_store_rename(fx.store, fx.source_fd, "new", fx.source_fd, "disk", 0), 0);
}

Test(snapshots, disks_that_lose_their_names)
{
	struct stat st;

	five_freeze(0);
	cr_assert_eq(ff_store_unlink(fx.store, fx.source_fd, "disk"), 0);
	cr_assert_eq(fstat(disk_fd, &st), 0);
	ff_store_fix_stat(fx.store, &st);
	cr_assert_eq(st.st_nlink, 0);
	five_change(0, 100000, 3); /* by the handle that is still open */
	five_expect(0);
	five_give_back();
	replace_disk(8);
	five_expect(0);
	fixture_close(&fx);
	fixture_open(&fx);
	five_expect(0);
	cr_assert_eq(ff_store_freeze(fx.store, "s1", 0), 0);
	replace_disk(9);
	five_expect(0);
	cr_assert_eq(ff_store_drop(fx.store, "s0"), 0);
	fill(views[1], 1000, 8);
	expect_frozen(&fx, "s1", "disk", views[1], 1000);
	cr_assert_eq(ff_store_drop(fx.store, "s1"), 0);
	cr_assert_eq(fstatat(fx.source_fd, fx.store->aside_path, &st, 0), 0);
	for (int i = 0; i < 2; i++) {
		char path[200];

		snprintf(path, sizeof path, "ls -A %s/%s | wc -l | grep -qx 0", fx.source,
		         fx.store->aside_path);
		cr_assert_eq(system(path), 0, "a disk that nobody needs was kept aside");
	}
}

Test(snapshots, renamed_disks_are_found_again)
{
	mkdirat(fx.source_fd, "a", 0755);
	mkdirat(fx.source_fd, "b", 0755);
	fixture_file(&fx, "b/other", 5000, 7);
	five_freeze(0);
	cr_assert_eq(ff_store_rename(fx.store, fx.source_fd, "disk", fx.source_fd, "a/disk", 0), 0);
	cr_assert_eq(
	    ff_store_rename(fx.store, fx.source_fd, "a", fx.source_fd, "b", RENAME_EXCHANGE), 0);
	five_change(0, 9000, 2);
	five_expect(0);
	five_give_back();
	fixture_close(&fx);
	fixture_open(&fx);
	five_expect(0);
	cr_assert_not_null(strstr(ff_image_backing(fx.store->snaps->links[0]->img), "/source/"));
	for (uint32_t i = 0; i < 2; i++) {
		const char *backing = ff_image_backing(fx.store->snaps->links[i]->img);

		cr_assert_eq(access(backing, F_OK), 0, "%s is not there", backing);
	}
}

Test(snapshots, a_disk_and_a_directory_exchanged_are_found_again)
{
	struct stat st;

	mkdirat(fx.source_fd, "a", 0755);
	fixture_file(&fx, "a/other", 5000, 7);
	five_freeze(0);
	for (int back = 0; back < 2; back++) {
		cr_assert_eq(ff_store_rename(fx.store, fx.source_fd, back ? "a" : "disk",
		                             fx.source_fd, back ? "disk" : "a", RENAME_EXCHANGE),
		             0);
		five_give_back();
		fixture_close(&fx);
		fixture_open(&fx);
		five_expect(0);
		for (uint32_t i = 0; i < 2; i++) {
			const char *backing = ff_image_backing(fx.store->snaps->links[i]->img);

			cr_assert_eq(stat(backing, &st), 0, "%s is not there", backing);
			cr_assert(S_ISREG(st.st_mode), "%s is not the disk", backing);
		}
	}
}

Test(snapshots, names)
{
	char longest[FF_SNAP_NAME_MAX + 2];

	memset(longest, 'n', sizeof longest);
	longest[FF_SNAP_NAME_MAX + 1] = '\0';
	cr_assert_eq(ff_store_freeze(fx.store, "", 0), -EINVAL);
	cr_assert_eq(ff_store_freeze(fx.store, ".hidden", 0), -EINVAL);
	cr_assert_eq(ff_store_freeze(fx.store, "a/b", 0), -EINVAL);
	cr_assert_eq(ff_store_freeze(fx.store, longest, 0), -EINVAL);
	longest[FF_SNAP_NAME_MAX] = '\0';
	cr_assert_eq(ff_store_freeze(fx.store, longest, 0), 0);
	cr_assert_eq(ff_store_freeze(fx.store, longest, 0), -EEXIST);
	five_freeze(0);
	five_change(0, 4096, 2);
	five_freeze(1);
	five_change(0, 9000, 3);
	cr_assert_eq(ff_store_rename_snap(fx.store, "s1", "s0"), -EEXIST);
	cr_assert_eq(ff_store_rename_snap(fx.store, "none", "x"), -ENOENT);
	cr_assert_eq(ff_store_rename_snap(fx.store, "s1", ".x"), -EINVAL);
	cr_assert_eq(ff_store_rename_snap(fx.store, "s1", "renamed"), 0);
	expect_frozen(&fx, "renamed", "disk", views[1], SIZE);
	five_expect(0);
	cr_assert_not_null(
	    strstr(ff_image_backing(fx.store->snaps->next->links[0]->img), "../renamed/"));
	five_remount();
	expect_frozen(&fx, "renamed", "disk", views[1], SIZE);
	five_expect(0);
}

Test(snapshots, inode_numbers_come_back_with_the_name)
{
	const struct ff_frozen *f;
	struct stat st[3], source;
	struct ff_snap *snap;

	for (int i = 0; i < 3; i++) {
		const char *name = i == 2 ? "other" : "nightly";

		cr_assert_eq(ff_store_freeze(fx.store, name, 0), 0);
		cr_assert_eq(ff_snap_get(fx.store, name, &snap), 0);
		cr_assert_eq(ff_frozen_lookup(snap, ff_snap_root(snap), "disk", &f), 0);
		ff_frozen_stat(snap, f, &st[i]);
		ff_snap_put(snap);
		cr_assert_eq(ff_store_drop(fx.store, name), 0);
		five_change(0, 10, (unsigned)i);
	}
	fstat(disk_fd, &source);
	cr_assert_eq(st[0].st_ino, st[1].st_ino);
	cr_assert_neq(st[0].st_ino, st[2].st_ino);
	cr_assert_neq(st[0].st_ino, source.st_ino);
}

Test(snapshots, busy_while_read)
{
	const struct ff_frozen *f;
	struct ff_reader *rd;
	struct ff_snap *snap;

	five_freeze(0);
	cr_assert_eq(ff_snap_get(fx.store, "s0", &snap), 0);
	cr_assert_eq(ff_frozen_lookup(snap, ff_snap_root(snap), "disk", &f), 0);
	cr_assert_eq(ff_reader_open(snap, f, &rd), 0);
	cr_assert_eq(ff_store_drop(fx.store, "s0"), -EBUSY);
	five_expect(0);
	ff_reader_close(rd);
	cr_assert_eq(ff_store_drop(fx.store, "s0"), 0);
	cr_assert_eq(ff_reader_open(snap, f, &rd), -ESTALE);
	ff_snap_put(snap);
}

static void with_little_space(enum ff_cbw_policy policy)
{
	five_give_back();
	fixture_close(&fx);
	fixture_file(&fx, "other", 50000, 7);
	fx.config.policy = policy;
	fx.config.fleece_limit = 100000;
	ff_log_threshold(FF_LOG_ERROR - 1);
	fixture_open(&fx);
	disk_fd = live_open(&fx, "disk", &disk);
}

Test(snapshots, full_storage_breaks_the_view_and_not_the_guest)
{
	static char other[50000];

	with_little_space(FF_BREAK_SNAPSHOT);
	five_freeze(0);
	for (size_t at = 0; at + 10000 <= SIZE; at += 10000)
		five_change(at, 10000, 5);
	cr_assert_eq(frozen_error(&fx, "s0", "disk"), -EIO);
	fill(other, sizeof other, 7);
	expect_frozen(&fx, "s0", "other", other, sizeof other);
	five_remount();
	cr_assert_eq(frozen_error(&fx, "s0", "disk"), -EIO);
	expect_frozen(&fx, "s0", "other", other, sizeof other);
	cr_assert_eq(ff_store_drop(fx.store, "s0"), 0);
	five_freeze(1); /* the space is back */
	five_change(0, 10000, 6);
	five_expect(1);
}

Test(snapshots, full_storage_fails_the_guest_and_keeps_the_view)
{
	char buf[10000] = {1};
	int r = 0;

	with_little_space(FF_BREAK_GUEST_WRITE);
	five_freeze(0);
	for (size_t at = 0; at + sizeof buf <= SIZE && !r; at += sizeof buf)
		r = live_write(disk, disk_fd, buf, sizeof buf, (off_t)at);
	cr_assert_eq(r, -ENOSPC);
	five_expect(0);
}

/* With a time limit that is not reached, all is as without. */
Test(snapshots, saves_with_a_time_limit)
{
	five_give_back();
	fixture_close(&fx);
	fx.config.cbw_timeout = 60;
	fixture_open(&fx);
	disk_fd = live_open(&fx, "disk", &disk);
	five_make();
	for (int i = 0; i < SNAPS; i++)
		five_expect(i);
}

Test(snapshots, one_store_a_directory_and_one_source_a_store)
{
	struct ff_store *second;
	struct fixture other;

	ff_log_threshold(FF_LOG_ERROR - 1);
	cr_assert_eq(ff_store_open(&fx.config, &second), -EBUSY);
	five_freeze(0);
	five_give_back();
	fixture_close(&fx);
	fixture_init(&other, 4096);
	other.config.fleece_path = fx.fleece;
	ff_log_threshold(FF_LOG_ERROR - 1);
	cr_assert_eq(ff_store_open(&other.config, &second), -EINVAL);
	fixture_done(&other);
	fixture_open(&fx);
	five_expect(0);
}

Test(snapshots, a_hidden_image_goes_when_the_next_older_one_has_it_all)
{
	five_freeze(0);
	five_change(0, 50000, 2);
	five_freeze(1);
	five_freeze(2);
	five_change(0, 50000, 3); /* s1 needs it from s2 */
	cr_assert_eq(ff_store_drop(fx.store, "s2"), 0);
	cr_assert_eq(count_images(&fx), 3);
	cr_assert_eq(ff_store_drop(fx.store, "s1"), 0);
	cr_assert_eq(count_images(&fx), 1);
	five_expect(0);
}

Test(snapshots, a_disk_aside_whose_other_name_goes_too)
{
	cr_assert_eq(linkat(fx.source_fd, "disk", fx.source_fd, "twin", 0), 0);
	five_freeze(0);
	cr_assert_eq(ff_store_unlink(fx.store, fx.source_fd, "twin"), 0);
	five_give_back();
	five_freeze(1);
	cr_assert_eq(ff_store_unlink(fx.store, fx.source_fd, "disk"), 0);
	fixture_file(&fx, "disk", 100, 9);
	five_expect(0);
	five_expect(1);
	five_shell("qemu-img convert -f qcow2 -O raw $F/s0/disk-fleece-1.qcow2 $F/.out");
	five_shell("cmp -n 300000 $F/.out $S/.fleecefs/.aside-*/*");
}

static atomic_bool replacing;

static void *replace_on(void *ctx)
{
	while (atomic_load(&replacing)) {
		fixture_file(&fx, "new", 1000, 3);
		cr_assert_eq(
		    ff_store_rename(fx.store, fx.source_fd, "new", fx.source_fd, "disk", 0), 0);
	}
	return NULL;
}

Test(snapshots, files_replaced_during_a_freeze)
{
	pthread_t thread;
	char name[16];

	for (int i = 0; i < 30; i++) {
		snprintf(name, sizeof name, "file%d", i);
		fixture_file(&fx, name, 100, 1);
	}
	atomic_store(&replacing, true);
	pthread_create(&thread, NULL, replace_on, NULL);
	for (int i = 0; i < 40; i++) {
		cr_assert_eq(ff_store_freeze(fx.store, "s", 0), 0);
		cr_assert_eq(ff_store_drop(fx.store, "s"), 0);
	}
	atomic_store(&replacing, false);
	pthread_join(thread, NULL);
	cr_assert_eq(count_images(&fx), 0);
}

/* A disk that grows and shrinks between its snapshots, with few and many clusters saved in each. */
static void make_ragged_chain(int fd, struct ff_disk *d, unsigned links)
{
	static char buf[300 * 4096];
	unsigned rng = 5;

	for (unsigned i = 0; i < links; i++) {
		struct ff_change cut = {.kind = FF_TRUNCATE, .fd = fd};
		char name[8];
		size_t done;

		snprintf(name, sizeof name, "r%u", i);
		cr_assert_eq(ff_store_freeze(fx.store, name, 0), 0);
		for (unsigned k = 0; k < 40; k++) {
			rng = rng * 1103515245 + 12345;
			fill(buf, 4096 * (1 + rng % 3), i * 100 + k);
			live_write(d, fd, buf, 4096 * (1 + (rng >> 8) % 3),
			           (off_t)((rng >> 12) % 400) * 4096);
		}
		cut.off = (off_t)(200 + (rng >> 10) % 300) * 4096;
		cr_assert_eq(ff_disk_change(d, &cut, &done), 0);
	}
}

Test(snapshots, owners_of_a_run_are_those_of_its_clusters)
{
	struct ff_disk *d;
	unsigned seen[3] = {0};
	int fd;

	fixture_file(&fx, "ragged", 500 * 4096, 1);
	fd = live_open(&fx, "ragged", &d);
	make_ragged_chain(fd, d, 6);
	for (struct link *l = atomic_load(&d->top); l; l = l->older)
		for (uint64_t first = 0; first < l->clusters; first += 37) {
			struct owner run[OWNERS_MAX], one;
			unsigned count = (unsigned)FF_MIN(l->clusters - first, OWNERS_MAX);

			count -= (unsigned)first % count / 2;
			chain_owners(l, first, count, run);
			for (unsigned i = 0; i < count; i++) {
				cr_assert_eq(chain_resolve(l, first + i, 1, &one), 1);
				cr_assert_eq(run[i].kind, one.kind);
				cr_assert_eq(run[i].link, one.link);
				seen[one.kind]++;
			}
		}
	cr_assert(seen[OWNER_LIVE] && seen[OWNER_ZERO] && seen[OWNER_LINK]);
	ff_disk_put(d);
	close(fd);
}
