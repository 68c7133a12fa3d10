/*
 * What has happened to the files of an image meanwhile: bits flipped in the header, the tables, the
 * data and the checksums, entries that lead elsewhere, files cut short, missing, or not ours at
 * all. An image that is damaged does not load, or all that was saved reads as it was or gives EIO.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <criterion/criterion.h>

#include "ff_util.h"
#include "imgtest.h"

static void flip(struct imgtest *t, const char *name, uint64_t off, uint8_t bits)
{
	int fd = openat(t->dirfd, name, O_RDWR);
	uint8_t b;

	cr_assert(fd >= 0 && pread(fd, &b, 1, (off_t)off) == 1);
	b ^= bits;
	cr_assert_eq(pwrite(fd, &b, 1, (off_t)off), 1);
	close(fd);
}

static uint64_t be64_at(struct imgtest *t, uint64_t off)
{
	int fd = openat(t->dirfd, "img.qcow2", O_RDONLY);
	uint8_t b[8];

	cr_assert(fd >= 0 && pread(fd, b, 8, (off_t)off) == 8);
	close(fd);
	return ff_be64(b);
}

/* Of a damaged image: it does not load, or all clusters that were saved are as they were or EIO.
 * Returns the number of errors seen. */
static unsigned damage_seen(struct imgtest *t)
{
	struct ff_image *img;
	uint8_t *want = malloc(t->cs), *got = malloc(t->cs);
	unsigned errors = 0;

	if (ff_image_load(t->dirfd, "img.qcow2", &img)) {
		free(want);
		free(got);
		return 1;
	}
	for (unsigned k = 0; k < t->windows; k++)
		for (uint64_t i = 0; i < t->w[k].count; i++) {
			int r;

			if (t->w[k].state[i] == M_NONE) {
				cr_assert_not(ff_image_marked(img, t->w[k].first + i));
				continue;
			}
			cr_assert(ff_image_marked(img, t->w[k].first + i));
			r = ff_image_read(img, t->w[k].first + i, 1, got);
			if (r) {
				cr_assert_eq(r, -EIO);
				errors++;
				continue;
			}
			imgtest_saved(t, t->w[k].first + i, want);
			cr_assert_eq(memcmp(want, got, t->cs), 0);
		}
	ff_image_free(img);
	free(want);
	free(got);
	return errors;
}

#define SAVED 12

/* An image with its first SAVED clusters saved and closed. The first of them that has data. */
static uint64_t make_closed(struct imgtest *t)
{
	uint64_t c = 0;

	imgtest_open(t, 5000000, 4096, 1);
	imgtest_save(t, &t->w[0], 0, SAVED, 0);
	ff_image_park(t->img);
	while (t->w[0].state[c] != M_DATA)
		c++;
	return c;
}

/* Where cluster 0's entry is. */
static uint64_t l2_at(struct imgtest *t)
{
	return be64_at(t, be64_at(t, 40)) & ~(UINT64_C(1) << 63);
}

Test(qcow2_damage, flipped_header, .timeout = 60)
{
	struct imgtest t;

	make_closed(&t);
	for (unsigned off = 0; off < 4096; off += off < 320 ? 1 : 61)
		for (unsigned bits = 1; bits < 256; bits = bits * 2 + (bits == 128) * 255) {
			flip(&t, "img.qcow2", off, (uint8_t)bits);
			cr_assert_eq(damage_seen(&t), 1, "byte %u", off);
			flip(&t, "img.qcow2", off, (uint8_t)bits);
			if (off >= 320)
				break;
		}
	cr_assert_eq(damage_seen(&t), 0);
	imgtest_close(&t);
}

Test(qcow2_damage, flipped_tables, .timeout = 60)
{
	struct imgtest t;
	uint64_t c = make_closed(&t), l2 = l2_at(&t);

	for (unsigned off = 0; off < 8; off++)
		for (unsigned bit = 0; bit < 8; bit++) {
			uint64_t where[] = {l2 + c * 8 + off,      /* an L2 entry */
			                    be64_at(&t, 40) + off, /* the L1 entry */
			                    be64_at(&t, 48) + off /* the refcount table's */};

			for (size_t i = 0; i < FF_ARRAY_SIZE(where); i++) {
				flip(&t, "img.qcow2", where[i], (uint8_t)(1 << bit));
				if (i == 2 && be64_at(&t, be64_at(&t, 48)) == 0) {
					/* a block that was never entered, it seems: it is now */
					cr_assert_eq(damage_seen(&t), 0);
					cr_assert_neq(be64_at(&t, be64_at(&t, 48)), 0);
					continue;
				}
				cr_assert_geq(damage_seen(&t), 1);
				flip(&t, "img.qcow2", where[i], (uint8_t)(1 << bit));
				/* loading may have given back what seemed unused */
			}
		}
	cr_assert_eq(damage_seen(&t), 0);
	imgtest_close(&t);
}

