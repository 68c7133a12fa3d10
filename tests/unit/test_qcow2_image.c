/*
 * Fleecing images against a model, and against QEMU's own reading of them.
 */
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <criterion/criterion.h>
#include <criterion/parameterized.h>

#include "ff_util.h"
#include "imgtest.h"

#define MIB (UINT64_C(1) << 20)
#define TIB (UINT64_C(1) << 40)

struct geometry {
	uint64_t size;
	uint32_t cs;
};

static struct geometry geometries[] = {
    {0, 4096},         {0, 65536},         {0, 2097152},         {1, 4096},
    {1, 65536},        {1, 2097152},       {511, 4096},          {511, 65536},
    {511, 2097152},    {512, 4096},        {512, 65536},         {512, 2097152},
    {4095, 4096},      {4095, 65536},      {4095, 2097152},      {4096, 4096},
    {4096, 65536},     {4096, 2097152},    {5000, 4096},         {5000, 65536},
    {5000, 2097152},   {MIB + 777, 4096},  {MIB + 777, 65536},   {MIB + 777, 2097152},
    {300 * MIB, 4096}, {300 * MIB, 65536}, {300 * MIB, 2097152}, {TIB, 4096},
    {TIB, 65536},      {TIB, 2097152},     {15 * TIB + 1, 8192}};

ParameterizedTestParameters(qcow2_image, random_operations)
{
	return cr_make_param_array(struct geometry, geometries, FF_ARRAY_SIZE(geometries));
}

ParameterizedTest(struct geometry *g, qcow2_image, random_operations)
{
	struct imgtest t;
	int steps = g->cs > 65536 ? 25 : 60;

	imgtest_open(&t, g->size, g->cs, g->size + g->cs);
	imgtest_check(&t, false);
	for (int round = 0; round < 3; round++) {
		for (int i = 0; i < steps; i++)
			imgtest_step(&t);
		imgtest_verify(&t);
		imgtest_check(&t, false);
		if (round == 1)
			ff_image_park(t.img);
		else
			imgtest_reload(&t);
		imgtest_verify(&t);
		imgtest_check(&t, false);
	}
	imgtest_verify_qemu(&t);
	imgtest_close(&t);
}

/* The whole disk, holes between the windows too, as qemu-img converts it. */
ParameterizedTestParameters(qcow2_image, convert_equals_model)
{
	static struct geometry some[] = {{1, 4096},         {5000, 4096},      {5000, 65536},
	                                 {MIB + 777, 4096}, {300 * MIB, 4096}, {300 * MIB, 65536}};

	return cr_make_param_array(struct geometry, some, FF_ARRAY_SIZE(some));
}

ParameterizedTest(struct geometry *g, qcow2_image, convert_equals_model)
{
	struct imgtest t;
	int fd;

	imgtest_open(&t, g->size, g->cs, 99);
	for (int i = 0; i < 80; i++)
		imgtest_step(&t);
	/* the model: the backing file overwritten with what is saved */
	cr_assert_eq(imgtest_run(&t, "cp --sparse=always base.raw want.raw"), 0);
	fd = openat(t.dirfd, "want.raw", O_RDWR);
	for (unsigned k = 0; k < t.windows; k++)
		for (uint64_t i = 0; i < t.w[k].count; i++) {
			uint64_t c = t.w[k].first + i;

			if (t.w[k].state[i] == M_DATA)
				imgtest_saved(&t, c, t.buf);
			else if (t.w[k].state[i] == M_ZERO)
				memset(t.buf, 0, t.cs);
			else
				continue;
			cr_assert_eq(pwrite(fd, t.buf, t.cs, (off_t)(c * t.cs)), t.cs);
		}
	cr_assert_eq(ftruncate(fd, (off_t)ff_round_up(g->size, 512)), 0);
	close(fd);
	cr_assert_eq(imgtest_run(&t, "qemu-img convert -f qcow2 -O raw img.qcow2 out.raw"), 0);
	cr_assert_eq(imgtest_run(&t, "cmp want.raw out.raw"), 0);
	imgtest_close(&t);
}

/* While we have it open, QEMU reads it but does not write to it. */
Test(qcow2_image, qemu_may_read_only)
{
	struct imgtest t;

	imgtest_open(&t, MIB, 4096, 1);
	cr_assert_eq(imgtest_run(&t, "qemu-img info img.qcow2"), 0);
	cr_assert_eq(imgtest_run(&t, "qemu-img convert -O raw img.qcow2 out"), 0);
	cr_assert_neq(imgtest_run(&t, "qemu-io -c 'write 0 4096' img.qcow2"), 0);
	cr_assert_neq(imgtest_run(&t, "qemu-img check -r all img.qcow2"), 0);
	ff_image_park(t.img); /* the lock is what kept it off */
	cr_assert_eq(imgtest_run(&t, "qemu-io -c 'write 0 4096' img.qcow2"), 0);
	imgtest_close(&t);
}

