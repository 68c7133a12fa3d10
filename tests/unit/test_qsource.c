/*
 * The decoder of guests' qcow2 images against qemu-img, and where libqcow reads right against that:
 * over images of all kinds that QEMU makes.
 */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <criterion/criterion.h>
#include <criterion/parameterized.h>
#include <libqcow.h>

#include "ff_util.h"
#include "guestimg.h"

TestSuite(qsource, .timeout = 300);

/* How an image is made: raw.img, of SIZE bytes, is there and becomes disk.qcow2, or the commands
 * do all. */
struct way {
	const char *name;
	uint64_t size;
	const char *options; /* of qemu-img convert */
	const char *commands;
	bool libqcow; /* reads it right */
};

#define IO(cmds)  "qemu-io -f qcow2 " cmds " disk.qcow2;"
#define MIX       IO("-c 'write -P 7 60k 100k' -c 'write -P 9 1m 3k'")
#define ZEROS     IO("-c 'write -z 128k 300k' -c 'write -z -u 1m 200k' -c 'write -P 3 300k 5k'")
#define DISCARD   IO("-c 'discard 256k 512k' -c 'discard 2m 64k' -c 'write -P 8 2m 1k'")
#define OVER(fmt) "qemu-img create -q -f qcow2 -b base.img -F " fmt " "
#define ODD       (3 * 1048576 + 512 * 7)
#define BIG       (9 * 1048576 + 512)

