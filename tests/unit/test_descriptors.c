/*
 * Descriptors: many more disks than a process may have descriptors, read one after the other.
 */
#include <criterion/criterion.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include "fixture.h"

enum { LIMIT = 128, DISKS = 3 * LIMIT, SIZE = 5000 };

static struct fixture fx;

static void setup(void)
{
	struct rlimit rl = {LIMIT, LIMIT};
	char name[16];

	cr_assert_eq(setrlimit(RLIMIT_NOFILE, &rl), 0);
	fixture_init(&fx, 4096);
	for (unsigned i = 0; i < DISKS; i++) {
		snprintf(name, sizeof name, "d%u", i);
		fixture_file(&fx, name, SIZE, i);
	}
	fixture_open(&fx);
	cr_assert_eq(ff_store_freeze(fx.store, "s", 0), 0);
}

static void teardown(void)
{
	fixture_done(&fx);
}

TestSuite(descriptors, .init = setup, .fini = teardown);

static void expect_all(unsigned from, unsigned to)
{
	char name[16], want[SIZE];

	for (unsigned i = from; i < to; i++) {
		snprintf(name, sizeof name, "d%u", i);
		fill(want, SIZE, i);
		expect_frozen(&fx, "s", name, want, SIZE);
	}
}

Test(descriptors, more_disks_than_descriptors)
{
	expect_all(0, DISKS);
}

Test(descriptors, the_time_being_written_keeps_none_open)
{
	atomic_fetch_add(&fx.store->asking, 1); /* as a write of the time that hangs */
	expect_all(0, DISKS);
	atomic_fetch_sub(&fx.store->asking, 1);
}

/* While a job that nobody waits for may use any of them, they stay open; not for ever. */
Test(descriptors, what_a_late_job_kept_open_is_closed_after_it)
{
	expect_all(0, LIMIT / 4);
	atomic_fetch_add(&fx.store->late, 1);
	expect_all(LIMIT / 4, LIMIT / 3);
	for (unsigned i = LIMIT / 3; i < LIMIT; i++) {
		char name[16];

		snprintf(name, sizeof name, "d%u", i);
		frozen_error(&fx, "s", name); /* with what is left: right, or an error */
	}
	cr_assert_neq(frozen_error(&fx, "s", "d300"), 0);
	atomic_fetch_sub(&fx.store->late, 1);
	frozen_error(&fx, "s", "d300"); /* the first that ends after it closes them */
	expect_all(0, DISKS);
}