Test(qcow2_image, header_rewrites)
{
	struct imgtest t;
	char longest[1024];

	imgtest_open(&t, MIB + 1, 4096, 1);
	imgtest_save(&t, &t.w[0], 0, 9, 0);
	memset(longest, 'x', sizeof longest);
	longest[1023] = 0;
	cr_assert_eq(ff_image_set_backing(t.img, longest, "qcow2"), 0);
	imgtest_reload(&t);
	cr_assert_str_eq(ff_image_backing(t.img), longest);
	cr_assert_eq(ff_image_set_backing(t.img, "x/base.raw", "raw"), 0);
	cr_assert_eq(imgtest_run(&t, "mkdir x && mv base.raw x/"), 0);
	imgtest_verify_qemu(&t);
	cr_assert_not(ff_image_is_broken(t.img));
	cr_assert_eq(ff_image_set_broken(t.img, 7), 0);
	cr_assert(ff_image_is_broken(t.img));
	imgtest_reload(&t);
	cr_assert(ff_image_is_broken(t.img));
	cr_assert(ff_image_desc(t.img)->broken);
	cr_assert_str_eq(ff_image_backing(t.img), "x/base.raw");
	cr_assert_eq(ff_image_desc(t.img)->size, MIB + 1);
	cr_assert_eq(ff_image_desc(t.img)->disk_btime_sec, -5);
	cr_assert_eq(imgtest_run(&t, "qemu-img info img.qcow2 | grep -q 'corrupt: true'"), 0);
	imgtest_verify(&t);
	imgtest_verify_qemu(&t);
	imgtest_close(&t);
}

Test(qcow2_image, names)
{
	struct imgtest t;
	struct ff_image *other;
	struct ff_image_desc desc;
	char name[1025];

	imgtest_open(&t, MIB, 4096, 1);
	desc = *ff_image_desc(t.img);
	cr_assert_eq(ff_image_create(t.dirfd, "img.qcow2", 0600, &desc, "b", "raw", &other),
	             -EEXIST);
	memset(name, 'x', sizeof name);
	name[1024] = 0;
	cr_assert_eq(ff_image_create(t.dirfd, "o.qcow2", 0600, &desc, name, "raw", &other),
	             -ENAMETOOLONG);
	cr_assert_neq(faccessat(t.dirfd, "o.qcow2", F_OK, 0), 0);
	/* no symlink is followed, and nothing but a regular file opened */
	cr_assert_eq(imgtest_run(&t, "mkdir d; cp img.qcow2 d; ln -s d e; ln -s img.qcow2 l.qcow2; "
	                             "mkfifo f.qcow2"),
	             0);
	cr_assert_eq(ff_image_load(t.dirfd, "d/img.qcow2", &other), 0);
	ff_image_free(other);
	cr_assert_neq(ff_image_load(t.dirfd, "e/img.qcow2", &other), 0);
	cr_assert_neq(ff_image_load(t.dirfd, "l.qcow2", &other), 0);
	cr_assert_neq(ff_image_load(t.dirfd, "f.qcow2", &other), 0);
	cr_assert_neq(ff_image_load(t.dirfd, "missing.qcow2", &other), 0);
	imgtest_close(&t);
}

Test(qcow2_image, unlinked_stays_usable)
{
	struct imgtest t;

	imgtest_open(&t, MIB, 4096, 1);
	imgtest_save(&t, &t.w[0], 0, 9, 0);
	ff_image_park(t.img);
	cr_assert_eq(ff_image_unlink(t.img), 0);
	ff_image_park(t.img);
	imgtest_save(&t, &t.w[0], 20, 9, 0);
	imgtest_verify(&t);
	cr_assert_eq(imgtest_run(&t, "! ls img.*"), 0);
	imgtest_close(&t);

	/* also where the checksum file comes only later */
	imgtest_open(&t, MIB, 4096, 1);
	cr_assert_eq(ff_image_unlink(t.img), 0);
	imgtest_save(&t, &t.w[0], 0, 9, 0);
	imgtest_verify(&t);
	cr_assert_eq(imgtest_run(&t, "! ls img.*"), 0);
	imgtest_close(&t);
}

