/*
 * model FLEECEFS [options]: random operations through a mount, compared with a model of the tree.
 * model --plain=DIR [options]: the same in a plain directory (a new one in DIR), without snapshots:
 * what proves that the model itself is right.
 *
 * A run is a function of its options and the seed, which is shown first and in every failure.
 */
#include "model.h"

#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

struct op {
	bool (*fn)(struct model *m);
	unsigned weight;
	bool snapshots; /* not on a plain directory */
};

static const struct op ops[] = {
    {op_write, 28},
    {op_write_same, 4},
    {op_write_zeros, 3},
    {op_write_direct, 8},
    {op_append, 5},
    {op_open_trunc, 1},
    {op_truncate, 7},
    {op_punch, 6},
    {op_zero_range, 5},
    {op_fallocate, 4},
    {op_copy_range, 8},
    {op_mmap_write, 5},
    {op_fsync, 1},
    {op_open, 3},
    {op_close, 3},
    {op_create, 4},
    {op_unlink, 2},
    {op_recreate, 1},
    {op_rename, 3},
    {op_rename_over, 1},
    {op_exchange, 2},
    {op_link, 2},
    {op_symlink, 1},
    {op_mkdir, 1},
    {op_rmdir, 1},
    {op_chmod, 1},
    {op_utimens, 2},
    {op_xattr, 2},
    {op_snap_make, 2, true},
    {op_snap_drop, 1, true},
    {op_snap_rename, 1, true},
    {op_snap_checkpoint, 1, true},
    {op_snap_consume, 1, true},
    {op_frozen_open, 2, true},
    {op_frozen_close, 1, true},
    {op_frozen_change, 2, true},
};
#define NOPS (sizeof ops / sizeof ops[0])

void note(struct model *m, const char *fmt, ...)
{
	va_list ap;
	char *h = m->hist[m->op % HIST];
	int n = snprintf(h, HIST_LEN, "%lu: ", m->op);

	va_start(ap, fmt);
	vsnprintf(h + n, (size_t)(HIST_LEN - n), fmt, ap);
	va_end(ap);
	if (m->verbose)
		printf("%s\n", h);
}

void fail(struct model *m, const char *fmt, ...)
{
	va_list ap;

	if (m->failing)
		exit(1);
	m->failing = true;
	fflush(stdout);
	fprintf(stderr,
	        "\nFAILED at operation %lu, --seed=%llu --ops=%lu --cluster-size=%u: ", m->op,
	        (unsigned long long)m->seed, m->ops, m->cluster);
	va_start(ap, fmt);
	vfprintf(stderr, fmt, ap);
	va_end(ap);
	fprintf(stderr, "\nthe last operations:\n");
	for (unsigned long i = m->op < HIST ? 0 : m->op - HIST + 1; i <= m->op; i++)
		fprintf(stderr, "  %s\n", m->hist[i % HIST]);
	fprintf(stderr, "snapshots, oldest first:");
	for (unsigned i = 0; i < m->nsnaps; i++)
		fprintf(stderr, " '%s'", m->snaps[i]->name);
	fprintf(stderr, "\n");
	if (!m->plain)
		mnt_show_log(&m->mnt);
	exit(1);
}

static void one_op(struct model *m)
{
	unsigned total = 0, i;
	uint64_t r;

	if (!m->plain && rng_one_in(&m->rng, 800)) {
		op_remount(m);
		return;
	}
	if (!m->plain && m->kill_one_in && rng_one_in(&m->rng, m->kill_one_in) && op_kill(m))
		return;
	for (i = 0; i < NOPS; i++)
		total += ops[i].weight;
	for (;;) {
		r = rng_below(&m->rng, total);
		for (i = 0; r >= ops[i].weight; i++)
			r -= ops[i].weight;
		if (!(m->plain && ops[i].snapshots) && ops[i].fn(m))
			return;
	}
}

static void run(struct model *m)
{
	unsigned long full = m->ops / 20 + 1;

	for (m->op = 0; m->op < m->ops; m->op++) {
		one_op(m);
		for (int i = 0; i < 2; i++)
			check_somewhere(m);
		if (m->op % 64 == 63)
			check_tree_live(m);
		if (m->op % full == full - 1)
			check_all(m);
	}
	check_all(m);
	if (m->qemu_every)
		check_images(m);
	close_all(m);
	frozen_close_all(m, NULL);
}

static void finish(struct model *m)
{
	char path[PATH_LEN];

	while (m->nsnaps) {
		struct snap *s = m->snaps[--m->nsnaps];

		snap_path(m, s->name, path);
		if (rmdir(path) < 0)
			fail(m, "rmdir %s: %s", path, strerror(errno));
		inode_put(s->root);
		free(s);
	}
	if (!m->plain)
		check_images(m);
	check_live(m);
	if (!m->plain && mnt_stop(&m->mnt))
		fail(m, "the unmount");
}

