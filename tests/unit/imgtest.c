#include "imgtest.h"

#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <criterion/criterion.h>

#include "ff_util.h"

/* Of so many questions to QEMU one is put: a program of its own each time, it says nothing else of
 * an image that a build with sanitizers has made, but takes most of the time there. */
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
enum { ONE_OF = 6 };
#else
enum { ONE_OF = 1 };
#endif

enum { PART = 3 };

static bool is_turn(void)
{
	static unsigned turns;

	return turns++ % ONE_OF == 0;
}

static uint64_t mix(uint64_t x)
{
	x += UINT64_C(0x9e3779b97f4a7c15);
	x = (x ^ (x >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
	x = (x ^ (x >> 27)) * UINT64_C(0x94d049bb133111eb);
	return x ^ (x >> 31);
}

uint64_t imgtest_random(struct imgtest *t, uint64_t below)
{
	return mix(t->rng++) % below;
}

/* Bytes that depend on every bit of SALT and CLUSTER; the disk ends within its last cluster. */
static void content(const struct imgtest *t, uint64_t cluster, uint64_t salt, uint8_t *buf)
{
	uint64_t start = cluster * t->cs, left = t->size - FF_MIN(start, t->size);
	uint64_t seed = mix(mix(cluster) ^ salt);

	for (uint32_t i = 0; i < t->cs; i += 8) {
		uint64_t v = mix(seed + i);

		memcpy(buf + i, &v, 8);
	}
	if (left < t->cs)
		memset(buf + left, 0, t->cs - left);
}

void imgtest_saved(const struct imgtest *t, uint64_t cluster, uint8_t *buf)
{
	if (mix(cluster) % 5 == 0)
		memset(buf, 0, t->cs);
	else
		content(t, cluster, 1, buf);
}

void imgtest_backing(const struct imgtest *t, uint64_t cluster, uint8_t *buf)
{
	content(t, cluster, 2, buf);
}

int imgtest_run(struct imgtest *t, const char *fmt, ...)
{
	char cmd[512], all[700];
	va_list ap;
	int r;

	va_start(ap, fmt);
	vsnprintf(cmd, sizeof cmd, fmt, ap);
	va_end(ap);
	snprintf(all, sizeof all, "cd %s && { %s; } >log 2>&1", t->dir, cmd);
	r = system(all);
	return WIFEXITED(r) ? WEXITSTATUS(r) : 1000;
}

static void add_window(struct imgtest *t, uint64_t first)
{
	struct window *last = t->windows ? &t->w[t->windows - 1] : NULL;
	struct window *w = &t->w[t->windows];
	uint64_t room = t->clusters - FF_MIN(first, t->clusters);

	if (!room || (last && first < last->first + last->count))
		return;
	w->first = first;
	w->count = FF_MIN(room, (uint64_t)(t->cs > 65536 ? 8 : WINDOW_SIZE));
	t->windows++;
}

static void make_backing(struct imgtest *t)
{
	int fd = openat(t->dirfd, "base.raw", O_RDWR | O_CREAT | O_EXCL, 0600);

	cr_assert(fd >= 0);
	for (unsigned k = 0; k < t->windows; k++)
		for (uint64_t i = 0; i < t->w[k].count; i++) {
			imgtest_backing(t, t->w[k].first + i, t->buf);
			cr_assert_eq(
			    pwrite(fd, t->buf, t->cs, (off_t)((t->w[k].first + i) * t->cs)), t->cs);
		}
	cr_assert_eq(ftruncate(fd, (off_t)t->size), 0);
	close(fd);
}

void imgtest_open(struct imgtest *t, uint64_t size, uint32_t cs, uint64_t seed)
{
	struct ff_image_desc desc = {
	    .seq = 7,
	    .size = size,
	    .disk_ino = 42,
	    .disk_btime_sec = -5,
	    .disk_btime_nsec = 6,
	    .cluster_size = cs,
	};
	const char *tmp = getenv("TMPDIR");
	uint64_t per_table = cs / 8;

	*t = (struct imgtest){.size = size, .cs = cs, .rng = mix(seed)};
	t->clusters = ff_div_up(size, cs);
	snprintf(t->dir, sizeof t->dir, "%s/fleecefs-img-XXXXXX",
	         tmp && strlen(tmp) < 32         ? tmp
	         : access("/dev/shm", W_OK) == 0 ? "/dev/shm"
	                                         : "/tmp");
	cr_assert_not_null(mkdtemp(t->dir));
	t->dirfd = open(t->dir, O_RDONLY | O_DIRECTORY);
	t->buf = malloc((size_t)WINDOW_SIZE * cs);
	cr_assert(t->dirfd >= 0 && t->buf);
	add_window(t, 0);
	add_window(t, per_table - 20); /* over the border of two L2 tables */
	add_window(t, t->clusters / 2);
	add_window(t, t->clusters - FF_MIN(t->clusters, UINT64_C(8)));
	make_backing(t);
	cr_assert_eq(
	    ff_image_create(t->dirfd, "img.qcow2", 0600, &desc, "base.raw", "raw", &t->img), 0);
	cr_assert_eq(ff_image_clusters(t->img), t->clusters);
}

void imgtest_close(struct imgtest *t)
{
	char cmd[128];

	ff_image_free(t->img);
	close(t->dirfd);
	free(t->buf);
	snprintf(cmd, sizeof cmd, "rm -rf %s", t->dir);
	cr_assert_eq(system(cmd), 0);
}

void imgtest_reload(struct imgtest *t)
{
	ff_image_free(t->img);
	t->img = NULL;
	cr_assert_eq(ff_image_load(t->dirfd, "img.qcow2", &t->img), 0);
	for (unsigned k = 0; k < t->windows; k++)
		for (uint64_t i = 0; i < t->w[k].count; i++)
			if (t->w[k].state[i] == M_SKIPPED || t->w[k].state[i] == M_RELEASED)
				t->w[k].state[i] = M_NONE;
}

static uint8_t saved_state(const struct imgtest *t, uint64_t cluster)
{
	uint8_t *buf = malloc(t->cs);
	bool zero;

	imgtest_saved(t, cluster, buf);
	zero = buf[0] == 0 && memcmp(buf, buf + 1, t->cs - 1) == 0;
	free(buf);
	return zero ? M_ZERO : M_DATA;
}

void imgtest_save(struct imgtest *t, struct window *w, uint64_t i, uint64_t count, int r)
{
	uint8_t wanted[WINDOW_SIZE];
	bool all = true;

	for (uint64_t j = 0; j < count; j++) {
		wanted[j] = w->state[i + j] == M_NONE;
		all = all && wanted[j];
		if (wanted[j])
			imgtest_saved(t, w->first + i + j, t->buf + j * t->cs);
		else /* must not be saved a second time: this would show */
			memset(t->buf + j * t->cs, 0xee, t->cs);
	}
	cr_assert_eq(ff_image_save(t->img, w->first + i, count, t->buf, all ? NULL : wanted,
	                           imgtest_random(t, 8) == 0),
	             r);
	for (uint64_t j = 0; !r && j < count; j++)
		if (wanted[j])
			w->state[i + j] = saved_state(t, w->first + i + j);
}

void imgtest_step(struct imgtest *t)
{
	struct window *w;
	uint64_t i, n, run = 0;

	if (!t->windows)
		return;
	w = &t->w[imgtest_random(t, t->windows)];
	i = imgtest_random(t, w->count);
	n = 1 + imgtest_random(t, FF_MIN(w->count - i, UINT64_C(12)));
	switch (imgtest_random(t, 8)) {
	case 0: /* zeros, and skipping, only for what is not marked */
	case 1:
		while (run < n && w->state[i + run] == M_NONE)
			run++;
		if (imgtest_random(t, 3)) {
			cr_assert_eq(ff_image_save_zeros(t->img, w->first + i, run, false), 0);
			memset(w->state + i, M_ZERO, run);
		} else {
			cr_assert_eq(ff_image_skip(t->img, w->first + i, run), 0);
			memset(w->state + i, M_SKIPPED, run);
		}
		break;
	case 2:
		cr_assert_eq(ff_image_release(t->img, w->first + i, n), 0);
		for (uint64_t j = i; j < i + n; j++)
			if (w->state[j] == M_ZERO || w->state[j] == M_DATA)
				w->state[j] = M_RELEASED;
		break;
	default:
		imgtest_save(t, w, i, n, 0);
	}
}

static bool is_begin(const struct window *w, uint64_t i)
{
	return i == 0 || (w->state[i - 1] != M_ZERO && w->state[i - 1] != M_DATA);
}

static void verify_window(struct imgtest *t, struct window *w)
{
	uint8_t kinds[WINDOW_SIZE], *want = malloc(t->cs);

	cr_assert_eq(ff_image_kinds(t->img, w->first, w->count, kinds), 0);
	for (uint64_t i = 0; i < w->count; i++) {
		uint8_t s = w->state[i];
		bool marked;
		uint64_t end = i, run = ff_image_run(t->img, w->first + i, w->count - i, &marked);

		while (end < w->count && (w->state[end] != M_NONE) == (s != M_NONE))
			end++;
		cr_assert_eq(marked, s != M_NONE);
		cr_assert_eq(ff_image_marked(t->img, w->first + i), marked);
		cr_assert_eq(run, end - i);
		cr_assert_eq(kinds[i], s == M_ZERO   ? FF_KIND_ZERO
		                       : s == M_DATA ? FF_KIND_DATA
		                                     : FF_KIND_NONE);
		/* all of a run at once, and from each of its clusters a bit of it */
		for (end = i; end < w->count &&
		              (w->state[end] == M_ZERO || w->state[end] == M_DATA) &&
		              (end - i < PART || is_begin(w, i));)
			end++;
		if (end == i) {
			cr_assert_eq(ff_image_read(t->img, w->first + i, 1, t->buf), -ENODATA);
			continue;
		}
		memset(t->buf, 0xaa, (end - i) * t->cs);
		cr_assert_eq(ff_image_read(t->img, w->first + i, end - i, t->buf), 0);
		for (uint64_t j = i; j < end; j++) {
			imgtest_saved(t, w->first + j, want);
			if (w->state[j] == M_ZERO)
				memset(want, 0, t->cs);
			cr_assert_eq(memcmp(want, t->buf + (j - i) * t->cs, t->cs), 0,
			             "cluster %llu", (unsigned long long)(w->first + j));
		}
	}
	free(want);
}

void imgtest_verify(struct imgtest *t)
{
	for (unsigned k = 0; k < t->windows; k++)
		verify_window(t, &t->w[k]);
}

void imgtest_check(struct imgtest *t, bool leaks)
{
	int r = is_turn() ? imgtest_run(t, "qemu-img check -f qcow2 img.qcow2") : 0;

	if (r != 0 && !(leaks && r == 3)) {
		imgtest_run(t, "mv log check.log; cat check.log >&2");
		cr_assert_fail("qemu-img check: %d, see %s", r, t->dir);
	}
}

void imgtest_verify_qemu(struct imgtest *t)
{
	uint8_t *want = malloc(t->cs), *got = malloc(t->cs);

	for (unsigned k = 0; k < t->windows; k++) {
		struct window *w = &t->w[k];
		int fd;

		if (!is_turn())
			continue;
		/* dd of qemu-img counts from the beginning, not from where it has skipped to */
		cr_assert_eq(imgtest_run(t,
		                         "rm -f out && qemu-img dd -f qcow2 -O raw bs=%u skip=%llu "
		                         "count=%llu if=img.qcow2 of=out",
		                         t->cs, (unsigned long long)w->first,
		                         (unsigned long long)(w->first + w->count)),
		             0);
		fd = openat(t->dirfd, "out", O_RDONLY);
		for (uint64_t i = 0; i < w->count; i++) {
			uint64_t left = t->size - (w->first + i) * t->cs;
			size_t len = (size_t)FF_MIN(left, (uint64_t)t->cs);

			imgtest_backing(t, w->first + i, want);
			if (w->state[i] == M_DATA)
				imgtest_saved(t, w->first + i, want);
			else if (w->state[i] == M_ZERO)
				memset(want, 0, t->cs);
			cr_assert(pread(fd, got, len, (off_t)(i * t->cs)) == (ssize_t)len);
			cr_assert_eq(memcmp(want, got, len), 0, "cluster %llu",
			             (unsigned long long)(w->first + i));
		}
		close(fd);
	}
	free(want);
	free(got);
}
