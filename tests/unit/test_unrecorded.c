/*
 * Views that are broken in memory, while no storage has taken that they are: a later mount takes
 * them for whole, so nothing of what they need may go.
 */
#include <criterion/criterion.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "cow/io.h"
#include "five.h"

static bool full; /* storage takes no new file, no header and nothing more of what may grow */

int __real_io_pwrite(int fd, const void *buf, size_t len, uint64_t off);
int __wrap_io_pwrite(int fd, const void *buf, size_t len, uint64_t off);
int __real_io_openat(int dirfd, const char *path, int flags, mode_t mode, int *out);
int __wrap_io_openat(int dirfd, const char *path, int flags, mode_t mode, int *out);

int __wrap_io_pwrite(int fd, const void *buf, size_t len, uint64_t off)
{
	char proc[40], path[300] = "";

	snprintf(proc, sizeof proc, "/proc/self/fd/%d", fd);
	if (full && readlink(proc, path, sizeof path - 1) > 0 &&
	    (strstr(path, ".dirty") || strstr(path, ".xxh3") ||
	     (strstr(path, ".qcow2") && off == 0)))
		return -ENOSPC;
	return __real_io_pwrite(fd, buf, len, off);
}

int __wrap_io_openat(int dirfd, const char *path, int flags, mode_t mode, int *out)
{
	return full && strstr(path, ".lost-") ? -ENOSPC
	                                      : __real_io_openat(dirfd, path, flags, mode, out);
}

TestSuite(unrecorded, .init = five_setup, .fini = five_teardown);

Test(unrecorded, what_a_later_mount_would_read_is_kept)
{
	struct ff_snap *snap;
	char buf[CLUSTER];

	five_freeze(0);
	cr_assert_eq(ff_snap_get(fx.store, "s0", &snap), 0);
	cr_assert_eq(ff_snap_checkpoint(snap), 0);
	ff_snap_put(snap);
	five_freeze(1);
	five_change(0, 100000, 5);
	five_freeze(2);

	full = true;
	fill(buf, sizeof buf, 9);
	cr_assert_lt(live_write(disk, disk_fd, buf, sizeof buf, 200000), 0,
	             "nothing could tell a later mount what this destroys");
	cr_assert_eq(frozen_error(&fx, "s1", "disk"), -EIO);
	ff_store_drop(fx.store, "s2"); /* sweeps */
	five_give_back();
	fixture_close(&fx);
	full = false;

	fixture_open(&fx);
	five_expect(1);
}
