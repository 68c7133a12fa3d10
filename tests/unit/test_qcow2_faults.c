/*
 * What goes wrong on the storage: a write that fails or is cut short, a process that dies between
 * two writes, a file that is cut or damaged. Writes go through __wrap_io_pwrite() here (linker
 * option
 * --wrap), so each single one of them can be made the one that fails.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <criterion/criterion.h>
#include <criterion/parameterized.h>

#include "cow/io.h"
#include "cow/names.h"
#include "ff_util.h"
#include "imgtest.h"

enum fault { NONE, FAIL, SHORT, ALL_FROM_HERE, DIE };

/* What the next writes do; one test process, one thread. */
static struct {
	enum fault kind;
	int countdown; /* writes before it happens */
} fault;

int __real_io_pwrite(int fd, const void *buf, size_t len, uint64_t off);
int __wrap_io_pwrite(int fd, const void *buf, size_t len, uint64_t off);

int __wrap_io_pwrite(int fd, const void *buf, size_t len, uint64_t off)
{
	uint64_t whole;

	if (fault.kind == NONE || fault.countdown-- > 0)
		return __real_io_pwrite(fd, buf, len, off);
	/* the page cache takes a write page by page: between two pages it can be cut short */
	whole = (off + len - 1) / 4096 * 4096;
	switch (fault.kind) {
	case SHORT:
		if (whole > off)
			__real_io_pwrite(fd, buf, whole - off, off);
		fault.kind = NONE;
		return -ENOSPC;
	case FAIL:
		fault.kind = NONE;
		return -ENOSPC;
	case DIE:
		if (whole > off)
			__real_io_pwrite(fd, buf, whole - off, off);
		_exit(42);
	default:
		fault.countdown = 0;
		return -EIO;
	}
}

typedef int (*change_fn)(struct imgtest *t);

static int save_mixed(struct imgtest *t)
{
	static const uint8_t wanted[40] = {[0 ... 6] = 1, [8 ... 20] = 1, [25 ... 39] = 1};
	struct window *w = &t->w[1];

	for (int i = 0; i < 40; i++)
		imgtest_saved(t, w->first + (uint64_t)i, t->buf + (size_t)i * t->cs);
	return ff_image_save(t->img, w->first, 40, t->buf, wanted, true);
}

static int save_one(struct imgtest *t)
{
	uint64_t c = t->w[0].first;

	do /* one that is not all zeros */
		imgtest_saved(t, ++c, t->buf);
	while (!t->buf[0]);
	return ff_image_save(t->img, c, 1, t->buf, NULL, false);
}

static int save_zeros(struct imgtest *t)
{
	return ff_image_save_zeros(t->img, t->w[1].first, 50, false);
}

static int release_some(struct imgtest *t)
{
	return ff_image_release(t->img, t->w[2].first, 30);
}

static int new_backing(struct imgtest *t)
{
	return ff_image_set_backing(t->img, "./base.raw", "raw");
}

static const change_fn changes[] = {save_mixed, save_one, save_zeros, release_some, new_backing};

/* Parameters travel to another process: numbers, no pointers. */
static int change_numbers[] = {0, 1, 2, 3, 4};

static void prepare(struct imgtest *t, uint32_t cs)
{
	imgtest_open(t, UINT64_C(1) << (cs == 4096 ? 36 : 32), cs, 5);
	imgtest_save(t, &t->w[2], 0, 40, 0);
}

/* The model takes what is marked and stored; that must be what was to be saved. */
static void learn(struct imgtest *t)
{
	for (unsigned k = 0; k < t->windows; k++) {
		struct window *w = &t->w[k];
		uint8_t kinds[WINDOW_SIZE];

		cr_assert_eq(ff_image_kinds(t->img, w->first, w->count, kinds), 0);
		for (uint64_t i = 0; i < w->count; i++)
			w->state[i] = kinds[i] == FF_KIND_DATA                ? M_DATA
			              : kinds[i] == FF_KIND_ZERO              ? M_ZERO
			              : ff_image_marked(t->img, w->first + i) ? M_RELEASED
			                                                      : M_NONE;
	}
}

ParameterizedTestParameters(qcow2_faults, one_write_fails)
{
	return cr_make_param_array(int, change_numbers, FF_ARRAY_SIZE(change_numbers));
}

ParameterizedTest(int *c, qcow2_faults, one_write_fails, .timeout = 400)
{
	for (unsigned turn = 0; turn < 6; turn++) {
		enum fault kind = (enum fault[]){FAIL, SHORT, ALL_FROM_HERE}[turn % 3];

		for (int nth = 0;; nth++) {
			struct imgtest t;
			uint64_t allocated;
			int r;

			prepare(&t, turn < 3 ? 4096 : 65536);
			allocated = ff_image_allocated(t.img);
			fault.kind = kind;
			fault.countdown = nth;
			r = changes[*c](&t);
			if (r == 0 && fault.countdown >= 0) { /* it had no Nth write */
				fault.kind = NONE;
				cr_assert(nth > 0);
				imgtest_close(&t);
				break;
			}
			fault.kind = NONE;
			cr_assert(r < 0);
			if (changes[*c] != release_some) {
				imgtest_verify(&t); /* nothing marked, nothing lost */
				/* tables may have been entered for good; clusters stay only
				 * where their entries could not be taken back */
				cr_assert(kind == ALL_FROM_HERE ||
				          ff_image_allocated(t.img) <=
				              allocated + UINT64_C(3) * 4096);
			}
			imgtest_check(&t, true);
			/* the same again succeeds */
			cr_assert_eq(changes[*c](&t), 0);
			learn(&t);
			imgtest_verify(&t);
			imgtest_check(&t, true);
			imgtest_reload(&t);
			imgtest_verify(&t);
			imgtest_check(&t, false);
			imgtest_close(&t);
		}
	}
}