Test(qcow2_image, release_gives_space_back)
{
	struct imgtest t;
	struct stat before, after;
	uint64_t allocated;

	imgtest_open(&t, 64 * MIB, 65536, 1);
	imgtest_save(&t, &t.w[0], 0, 64, 0);
	cr_assert_eq(fstatat(t.dirfd, "img.qcow2", &before, 0), 0);
	allocated = ff_image_allocated(t.img);
	cr_assert_eq(ff_image_release(t.img, 0, 64), 0);
	cr_assert_eq(fstatat(t.dirfd, "img.qcow2", &after, 0), 0);
	cr_assert_lt(after.st_blocks * 512, before.st_blocks * 512 - 2 * (off_t)MIB);
	cr_assert_lt(ff_image_allocated(t.img), allocated - 2 * MIB);
	imgtest_check(&t, false);
	memset(t.w[0].state, M_RELEASED, 64);
	imgtest_verify(&t);
	imgtest_close(&t);
}

struct budget {
	int64_t used, limit;
};

static int budget_charge(void *ctx, int64_t bytes, bool must)
{
	struct budget *b = ctx;

	if (bytes > 0 && !must && b->used + bytes > b->limit)
		return -ENOSPC;
	b->used += bytes;
	return 0;
}

Test(qcow2_image, budget)
{
	struct imgtest t;
	struct budget b = {.limit = 0};
	uint64_t base;

	imgtest_open(&t, 64 * MIB, 4096, 1);
	base = ff_image_allocated(t.img);
	ff_image_set_budget(t.img, budget_charge, &b);
	memset(t.buf, 1, 4096);
	for (b.limit = 0; b.limit < 2 * 4096; b.limit += 4096) {
		/* not even for a table and a cluster */
		cr_assert_eq(ff_image_save(t.img, 1, 1, t.buf, NULL, false), -ENOSPC);
		cr_assert_not(ff_image_marked(t.img, 1));
		cr_assert_eq(b.used, 0);
		cr_assert_eq(ff_image_allocated(t.img), base);
		imgtest_check(&t, false);
	}
	b.limit = 13 * 4096;
	imgtest_save(&t, &t.w[0], 0, 9, 0);
	cr_assert_eq((uint64_t)b.used, ff_image_allocated(t.img) - base);
	imgtest_save(&t, &t.w[0], 9, 40, -ENOSPC);
	imgtest_verify(&t);
	imgtest_check(&t, false);
	cr_assert_eq(ff_image_release(t.img, 0, 9), 0);
	cr_assert_eq((uint64_t)b.used, ff_image_allocated(t.img) - base);
	cr_assert_eq(b.used, 4096); /* the table */
	b.limit = (int64_t)MIB;
	memset(t.w[0].state, M_RELEASED, 9);
	imgtest_save(&t, &t.w[0], 9, 40, 0);
	imgtest_verify(&t);
	imgtest_check(&t, false);
	imgtest_close(&t);
}

/* A huge disk costs next to nothing: on disk, and in time. */
Test(qcow2_image, huge_is_sparse, .timeout = 20)
{
	struct imgtest t;
	struct stat st;
	uint32_t cs;

	imgtest_open(&t, TIB, 4096, 1);
	cr_assert_eq(fstatat(t.dirfd, "img.qcow2", &st, 0), 0);
	cr_assert_leq(st.st_blocks * 512, 64 * 1024);
	imgtest_save(&t, &t.w[2], 0, 1, 0);
	for (int i = 0; i < 50; i++)
		imgtest_reload(&t);
	imgtest_check(&t, false);
	imgtest_close(&t);
	cr_assert_eq(ff_image_cluster_size(TIB, 4096, &cs), 0);
	cr_assert_eq(cs, 4096);
	cr_assert_eq(ff_image_cluster_size(16 * TIB, 4096, &cs), 0);
	cr_assert_eq(cs, 8192);
	cr_assert_eq(ff_image_cluster_size(0, 4096, &cs), 0);
	cr_assert_eq(ff_image_cluster_size(16 * TIB, 5000, &cs), -EINVAL);
	cr_assert_eq(ff_image_cluster_size(UINT64_MAX, 4096, &cs), -EFBIG);
}

/* --- many threads ------------------------------------------------------------------------------
 */

#define SAVERS 8

struct saver {
	struct imgtest *t;
	unsigned id;
	atomic_bool *stop;
};

/* Saves each cluster c with c % SAVERS == id, releases some, reads what it has saved. */
static void *saver_thread(void *arg)
{
	struct saver *s = arg;
	uint8_t *buf = malloc(s->t->cs), *got = malloc(s->t->cs);

	for (uint64_t c = s->id; c < s->t->clusters; c += SAVERS) {
		imgtest_saved(s->t, c, buf);
		cr_assert_eq(ff_image_save(s->t->img, c, 1, buf, NULL, c % 512 == s->id), 0);
		cr_assert(ff_image_marked(s->t->img, c));
		cr_assert_eq(ff_image_read(s->t->img, c, 1, got), 0);
		cr_assert_eq(memcmp(buf, got, s->t->cs), 0);
		if (c / SAVERS % 7 == 3)
			cr_assert_eq(ff_image_release(s->t->img, c, 1), 0);
	}
	free(buf);
	free(got);
	return NULL;
}

