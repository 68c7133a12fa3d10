/*
 * Ends of a mount of every kind, and what the next one makes of them: clean, killed, with a loss of
 * power, with changes of SOURCE in between, with files in FLEECE_DIR that are not what they were.
 */
#include <criterion/criterion.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "ff_log.h"
#include "ff_util.h"
#include "five.h"

TestSuite(endings, .init = five_setup, .fini = five_teardown);

Test(endings, clean_end_and_new_mount)
{
	five_make();
	five_remount();
	for (int i = 0; i < SNAPS; i++)
		five_expect(i);
	five_change(1000, 150000, 99);
	for (int i = 0; i < SNAPS; i++)
		five_expect(i);
}

/* Another process has the lock of FLEECE_DIR for that long, and TEXT in its file. */
static pid_t holder(const char *text, long ms)
{
	char path[160], ready;
	int ends[2], fd;
	pid_t pid;

	cr_assert_eq(pipe(ends), 0);
	pid = fork();
	if (pid == 0) {
		snprintf(path, sizeof path, "%s/.lock", fx.fleece);
		fd = open(path, O_RDWR | O_TRUNC);
		if (fd < 0 || flock(fd, LOCK_EX) || write(fd, text, strlen(text)) < 0 ||
		    write(ends[1], "!", 1) != 1)
			_exit(1);
		nanosleep(&(struct timespec){ms / 1000, ms % 1000 * 1000000}, NULL);
		_exit(0);
	}
	close(ends[1]);
	cr_assert_eq(read(ends[0], &ready, 1), 1);
	close(ends[0]);
	return pid;
}

Test(endings, one_that_writes_back_is_waited_for)
{
	struct ff_store *store;
	struct timespec before, after;
	pid_t pid;

	five_give_back();
	fixture_close(&fx);
	pid = holder("ending\n", 3300);
	clock_gettime(CLOCK_MONOTONIC, &before);
	fixture_open(&fx);
	clock_gettime(CLOCK_MONOTONIC, &after);
	cr_assert_gt(after.tv_sec - before.tv_sec, 1);
	cr_assert_eq(waitpid(pid, NULL, 0), pid);
	fixture_close(&fx);
	pid = holder("", 60000);
	cr_assert_eq(ff_store_open(&fx.config, &store), -EBUSY);
	kill(pid, SIGKILL);
	cr_assert_eq(waitpid(pid, NULL, 0), pid);
	fixture_open(&fx);
	disk_fd = live_open(&fx, "disk", &disk);
}

Test(endings, killed_daemon_loses_nothing)
{
	int status;
	pid_t pid;

	five_make();
	five_give_back();
	fixture_close(&fx);
	pid = fork();
	if (pid == 0) {
		fixture_open(&fx);
		disk_fd = live_open(&fx, "disk", &disk);
		five_change(60000, 70000, 41);
		cr_assert_eq(ff_store_drop(fx.store, "s2"), 0);
		five_change(200000, 5000, 42);
		_exit(0);
	}
	cr_assert_eq(waitpid(pid, &status, 0), pid);
	cr_assert_eq(status, 0);
	fixture_open(&fx);
	disk_fd = live_open(&fx, "disk", &disk);
	for (int i = 0; i < SNAPS; i++)
		if (i != 2)
			five_expect(i);
	cr_assert_eq(frozen_error(&fx, "s2", "disk"), -ENOENT);
}

Test(endings, change_behind_the_mount_is_noticed)
{
	int past;

	fixture_file(&fx, "other", 5000, 7);
	five_make();
	five_give_back();
	fixture_close(&fx);
	past = openat(fx.source_fd, "disk", O_WRONLY);
	cr_assert_eq(pwrite(past, "x", 1, 5), 1);
	close(past);
	ff_log_threshold(FF_LOG_ERROR - 1);
	fixture_open(&fx);
	for (int i = 0; i < SNAPS; i++) {
		cr_assert_eq(frozen_error(&fx, five_name_of(i), "disk"), -EIO);
		cr_assert_eq(frozen_error(&fx, five_name_of(i), "other"), 0);
	}
	/* For good, also when the next end is a clean one. */
	fixture_close(&fx);
	fixture_open(&fx);
	cr_assert_eq(frozen_error(&fx, "s0", "disk"), -EIO);
	cr_assert_eq(frozen_error(&fx, "s0", "other"), 0);
	for (int i = 0; i < SNAPS; i++)
		cr_assert_eq(ff_store_drop(fx.store, five_name_of(i)), 0);
	cr_assert_eq(count_images(&fx), 0);
}

static void lose_power(void)
{
	five_give_back();
	fixture_close(&fx);
	five_shell("rm $F/.clean; echo another boot >$F/.session");
	ff_log_threshold(FF_LOG_ERROR - 1);
}

Test(endings, power_loss_tears_what_was_not_durable)
{
	five_make();
	lose_power();
	fixture_open(&fx);
	for (int i = 0; i < SNAPS; i++) {
		cr_assert_eq(frozen_error(&fx, five_name_of(i), "disk"), -EIO);
		cr_assert_eq(ff_store_drop(fx.store, five_name_of(i)), 0);
	}
	cr_assert_eq(count_images(&fx), 0);
}