static struct way ways[] = {
    {"512", ODD, "-o cluster_size=512", MIX, true},
    {"512 zeros", ODD, "-o cluster_size=512", ZEROS DISCARD MIX},
    {"1k", ODD, "-o cluster_size=1k", MIX, true},
    {"4k", ODD, "-o cluster_size=4k", MIX, true},
    {"4k zeros", ODD, "-o cluster_size=4k", ZEROS MIX DISCARD},
    {"64k", ODD, "", MIX, true},
    {"64k zeros", ODD, "", ZEROS MIX DISCARD},
    {"256k", BIG, "-o cluster_size=256k", MIX, true},
    {"1m zeros", BIG, "-o cluster_size=1m", ZEROS},
    {"2m", BIG, "-o cluster_size=2m", MIX, true},
    {"2m zeros", BIG, "-o cluster_size=2m", ZEROS MIX},
    {"v2 512", ODD, "-o compat=0.10,cluster_size=512", MIX, true},
    {"v2", ODD, "-o compat=0.10", MIX DISCARD, true},
    {"v2 2m", BIG, "-o compat=0.10,cluster_size=2m", MIX, true},
    {"v2 packed", ODD, "-c -o compat=0.10", MIX, true},
    {"zlib 512", ODD, "-c -o cluster_size=512", MIX, true},
    {"zlib 4k", ODD, "-c -o cluster_size=4k", "", true},
    {"zlib", ODD, "-c", MIX ZEROS},
    {"zlib 2m", BIG, "-c -o cluster_size=2m", "", true},
    {"zstd 512", ODD, "-c -o compression_type=zstd,cluster_size=512", MIX},
    {"zstd", ODD, "-c -o compression_type=zstd", MIX ZEROS DISCARD},
    {"zstd 2m", BIG, "-c -o compression_type=zstd,cluster_size=2m", ""},
    {"written packed", ODD, NULL,
     "qemu-img create -f qcow2 disk.qcow2 3m;" IO(
         "-c 'write -c -P 5 128k 64k' -c 'write -c -P 6 1m 64k'")},
    {"subclusters", ODD, "-o extended_l2=on", MIX ZEROS DISCARD},
    {"subclusters 16k", ODD, "-o extended_l2=on,cluster_size=16k", MIX ZEROS},
    {"subclusters 2m", BIG, "-o extended_l2=on,cluster_size=2m", ZEROS MIX},
    {"subclusters zstd", ODD, "-c -o extended_l2=on,compression_type=zstd", MIX ZEROS},
    {"lazy refcounts", ODD, "-o lazy_refcounts=on", MIX, true},
    {"dirty", ODD, "-o lazy_refcounts=on",
     "qemu-io -c 'write -P 7 60k 100k' -c 'flush' -c 'abort' disk.qcow2; true", true},
    {"refcounts of 1", ODD, "-o refcount_bits=1", MIX, true},
    {"refcounts of 64", ODD, "-o refcount_bits=64", MIX, true},
    {"metadata", BIG, NULL, "qemu-img create -f qcow2 -o preallocation=metadata disk.qcow2 9m;" MIX,
     true},
    {"falloc", BIG, NULL, "qemu-img create -f qcow2 -o preallocation=falloc disk.qcow2 9m;" MIX,
     true},
    {"full", ODD, NULL, "qemu-img create -f qcow2 -o preallocation=full disk.qcow2 3m;" MIX, true},
    {"metadata, subclusters", BIG, NULL,
     "qemu-img create -f qcow2 -o preallocation=metadata,extended_l2=on disk.qcow2 9m;" MIX ZEROS},
    {"empty", ODD, NULL, "qemu-img create -f qcow2 disk.qcow2 10m", true},
    {"none at all", ODD, NULL, "qemu-img create -f qcow2 disk.qcow2 0"},
    {"one sector", ODD, NULL,
     "qemu-img create -f qcow2 disk.qcow2 512; qemu-io -c 'write -P 1 0 512' disk.qcow2", true},
    {"bitmaps", ODD, "",
     "qemu-img bitmap --add disk.qcow2 b; qemu-img bitmap --add -g 64k disk.qcow2 c;" MIX, true},
    {"snapshots", ODD, "",
     MIX "qemu-img snapshot -c one disk.qcow2;" ZEROS
         "qemu-img snapshot -c two disk.qcow2;" IO("-c 'write -P 1 0 2m'")},
    {"snapshot applied", ODD, "-o cluster_size=4k",
     "qemu-img snapshot -c one disk.qcow2;" MIX ZEROS
     "qemu-img snapshot -a one disk.qcow2;" IO("-c 'write -P 1 2m 9k'")},
    {"grown", ODD, "", MIX "qemu-img resize disk.qcow2 +5m;" IO("-c 'write -P 2 7m 70k'"), true},
    {"grown a little", ODD, "", "qemu-img resize disk.qcow2 +512;", true},
    {"shrunk", BIG, "", "qemu-img resize --shrink disk.qcow2 5m;" MIX, true},
    {"data file", ODD, "-o data_file=data.raw", MIX ZEROS DISCARD},
    {"data file, raw", ODD, "-o data_file=data.raw,data_file_raw=on", MIX ZEROS},
    {"data file, subclusters", ODD, "-o data_file=data.raw,extended_l2=on", MIX ZEROS},
    {"over raw", ODD, NULL, "mv raw.img base.img;" OVER("raw") "disk.qcow2;" MIX ZEROS DISCARD},
    {"over raw, 512", ODD, NULL,
     "mv raw.img base.img;" OVER("raw") "-o cluster_size=512 disk.qcow2;" MIX ZEROS},
    {"over raw, subclusters", ODD, NULL,
     "mv raw.img base.img;" OVER("raw") "-o extended_l2=on disk.qcow2;" MIX ZEROS DISCARD},
    {"over raw, metadata", ODD, NULL,
     "mv raw.img base.img;" OVER("raw") "-o extended_l2=on,preallocation=metadata disk.qcow2;" MIX},
    {"over a shorter one", ODD, NULL, "mv raw.img base.img;" OVER("raw") "disk.qcow2 12m;" MIX},
    {"over a longer one", ODD, NULL, "mv raw.img base.img;" OVER("raw") "disk.qcow2 2m;" MIX},
    {"over a longer one, grown", ODD, NULL,
     "mv raw.img base.img;" OVER("raw") "disk.qcow2 2m; qemu-img resize disk.qcow2 4m"},
    {"over packed", ODD, NULL,
     "qemu-img convert -c -O qcow2 raw.img base.img;" OVER("qcow2") "disk.qcow2;" MIX ZEROS},
    {"chain", ODD, NULL,
     "qemu-img create -f qcow2 -b raw.img -F raw a.qcow2 5m; qemu-io -c 'write -P 1 1m 1m' a.qcow2;"
     "qemu-img create -f qcow2 -o cluster_size=512 -b a.qcow2 -F qcow2 b.qcow2 4m;"
     "qemu-io -c 'write -P 2 3m 600k' -c 'write -z 1500k 33k' b.qcow2;"
     "qemu-img create -f qcow2 -o extended_l2=on -b b.qcow2 -F qcow2 disk.qcow2 6m;" MIX ZEROS},
    {"rebased", ODD, NULL,
     "cp raw.img base.img;" OVER("raw") "disk.qcow2;" MIX
                                        "qemu-img create -f qcow2 b.qcow2 4m; qemu-img rebase -b "
                                        "b.qcow2 -F qcow2 disk.qcow2"},
    {"committed", ODD, NULL,
     "qemu-img convert -O qcow2 raw.img base.img;" OVER(
         "qcow2") "disk.qcow2;" MIX ZEROS "qemu-img commit disk.qcow2;" DISCARD},
    {"huge", ODD, NULL,
     "qemu-img create -f qcow2 disk.qcow2 64m; qemu-io -c 'write -P 1 0 1k' disk.qcow2; qemu-img"
     " create -f qcow2 -o cluster_size=512 -b disk.qcow2 -F qcow2 b.qcow2; mv b.qcow2 c.qcow2;"
     "mv disk.qcow2 base.img; qemu-img rebase -u -b base.img -F qcow2 c.qcow2; mv c.qcow2 "
     "disk.qcow2"},
};

