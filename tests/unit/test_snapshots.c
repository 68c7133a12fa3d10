/*
 * Many snapshots of one disk, dropped in any order, across ends of the mount of every kind; disks
 * that lose their names; storage that is full; files in FLEECE_DIR that are not what they were.
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
#include "fixture.h"

enum { SIZE = 300000, SNAPS = 5 };

static struct fixture fx;
static struct ff_disk *disk;
static int fd = -1;
static char live[SIZE], views[SNAPS][SIZE];

static void setup(void)
{
	fixture_init(&fx, 4096);
	fixture_file(&fx, "disk", SIZE, 1);
	fill(live, SIZE, 1);
	fixture_open(&fx);
	fd = live_open(&fx, "disk", &disk);
}

static void give_back(void)
{
	if (disk)
		ff_disk_put(ff_take_ptr(&disk));
	if (fd >= 0)
		close(ff_take_fd(&fd));
}

static void teardown(void)
{
	give_back();
	fixture_done(&fx);
}

static void remount(void)
{
	give_back();
	fixture_close(&fx);
	fixture_open(&fx);
	fd = live_open(&fx, "disk", &disk);
}

static void change(size_t off, size_t len, unsigned seed)
{
	fill(live + off, len, seed);
	cr_assert_eq(live_write(disk, fd, live + off, len, (off_t)off), 0);
}

static const char *name_of(int i)
{
	static const char *const names[] = {"s0", "s1", "s2", "s3", "s4"};

	return names[i];
}

static void freeze(int i)
{
	int r = ff_store_freeze(fx.store, name_of(i), 0);

	cr_assert_eq(r, 0, "freeze %s: %s", name_of(i), strerror(-r));
	memcpy(views[i], live, SIZE);
}

static void expect(int i)
{
	expect_frozen(&fx, name_of(i), "disk", views[i], SIZE);
}

static void make_five(void)
{
	for (int i = 0; i < SNAPS; i++) {
		freeze(i);
		change((size_t)i * 20000, 50000, 10 + (unsigned)i);
		change((size_t)i * 3000, 5000, 20 + (unsigned)i);
	}
}

TestSuite(snapshots, .init = setup, .fini = teardown);

Test(snapshots, dropped_in_every_order)
{
	/* All 120 orders, a fresh set of snapshots each. */
	for (int order = 0; order < 120; order++) {
		bool alive[SNAPS] = {true, true, true, true, true};
		int rest = order;

		make_five();
		for (int left = SNAPS; left > 0; left--) {
			int pick = rest % left, i = 0;

			rest /= left;
			while (!alive[i] || pick-- > 0)
				i++;
			alive[i] = false;
			cr_assert_eq(ff_store_drop(fx.store, name_of(i)), 0);
			change((size_t)(order * 1009 % 200000), 9000, 30 + (unsigned)order);
			for (int k = 0; k < SNAPS; k++)
				if (alive[k])
					expect(k);
			if (order % 40 == 7)
				remount();
		}
		cr_assert_eq(count_images(&fx), 0, "order %d leaves images", order);
	}
}

Test(snapshots, an_image_that_nobody_needs_goes_at_once)
{
	freeze(0);
	change(0, 8192, 2);
	freeze(1);
	change(0, 4096, 3); /* in s0 already */
	cr_assert_eq(ff_store_drop(fx.store, "s1"), 0);
	cr_assert_eq(count_images(&fx), 1);
	change(100000, 4096, 4); /* saved in s0 itself again */
	expect(0);
	freeze(2);
	change(200000, 4096, 5); /* s0 needs this from s2 */
	cr_assert_eq(ff_store_drop(fx.store, "s2"), 0);
	cr_assert_eq(count_images(&fx), 2);
	expect(0);
	cr_assert_eq(ff_store_drop(fx.store, "s0"), 0);
	cr_assert_eq(count_images(&fx), 0);
}

Test(snapshots, clean_end_and_new_mount)
{
	make_five();
	remount();
	for (int i = 0; i < SNAPS; i++)
		expect(i);
	change(1000, 150000, 99);
	for (int i = 0; i < SNAPS; i++)
		expect(i);
}

