/*
 * What is away while a mount changes its disks, and comes back: an image, a whole snapshot. It
 * shows nothing any more, and harms nobody.
 */
#include <criterion/criterion.h>
#include <errno.h>
#include <stdio.h>
#include <sys/wait.h>
#include <unistd.h>

#include "ff_log.h"
#include "five.h"

TestSuite(returns, .init = five_setup, .fini = five_teardown);

/* An image that cannot be read at one mount, and can at a later one, did not see what was changed
 * in between. HOW the mount without it ends. */
static void come_back(bool killed, bool another)
{
	pid_t pid = 0;
	int status;

	five_freeze(0);
	five_freeze(1);
	five_change(0, 20000, 3);
	five_give_back();
	fixture_close(&fx);
	five_shell("mv $F/s1/disk-fleece-2.qcow2 $F/away");
	ff_log_threshold(FF_LOG_ERROR - 1);
	if (killed)
		pid = fork();
	if (pid == 0) {
		fixture_open(&fx);
		disk_fd = live_open(&fx, "disk", &disk);
		cr_assert_eq(frozen_error(&fx, "s1", "disk"), -EIO);
		five_change(100000, 50000, 4);
		if (another)
			five_freeze(2);
		five_change(200000, 50000, 5);
		if (killed)
			_exit(0);
		five_give_back();
		fixture_close(&fx);
	} else {
		cr_assert_eq(waitpid(pid, &status, 0), pid);
		cr_assert_eq(status, 0);
	}
	five_shell("mv $F/away $F/s1/disk-fleece-2.qcow2");
	for (int i = 0; i < 2; i++) {
		fixture_open(&fx);
		cr_assert_eq(frozen_error(&fx, "s0", "disk"), -EIO);
		cr_assert_eq(frozen_error(&fx, "s1", "disk"), -EIO);
		if (another && !killed)
			five_expect(2);
		fixture_close(&fx);
	}
	fixture_open(&fx);
}

Test(returns, an_image_that_comes_back_after_a_clean_end)
{
	come_back(false, false);
}

Test(returns, an_image_that_comes_back_beside_another_snapshot)
{
	come_back(false, true);
}

Test(returns, an_image_that_comes_back_after_a_kill)
{
	come_back(true, false);
}

Test(returns, an_image_that_comes_back_after_a_kill_beside_another_snapshot)
{
	come_back(true, true);
}

static void take_away(int i)
{
	char command[80];

	five_give_back();
	fixture_close(&fx);
	snprintf(command, sizeof command, "mv $F/s%d $S/../away", i);
	five_shell(command);
	ff_log_threshold(FF_LOG_ERROR - 1);
	fixture_open(&fx);
	disk_fd = live_open(&fx, "disk", &disk);
}

static void bring_back(int i)
{
	char command[80];

	five_give_back();
	fixture_close(&fx);
	snprintf(command, sizeof command, "mv $S/../away $F/s%d", i);
	five_shell(command);
	fixture_open(&fx);
}

/* The same for a whole snapshot that somebody moved away and back. Its number is another's then,
 * which is not harmed. */
Test(returns, a_snapshot_that_comes_back)
{
	five_freeze(0);
	five_freeze(1);
	take_away(1);
	five_change(100000, 50000, 4);
	five_freeze(2);
	five_freeze(3);
	five_change(200000, 50000, 5);
	bring_back(1);
	for (int i = 0; i < 2; i++)
		cr_assert_eq(frozen_error(&fx, five_name_of(i), "disk"), -EIO);
	five_expect(2);
	five_expect(3);
	fixture_close(&fx);
	fixture_open(&fx);
	for (int i = 0; i < 2; i++)
		cr_assert_eq(frozen_error(&fx, five_name_of(i), "disk"), -EIO);
	five_expect(2);
	five_expect(3);
}

/* What only it needed of a newer image was given up. */
Test(returns, a_snapshot_that_comes_back_to_less)
{
	five_freeze(0);
	five_change(0, 50000, 3);
	five_freeze(1);
	five_freeze(2);
	five_change(0, 100000, 4);
	take_away(1);
	cr_assert_eq(ff_store_drop(fx.store, "s2"), 0);
	five_freeze(3);
	bring_back(1);
	cr_assert_eq(frozen_error(&fx, "s0", "disk"), -EIO);
	cr_assert_eq(frozen_error(&fx, "s1", "disk"), -EIO);
	five_expect(3);
}