ParameterizedTestParameters(qsource, as_qemu)
{
	/* Tests run in other processes, where a pointer would mean nothing. */
	static int numbers[FF_ARRAY_SIZE(ways)];

	for (int i = 0; i < (int)FF_ARRAY_SIZE(ways); i++)
		numbers[i] = i;
	return cr_make_param_array(int, numbers, FF_ARRAY_SIZE(numbers));
}

static void make(struct guestimg *g, const struct way *w)
{
	guestimg_raw(g, "raw.img", w->size, w->size + (uint64_t)strlen(w->name));
	if (w->options)
		cr_assert_eq(guestimg_run(g,
		                          "qemu-img convert -f raw -O qcow2 %s raw.img disk.qcow2",
		                          w->options),
		             0);
	if (*w->commands)
		cr_assert_eq(guestimg_run(g, "%s", w->commands), 0);
	cr_assert_eq(guestimg_run(g, "qemu-img convert -f qcow2 -O raw disk.qcow2 want.raw"), 0);
}

/* It reads a whole last cluster, of which the file may have a part only. */
static void pad(const struct guestimg *g)
{
	ff_autofree uint8_t *image = NULL;
	size_t size;

	image = guestimg_load(g, "disk.qcow2", &size);
	cr_assert_eq(
	    guestimg_run(g, "truncate -s %%%llu disk.qcow2", 1ULL << (ff_be32(image + 20) & 31)),
	    0);
}

static void libqcow_same(const struct guestimg *g, const uint8_t *want, size_t size)
{
	libqcow_file_t *file = NULL;
	ff_autofree uint8_t *buf = malloc(65536);
	size64_t seen = 0;
	char path[100];

	pad(g);
	snprintf(path, sizeof path, "%s/disk.qcow2", g->dir);
	cr_assert_eq(libqcow_file_initialize(&file, NULL), 1);
	cr_assert_eq(libqcow_file_open(file, path, LIBQCOW_OPEN_READ, NULL), 1);
	cr_assert_eq(libqcow_file_get_media_size(file, &seen, NULL), 1);
	cr_assert_eq(seen, size);
	for (size_t off = 0; off < size; off += 65536) {
		size_t len = FF_MIN(65536, size - off);

		cr_assert_eq(libqcow_file_read_buffer_at_offset(file, buf, len, (off64_t)off, NULL),
		             (ssize_t)len);
		cr_assert_eq(memcmp(buf, want + off, len), 0, "libqcow at %zu", off);
	}
	libqcow_file_close(file, NULL);
	libqcow_file_free(&file, NULL);
}

ParameterizedTest(int *number, qsource, as_qemu)
{
	const struct way *w = &ways[*number];
	struct guestimg g;
	uint64_t data, best;
	size_t size;
	uint8_t *want;

	guestimg_init(&g);
	make(&g, w);
	want = guestimg_load(&g, "want.raw", &size);
	cr_assert_eq(guestimg_open(&g, "disk.qcow2"), 0, "%s: %s", w->name, g.why);
	guestimg_compare(&g, want, size, &data);
	best = 0;
	for (size_t at = 0; at < size; at += 512)
		for (size_t i = at; i < FF_MIN(at + 512, size); i++)
			if (want[i]) {
				best += 512;
				break;
			}
	printf("%s: %zu bytes, %llu of data, %llu that are not zero\n", w->name, size,
	       (unsigned long long)data, (unsigned long long)best);
	if (w->libqcow)
		libqcow_same(&g, want, size);
	free(want);
	guestimg_done(&g);
}