/* A file that was made shortly before may have its length and nothing in it. */
Test(endings, power_loss_leaves_what_is_durable)
{
	five_give_back();
	fixture_close(&fx);
	fx.config.durable = true;
	fixture_open(&fx);
	disk_fd = live_open(&fx, "disk", &disk);
	five_freeze(0);
	five_change(0, 100000, 3);
	lose_power();
	five_shell("head -c 21 /dev/zero >$F/.alive");
	fixture_open(&fx);
	five_expect(0);
}

/* Of two images that had left their chain the kill left one, and that one names the other. */
Test(endings, an_image_that_has_left_is_nobodys_loss)
{
	five_freeze(0);
	five_change(0, 5000, 1);
	five_freeze(1);
	five_freeze(2);
	five_shell("cp $F/s1/disk-fleece-*.qcow2 $F/.clean-copy");
	cr_assert_eq(ff_store_drop(fx.store, "s1"), 0);
	cr_assert_eq(ff_store_drop(fx.store, "s2"), 0);
	five_give_back();
	fixture_close(&fx);
	five_shell(
	    "mkdir -m 700 $F/.dropped-9; mv $F/.clean-copy $F/.dropped-9/disk-fleece-2.qcow2");
	fixture_open(&fx);
	disk_fd = live_open(&fx, "disk", &disk);
	five_expect(0);
	five_change(3000, 9000, 2);
	five_expect(0);
	cr_assert_eq(count_images(&fx), 1);
}

