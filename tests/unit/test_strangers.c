/*
 * Directories of FLEECE_DIR that are no whole snapshots: somebody else's, which stay as they are; a
 * mkdir that was cut short, which is undone; a snapshot without its manifest, which is shown as
 * damaged, and never deleted unasked.
 */
#include <criterion/criterion.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <unistd.h>

#include "ff_log.h"
#include "ff_util.h"
#include "five.h"

static void setup(void)
{
	five_setup();
	ff_log_threshold(FF_LOG_ERROR - 1);
}

TestSuite(strangers, .init = setup, .fini = five_teardown);

static void end(void)
{
	five_give_back();
	fixture_close(&fx);
}

static void begin(void)
{
	fixture_open(&fx);
	disk_fd = live_open(&fx, "disk", &disk);
}

static int count_one(void *ctx, const char *name)
{
	++*(int *)ctx;
	return 0;
}

/* Asserts that so many snapshots are listed. */
static void expect_listed(int want)
{
	int n = 0;

	ff_snap_each(fx.store, count_one, &n);
	cr_assert_eq(n, want);
}

/* Somebody's: nothing at all, directories alone, files of all kinds, names like ours on what is
 * none, and what a repair of the filesystem leaves, which may have been ours. */
#define STRANGERS                                                                                  \
	"mkdir -p $F/none $F/tree/x/y $F/files/d $F/like/d $F/lost+found/#12; "                    \
	"echo it >$F/files/d/vm.qcow2; ln -s /nowhere $F/files/link; mkfifo $F/files/fifo; "       \
	"for n in qcow2 xxh3 dirty; do echo it >$F/like/disk-fleece-1.$n; done; "                  \
	"echo it >$F/like/d/disk-fleece-2.qcow2; mkfifo $F/like/x-fleece-1.qcow2; "                \
	"ln -s $F/s0/disk-fleece-1.qcow2 $F/like/y-fleece-1.qcow2; "
#define STATE "(cd $F; find none tree files like lost+found -printf '%P %y %s %T@ %i\\n' | sort)"

Test(strangers, stay_as_they_are)
{
	five_make();
	end();
	five_shell(STRANGERS "cp $F/s1/*.qcow2 $F/lost+found/#12; " STATE " >$S/../before");
	for (int i = 0; i < 2; i++) {
		begin();
		expect_listed(SNAPS);
		for (int k = 0; k < SNAPS; k++)
			five_expect(k);
		five_change(1000, 150000, 90 + (unsigned)i);
		for (int k = 0; k < SNAPS; k++)
			five_expect(k);
		end();
		five_shell(STATE " | cmp - $S/../before");
	}
	begin();
	for (int k = 0; k < SNAPS; k++)
		cr_assert_eq(ff_store_drop(fx.store, five_name_of(k)), 0);
	five_shell(STATE " | cmp - $S/../before");
}

Test(strangers, do_not_make_a_first_use_a_second)
{
	end();
	five_shell("find $F -mindepth 1 -delete; " STRANGERS);
	begin();
	expect_listed(0);
	end();
	five_shell("test -s $F/.source");
	/* nor keep it from being another SOURCE's, as long as nothing is in it */
	five_shell("echo 1 2 3 >$F/.source; mkdir $F/cut; touch $F/cut/~making");
	begin();
	expect_listed(0);
}

/* What FLEECE_DIR holds is of one SOURCE, and of no other that may be there in its place. */
Test(strangers, nor_snapshots_those_of_any_source)
{
	static const char *const changes[] = {
	    "rm $F/.source",
	    "echo 1 2 3 >$F/.source",
	    "rm $F/.source; mkdir $F/.source",
	};

	five_freeze(0);
	end();
	five_shell("cp $F/.source $S/../kept");
	for (int lost = 0; lost < 2; lost++) {
		for (size_t i = 0; i < FF_ARRAY_SIZE(changes); i++) {
			five_shell(changes[i]);
			cr_assert_eq(ff_store_open(&fx.config, &fx.store), -EINVAL, "%s",
			             changes[i]);
			five_shell("rm -rf $F/.source; cp $S/../kept $F/.source");
		}
		five_shell("rm -f $F/s0/manifest");
	}
	begin();
	expect_listed(1);
}

Test(strangers, an_empty_directory_gives_way)
{
	five_shell("mkdir -m 755 $F/s0");
	five_freeze(0);
	five_shell("test $(stat -c %a $F/s0) = 700; test ! -e $F/s0/~making");
	five_change(0, 100000, 2);
	five_remount();
	five_expect(0);
}

