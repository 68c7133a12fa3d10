/*
 * What only NFS has (see plain_fs.c): files that were unlinked while they were open.
 */
#include <criterion/criterion.h>
#include <errno.h>

#include "five.h"

TestSuite(nfs, .init = five_setup, .fini = five_teardown);

#define UNLINKED ".nfs000000000006000c0000001f"

Test(nfs, what_was_unlinked_is_not_frozen)
{
	fixture_file(&fx, UNLINKED, 5000, 1);
	fixture_file(&fx, UNLINKED "0", 5000, 2);
	fixture_file(&fx, ".nfs", 5000, 3);
	five_freeze(0);
	cr_assert_eq(frozen_error(&fx, "s0", UNLINKED), -ENOENT);
	cr_assert_eq(frozen_error(&fx, "s0", UNLINKED "0"), 0);
	cr_assert_eq(frozen_error(&fx, "s0", ".nfs"), 0);
	five_expect(0);
}
