#include "five.h"

#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "ff_util.h"

struct fixture fx;
struct ff_disk *disk;
int disk_fd = -1;
char live[SIZE], views[SNAPS][SIZE];
bool touched[SNAPS][CLUSTERS];

void five_setup(void)
{
	fixture_init(&fx, 4096);
	fixture_file(&fx, "disk", SIZE, 1);
	fill(live, SIZE, 1);
	fixture_open(&fx);
	disk_fd = live_open(&fx, "disk", &disk);
}

void five_give_back(void)
{
	if (disk)
		ff_disk_put(ff_take_ptr(&disk));
	if (disk_fd >= 0)
		close(ff_take_fd(&disk_fd));
}

void five_teardown(void)
{
	five_give_back();
	fixture_done(&fx);
}

void five_remount(void)
{
	five_give_back();
	fixture_close(&fx);
	fixture_open(&fx);
	disk_fd = live_open(&fx, "disk", &disk);
}

void five_change(size_t off, size_t len, unsigned seed)
{
	fill(live + off, len, seed);
	cr_assert_eq(live_write(disk, disk_fd, live + off, len, (off_t)off), 0);
	for (int i = 0; i < SNAPS; i++)
		for (size_t c = off / CLUSTER; c <= (off + len - 1) / CLUSTER; c++)
			touched[i][c] = true;
}

const char *five_name_of(int i)
{
	static const char *const names[] = {"s0", "s1", "s2", "s3", "s4"};

	return names[i];
}

void five_freeze(int i)
{
	int r = ff_store_freeze(fx.store, five_name_of(i), 0);

	cr_assert_eq(r, 0, "freeze %s: %s", five_name_of(i), strerror(-r));
	memcpy(views[i], live, SIZE);
	memset(touched[i], 0, sizeof touched[i]);
}

void five_expect(int i)
{
	expect_frozen(&fx, five_name_of(i), "disk", views[i], SIZE);
}

void five_make(void)
{
	for (int i = 0; i < SNAPS; i++) {
		five_freeze(i);
		five_change((size_t)i * 20000, 50000, 10 + (unsigned)i);
		five_change((size_t)i * 3000, 5000, 20 + (unsigned)i);
	}
}

void five_shell(const char *command)
{
	char line[600];

	snprintf(line, sizeof line, "S=%s; F=%s; set -e; %s", fx.source, fx.fleece, command);
	cr_assert_eq(system(line), 0, "%s", command);
}
