/*
 * What goes wrong on the storage while an image is changed: a write that fails or is cut short, and
 * a process that dies between two writes. Writes go through __wrap_io_pwrite() here (linker option
 * --wrap), so each single one of them can be made the one that fails; flushes, through
 * __wrap_io_fdatasync().
 *
 * `fault` says what comes: nothing (NONE); or, after `countdown` writes that succeed, one that
 * fails (FAIL) or leaves some of its pages (SHORT), and then NONE again; or all from there on fail
 * (ALL_FROM_HERE); or the process ends (DIE). A test counts up until its change has no such write.
 */
#include <errno.h>
#include <fcntl.h>
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
	bool flushes;  /* it happens at a flush, before which countdown is of flushes */
} fault;

int __real_io_pwrite(int fd, const void *buf, size_t len, uint64_t off);
int __wrap_io_pwrite(int fd, const void *buf, size_t len, uint64_t off);

int __wrap_io_pwrite(int fd, const void *buf, size_t len, uint64_t off)
{
	uint64_t whole;

	if (fault.kind == NONE || fault.flushes || fault.countdown-- > 0)
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

int __real_io_fdatasync(int fd);
int __wrap_io_fdatasync(int fd);

int __wrap_io_fdatasync(int fd)
{
	if (fault.kind == DIE && fault.flushes && fault.countdown-- <= 0)
		_exit(42);
	return __real_io_fdatasync(fd);
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

/* Has a process make the change; true: it died at its write, or flush, NTH. */
static bool dies(struct imgtest *t, change_fn change, bool at_flush, int nth)
{
	int status;
	pid_t pid;

	prepare(t, 4096);
	pid = fork();
	if (pid == 0) {
		fault.kind = DIE;
		fault.flushes = at_flush;
		fault.countdown = nth;
		_exit(change(t) ? 1 : 0);
	}
	cr_assert_eq(waitpid(pid, &status, 0), pid);
	cr_assert(WIFEXITED(status) && WEXITSTATUS(status) != 1);
	return WEXITSTATUS(status) == 42;
}

/* What is there is whole, also to QEMU. */
static void after_death(struct imgtest *t)
{
	imgtest_reload(t);
	imgtest_check(t, false);
	learn(t);
	imgtest_verify(t);
	imgtest_verify_qemu(t);
	imgtest_close(t);
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

		died = dies(&t, changes[*c], false, nth);
		imgtest_check(&t, true);
		after_death(&t);
		cr_assert(died || nth > 0);
	}
}

/* Most of the time of a durable save is that of its flushes: a process that dies in one leaves
 * nothing leaked. */
Test(qcow2_faults, dies_in_a_flush, .timeout = 400)
{
	bool died = true;
	int nth;

	for (nth = 0; died; nth++) {
		struct imgtest t;

		died = dies(&t, save_mixed, true, nth);
		imgtest_check(&t, false);
		after_death(&t);
	}
	cr_assert_geq(nth, 3, "a durable save has two flushes");
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
