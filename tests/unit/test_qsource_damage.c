/*
 * Guests' images that are not as they must be: what is refused when it is opened, with the reason,
 * and what is found when it is read. Of an image that is damaged no byte may be wrong: it is what
 * QEMU reads too, or EIO.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <criterion/criterion.h>
#include <criterion/parameterized.h>

#include "ff_util.h"
#include "guestimg.h"

TestSuite(qsource_damage, .timeout = 300);

static const struct {
	const char *name, *commands, *why;
	int error;
} refused[] = {
    {"AES", "qemu-img create -f qcow2 disk.qcow2 1m; printf '\\0\\0\\0\\1' | PUT 32",
     "encrypted (AES)", -ENOTSUP},
    {"LUKS",
     /* it measures the processor first, which fails now and then when others are busy */
     "for i in $(seq 50); do "
     "qemu-img create --object secret,id=s,data=geheim -f qcow2 -o encrypt.format=luks,"
     "encrypt.key-secret=s,encrypt.iter-time=10 disk.qcow2 1m && break; done",
     "encrypted (LUKS)", -ENOTSUP},
    {"unknown encryption", "qemu-img create -f qcow2 disk.qcow2 1m; printf '\\0\\0\\0\\3' | PUT 32",
     "unknown way", -ENOTSUP},
    {"version 4", "qemu-img create -f qcow2 disk.qcow2 1m; printf '\\4' | PUT 7", "version 4",
     -ENOTSUP},
    {"unknown feature", "qemu-img create -f qcow2 disk.qcow2 1m; printf '\\040' | PUT 79",
     "number 5", -ENOTSUP},
    {"named feature",
     "qemu-img create -f qcow2 disk.qcow2 1m; printf '\\040' | PUT 79;"
     "printf '\\0\\5warp drive\\n\\0' | PUT 120",
     "warp drive?", -ENOTSUP},
    {"cluster bits", "qemu-img create -f qcow2 disk.qcow2 1m; printf '\\026' | PUT 23",
     "impossible size", -EINVAL},
    {"L1 place", "qemu-img create -f qcow2 disk.qcow2 1m; printf '\\1' | PUT 47", "L1 table",
     -EINVAL},
    {"L1 length", "qemu-img create -f qcow2 disk.qcow2 1m; printf '\\0' | PUT 39", "too small",
     -EINVAL},
    {"too large", "qemu-img create -f qcow2 disk.qcow2 1m; printf '\\200' | PUT 24", "too large",
     -EINVAL},
    {"compression", "qemu-img create -f qcow2 disk.qcow2 1m; printf '\\2' | PUT 104", "compressed",
     -ENOTSUP},
    {"compression denied", "qemu-img create -f qcow2 disk.qcow2 1m; printf '\\1' | PUT 104",
     "contradicts", -EINVAL},
    {"short", "qemu-img create -f qcow2 disk.qcow2 1m; truncate -s 80 disk.qcow2", "cut short",
     -EINVAL},
    {"backing name",
     "qemu-img create -f qcow2 -u -b base -F raw disk.qcow2 1m; printf '\\377' | PUT 13",
     "outside of the first cluster", -EINVAL},
    {"NBD", "qemu-img create -f qcow2 -u -b nbd://h/x -F raw disk.qcow2 1m", "protocol", -ENOTSUP},
    {"json",
     "qemu-img create -f qcow2 -u -F raw -b "
     "'json:{\"driver\":\"raw\",\"file\":{\"driver\":\"nbd\",\"host\":\"h\"}}' disk.qcow2 1m",
     "more than a plain file", -ENOTSUP},
};

ParameterizedTestParameters(qsource_damage, refuses)
{
	static int numbers[FF_ARRAY_SIZE(refused)];

	for (int i = 0; i < (int)FF_ARRAY_SIZE(refused); i++)
		numbers[i] = i;
	return cr_make_param_array(int, numbers, FF_ARRAY_SIZE(numbers));
}

ParameterizedTest(int *number, qsource_damage, refuses)
{
	struct guestimg g;
	int r;

	guestimg_init(&g);
	cr_assert_eq(guestimg_run(&g, "PUT() { dd of=disk.qcow2 bs=1 seek=$1 conv=notrunc; }\n%s",
	                          refused[*number].commands),
	             0);
	r = guestimg_open(&g, "disk.qcow2");
	cr_assert_eq(r, refused[*number].error, "%s: %d, %s", refused[*number].name, r, g.why);
	cr_assert(strstr(g.why, refused[*number].why), "%s: %s", refused[*number].name, g.why);
	guestimg_done(&g);
}

/* Offset of the entry of an L2 table of disk.qcow2 with clusters of 64K. */
static uint64_t entry_at(const struct guestimg *g, uint64_t cluster)
{
	ff_autofree uint8_t *buf = NULL;
	size_t size;

	buf = guestimg_load(g, "disk.qcow2", &size);
	return (ff_be64(buf + ff_be64(buf + 40)) & UINT64_C(0x00fffffffffffe00)) + cluster * 8;
}