Test(snapshots, killed_daemon_loses_nothing)
{
	int status;
	pid_t pid;

	make_five();
	give_back();
	fixture_close(&fx);
	pid = fork();
	if (pid == 0) {
		fixture_open(&fx);
		fd = live_open(&fx, "disk", &disk);
		change(60000, 70000, 41);
		cr_assert_eq(ff_store_drop(fx.store, "s2"), 0);
		change(200000, 5000, 42);
		_exit(0);
	}
	cr_assert_eq(waitpid(pid, &status, 0), pid);
	cr_assert_eq(status, 0);
	fixture_open(&fx);
	fd = live_open(&fx, "disk", &disk);
	for (int i = 0; i < SNAPS; i++)
		if (i != 2)
			expect(i);
	cr_assert_eq(frozen_error(&fx, "s2", "disk"), -ENOENT);
}

Test(snapshots, change_behind_the_mount_is_noticed)
{
	int past;

	fixture_file(&fx, "other", 5000, 7);
	make_five();
	give_back();
	fixture_close(&fx);
	past = openat(fx.source_fd, "disk", O_WRONLY);
	cr_assert_eq(pwrite(past, "x", 1, 5), 1);
	close(past);
	ff_log_threshold(FF_LOG_ERROR - 1);
	fixture_open(&fx);
	for (int i = 0; i < SNAPS; i++) {
		cr_assert_eq(frozen_error(&fx, name_of(i), "disk"), -EIO);
		cr_assert_eq(frozen_error(&fx, name_of(i), "other"), 0);
	}
	/* For good, also when the next end is a clean one. */
	fixture_close(&fx);
	fixture_open(&fx);
	cr_assert_eq(frozen_error(&fx, "s0", "disk"), -EIO);
	cr_assert_eq(frozen_error(&fx, "s0", "other"), 0);
	for (int i = 0; i < SNAPS; i++)
		cr_assert_eq(ff_store_drop(fx.store, name_of(i)), 0);
	cr_assert_eq(count_images(&fx), 0);
}

Test(snapshots, power_loss_tears_what_was_not_durable)
{
	char path[160];
	FILE *f;

	make_five();
	give_back();
	fixture_close(&fx);
	snprintf(path, sizeof path, "%s/.clean", fx.fleece);
	cr_assert_eq(unlink(path), 0);
	snprintf(path, sizeof path, "%s/.session", fx.fleece);
	f = fopen(path, "w");
	fputs("another boot\n", f);
	fclose(f);
	ff_log_threshold(FF_LOG_ERROR - 1);
	fixture_open(&fx);
	for (int i = 0; i < SNAPS; i++) {
		cr_assert_eq(frozen_error(&fx, name_of(i), "disk"), -EIO);
		cr_assert_eq(ff_store_drop(fx.store, name_of(i)), 0);
	}
	cr_assert_eq(count_images(&fx), 0);
}

