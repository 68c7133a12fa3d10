/*
 * Decoded disks in the engine: read by threads while others write to the images and to their
 * backing file; what keeps a snapshot; who may follow a name.
 */
#include <errno.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include <criterion/criterion.h>

#include "cow/io.h"
#include "ff_util.h"
#include "fixture.h"

enum { DISK = 3 << 20, READERS = 4 };

static struct fixture fx;
static char *want;
static atomic_bool stop;

static void run(const char *commands)
{
	char all[1000];

	snprintf(all, sizeof all, "cd %s && { %s; } >/dev/null", fx.source, commands);
	cr_assert_eq(system(all), 0, "%s", commands);
}

static void setup(void)
{
	char path[200];
	FILE *f;

	fixture_init(&fx, 4096);
	fixture_file(&fx, "base.img", DISK, 1);
	run("mkdir d; qemu-img create -f qcow2 -b ../base.img -F raw d/a.qcow2;"
	    "qemu-img create -f qcow2 -b a.qcow2 -F qcow2 -o cluster_size=4k d/top.qcow2;"
	    "qemu-io -c 'write -P 1 100k 300k' -c 'write -z 1m 192k' d/a.qcow2;"
	    "qemu-io -c 'write -P 2 300k 333k' -c 'write -z 2m 20k' d/top.qcow2;"
	    "qemu-img convert -f qcow2 -O raw d/top.qcow2 ../want");
	want = malloc(DISK);
	snprintf(path, sizeof path, "%s/want", fx.root);
	f = fopen(path, "r");
	cr_assert(f && want && fread(want, 1, DISK, f) == DISK);
	fclose(f);
	fixture_open(&fx);
	cr_assert_eq(ff_store_freeze(fx.store, "s", 0), 0);
}

static void teardown(void)
{
	fixture_close(&fx);
	fixture_done(&fx);
	free(want);
}

TestSuite(raw, .init = setup, .fini = teardown, .timeout = 120);

static int open_raw(struct ff_snap *snap, const char *name, const struct ff_raw_asker *asker,
                    struct ff_raw **out)
{
	const struct ff_frozen *dir, *f;

	cr_assert_eq(ff_frozen_lookup(snap, ff_snap_root(snap), "d", &dir), 0);
	cr_assert_eq(ff_frozen_lookup(snap, dir, name, &f), 0);
	cr_assert(ff_raw_is(snap, f));
	return ff_raw_open(snap, dir, f, asker, out);
}

static void *read_along(void *arg)
{
	ff_autofree char *buf = malloc(70000);
	struct ff_raw *raw = arg;
	unsigned seed = (unsigned)(uintptr_t)&buf;

	for (int i = 0; i < 300; i++) {
		size_t off = (size_t)rand_r(&seed) % DISK, got = 0;
		size_t len = FF_MIN((size_t)(i % 2 ? 70000 : 5000), DISK - off);
		off_t at;

		cr_assert_eq(ff_raw_read(raw, buf, len, (off_t)off, &got), 0);
		cr_assert_eq(got, len);
		cr_assert_eq(memcmp(buf, want + off, len), 0, "at %zu", off);
		cr_assert_eq(ff_raw_seek(raw, (off_t)off, SEEK_DATA, &at), 0);
		cr_assert(at >= (off_t)off);
	}
	return NULL;
}

static void *write_along(void *arg)
{
	static const char *const names[] = {"base.img", "d/a.qcow2", "d/top.qcow2"};
	struct ff_disk *disks[3];
	char buf[8192];
	int fds[3];

	for (int i = 0; i < 3; i++)
		fds[i] = live_open(&fx, names[i], &disks[i]);
	memset(buf, 0x55, sizeof buf);
	for (unsigned n = 0; !atomic_load(&stop); n++)
		cr_assert_eq(live_write(disks[n % 3], fds[n % 3], buf, sizeof buf,
		                        (off_t)(n * 7919 % (DISK / 3))),
		             0);
	for (int i = 0; i < 3; i++) {
		close(fds[i]);
		ff_disk_put(disks[i]);
	}
	return NULL;
}

Test(raw, concurrent_with_writes)
{
	const struct ff_raw_asker us = {0};
	pthread_t readers[READERS], writer;
	struct ff_snap *snap;
	struct ff_raw *raw;
	uint64_t blocks;
	off_t at;

	cr_assert_eq(ff_snap_get(fx.store, "s", &snap), 0);
	cr_assert_eq(open_raw(snap, "top.qcow2", &us, &raw), 0);
	cr_assert_eq(pthread_create(&writer, NULL, write_along, NULL), 0);
	for (int i = 0; i < READERS; i++)
		cr_assert_eq(pthread_create(&readers[i], NULL, read_along, raw), 0);
	for (int i = 0; i < READERS; i++)
		pthread_join(readers[i], NULL);
	atomic_store(&stop, true);
	pthread_join(writer, NULL);
	cr_assert_eq(ff_raw_blocks(raw, &blocks), 0);
	/* 192k and 20k were made zeros, in whole clusters: a part of one would be an unwritten
	 * extent of the image's file, which is no hole any more while the page cache has it */
	cr_assert_eq(blocks, (DISK - 212 * 1024) / 512, "%llu blocks", (unsigned long long)blocks);
	cr_assert_eq(ff_raw_seek(raw, (1 << 20) + 5, SEEK_HOLE, &at), 0);
	cr_assert_eq(at, (1 << 20) + 5);
	cr_assert_eq(ff_raw_seek(raw, DISK, SEEK_DATA, &at), -ENXIO);
	cr_assert_eq(ff_store_drop(fx.store, "s"), -EBUSY);
	ff_raw_close(raw);
	cr_assert_eq(ff_store_drop(fx.store, "s"), 0);
	ff_snap_put(snap);
}

/* What was asked, and the I-th answer is no. */
struct asked {
	unsigned count, refuse;
	mode_t what[16];
	ino_t ino[16];
};

static bool ask(void *ctx, const struct stat *st, bool acl, mode_t what)
{
	struct asked *a = ctx;

	cr_assert_lt(a->count, FF_ARRAY_SIZE(a->what));
	a->what[a->count] = what;
	a->ino[a->count] = st->st_ino;
	return a->count++ != a->refuse;
}

/* Each directory that a name leads through and each file is asked for, and each may be denied. */
Test(raw, rights)
{
	static const mode_t asked[] = {1, 4, 1, 1, 4}; /* d, a.qcow2; d, the root, base.img */
	struct asked a = {.refuse = 99};
	struct ff_raw_asker asker = {.may = ask, .ctx = &a};
	struct ff_snap *snap;
	struct ff_raw *raw;

	cr_assert_eq(ff_snap_get(fx.store, "s", &snap), 0);
	cr_assert_eq(open_raw(snap, "top.qcow2", &asker, &raw), 0);
	ff_raw_close(raw);
	cr_assert_eq(a.count, FF_ARRAY_SIZE(asked));
	cr_assert_eq(memcmp(a.what, asked, sizeof asked), 0);
	cr_assert(a.ino[0] == a.ino[2] && a.ino[0] != a.ino[3] && a.ino[1] != a.ino[4]);
	for (unsigned i = 0; i < FF_ARRAY_SIZE(asked); i++) {
		a = (struct asked){.refuse = i};
		cr_assert_eq(open_raw(snap, "top.qcow2", &asker, &raw), -EACCES);
		cr_assert_eq(a.count, i + 1);
	}
	ff_snap_put(snap);
	cr_assert_eq(ff_store_drop(fx.store, "s"), 0); /* nothing was left open */
}