/* Without the record nothing tells that SOURCE was left alone while no mount was there. */
Test(endings, a_damaged_record_proves_nothing)
{
	char path[160];
	FILE *f;

	five_freeze(0);
	five_give_back();
	fixture_close(&fx);
	snprintf(path, sizeof path, "%s/.clean", fx.fleece);
	f = fopen(path, "r+");
	cr_assert_not_null(f);
	fputc('x', f);
	fclose(f);
	fixture_file(&fx, "disk", 5000, 77);
	ff_log_threshold(FF_LOG_ERROR - 1);
	fixture_open(&fx);
	cr_assert_eq(frozen_error(&fx, five_name_of(0), "disk"), -EIO);
	cr_assert_eq(ff_store_drop(fx.store, five_name_of(0)), 0);
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

Test(endings, a_bad_manifest_costs_its_own_snapshot)
{
	five_make();
	five_give_back();
	fixture_close(&fx);
	damage("s2/manifest", 60);
	ff_log_threshold(FF_LOG_ERROR - 1);
	fixture_open(&fx);
	for (int i = 0; i < SNAPS; i++)
		if (i == 2)
			cr_assert_eq(frozen_error(&fx, "s2", "disk"), -EIO);
		else
			five_expect(i);
	cr_assert_eq(ff_store_drop(fx.store, "s2"), 0);
	five_expect(0);
	five_expect(1);
}

Test(endings, a_bad_image_costs_the_views_that_need_it)
{
	five_make();
	five_give_back();
	fixture_close(&fx);
	damage("s2/disk-fleece-3.qcow2", 30);
	ff_log_threshold(FF_LOG_ERROR - 1);
	fixture_open(&fx);
	for (int i = 0; i < SNAPS; i++)
		if (i <= 2)
			cr_assert_eq(frozen_error(&fx, five_name_of(i), "disk"), -EIO);
		else
			five_expect(i);
	for (int i = 0; i < SNAPS; i++)
		cr_assert_eq(ff_store_drop(fx.store, five_name_of(i)), 0);
	cr_assert_eq(count_images(&fx), 0);
}

Test(endings, a_torn_down_ephemeral_one_is_dropped)
{
	cr_assert_eq(ff_store_freeze(fx.store, "s0", FF_FREEZE_EPHEMERAL), 0);
	five_freeze(1);
	five_remount();
	cr_assert_eq(frozen_error(&fx, "s0", "disk"), -ENOENT);
	five_expect(1);
}

Test(endings, a_lost_hidden_image_is_noticed)
{
	static const char *const losses[] = {
	    "rm $F/.dropped-*/*.qcow2",
	    "printf X | dd of=$(ls $F/.dropped-*/*.qcow2) bs=1 seek=60 conv=notrunc status=none",
	    "rm -r $F/.dropped-*",
	};

	ff_log_threshold(FF_LOG_ERROR - 1);
	for (size_t i = 0; i < FF_ARRAY_SIZE(losses); i++) {
		five_freeze(0);
		five_freeze(1);
		five_change(0, 100000, 70 + (unsigned)i);
		cr_assert_eq(ff_store_drop(fx.store, "s1"), 0);
		five_expect(0);
		five_give_back();
		fixture_close(&fx);
		five_shell(losses[i]);
		fixture_open(&fx);
		disk_fd = live_open(&fx, "disk", &disk);
		cr_assert_eq(frozen_error(&fx, "s0", "disk"), -EIO, "%s", losses[i]);
		cr_assert_eq(ff_store_drop(fx.store, "s0"), 0);
	}
}

Test(endings, a_snapshot_removed_by_hand_is_noticed)
{
	ff_log_threshold(FF_LOG_ERROR - 1);
	five_freeze(0);
	five_freeze(1);
	five_change(0, 100000, 2);
	five_give_back();
	fixture_close(&fx);
	five_shell("rm -r $F/s1");
	fixture_open(&fx);
	cr_assert_eq(frozen_error(&fx, "s0", "disk"), -EIO);
}

Test(endings, damaged_ones_and_interrupted_ones_do_not_get_in_each_others_way)
{
	ff_log_threshold(FF_LOG_ERROR - 1);
	five_make();
	five_give_back();
	fixture_close(&fx);
	five_shell(
	    "for i in 1 2; do echo >$F/s$i/manifest; done; "
	    "mkdir $F/cut1 $F/cut2 $F/cut3; for i in 1 2 3; do touch $F/cut$i/~making; done");
	fixture_open(&fx);
	for (int i = 1; i < SNAPS; i++)
		cr_assert_eq(ff_store_drop(fx.store, five_name_of(i)), 0);
	five_expect(0);
	fixture_close(&fx);
	five_shell("mkdir $F/cut1 $F/cut2; touch $F/cut1/~making $F/cut2/~making");
	fixture_open(&fx);
	five_expect(0);
	cr_assert_eq(ff_store_drop(fx.store, "s0"), 0);
	cr_assert_eq(count_images(&fx), 0);
	five_shell("test -z \"$(ls $F)\"");
}

/* Killed; then somebody starts his machine on SOURCE itself. ALIVE: how long the daemon lived, in
 * seconds from now. */
static void kill_and_change(int alive, bool change_it)
{
	char path[160], text[32] = "";
	int status, past;
	pid_t pid;

	five_give_back();
	fixture_close(&fx);
	pid = fork();
	if (pid == 0) {
		snprintf(path, sizeof path, "%s/.alive", fx.fleece);
		fixture_open(&fx);
		ff_store_pulse(fx.store);
		while (access(path, F_OK) < 0 || atomic_load(&fx.store->pulsing))
			usleep(1000);
		_exit(0);
	}
	cr_assert_eq(waitpid(pid, &status, 0), pid);
	cr_assert_eq(status, 0);
	snprintf(path, sizeof path, "%s/.alive", fx.fleece);
	past = open(path, O_RDWR);
	cr_assert_geq(past, 0);
	cr_assert_eq(read(past, text, sizeof text), 21);
	cr_assert(llabs(strtoll(text, NULL, 10) - (long long)time(NULL)) < 10);
	snprintf(text, sizeof text, "%020lld\n", (long long)time(NULL) + alive);
	cr_assert_eq(pwrite(past, text, 21, 0), 21);
	close(past);
	if (change_it) {
		past = openat(fx.source_fd, "disk", O_WRONLY);
		cr_assert_eq(pwrite(past, "x", 1, 5), 1);
		close(past);
	}
	ff_log_threshold(FF_LOG_ERROR - 1);
	fixture_open(&fx);
}

Test(endings, change_after_a_kill_is_noticed)
{
	fixture_file(&fx, "other", 5000, 7);
	five_freeze(0);
	usleep(1100000); /* the other's ctime is older than what follows */
	kill_and_change(-1 - 10, true);
	cr_assert_eq(frozen_error(&fx, "s0", "disk"), -EIO);
	cr_assert_eq(frozen_error(&fx, "s0", "other"), 0);
}

Test(endings, a_daemon_that_lived_accounts_for_its_changes)
{
	five_freeze(0);
	five_change(0, 100000, 3);
	kill_and_change(0, false);
	five_expect(0);
}

static const char *reason_of(const char *name)
{
	const struct ff_frozen *f;
	struct ff_disk_status st;
	struct ff_snap *snap;

	cr_assert_eq(ff_snap_get(fx.store, name, &snap), 0);
	cr_assert_eq(ff_frozen_lookup(snap, ff_snap_root(snap), "disk", &f), 0);
	cr_assert_eq(ff_frozen_status(snap, f, &st), 0);
	ff_snap_put(snap);
	cr_assert_eq(st.state, FF_VIEW_BROKEN);
	return st.reason;
}

Test(endings, why_a_view_broke_is_known_later)
{
	five_freeze(0);
	ff_log_threshold(FF_LOG_ERROR - 1);
	fx.store->cfg.fleece_limit = fx.store->space_used;
	five_change(0, 5000, 3);
	cr_assert_str_eq(reason_of("s0"), strerrordesc_np(ENOSPC));
	five_remount();
	cr_assert_str_eq(reason_of("s0"), strerrordesc_np(ENOSPC));
	five_freeze(1);
	five_give_back();
	fixture_close(&fx);
	five_shell("printf x | dd of=$S/disk bs=1 seek=7 conv=notrunc status=none");
	fixture_open(&fx);
	fixture_close(&fx);
	fixture_open(&fx);
	cr_assert_str_eq(reason_of("s0"), strerrordesc_np(ENOSPC));
	cr_assert_str_eq(reason_of("s1"), "its disk was changed while fleecefs was not mounted");
}