/* An entry that is wrong in one way gives EIO for its cluster, and nothing else suffers. */
Test(qsource_damage, one_bad_entry)
{
	static const struct {
		uint64_t entry;
		const char *why;
	} bad[] = {
	    {UINT64_C(1) << 63 | UINT64_C(1) << 40, "past the end"},
	    {UINT64_C(1) << 63 | 0x50200, "no cluster"},
	    {UINT64_C(1) << 63 | 0x50002, "must be zero"},
	    {UINT64_C(1) << 61 | 0x50000, "must be zero"},
	    {UINT64_C(1) << 62 | 0xffff0000, "past the end"},
	    {UINT64_C(1) << 62 | 0x10000, "unpacked"},
	};
	struct guestimg g;
	ff_autofree uint8_t *want = NULL;
	uint8_t buf[4096];
	uint64_t at;
	size_t size;

	guestimg_init(&g);
	guestimg_raw(&g, "raw.img", 1 << 20, 5);
	cr_assert_eq(guestimg_run(&g, "qemu-io -f raw -c 'write -P 9 0 1m' raw.img;"
	                              "qemu-img convert -f raw -O qcow2 raw.img disk.qcow2"),
	             0);
	want = guestimg_load(&g, "raw.img", &size);
	at = entry_at(&g, 3);
	for (size_t i = 0; i < FF_ARRAY_SIZE(bad); i++) {
		guestimg_put(&g, "disk.qcow2", at, bad[i].entry);
		cr_assert_eq(guestimg_open(&g, "disk.qcow2"), 0);
		for (size_t off = 0; off < size; off += sizeof buf) {
			int r = qs_disk_read(g.disk, buf, sizeof buf, off);

			cr_assert_eq(r, off / 65536 == 3 ? -EIO : 0, "%zu: %d at %zu", i, r, off);
			cr_assert(r || memcmp(buf, want + off, sizeof buf) == 0);
		}
		cr_assert(strstr(g.damage, bad[i].why), "%zu: %s", i, g.damage);
		guestimg_close(&g);
	}
	guestimg_done(&g);
}

/* Bytes flipped at random. What is read without an error is what QEMU reads, if it reads. */
Test(qsource_damage, damaged)
{
	unsigned seed = guestimg_number("SEED", (unsigned)getpid()), same = 0, errors = 0,
	         qemu_errors = 0;
	unsigned rounds = guestimg_number("ROUNDS", 40);
	struct guestimg g;

	printf("seed %u\n", seed);
	guestimg_init(&g);
	guestimg_raw(&g, "raw.img", 300 << 10, seed);
	cr_assert_eq(guestimg_run(&g,
	                          "qemu-img convert -c -f raw -O qcow2 -o cluster_size=4k raw.img "
	                          "a.qcow2; qemu-io -c 'write -z 40k 20k' -c 'write -P 1 100k "
	                          "30k' a.qcow2"),
	             0);
	for (unsigned round = 0; round < rounds; round++) {
		ff_autofree uint8_t *image = NULL, *want = NULL, *got = NULL;
		size_t size, l1, l2, want_size;
		uint64_t seen;
		int fd, r;

		image = guestimg_load(&g, "a.qcow2", &size);
		l1 = (size_t)ff_be64(image + 40);
		l2 = (size_t)ff_be64(image + l1) & 0xfffffffffe00;
		for (int flips = rand_r(&seed) % 4 ? 1 : 2; flips > 0; flips--) {
			const size_t places[][2] = {{0, 112},  {l1, 8},   {l2, 600},
			                            {l2, 600}, {l2, 600}, {0, size}};
			const size_t *in = places[rand_r(&seed) % FF_ARRAY_SIZE(places)];

			image[in[0] + (size_t)rand_r(&seed) % in[1]] ^=
			    (uint8_t)(1u << rand_r(&seed) % 8);
		}
		fd = openat(g.dirfd, "disk.qcow2", O_CREAT | O_TRUNC | O_WRONLY, 0600);
		cr_assert_eq(write(fd, image, size), (ssize_t)size);
		close(fd);
		r = guestimg_open(&g, "disk.qcow2");
		seen = r ? 0 : qs_disk_size(g.disk) & ~UINT64_C(511); /* as QEMU sees it */
		if (seen > 64 << 20)
			r = -EFBIG;
		got = malloc(seen + !seen);
		if (!r)
			r = qs_disk_read(g.disk, got, seen, 0);
		guestimg_close(&g);
		if (r) {
			errors++;
		} else if (guestimg_run(&g, "qemu-img convert -f qcow2 -O raw disk.qcow2 w")) {
			qemu_errors++;
		} else {
			want = guestimg_load(&g, "w", &want_size);
			cr_assert_eq(want_size, seen);
			cr_assert_eq(memcmp(got, want, want_size), 0, "round %u", round);
			same++;
		}
	}
	printf("%u the same, %u errors, %u only QEMU's\n", same, errors, qemu_errors);
	cr_assert(same + errors + qemu_errors == rounds && same > 0);
	guestimg_done(&g);
}