ParameterizedTestParameters(qcow2_faults, dies_between_writes)
{
	return cr_make_param_array(int, change_numbers, FF_ARRAY_SIZE(change_numbers));
}

ParameterizedTest(int *c, qcow2_faults, dies_between_writes, .timeout = 400)
{
	bool died = true;

	if (changes[*c] == new_backing) /* one write within a page, which a death does not tear */
		return;
	for (int nth = 0; died; nth++) {
		struct imgtest t;
		int status;
		pid_t pid;

		prepare(&t, 4096);
		pid = fork();
		if (pid == 0) {
			fault.kind = DIE;
			fault.countdown = nth;
			_exit(changes[*c](&t) ? 1 : 0);
		}
		cr_assert_eq(waitpid(pid, &status, 0), pid);
		cr_assert(WIFEXITED(status) && WEXITSTATUS(status) != 1);
		died = WEXITSTATUS(status) == 42;
		imgtest_check(&t, true);
		imgtest_reload(&t);
		imgtest_check(&t, false);
		learn(&t);
		imgtest_verify(&t);
		imgtest_verify_qemu(&t);
		imgtest_close(&t);
		cr_assert(died || nth > 0);
	}
}

/* A creation that fails leaves no file, and one that another left does not matter. */
Test(qcow2_faults, creation)
{
	for (int nth = 0;; nth++) {
		struct imgtest t;
		struct ff_image *img;
		struct ff_image_desc desc;
		int r;

		imgtest_open(&t, 5000000, 4096, 1);
		desc = *ff_image_desc(t.img);
		close(openat(t.dirfd, NAMES_UNFINISHED, O_WRONLY | O_CREAT, 0600));
		fault.kind = FAIL;
		fault.countdown = nth;
		r = ff_image_create(t.dirfd, "new.qcow2", 0600, &desc, "base.raw", "raw", &img);
		fault.kind = NONE;
		if (r == 0) {
			ff_image_free(img);
			imgtest_close(&t);
			cr_assert(nth >= 3);
			return;
		}
		cr_assert_eq(r, -ENOSPC);
		cr_assert_neq(faccessat(t.dirfd, "new.qcow2", F_OK, 0), 0);
		cr_assert_neq(faccessat(t.dirfd, NAMES_UNFINISHED, F_OK, 0), 0);
		imgtest_close(&t);
	}
}

/* Where the header cannot be written, the caller must know: the loss is to be recorded elsewhere.
 * The image stays, for older views may need what it holds. */
Test(qcow2_faults, broken_without_a_header)
{
	struct imgtest t;
	struct ff_image *again;

	imgtest_open(&t, 5000000, 4096, 1);
	imgtest_save(&t, &t.w[0], 0, 9, 0);
	fault.kind = ALL_FROM_HERE;
	cr_assert_eq(ff_image_set_broken(t.img, 7), -EIO);
	cr_assert(ff_image_is_broken(t.img));
	fault.kind = NONE;
	imgtest_verify(&t);
	cr_assert_eq(ff_image_load(t.dirfd, "img.qcow2", &again), 0);
	cr_assert_not(ff_image_is_broken(again));
	ff_image_free(again);
	cr_assert_eq(ff_image_set_broken(t.img, 7), 0);
	imgtest_close(&t);
}

/* --- damage ------------------------------------------------------------------------------------
 */

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

/* An image with its first SAVED clusters saved and closed. *L2: where cluster 0's entry is. */
static void make_closed(struct imgtest *t, uint64_t *l2)
{
	imgtest_open(t, 5000000, 4096, 1);
	imgtest_save(t, &t->w[0], 0, SAVED, 0);
	ff_image_park(t->img);
	*l2 = be64_at(t, be64_at(t, 40)) & ~(UINT64_C(1) << 63);
}

Test(qcow2_faults, flipped_header, .timeout = 60)
{
	struct imgtest t;
	uint64_t l2;

	make_closed(&t, &l2);
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

Test(qcow2_faults, flipped_tables, .timeout = 60)
{
	struct imgtest t;
	uint64_t l2, c = 0;

	make_closed(&t, &l2);
	while (t.w[0].state[c] != M_DATA)
		c++;
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

Test(qcow2_faults, flipped_data_and_checksums)
{
	struct imgtest t;
	uint64_t l2, c = 0, data;
	uint8_t buf[4096];

	make_closed(&t, &l2);
	while (t.w[0].state[c] != M_DATA)
		c++;
	data = be64_at(&t, l2 + c * 8) & ~(UINT64_C(1) << 63);
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
Test(qcow2_faults, misdirected_entry)
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
	l2 = be64_at(&t, be64_at(&t, 40)) & ~(UINT64_C(1) << 63);
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

Test(qcow2_faults, truncated)
{
	struct imgtest t;
	struct stat st;
	uint64_t l2;

	make_closed(&t, &l2);
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
Test(qcow2_faults, damaged_checksums_are_replaced)
{
	struct imgtest t;
	uint64_t l2, c = 0;

	make_closed(&t, &l2);
	while (t.w[0].state[c] != M_DATA)
		c++;
	flip(&t, "img.xxh3", 20, 1);
	imgtest_reload(&t);
	cr_assert_eq(ff_image_read(t.img, c, 1, t.buf), -EIO);
	imgtest_save(&t, &t.w[0], 20, 9, 0);
	cr_assert_eq(ff_image_read(t.img, 20, 9, t.buf), 0);
	cr_assert_eq(ff_image_read(t.img, c, 1, t.buf), -EIO);
	imgtest_close(&t);
}

/* What a stranger could write into FLEECE_DIR: other programs' images, noise. */
Test(qcow2_faults, foreign_files)
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
