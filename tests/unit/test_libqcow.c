/*
 * A second opinion: libqcow, which shares no code with QEMU or with us, reads the saved clusters of
 * our images.
 *
 * libqcow has no answer for two things that our images have: a backing file that is no qcow2 image
 * (every read fails), and zero clusters (it takes the flag for part of an offset). It also keeps
 * what it has read of a file. So it gets a twin: a closed, sparse copy with the backing file's name
 * and the zero clusters taken out. Data clusters, tables and everything else in it are ours.
 */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <criterion/criterion.h>
#include <criterion/parameterized.h>
#include <libqcow.h>

#include "cow/qcow2_format.h"
#include "ff_util.h"
#include "imgtest.h"

#define MIB (UINT64_C(1) << 20)

struct geometry {
	uint64_t size;
	uint32_t cs;
};

static struct geometry geometries[] = {
    {512, 4096},        {5000, 4096},           {MIB + 777, 4096},      {300 * MIB, 4096},
    {MIB << 20, 4096},  {MIB + 777, 65536},     {300 * MIB, 65536},     {MIB << 20, 65536},
    {MIB + 777, 16384}, {9 * MIB + 3, 2097152}, {30000 * MIB, 2097152},
};

static void put(int fd, const void *buf, size_t len, uint64_t off)
{
	cr_assert_eq(pwrite(fd, buf, len, (off_t)off), (ssize_t)len);
}

static void make_twin(struct imgtest *t)
{
	static const uint8_t none[16];
	struct qcow2_layout l;
	int fd;

	ff_image_park(t->img);
	cr_assert_eq(imgtest_run(t, "cp --sparse=always img.qcow2 twin.qcow2"), 0);
	cr_assert_eq(qcow2_layout(t->size, t->cs, &l), 0);
	fd = openat(t->dirfd, "twin.qcow2", O_RDWR);
	cr_assert(fd >= 0);
	put(fd, none, 12, 8);  /* backing file name: offset and length */
	put(fd, none, 8, 112); /* header extensions: none */
	for (unsigned k = 0; k < t->windows; k++)
		for (uint64_t i = 0; i < t->w[k].count; i++)
			if (t->w[k].state[i] == M_ZERO)
				put(fd, none, 8, l.l2_first * t->cs + (t->w[k].first + i) * 8);
	close(fd);
}

static libqcow_file_t *open_twin(struct imgtest *t)
{
	libqcow_file_t *file = NULL;
	libqcow_error_t *error = NULL;
	char path[128];

	snprintf(path, sizeof path, "%s/twin.qcow2", t->dir);
	cr_assert_eq(libqcow_file_initialize(&file, &error), 1);
	if (libqcow_file_open(file, path, LIBQCOW_OPEN_READ, &error) != 1) {
		libqcow_error_fprint(error, stderr);
		cr_assert_fail("libqcow does not open %s", path);
	}
	return file;
}

/* Compares a window, a cluster a read; returns the number of data clusters. */
static unsigned compare_window(struct imgtest *t, struct window *w, libqcow_file_t *file)
{
	uint8_t *want = malloc(t->cs), *got = malloc(t->cs);
	uint64_t end = ff_round_up(t->size, 512);
	unsigned seen = 0;

	for (uint64_t i = 0; i < w->count; i++) {
		uint64_t off = (w->first + i) * t->cs;
		size_t len = (size_t)FF_MIN((uint64_t)t->cs, end - off);
		libqcow_error_t *error = NULL;
		ssize_t n;

		memset(want, 0, t->cs);
		if (w->state[i] == M_DATA) {
			imgtest_saved(t, w->first + i, want);
			seen++;
		}
		memset(got, 0xee, t->cs);
		n = libqcow_file_read_buffer_at_offset(file, got, len, (off64_t)off, &error);
		if (n < 0)
			libqcow_error_fprint(error, stderr);
		cr_assert_eq(n, (ssize_t)len);
		cr_assert_eq(memcmp(want, got, len), 0, "cluster %llu",
		             (unsigned long long)(w->first + i));
	}
	free(want);
	free(got);
	return seen;
}

ParameterizedTestParameters(libqcow, agrees)
{
	return cr_make_param_array(struct geometry, geometries, FF_ARRAY_SIZE(geometries));
}

ParameterizedTest(struct geometry *g, libqcow, agrees)
{
	struct imgtest t;
	libqcow_file_t *file;
	size64_t size = 0;
	unsigned seen = 0, saved = 0;

	imgtest_open(&t, g->size, g->cs, g->size * 3 + g->cs);
	for (int i = 0; t.clusters >= 10 && i < 60; i++)
		imgtest_step(&t);
	for (unsigned k = 0; k < t.windows; k++) { /* whatever chance left */
		imgtest_save(&t, &t.w[k], 0, t.w[k].count, 0);
		for (uint64_t i = 0; i < t.w[k].count; i++)
			saved += t.w[k].state[i] == M_DATA;
	}
	make_twin(&t);
	file = open_twin(&t);
	cr_assert_eq(libqcow_file_get_media_size(file, &size, NULL), 1);
	cr_assert_eq(size, ff_round_up(g->size, 512));
	for (unsigned k = 0; k < t.windows; k++)
		seen += compare_window(&t, &t.w[k], file);
	cr_assert_eq(seen, saved);
	cr_assert(seen > 0 || t.clusters < 3);
	cr_assert_eq(libqcow_file_close(file, NULL), 0);
	libqcow_file_free(&file, NULL);
	imgtest_close(&t);
}