Test(qcow2_damage, flipped_data_and_checksums)
{
	struct imgtest t;
	uint64_t c = make_closed(&t), data = be64_at(&t, l2_at(&t) + c * 8) & ~(UINT64_C(1) << 63);
	uint8_t buf[4096];

	for (unsigned i = 0; i < 4096; i += 111) {
		flip(&t, "img.qcow2", data + i, 4);
		cr_assert_eq(ff_image_read(t.img, c, 1, buf), -EIO);
		ff_image_park(t.img);
		cr_assert_eq(damage_seen(&t), 1);
		flip(&t, "img.qcow2", data + i, 4);
	}
	cr_assert_eq(damage_seen(&t), 0);
	/* the first data cluster's checksum, then each byte of the file's head */
	flip(&t, "img.xxh3", 64, 1);
	cr_assert_eq(damage_seen(&t), 1);
	flip(&t, "img.xxh3", 64, 1);
	for (unsigned i = 0; i < 64; i++) {
		flip(&t, "img.xxh3", i, 0x10);
		cr_assert_gt(damage_seen(&t), 1);
		flip(&t, "img.xxh3", i, 0x10);
	}
	cr_assert_eq(damage_seen(&t), 0);
	imgtest_close(&t);
}

/* Two clusters with the same data: an entry that leads to the other one is still seen. */
Test(qcow2_damage, misdirected_entry)
{
	struct imgtest t;
	struct ff_image *again;
	uint64_t l2, entry;
	uint8_t be[8];
	int fd;

	imgtest_open(&t, 5000000, 4096, 1);
	memset(t.buf, 7, 2 * 4096);
	cr_assert_eq(ff_image_save(t.img, 0, 2, t.buf, NULL, false), 0);
	ff_image_park(t.img);
	l2 = l2_at(&t);
	entry = be64_at(&t, l2 + 8);
	ff_put_be64(be, entry);
	fd = openat(t.dirfd, "img.qcow2", O_RDWR);
	cr_assert_eq(pwrite(fd, be, 8, (off_t)l2), 8);
	close(fd);
	cr_assert_eq(ff_image_read(t.img, 1, 1, t.buf), 0);
	cr_assert_eq(ff_image_read(t.img, 0, 1, t.buf), -EIO);
	/* and no cluster of the image may be used twice */
	cr_assert_eq(ff_image_load(t.dirfd, "img.qcow2", &again), -EINVAL);
	imgtest_close(&t);
}

Test(qcow2_damage, truncated)
{
	struct imgtest t;
	struct stat st;

	make_closed(&t);
	cr_assert_eq(fstatat(t.dirfd, "img.qcow2", &st, 0), 0);
	cr_assert_eq(imgtest_run(&t, "cp img.qcow2 whole"), 0);
	for (off_t size = 0; size < st.st_size; size += 1000) {
		cr_assert_eq(imgtest_run(&t, "cp whole img.qcow2 && truncate -s %lld img.qcow2",
		                         (long long)size),
		             0);
		cr_assert_eq(damage_seen(&t), 1, "cut to %lld", (long long)size);
	}
	cr_assert_eq(imgtest_run(&t, "cp whole img.qcow2"), 0);
	cr_assert_eq(damage_seen(&t), 0);
	cr_assert_eq(imgtest_run(&t, "cp img.xxh3 sums"), 0);
	for (int size = 0; size < 64 + 8 * 5; size += 7) {
		cr_assert_eq(imgtest_run(&t, "cp sums img.xxh3 && truncate -s %d img.xxh3", size),
		             0);
		cr_assert_geq(damage_seen(&t), 1);
	}
	cr_assert_eq(imgtest_run(&t, "rm img.xxh3"), 0);
	cr_assert_geq(damage_seen(&t), 1);
	imgtest_close(&t);
}

/* A checksum file that is another image's is not believed, and not mixed with. */
Test(qcow2_damage, damaged_checksums_are_replaced)
{
	struct imgtest t;
	uint64_t c = make_closed(&t);

	flip(&t, "img.xxh3", 20, 1);
	imgtest_reload(&t);
	cr_assert_eq(ff_image_read(t.img, c, 1, t.buf), -EIO);
	imgtest_save(&t, &t.w[0], 20, 9, 0);
	cr_assert_eq(ff_image_read(t.img, 20, 9, t.buf), 0);
	cr_assert_eq(ff_image_read(t.img, c, 1, t.buf), -EIO);
	imgtest_close(&t);
}

/* What a stranger could write into FLEECE_DIR: other programs' images, noise. */
Test(qcow2_damage, foreign_files)
{
	static const char *const make[] = {
	    "qemu-img create -f qcow2 f.qcow2 1M",
	    "qemu-img create -f qcow2 -o refcount_bits=1,cluster_size=4k f.qcow2 1M",
	    "qemu-img create -f qcow2 -o compat=0.10 f.qcow2 1M",
	    "head -c 100000 /dev/urandom > f.qcow2",
	    "head -c 100000 /dev/zero > f.qcow2",
	    ": > f.qcow2",
	    "cp img.qcow2 f.qcow2 && qemu-img rebase -u -F raw -b other.raw f.qcow2",
	};
	struct imgtest t;
	struct ff_image *img;

	imgtest_open(&t, 5000000, 4096, 1);
	for (size_t i = 0; i < FF_ARRAY_SIZE(make); i++) {
		cr_assert_eq(imgtest_run(&t, "rm -f f.qcow2; %s", make[i]), 0);
		cr_assert_eq(ff_image_load(t.dirfd, "f.qcow2", &img), -EINVAL, "%s", make[i]);
	}
	imgtest_close(&t);
}
