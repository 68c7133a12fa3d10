/*
 * What the tests of fleecing images share: a directory of their own, an image with a raw backing
 * file, and a model of both. The disks may be huge, so the model knows some windows of clusters,
 * and tests work only in these; everything else is a hole in the backing file.
 */
#ifndef IMGTEST_H
#define IMGTEST_H

#include <stdbool.h>
#include <stdint.h>

#include "cow/qcow2_image.h"

#define WINDOWS     4
#define WINDOW_SIZE 96

enum model_state { M_NONE, M_SKIPPED, M_ZERO, M_DATA, M_RELEASED };

struct window {
	uint64_t first, count;
	uint8_t state[WINDOW_SIZE];
};

struct imgtest {
	char dir[64];
	int dirfd;
	uint64_t size, clusters;
	uint32_t cs;
	unsigned windows;
	struct window w[WINDOWS];
	struct ff_image *img;
	uint8_t *buf; /* WINDOW_SIZE clusters */
	uint64_t rng;
};

/* Makes directory, backing file base.raw and image img.qcow2. */
void imgtest_open(struct imgtest *t, uint64_t size, uint32_t cs, uint64_t seed);
/* Frees the image, removes everything. */
void imgtest_close(struct imgtest *t);
/* Frees the image and loads it again; the model forgets what is not on disk. */
void imgtest_reload(struct imgtest *t);

uint64_t imgtest_random(struct imgtest *t, uint64_t below);
/* What is saved for a cluster, zeros beyond the end of the disk; some clusters are zeros. */
void imgtest_saved(const struct imgtest *t, uint64_t cluster, uint8_t *buf);
/* What the backing file holds there. */
void imgtest_backing(const struct imgtest *t, uint64_t cluster, uint8_t *buf);

/* One random save, save of zeros, skip or release. */
void imgtest_step(struct imgtest *t);
/* Saves COUNT clusters of a window from I on as the model says, and expects R of it. */
void imgtest_save(struct imgtest *t, struct window *w, uint64_t i, uint64_t count, int r);

/* Compares marks, kinds and data with the model, cluster by cluster and as runs. */
void imgtest_verify(struct imgtest *t);
/* Compares what qemu-img makes of image and backing file. */
void imgtest_verify_qemu(struct imgtest *t);
/* qemu-img check: 0, or 3 where leaks are allowed. */
void imgtest_check(struct imgtest *t, bool leaks);

/* Runs a shell command in the directory; its exit status. */
int imgtest_run(struct imgtest *t, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

#endif