/* Makes an image of the class that libqcow reads right: no zero clusters, no backing file, zlib. */
static void make_random(struct guestimg *g, unsigned *seed)
{
	unsigned bits = 9 + (unsigned)rand_r(seed) % 13;
	uint64_t size = ((uint64_t)rand_r(seed) % 6000 + 8) << (bits > 16 ? 11 : 9);
	bool old = rand_r(seed) % 3 == 0, packed = rand_r(seed) % 2;
	char more[60] = "compat=0.10", cmds[1000] = "";
	size_t n = 0;

	if (!old)
		snprintf(more, sizeof more, "refcount_bits=%d,lazy_refcounts=%s",
		         1 << rand_r(seed) % 7, rand_r(seed) % 2 ? "on" : "off");
	for (int i = rand_r(seed) % 10; i > 0; i--) {
		uint64_t off = (uint64_t)rand_r(seed) % (size / 512), len;

		len = FF_MIN((uint64_t)rand_r(seed) % 900 + 1, size / 512 - off);
		n += (size_t)snprintf(cmds + n, sizeof cmds - n, " -c 'write -P %d %llu %llu'",
		                      rand_r(seed) % 256, (unsigned long long)off * 512,
		                      (unsigned long long)len * 512);
	}
	guestimg_raw(g, "raw.img", size, *seed);
	cr_assert_eq(guestimg_run(g,
	                          "qemu-img convert %s -f raw -O qcow2 -o cluster_size=%u,%s "
	                          "raw.img disk.qcow2; qemu-io -f qcow2 -c 'read 0 512'%s "
	                          "disk.qcow2; qemu-img convert -O raw disk.qcow2 want.raw",
	                          packed ? "-c" : "", 1u << bits, more, cmds),
	             0);
}

/* Both decoders and QEMU, over images made at random of what all three read. */
Test(qsource, libqcow_random, .timeout = 1800)
{
	unsigned seed = guestimg_number("SEED", (unsigned)getpid()),
	         rounds = guestimg_number("ROUNDS", 6);

	printf("seed %u\n", seed);
	for (unsigned i = 0; i < rounds; i++) {
		ff_autofree uint8_t *want = NULL;
		struct guestimg g;
		uint64_t data;
		size_t size;

		guestimg_init(&g);
		make_random(&g, &seed);
		want = guestimg_load(&g, "want.raw", &size);
		cr_assert_eq(guestimg_open(&g, "disk.qcow2"), 0, "round %u: %s", i, g.why);
		guestimg_compare(&g, want, size, &data);
		libqcow_same(&g, want, size);
		guestimg_done(&g);
	}
}

/* The deepest chain there may be: layer I has cluster I alone, and all have their tables at the
 * same place. */
Test(qsource, deep)
{
	enum { CLUSTER = 4096, CLUSTERS = 256 };
	ff_autofree uint8_t *image = NULL, *want = calloc(CLUSTERS, CLUSTER);
	struct guestimg g;
	uint64_t data;
	size_t size, l2, name;

	guestimg_init(&g);
	cr_assert_eq(guestimg_run(&g,
	                          "truncate -s 1m raw; qemu-img create -f qcow2 -b raw -F raw -o "
	                          "cluster_size=4k t; qemu-io -c 'write -P 1 0 4k' t;"
	                          "qemu-img rebase -u -b l001 -F qcow2 t"),
	             0);
	image = guestimg_load(&g, "t", &size);
	l2 = (size_t)(ff_be64(image + ff_be64(image + 40)) & UINT64_C(0x00fffffffffffe00));
	name = (size_t)ff_be64(image + 8);
	data = ff_be64(image + l2) & UINT64_C(0x00fffffffffffe00);
	cr_assert(data && memcmp(image + name, "l001", 4) == 0);
	memset(image + l2, 0, CLUSTER);
	for (unsigned i = 0; i <= QS_LAYERS_MAX; i++) {
		char file[8], backing[8];
		int fd;

		snprintf(file, sizeof file, "l%03u", i);
		snprintf(backing, sizeof backing, "l%03u", i + 1);
		memcpy(image + name, backing, 4);
		memset(image + data, (int)i + 1, CLUSTER);
		ff_put_be64(image + l2 + i * 8, UINT64_C(1) << 63 | data);
		if (i == QS_LAYERS_MAX - 1) /* the last; and one too many has one as well */
			ff_put_be64(image + 8, 0);
		fd = openat(g.dirfd, file, O_CREAT | O_WRONLY | O_CLOEXEC, 0600);
		cr_assert_eq(write(fd, image, size), (ssize_t)size);
		close(fd);
		ff_put_be64(image + l2 + i * 8, 0);
		if (i < QS_LAYERS_MAX)
			memset(want + (size_t)i * CLUSTER, (int)i + 1, CLUSTER);
	}
	cr_assert_eq(guestimg_open(&g, "l000"), 0, "%s", g.why);
	guestimg_compare(&g, want, (size_t)CLUSTERS * CLUSTER, &data);
	cr_assert_eq(data, (uint64_t)QS_LAYERS_MAX * CLUSTER);
	guestimg_close(&g);
	guestimg_put(&g, "l199", 8, name);
	cr_assert_eq(guestimg_open(&g, "l000"), -ELOOP);
	guestimg_done(&g);
}

