/*
 * SIGKILL while something goes on, and mounting again.
 *
 * Changes that returned must be there afterwards. Of the one that was cut short any part may be
 * there, but no frozen view may show it. A snapshot whose mkdir or rmdir was cut short is whole or
 * not there at all.
 *
 * A second thread sends the signal; it shares nothing but its argument, which is constant while it
 * runs.
 */
#include "model.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

struct killer {
	pid_t pid;
	struct timespec delay;
	pthread_t thread;
};

static void *killer_main(void *arg)
{
	const struct killer *k = arg;

	nanosleep(&k->delay, NULL);
	kill(k->pid, SIGKILL);
	return NULL;
}

static void kill_soon(struct model *m, struct killer *k)
{
	close_all(m);
	frozen_close_all(m, NULL);
	k->pid = m->mnt.daemon;
	k->delay = (struct timespec){0, (long)rng_below(&m->rng, 5000000)};
	if (pthread_create(&k->thread, NULL, killer_main, k))
		abort();
}

static void mount_again(struct model *m, struct killer *k)
{
	pthread_join(k->thread, NULL);
	if (mnt_reap_killed(&m->mnt) || mnt_start(&m->mnt))
		fail(m, "mounting again after a kill");
	m->kills++;
}

/* Takes over what the interrupted change made of INO: each byte is as in OLD or as it was to be. */
static void adopt(struct model *m, const char *path, struct inode *ino, const struct content *old)
{
	uint64_t off, i, n, size, min = old->size, max = ino->data.size;
	uint8_t *a = malloc(CONTENT_BLOCK), *b = malloc(CONTENT_BLOCK);
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	struct stat st;

	if (fd < 0 || !a || !b || fstat(fd, &st) < 0)
		fail(m, "open %s after a kill: %s", path, strerror(errno));
	if (min > max) {
		min = ino->data.size;
		max = old->size;
	}
	size = (uint64_t)st.st_size;
	if (size < min || size > max)
		fail(m, "%s: size %llu after a kill, want %llu to %llu", path,
		     (unsigned long long)size, (unsigned long long)min, (unsigned long long)max);
	for (off = 0; off < size; off += n) {
		n = size - off < CONTENT_BLOCK ? size - off : CONTENT_BLOCK;
		if (!content_has_block(old, off / CONTENT_BLOCK) &&
		    !content_has_block(&ino->data, off / CONTENT_BLOCK))
			continue;
		if (pread(fd, m->buf2, n, (off_t)off) != (ssize_t)n)
			fail(m, "read %s after a kill: %s", path, strerror(errno));
		content_read(old, off, a, n);
		content_read(&ino->data, off, b, n);
		for (i = 0; i < n; i++)
			if (m->buf2[i] != a[i] && m->buf2[i] != b[i])
				fail(m, "%s: byte %llu is neither old nor new after a kill", path,
				     (unsigned long long)(off + i));
		if (off + n > ino->data.size || content_diff(&ino->data, off, m->buf2, n) >= 0)
			content_write(&ino->data, off, m->buf2, n);
	}
	content_resize(&ino->data, size);
	free(a);
	free(b);
	close(fd);
}

/* One change of FD and of the model; false: it was cut short. */
static bool change(struct model *m, int fd, struct inode *ino)
{
	uint64_t off, len;

	pick_range(m, ino, ino->big ? m->big_max : m->file_max, 1u << 17, &off, &len);
	switch (rng_below(&m->rng, 5)) {
	case 0:
		note(m, "truncate to %llu, being killed", (unsigned long long)off);
		content_resize(&ino->data, off);
		return ftruncate(fd, (off_t)off) == 0;
	case 1:
		note(m, "punch %llu+%llu, being killed", (unsigned long long)off,
		     (unsigned long long)len);
		content_zero(&ino->data, off, len);
		return fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)off,
		                 (off_t)len) == 0;
	default:
		note(m, "write %llu+%llu, being killed", (unsigned long long)off,
		     (unsigned long long)len);
		rng_fill(&m->rng, m->buf, len);
		content_write(&ino->data, off, m->buf, len);
		return pwrite(fd, m->buf, len, (off_t)off) == (ssize_t)len;
	}
}

static bool kill_while_changing(struct model *m)
{
	struct content old = {.size = 0};
	struct killer k;
	struct inode *dir;
	struct ent *e;
	char path[PATH_LEN];
	int fd;

	if (!tree_pick(m, m->root, I_REG, &dir, &e))
		return false;
	path_of(m->live, dir, e->name, path);
	fd = open(path, O_RDWR | O_CLOEXEC);
	if (fd < 0)
		fail(m, "open %s: %s", path, strerror(errno));
	kill_soon(m, &k);
	do {
		content_free(&old);
		content_copy(&old, &e->ino->data);
	} while (change(m, fd, e->ino));
	close(fd);
	mount_again(m, &k);
	adopt(m, path, e->ino, &old);
	content_free(&old);
	return true;
}

/* A snapshot comes and goes until the daemon is gone. */
static bool kill_while_snapping(struct model *m)
{
	struct snap *s = calloc(1, sizeof *s);
	struct killer k;
	struct stat st;
	const char *name = free_snap_name(m);
	char path[PATH_LEN];

	if (m->nsnaps == MAX_SNAPS || !s || !name) {
		free(s);
		return false;
	}
	snprintf(s->name, sizeof s->name, "%s", name);
	snap_path(m, name, path);
	s->root = tree_freeze(m);
	record_stats(m, s->root);
	note(m, "mkdir and rmdir %s, being killed", path);
	kill_soon(m, &k);
	while (mkdir(path, 0755) == 0 && rmdir(path) == 0)
		;
	mount_again(m, &k);
	if (lstat(m->below, &st) < 0)
		fail(m, "%s: %s", m->below, strerror(errno));
	s->root->mtime_after = st.st_mtim;
	if (lstat(path, &st) == 0) {
		m->snaps[m->nsnaps++] = s;
		return true;
	}
	if (errno != ENOENT)
		fail(m, "%s: %s", path, strerror(errno));
	inode_put(s->root);
	free(s);
	return true;
}

/* A snapshot becomes a checkpoint, while the disks are written to or not, as the daemon goes. */
static bool kill_while_giving_up(struct model *m)
{
	struct killer k;
	struct snap *s;
	char path[PATH_LEN];

	if (!m->nsnaps)
		return false;
	s = m->snaps[rng_below(&m->rng, m->nsnaps)];
	if (s->given_up)
		return false;
	snap_path(m, s->name, path);
	snprintf(path + strlen(path), 20, "/.checkpoint");
	note(m, "mkdir %s, being killed", path);
	kill_soon(m, &k);
	mkdir(path, 0755);
	mount_again(m, &k);
	s->given_up = is_given_up(m, s);
	return true;
}

bool op_kill(struct model *m)
{
	bool changing = !rng_one_in(&m->rng, 3), giving_up = rng_one_in(&m->rng, 3);

	note(m, "SIGKILL");
	if (!(giving_up  ? kill_while_giving_up(m)
	      : changing ? kill_while_changing(m)
	                 : kill_while_snapping(m)))
		return false;
	check_all(m);
	if (m->qemu_every)
		check_images(m);
	return true;
}