static const struct option options[] = {
    {"seed", required_argument, NULL, 's'},
    {"ops", required_argument, NULL, 'n'},
    {"cluster-size", required_argument, NULL, 'c'},
    {"kill", required_argument, NULL, 'K'},
    {"qemu-img", required_argument, NULL, 'q'},
    {"plain", required_argument, NULL, 'p'},
    {"keep", no_argument, NULL, 'k'},
    {"verbose", no_argument, NULL, 'v'},
    {NULL, 0, NULL, 0},
};

static void usage(void)
{
	fprintf(
	    stderr,
	    "usage: model FLEECEFS|--plain=DIR [--seed=N] [--ops=N] [--cluster-size=BYTES]\n"
	    "             [--kill=ONE_IN_N_OPERATIONS, 0: never] [--qemu-img=EVERY_N_SNAPSHOTS]\n"
	    "             [--keep] [--verbose]\n");
	exit(2);
}

static void parse(struct model *m, int argc, char **argv, bool *keep)
{
	int c;

	while ((c = getopt_long(argc, argv, "v", options, NULL)) != -1) {
		unsigned long long v =
		    c == 'p' || c == 'k' || c == 'v' ? 0 : strtoull(optarg ? optarg : "", NULL, 0);

		switch (c) {
		case 's':
			m->seed = v;
			break;
		case 'n':
			m->ops = (unsigned long)v;
			break;
		case 'c':
			m->cluster = (uint32_t)v;
			break;
		case 'K':
			m->kill_one_in = (unsigned long)v;
			break;
		case 'q':
			m->qemu_every = (unsigned)v;
			break;
		case 'p':
			m->plain = true;
			snprintf(m->live, sizeof m->live, "%.400s", optarg);
			break;
		case 'k':
			*keep = true;
			break;
		case 'v':
			m->verbose = true;
			break;
		default:
			usage();
		}
	}
	if (argc - optind != (m->plain ? 0 : 1) || !m->cluster || !m->ops)
		usage();
}

static int setup(struct model *m, const char *binary, bool keep)
{
	int r;

	m->rng.s = m->seed;
	m->file_max = m->cluster > 1u << 20 ? 7u << 20 : 3u << 20;
	m->big_max = (uint64_t)5 << 30;
	for (unsigned i = 0; i < MAX_FDS; i++)
		m->fds[i].fd = -1;
	for (unsigned i = 0; i < MAX_FROZEN; i++)
		m->frozen[i].fd = -1;
	m->buf = aligned_alloc(4096, BUF_LEN);
	m->buf2 = aligned_alloc(4096, BUF_LEN);
	m->root = inode_new(m, I_DIR);
	if (!m->buf || !m->buf2)
		return -ENOMEM;
	if (m->plain) {
		/* A directory of its own in the one that was named. */
		strncat(m->live, "/fleecefs-model-XXXXXX", PATH_LEN - strlen(m->live) - 1);
		if (!mkdtemp(m->live)) {
			fprintf(stderr, "%s: %s\n", m->live, strerror(errno));
			return -errno;
		}
		memcpy(m->below, m->live, PATH_LEN);
		return 0;
	}
	r = mnt_init(&m->mnt, binary, m->cluster, keep);
	if (r)
		return r;
	snprintf(m->live, sizeof m->live, "%s", m->mnt.live);
	snprintf(m->below, sizeof m->below, "%s", m->mnt.source);
	return mnt_start(&m->mnt);
}

int main(int argc, char **argv)
{
	struct model *m = calloc(1, sizeof *m);
	struct timespec start, end;
	bool keep = false;

	if (!m)
		return 1;
	clock_gettime(CLOCK_REALTIME, &start);
	m->seed = (uint64_t)start.tv_nsec ^ (uint64_t)start.tv_sec << 20;
	m->ops = 20000;
	m->cluster = 4096;
	m->kill_one_in = 4000;
	parse(m, argc, argv, &keep);
	if (!m->plain && mnt_skip())
		return 77;
	umask(022);
	printf("model: --seed=%llu --ops=%lu --cluster-size=%u\n", (unsigned long long)m->seed,
	       m->ops, m->cluster);
	fflush(stdout);
	clock_gettime(CLOCK_MONOTONIC, &start);
	if (setup(m, argv[optind], keep)) {
		if (!m->plain)
			mnt_show_log(&m->mnt);
		return 1;
	}
	run(m);
	finish(m);
	clock_gettime(CLOCK_MONOTONIC, &end);
	printf("model: ok, %lu operations in %ld s: %lu snapshots, %lu checkpoints, %lu holes, %lu "
	       "remounts, %lu "
	       "kills, "
	       "%lu whole compares, qemu-img checked %lu images and read %lu, %llu MiB compared; "
	       "%lu times no shared mmap\n",
	       m->ops, (long)(end.tv_sec - start.tv_sec), m->snaps_made, m->checkpoints,
	       m->released, m->remounts, m->kills, m->full_compares, m->images_checked, m->images,
	       (unsigned long long)(m->bytes_read >> 20), m->no_mmap);
	mnt_done(&m->mnt);
	if (m->plain && !keep)
		mnt_remove_tree(m->live);
	inode_put(m->root);
	free(m->known);
	free(m->buf);
	free(m->buf2);
	free(m);
	return 0;
}