/* Without the record nothing tells that SOURCE was left alone while no mount was there. */
Test(snapshots, a_damaged_record_proves_nothing)
{
	char path[160];
	FILE *f;

	freeze(0);
	give_back();
	fixture_close(&fx);
	snprintf(path, sizeof path, "%s/.clean", fx.fleece);
	f = fopen(path, "r+");
	cr_assert_not_null(f);
	fputc('x', f);
	fclose(f);
	fixture_file(&fx, "disk", 5000, 77);
	ff_log_threshold(FF_LOG_ERROR - 1);
	fixture_open(&fx);
	cr_assert_eq(frozen_error(&fx, name_of(0), "disk"), -EIO);
	cr_assert_eq(ff_store_drop(fx.store, name_of(0)), 0);
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

	freeze(0);
	cr_assert_eq(ff_store_unlink(fx.store, fx.source_fd, "disk"), 0);
	cr_assert_eq(fstat(fd, &st), 0);
	ff_store_fix_stat(fx.store, &st);
	cr_assert_eq(st.st_nlink, 0);
	change(0, 100000, 3); /* by the handle that is still open */
	expect(0);
	give_back();
	replace_disk(8);
	expect(0);
	fixture_close(&fx);
	fixture_open(&fx);
	expect(0);
	cr_assert_eq(ff_store_freeze(fx.store, "s1", 0), 0);
	replace_disk(9);
	expect(0);
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
	freeze(0);
	cr_assert_eq(ff_store_rename(fx.store, fx.source_fd, "disk", fx.source_fd, "a/disk", 0), 0);
	cr_assert_eq(
	    ff_store_rename(fx.store, fx.source_fd, "a", fx.source_fd, "b", RENAME_EXCHANGE), 0);
	change(0, 9000, 2);
	expect(0);
	give_back();
	fixture_close(&fx);
	fixture_open(&fx);
	expect(0);
	cr_assert_not_null(strstr(ff_image_backing(fx.store->snaps->links[0]->img), "/source/"));
	for (uint32_t i = 0; i < 2; i++) {
		const char *backing = ff_image_backing(fx.store->snaps->links[i]->img);

		cr_assert_eq(access(backing, F_OK), 0, "%s is not there", backing);
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
	freeze(0);
	change(0, 4096, 2);
	freeze(1);
	change(0, 9000, 3);
	cr_assert_eq(ff_store_rename_snap(fx.store, "s1", "s0"), -EEXIST);
	cr_assert_eq(ff_store_rename_snap(fx.store, "none", "x"), -ENOENT);
	cr_assert_eq(ff_store_rename_snap(fx.store, "s1", ".x"), -EINVAL);
	cr_assert_eq(ff_store_rename_snap(fx.store, "s1", "renamed"), 0);
	expect_frozen(&fx, "renamed", "disk", views[1], SIZE);
	expect(0);
	cr_assert_not_null(
	    strstr(ff_image_backing(fx.store->snaps->next->links[0]->img), "../renamed/"));
	remount();
	expect_frozen(&fx, "renamed", "disk", views[1], SIZE);
	expect(0);
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
		change(0, 10, (unsigned)i);
	}
	fstat(fd, &source);
	cr_assert_eq(st[0].st_ino, st[1].st_ino);
	cr_assert_neq(st[0].st_ino, st[2].st_ino);
	cr_assert_neq(st[0].st_ino, source.st_ino);
}

Test(snapshots, busy_while_read)
{
	const struct ff_frozen *f;
	struct ff_reader *rd;
	struct ff_snap *snap;

	freeze(0);
	cr_assert_eq(ff_snap_get(fx.store, "s0", &snap), 0);
	cr_assert_eq(ff_frozen_lookup(snap, ff_snap_root(snap), "disk", &f), 0);
	cr_assert_eq(ff_reader_open(snap, f, &rd), 0);
	cr_assert_eq(ff_store_drop(fx.store, "s0"), -EBUSY);
	expect(0);
	ff_reader_close(rd);
	cr_assert_eq(ff_store_drop(fx.store, "s0"), 0);
	cr_assert_eq(ff_reader_open(snap, f, &rd), -ESTALE);
	ff_snap_put(snap);
}

static void with_little_space(enum ff_cbw_policy policy)
{
	give_back();
	fixture_close(&fx);
	fixture_file(&fx, "other", 50000, 7);
	fx.config.policy = policy;
	fx.config.fleece_limit = 100000;
	ff_log_threshold(FF_LOG_ERROR - 1);
	fixture_open(&fx);
	fd = live_open(&fx, "disk", &disk);
}

Test(snapshots, full_storage_breaks_the_view_and_not_the_guest)
{
	static char other[50000];

	with_little_space(FF_BREAK_SNAPSHOT);
	freeze(0);
	for (size_t at = 0; at + 10000 <= SIZE; at += 10000)
		change(at, 10000, 5);
	cr_assert_eq(frozen_error(&fx, "s0", "disk"), -EIO);
	fill(other, sizeof other, 7);
	expect_frozen(&fx, "s0", "other", other, sizeof other);
	remount();
	cr_assert_eq(frozen_error(&fx, "s0", "disk"), -EIO);
	expect_frozen(&fx, "s0", "other", other, sizeof other);
	cr_assert_eq(ff_store_drop(fx.store, "s0"), 0);
	freeze(1); /* the space is back */
	change(0, 10000, 6);
	expect(1);
}

