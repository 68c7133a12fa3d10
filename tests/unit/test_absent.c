/*
 * Snapshots whose directory is away during a mount and there again at a later one: whatever the
 * ends of both mounts were, they do not show what was changed meanwhile as old.
 */
#include <criterion/criterion.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "cow/manifest.h"
#include "ff_log.h"
#include "ff_util.h"
#include "five.h"

static void setup(void)
{
	five_setup();
	ff_log_threshold(FF_LOG_ERROR - 1);
}

TestSuite(absent, .init = setup, .fini = five_teardown);

/* Ends the mount. KILLED: as if it had been, and nothing of it is left in memory. */
static void end(bool killed)
{
	five_give_back();
	fixture_close(&fx);
	if (killed)
		five_shell("rm $F/.clean");
}

static void begin(void)
{
	fixture_open(&fx);
	disk_fd = live_open(&fx, "disk", &disk);
}

static void drop_all(int first, int last)
{
	for (int i = first; i <= last; i++)
		cr_assert_eq(ff_store_drop(fx.store, five_name_of(i)), 0);
	cr_assert_eq(count_images(&fx), 0);
}

/* The only one is away while a mount makes another, which gets its number: all of the ways in which
 * the two mounts can end. */
static void only_one(bool before_killed, bool away_killed)
{
	five_freeze(0);
	five_change(0, 50000, 2);
	end(before_killed);
	five_shell("mv $F/s0 $S/../away");
	begin();
	five_change(30000, 100000, 3);
	five_freeze(1);
	five_change(60000, 100000, 4);
	end(away_killed);
	five_shell("mv $S/../away $F/s0");
	for (int i = 0; i < 3; i++) {
		begin();
		cr_assert_eq(frozen_error(&fx, "s0", "disk"), -EIO, "%d %d, mount %d",
		             before_killed, away_killed, i);
		five_expect(1);
		five_change(90000, 100000, 5 + (unsigned)i);
		five_expect(1);
		if (i < 2)
			end(i == 0);
	}
	drop_all(0, 1);
}

Test(absent, the_only_one)
{
	for (int how = 0; how < 4; how++)
		only_one(how & 1, how & 2);
}

/* The snapshot is away during a mount that writes SALT all over its disk, and back after that. */
static void write_while_away(unsigned salt)
{
	five_shell("mv $F/s0 $S/../away");
	begin();
	five_change(0, SIZE, salt);
	end(true);
	five_shell("mv $S/../away $F/s0");
	begin();
	cr_assert_eq(frozen_error(&fx, "s0", "disk"), -EIO);
}

/* Nothing was made meanwhile, and nothing is left that tells of the time but .known. */
Test(absent, the_only_one_of_a_mount_without_any)
{
	five_freeze(0);
	end(true);
	write_while_away(3);
	drop_all(0, 0);
}

/* WHICH of the five is away: the older ones rely on it, the newer ones do not. */
Test(absent, one_of_many)
{
	static const char *const names[] = {"s0", "s2", "s4"};

	for (int which = 0; which < SNAPS; which += 2) {
		char command[80];

		five_make();
		end(true);
		snprintf(command, sizeof command, "mv $F/%s $S/../away", names[which / 2]);
		five_shell(command);
		begin();
		five_change(0, SIZE, 3 + (unsigned)which);
		end(true);
		snprintf(command, sizeof command, "mv $S/../away $F/%s", names[which / 2]);
		five_shell(command);
		begin();
		for (int i = 0; i < SNAPS; i++)
			if (i <= which)
				cr_assert_eq(frozen_error(&fx, five_name_of(i), "disk"), -EIO);
			else
				five_expect(i);
		drop_all(0, SNAPS - 1);
	}
}

/* Kills alone, a rename and directories by other names are nothing. */
Test(absent, none_that_was_there)
{
	five_freeze(0);
	end(true);
	begin();
	five_change(0, 100000, 2);
	five_freeze(1);
	cr_assert_eq(ff_store_rename_snap(fx.store, "s0", "other"), 0);
	five_change(50000, 100000, 3);
	end(true);
	five_shell("mv $F/other $F/s0");
	begin();
	five_change(100000, 100000, 4);
	end(true);
	begin();
	five_expect(0);
	five_expect(1);
}

/* A manifest that cannot be read for a while: the snapshot was there, and its images in their
 * chain. But a copy of the directory, put in its place, was not. */
static void unreadable(bool copied)
{
	for (int i = 0; i < 3; i++) {
		five_freeze(i);
		five_change((size_t)i * 50000, 60000, 2 + (unsigned)i);
	}
	end(true);
	five_shell("cp -a $F/s1 $S/../copy; mv $F/s1/manifest $S/../away; mkdir $F/s1/manifest");
	begin();
	cr_assert_eq(frozen_error(&fx, "s1", "disk"), -EIO);
	five_expect(0);
	five_change(0, SIZE, 7);
	cr_assert_eq(ff_store_drop(fx.store, "s2"), 0);
	five_change(0, SIZE, 8);
	five_expect(0);
	end(true);
	if (copied)
		five_shell("rm -r $F/s1; mv $S/../copy $F/s1");
	else
		five_shell("rmdir $F/s1/manifest; mv $S/../away $F/s1/manifest");
	begin();
	for (int i = 0; i < 2; i++)
		if (copied)
			cr_assert_eq(frozen_error(&fx, five_name_of(i), "disk"), -EIO);
		else
			five_expect(i);
	drop_all(0, 1);
	five_shell("rm -rf $S/../copy $S/../away");
}

Test(absent, one_with_a_manifest_that_is_read_later)
{
	unreadable(false);
	unreadable(true);
}

/* Without .known, or with a wrong one, none is believed; and what comes then is right again. */
Test(absent, a_record_that_is_gone_or_damaged)
{
	static const char *const losses[] = {
	    "rm $F/.known",
	    "truncate -s 30 $F/.known",
	    "printf 'mount 7\\n' >$F/.known",
	    "sed -i s/known/knowm/ $F/.known",
	    "rm $F/.known; mkdir $F/.known",
	};

	for (size_t i = 0; i < FF_ARRAY_SIZE(losses); i++) {
		five_freeze(0);
		end(true);
		begin(); /* now it stands in the list */
		end(true);
		five_shell(losses[i]);
		if (i + 1 < FF_ARRAY_SIZE(losses)) {
			begin();
			cr_assert_eq(frozen_error(&fx, "s0", "disk"), -EIO, "%s", losses[i]);
			five_freeze(1);
			five_change(0, 100000, 10 + (unsigned)i);
			five_expect(1);
			drop_all(0, 1);
		} else {
			cr_assert_neq(ff_store_open(&fx.config, &fx.store), 0);
		}
	}
}

/* As a fleecefs left it that knew of no mounts: what was there before is believed once, and then as
 * any other. */
Test(absent, one_that_tells_of_no_mount)
{
	struct manifest m;
	struct ff_snap *snap;

	five_freeze(0);
	cr_assert_eq(ff_snap_get(fx.store, "s0", &snap), 0);
	cr_assert_eq(manifest_read(snap->dir->fd, "s0", &m), 0);
	m.made = 0;
	cr_assert_eq(manifest_write(snap->dir->fd, &m, false), 0);
	tree_free(m.tree);
	ff_snap_put(snap);
	end(true);
	five_shell("rm $F/.known");
	for (int i = 0; i < 3; i++) {
		begin();
		five_change(0, 50000, 2 + (unsigned)i);
		five_expect(0);
		end(i != 1);
	}
	write_while_away(7);
}