/* A disk of an odd number of bytes, which QEMU makes none of and others do. */
Test(qsource, odd_size)
{
	struct guestimg g;
	ff_autofree uint8_t *want = NULL;
	uint64_t data;
	size_t size;

	guestimg_init(&g);
	guestimg_raw(&g, "raw.img", 200192, 5);
	cr_assert_eq(guestimg_run(&g, "qemu-img convert -f raw -O qcow2 raw.img disk.qcow2"), 0);
	want = guestimg_load(&g, "raw.img", &size);
	guestimg_put(&g, "disk.qcow2", 24, 200100);
	cr_assert_eq(guestimg_open(&g, "disk.qcow2"), 0, "%s", g.why);
	guestimg_compare(&g, want, 200100, &data);
	libqcow_same(&g, want, 200100);
	guestimg_done(&g);
}

/* What many open disks keep together is bounded; what is not kept is as right. */
Test(qsource, memory)
{
	/* UNIT: the largest piece that is kept, a cluster unpacked */
	enum { DISKS = 6, UNIT = 128 << 10, MOST = 8 * UNIT };
	struct qs_kept kept = {.max = MOST};
	struct guestimg g[DISKS];
	ff_autofree uint8_t *want = NULL;
	size_t size, most = 0;
	uint64_t data;

	for (int i = 0; i < DISKS; i++) {
		guestimg_init(&g[i]);
		guestimg_raw(&g[i], "raw.img", BIG, 3);
		cr_assert_eq(guestimg_run(&g[i],
		                          "qemu-img convert -c -f raw -O qcow2 -o "
		                          "cluster_size=%s raw.img disk.qcow2",
		                          i % 2 ? "128k" : "512"),
		             0);
		g[i].kept = &kept;
		cr_assert_eq(guestimg_open(&g[i], "disk.qcow2"), 0);
	}
	want = guestimg_load(&g[0], "raw.img", &size);
	for (int i = 0; i < DISKS; i++) {
		guestimg_compare(&g[i], want, size, &data);
		most = FF_MAX(most, (size_t)kept.bytes);
	}
	cr_assert(most > MOST - UNIT && most <= MOST, "%zu", most);
	for (int i = 0; i < DISKS; i++)
		guestimg_done(&g[i]);
	cr_assert_eq(kept.bytes, 0);
}

/* --- threads --- */

struct reader {
	struct guestimg *g;
	const uint8_t *want;
	size_t size;
	unsigned seed;
};

static void *read_along(void *arg)
{
	struct reader *rd = arg;
	uint8_t buf[9000];

	for (int i = 0; i < 400; i++) {
		size_t off = (size_t)rand_r(&rd->seed) % rd->size;
		size_t len = (size_t)rand_r(&rd->seed) % sizeof buf + 1;

		len = FF_MIN(len, rd->size - off);
		cr_assert_eq(qs_disk_read(rd->g->disk, buf, len, off), 0);
		cr_assert_eq(memcmp(buf, rd->want + off, len), 0, "%zu at %zu", len, off);
	}
	return NULL;
}

Test(qsource, concurrent_reads)
{
	struct reader readers[8];
	pthread_t threads[8];
	struct guestimg g;
	ff_autofree uint8_t *want = NULL;
	size_t size;

	guestimg_init(&g);
	guestimg_raw(&g, "raw.img", BIG, 7);
	cr_assert_eq(
	    guestimg_run(&g,
	                 "qemu-img convert -c -f raw -O qcow2 -o cluster_size=512k raw.img"
	                 " base.img; " OVER("qcow2") "-o cluster_size=512 disk.qcow2;" MIX
	                                             "qemu-img convert -O raw disk.qcow2 want.raw"),
	    0);
	want = guestimg_load(&g, "want.raw", &size);
	cr_assert_eq(guestimg_open(&g, "disk.qcow2"), 0);
	for (unsigned i = 0; i < 8; i++) {
		readers[i] = (struct reader){&g, want, size, i};
		cr_assert_eq(pthread_create(&threads[i], NULL, read_along, &readers[i]), 0);
	}
	for (unsigned i = 0; i < 8; i++)
		pthread_join(threads[i], NULL);
	guestimg_done(&g);
}