Test(snapshots, full_storage_fails_the_guest_and_keeps_the_view)
{
	char buf[10000] = {1};
	int r = 0;

	with_little_space(FF_BREAK_GUEST_WRITE);
	freeze(0);
	for (size_t at = 0; at + sizeof buf <= SIZE && !r; at += sizeof buf)
		r = live_write(disk, fd, buf, sizeof buf, (off_t)at);
	cr_assert_eq(r, -ENOSPC);
	expect(0);
}

/* With a time limit that is not reached, all is as without. */
Test(snapshots, saves_with_a_time_limit)
{
	give_back();
	fixture_close(&fx);
	fx.config.cbw_timeout = 60;
	fixture_open(&fx);
	fd = live_open(&fx, "disk", &disk);
	make_five();
	for (int i = 0; i < SNAPS; i++)
		expect(i);
}

static void damage(const char *file, off_t off)
{
	char path[200], byte;
	int f;

	snprintf(path, sizeof path, "%s/%s", fx.fleece, file);
	f = open(path, O_RDWR);
	cr_assert_geq(f, 0, "%s: %s", path, strerror(errno));
	cr_assert_eq(pread(f, &byte, 1, off), 1);
	byte ^= 0x10;
	cr_assert_eq(pwrite(f, &byte, 1, off), 1);
	close(f);
}

Test(snapshots, a_bad_manifest_costs_its_own_snapshot)
{
	make_five();
	give_back();
	fixture_close(&fx);
	damage("s2/manifest", 60);
	ff_log_threshold(FF_LOG_ERROR - 1);
	fixture_open(&fx);
	for (int i = 0; i < SNAPS; i++)
		if (i == 2)
			cr_assert_eq(frozen_error(&fx, "s2", "disk"), -EIO);
		else
			expect(i);
	cr_assert_eq(ff_store_drop(fx.store, "s2"), 0);
	expect(0);
	expect(1);
}

Test(snapshots, a_bad_image_costs_the_views_that_need_it)
{
	make_five();
	give_back();
	fixture_close(&fx);
	damage("s2/disk-fleece-3.qcow2", 30);
	ff_log_threshold(FF_LOG_ERROR - 1);
	fixture_open(&fx);
	for (int i = 0; i < SNAPS; i++)
		if (i <= 2)
			cr_assert_eq(frozen_error(&fx, name_of(i), "disk"), -EIO);
		else
			expect(i);
	for (int i = 0; i < SNAPS; i++)
		cr_assert_eq(ff_store_drop(fx.store, name_of(i)), 0);
	cr_assert_eq(count_images(&fx), 0);
}

Test(snapshots, one_store_a_directory_and_one_source_a_store)
{
	struct ff_store *second;
	struct fixture other;

	ff_log_threshold(FF_LOG_ERROR - 1);
	cr_assert_eq(ff_store_open(&fx.config, &second), -EBUSY);
	freeze(0);
	give_back();
	fixture_close(&fx);
	fixture_init(&other, 4096);
	other.config.fleece_path = fx.fleece;
	ff_log_threshold(FF_LOG_ERROR - 1);
	cr_assert_eq(ff_store_open(&other.config, &second), -EINVAL);
	fixture_done(&other);
	fixture_open(&fx);
	expect(0);
}

Test(snapshots, a_torn_down_ephemeral_one_is_dropped)
{
	cr_assert_eq(ff_store_freeze(fx.store, "s0", FF_FREEZE_EPHEMERAL), 0);
	freeze(1);
	remount();
	cr_assert_eq(frozen_error(&fx, "s0", "disk"), -ENOENT);
	expect(1);
}