/* Reads whatever is marked, all the time. */
static void *reader_thread(void *arg)
{
	struct saver *s = arg;
	uint8_t *buf = malloc(s->t->cs), *got = malloc(s->t->cs);

	for (uint64_t c = 0; !atomic_load(s->stop); c = (c + 1) % s->t->clusters) {
		int r;

		if (!ff_image_marked(s->t->img, c) || c / SAVERS % 7 == 3)
			continue;
		r = ff_image_read(s->t->img, c, 1, got);
		imgtest_saved(s->t, c, buf);
		cr_assert_eq(r, 0);
		cr_assert_eq(memcmp(buf, got, s->t->cs), 0);
	}
	free(buf);
	free(got);
	return NULL;
}

Test(qcow2_image, concurrent_savers, .timeout = 120)
{
	struct imgtest t;
	struct saver s[SAVERS + 1];
	pthread_t thread[SAVERS + 1];
	atomic_bool stop = false;

	imgtest_open(&t, 16 * MIB, 4096, 3);
	for (unsigned i = 0; i <= SAVERS; i++) {
		s[i] = (struct saver){&t, i, &stop};
		cr_assert_eq(pthread_create(&thread[i], NULL,
		                            i < SAVERS ? saver_thread : reader_thread, &s[i]),
		             0);
	}
	for (unsigned i = 0; i <= SAVERS; i++) {
		if (i == SAVERS)
			atomic_store(&stop, true);
		pthread_join(thread[i], NULL);
	}
	imgtest_check(&t, false);
	for (unsigned k = 0; k < t.windows; k++)
		for (uint64_t i = 0; i < t.w[k].count; i++) {
			uint64_t c = t.w[k].first + i;

			imgtest_saved(&t, c, t.buf);
			t.w[k].state[i] = c / SAVERS % 7 == 3 ? M_RELEASED
			                  : t.buf[0] || memcmp(t.buf, t.buf + 1, t.cs - 1) ? M_DATA
			                                                                   : M_ZERO;
		}
	imgtest_verify(&t);
	imgtest_reload(&t);
	imgtest_verify(&t);
	imgtest_verify_qemu(&t);
	imgtest_close(&t);
}

/* --- killed at any moment ----------------------------------------------------------------------
 */

static void child_saves(struct imgtest *t)
{
	for (;;)
		for (unsigned k = 0; k < t->windows; k++)
			for (uint64_t i = 0; i < t->w[k].count; i += 3) {
				imgtest_step(t);
				imgtest_save(t, &t->w[k], i, FF_MIN(t->w[k].count - i, UINT64_C(3)),
				             0);
			}
}

/* Every cluster that is marked after a kill must be right; the model learns which are. */
static void learn_marks(struct imgtest *t)
{
	for (unsigned k = 0; k < t->windows; k++) {
		uint8_t kinds[WINDOW_SIZE];

		cr_assert_eq(ff_image_kinds(t->img, t->w[k].first, t->w[k].count, kinds), 0);
		for (uint64_t i = 0; i < t->w[k].count; i++)
			t->w[k].state[i] = kinds[i] == FF_KIND_DATA   ? M_DATA
			                   : kinds[i] == FF_KIND_ZERO ? M_ZERO
			                                              : M_NONE;
	}
}

ParameterizedTestParameters(qcow2_image, killed)
{
	static struct geometry some[] = {
	    {64 * MIB, 4096}, {64 * MIB, 65536}, {512 * MIB, 2097152}, {TIB, 4096}};

	return cr_make_param_array(struct geometry, some, FF_ARRAY_SIZE(some));
}

ParameterizedTest(struct geometry *g, qcow2_image, killed)
{
	struct imgtest t;

	for (int round = 0; round < 15; round++) {
		pid_t pid;
		int status;

		imgtest_open(&t, g->size, g->cs, (uint64_t)round);
		pid = fork();
		cr_assert(pid >= 0);
		if (pid == 0) {
			child_saves(&t);
			_exit(1);
		}
		usleep((useconds_t)imgtest_random(&t, g->cs > 4096 ? 12000 : 4000));
		kill(pid, SIGKILL);
		cr_assert_eq(waitpid(pid, &status, 0), pid);
		cr_assert(WIFSIGNALED(status));
		imgtest_check(&t, true);
		imgtest_reload(&t);
		imgtest_check(&t, false);
		learn_marks(&t);
		imgtest_verify(&t);
		for (int i = 0; i < 20; i++)
			imgtest_step(&t);
		imgtest_verify(&t);
		imgtest_check(&t, false);
		imgtest_verify_qemu(&t);
		imgtest_close(&t);
	}
}