Test(strangers, anything_else_does_not)
{
	static const char *const things[] = {
	    "mkdir -p $F/x/y", "mkdir $F/x; touch $F/x/.hidden",
	    "touch $F/x",      "ln -s /nowhere $F/x",
	    "mkfifo $F/x",     "mkdir $F/e; ln -s e $F/x",
	};

	for (size_t i = 0; i < FF_ARRAY_SIZE(things); i++) {
		five_shell(things[i]);
		five_shell("find $F -name '*x*' -printf '%P %y %i %T@\\n' >$S/../before");
		cr_assert_eq(ff_store_freeze(fx.store, "x", 0), -EEXIST, "%s", things[i]);
		five_shell("find $F -name '*x*' -printf '%P %y %i %T@\\n' | cmp - $S/../before; "
		           "test -z \"$(find $F -name '.dropped-*')\"; rm -r $F/x");
	}
	cr_assert_eq(ff_store_freeze(fx.store, "x", 0), 0);
}

/* What a mkdir leaves behind when it is cut short: before it has made its directory, with nothing
 * in that yet, and with an image that an older one needs. */
Test(strangers, an_interrupted_mkdir_is_undone)
{
	struct fleece_dir *dir;

	five_make();
	cr_assert_eq(making_begin(fx.store, "early", &dir), 0);
	close(dir->fd);
	free(dir->name);
	free(dir);
	end();
	five_shell("test -f $F/early/~making; rm $F/s3/manifest; touch $F/s3/~making; "
	           "mkdir $F/.dropped-77; touch $F/.dropped-77/~making");
	begin();
	five_shell("test ! -e $F/early; test ! -e $F/s3; test ! -e $F/.dropped-77");
	expect_listed(SNAPS - 1);
	for (int i = 0; i < SNAPS; i++)
		if (i != 3)
			five_expect(i);
	cr_assert_eq(ff_store_freeze(fx.store, "early", 0), 0);
	cr_assert_eq(ff_store_drop(fx.store, "early"), 0);
	for (int i = 0; i < SNAPS; i++)
		if (i != 3)
			cr_assert_eq(ff_store_drop(fx.store, five_name_of(i)), 0);
	five_shell("test -z \"$(ls $F)\"; test -z \"$(find $F -name '.dropped-*')\"");
}

Test(strangers, what_was_put_into_an_interrupted_mkdir_stays)
{
	end();
	five_shell("mkdir $F/cut; touch $F/cut/~making; echo it >$F/cut/mine");
	begin();
	expect_listed(0);
	five_shell("grep -q it $F/cut/mine");
}

/* Killed between the manifest and the mark's end: a snapshot, which is none that is being made from
 * then on. */
Test(strangers, a_mark_beside_a_manifest_goes)
{
	five_make();
	end();
	five_shell("touch $F/s2/~making");
	begin();
	for (int i = 0; i < SNAPS; i++)
		five_expect(i);
	five_shell("test ! -e $F/s2/~making");
}

static void expect_all_but_one(int lost)
{
	expect_listed(SNAPS);
	for (int i = 0; i < SNAPS; i++)
		if (i == lost)
			cr_assert_eq(frozen_error(&fx, five_name_of(i), "disk"), -EIO);
		else
			five_expect(i);
}

/* Beside it, the images may have company. */
static void lose_manifest(const char *how, bool killed)
{
	five_make();
	end();
	five_shell(how);
	if (killed)
		five_shell("rm $F/.clean");
	for (int i = 0; i < 2; i++) {
		begin();
		expect_all_but_one(2);
		five_change(i ? 0 : 100000, 150000, 90 + (unsigned)i);
		expect_all_but_one(2);
		cr_assert_eq(ff_store_freeze(fx.store, "s2", 0), -EEXIST);
		end();
	}
	begin();
	cr_assert_eq(ff_store_drop(fx.store, "s2"), 0);
	for (int i = 0; i < SNAPS; i++)
		if (i != 2)
			five_expect(i);
	for (int i = 0; i < SNAPS; i++)
		if (i != 2)
			cr_assert_eq(ff_store_drop(fx.store, five_name_of(i)), 0);
	five_shell("test -z \"$(ls $F)\"");
}

Test(strangers, a_lost_manifest_costs_its_own_snapshot)
{
	lose_manifest("rm $F/s2/manifest", false);
	lose_manifest("rm $F/s2/manifest", true);
	lose_manifest("rm $F/s2/manifest; touch $F/s2/note", false);
}