/* Runs a command of the shell with SOURCE and FLEECE_DIR in $S and $F. */
static void shell(const char *command)
{
	char line[600];

	snprintf(line, sizeof line, "S=%s; F=%s; set -e; %s", fx.source, fx.fleece, command);
	cr_assert_eq(system(line), 0, "%s", command);
}

Test(snapshots, a_lost_hidden_image_is_noticed)
{
	static const char *const losses[] = {
	    "rm $F/.dropped-*/*.qcow2",
	    "printf X | dd of=$(ls $F/.dropped-*/*.qcow2) bs=1 seek=60 conv=notrunc status=none",
	    "rm -r $F/.dropped-*",
	};

	ff_log_threshold(FF_LOG_ERROR - 1);
	for (size_t i = 0; i < FF_ARRAY_SIZE(losses); i++) {
		freeze(0);
		freeze(1);
		change(0, 100000, 70 + (unsigned)i);
		cr_assert_eq(ff_store_drop(fx.store, "s1"), 0);
		expect(0);
		give_back();
		fixture_close(&fx);
		shell(losses[i]);
		fixture_open(&fx);
		fd = live_open(&fx, "disk", &disk);
		cr_assert_eq(frozen_error(&fx, "s0", "disk"), -EIO, "%s", losses[i]);
		cr_assert_eq(ff_store_drop(fx.store, "s0"), 0);
	}
}

Test(snapshots, a_snapshot_removed_by_hand_is_noticed)
{
	ff_log_threshold(FF_LOG_ERROR - 1);
	freeze(0);
	freeze(1);
	change(0, 100000, 2);
	give_back();
	fixture_close(&fx);
	shell("rm -r $F/s1");
	fixture_open(&fx);
	cr_assert_eq(frozen_error(&fx, "s0", "disk"), -EIO);
}

Test(snapshots, a_hidden_image_goes_when_the_next_older_one_has_it_all)
{
	freeze(0);
	change(0, 50000, 2);
	freeze(1);
	freeze(2);
	change(0, 50000, 3); /* s1 needs it from s2 */
	cr_assert_eq(ff_store_drop(fx.store, "s2"), 0);
	cr_assert_eq(count_images(&fx), 3);
	cr_assert_eq(ff_store_drop(fx.store, "s1"), 0);
	cr_assert_eq(count_images(&fx), 1);
	expect(0);
}

Test(snapshots, a_disk_aside_whose_other_name_goes_too)
{
	cr_assert_eq(linkat(fx.source_fd, "disk", fx.source_fd, "twin", 0), 0);
	freeze(0);
	cr_assert_eq(ff_store_unlink(fx.store, fx.source_fd, "twin"), 0);
	give_back();
	freeze(1);
	cr_assert_eq(ff_store_unlink(fx.store, fx.source_fd, "disk"), 0);
	fixture_file(&fx, "disk", 100, 9);
	expect(0);
	expect(1);
	shell("qemu-img convert -f qcow2 -O raw $F/s0/disk-fleece-1.qcow2 $F/.out");
	shell("cmp -n 300000 $F/.out $S/.fleecefs/.aside-*/*");
}

Test(snapshots, damaged_ones_and_interrupted_ones_do_not_get_in_each_others_way)
{
	ff_log_threshold(FF_LOG_ERROR - 1);
	make_five();
	give_back();
	fixture_close(&fx);
	shell("for i in 1 2; do echo >$F/s$i/manifest; done; mkdir $F/cut1 $F/cut2 $F/cut3");
	fixture_open(&fx);
	for (int i = 1; i < SNAPS; i++)
		cr_assert_eq(ff_store_drop(fx.store, name_of(i)), 0);
	expect(0);
	fixture_close(&fx);
	shell("mkdir $F/cut1 $F/cut2");
	fixture_open(&fx);
	expect(0);
	cr_assert_eq(ff_store_drop(fx.store, "s0"), 0);
	cr_assert_eq(count_images(&fx), 0);
	shell("test -z \"$(ls $F)\"");
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
