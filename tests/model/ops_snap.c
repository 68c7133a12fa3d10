/*
 * Operations on snapshots, and unmounting.
 */
#include "model.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/xattr.h>
#include <unistd.h>

static const char *const snap_names[] = {
    "nightly",           "hourly",  "weekly", "a b", "%d", "s-5", "s-6",
    "\xc3\xa9t\xc3\xa9", "x.qcow2", "before",
};
#define NNAMES (sizeof snap_names / sizeof snap_names[0])

const char *free_snap_name(struct model *m)
{
	unsigned start = (unsigned)rng_below(&m->rng, 3), i, j;

	/* Rather few names, so that they come back often. */
	for (i = 0; i < NNAMES; i++) {
		const char *name = snap_names[(start + i) % NNAMES];

		for (j = 0; j < m->nsnaps && strcmp(m->snaps[j]->name, name) != 0; j++)
			;
		if (j == m->nsnaps)
			return name;
	}
	return NULL;
}

bool op_snap_make(struct model *m)
{
	struct snap *s;
	struct stat st;
	const char *name;
	char path[PATH_LEN];

	if (m->nsnaps == MAX_SNAPS)
		return false;
	name = free_snap_name(m);
	s = calloc(1, sizeof *s);
	if (!s || !name)
		abort();
	snprintf(s->name, sizeof s->name, "%s", name);
	snap_path(m, name, path);
	note(m, "mkdir %s", path);
	s->root = tree_freeze(m);
	record_stats(m, s->root);
	if (mkdir(path, 0755) < 0)
		fail(m, "mkdir %s: %s", path, strerror(errno));
	if (lstat(m->below, &st) < 0)
		fail(m, "%s: %s", m->below, strerror(errno));
	s->root->mtime_after = st.st_mtim;
	m->snaps[m->nsnaps++] = s;
	m->snaps_made++;
	check_tree_frozen(m, s);
	if (mkdir(path, 0755) == 0 || errno != EEXIST)
		fail(m, "a second mkdir %s: %s", path, strerror(errno));
	if (m->qemu_every && m->snaps_made % m->qemu_every == 0)
		check_images(m);
	return true;
}

void frozen_close_all(struct model *m, const struct snap *of)
{
	for (unsigned i = 0; i < MAX_FROZEN; i++) {
		struct open_file *f = &m->frozen[i];

		if (f->fd < 0 || (of && f->snap != of))
			continue;
		if (close(f->fd) < 0)
			fail(m, "close of a frozen file: %s", strerror(errno));
		f->fd = -1;
	}
}

static bool any_open(const struct model *m, const struct snap *s)
{
	for (unsigned i = 0; i < MAX_FROZEN; i++)
		if (m->frozen[i].fd >= 0 && m->frozen[i].snap == s)
			return true;
	return false;
}

static void drop(struct model *m, unsigned i)
{
	struct snap *s = m->snaps[i];
	struct stat st;
	char path[PATH_LEN];

	snap_path(m, s->name, path);
	if (!s->checked || rng_one_in(&m->rng, 2))
		check_snap(m, s);
	note(m, "rmdir %s", path);
	if (any_open(m, s)) {
		if (rmdir(path) == 0 || errno != EBUSY)
			fail(m, "rmdir %s with an open file: %s", path, strerror(errno));
		frozen_close_all(m, s);
	}
	if (rmdir(path) < 0)
		fail(m, "rmdir %s: %s", path, strerror(errno));
	if (lstat(path, &st) == 0 || errno != ENOENT)
		fail(m, "%s is still there", path);
	inode_put(s->root);
	free(s);
	memmove(&m->snaps[i], &m->snaps[i + 1], (m->nsnaps - i - 1) * sizeof m->snaps[0]);
	m->nsnaps--;
	if (!m->nsnaps)
		check_images(m);
}

bool op_snap_drop(struct model *m)
{
	/* Fewer snapshots more often than not, and none at all now and then. */
	if (m->nsnaps < 2 + rng_below(&m->rng, 7) && !rng_one_in(&m->rng, 6))
		return false;
	if (!m->nsnaps)
		return false;
	do {
		drop(m, (unsigned)rng_below(&m->rng, m->nsnaps));
	} while (m->nsnaps && rng_one_in(&m->rng, 3));
	return true;
}

bool op_snap_rename(struct model *m)
{
	struct snap *s;
	const char *name;
	char from[PATH_LEN], to[PATH_LEN];

	if (!m->nsnaps)
		return false;
	s = m->snaps[rng_below(&m->rng, m->nsnaps)];
	name = free_snap_name(m);
	snap_path(m, s->name, from);
	snap_path(m, name, to);
	note(m, "rename %s to %s", from, to);
	if (rename(from, to) < 0)
		fail(m, "rename %s to %s: %s", from, to, strerror(errno));
	snprintf(s->name, sizeof s->name, "%s", name);
	check_snap_list(m);
	check_tree_frozen(m, s);
	return true;
}

bool op_snap_checkpoint(struct model *m)
{
	char path[PATH_LEN], dir[PATH_LEN];
	bool by_mkdir = rng_one_in(&m->rng, 2);
	struct snap *s;

	if (!m->nsnaps)
		return false;
	s = m->snaps[rng_below(&m->rng, m->nsnaps)];
	if (s->given_up)
		return false;
	if (!s->checked || rng_one_in(&m->rng, 2))
		check_snap(m, s);
	snap_path(m, s->name, path);
	snprintf(dir, sizeof dir, "%.900s/.checkpoint", path);
	note(m, "checkpoint of %s by %s", path, by_mkdir ? "mkdir" : "setxattr");
	if (any_open(m, s)) {
		if (mkdir(dir, 0755) == 0 || errno != EBUSY)
			fail(m, "mkdir %s with an open file: %s", dir, strerror(errno));
		frozen_close_all(m, s);
	}
	if (by_mkdir ? mkdir(dir, 0755) : setxattr(path, "user.fleecefs.checkpoint", "1", 1, 0))
		fail(m, "checkpoint of %s: %s", path, strerror(errno));
	if (by_mkdir && (mkdir(dir, 0755) == 0 || errno != EEXIST))
		fail(m, "a second mkdir %s: %s", dir, strerror(errno));
	s->given_up = true;
	m->checkpoints++;
	check_snap(m, s);
	return true;
}

/* Gives up a range of a frozen file, which must give an error from then on, and nothing else. Only
 * whole pages can be. */
static void give_up(struct model *m, const char *path, const struct content *c)
{
	const uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
	static const int modes[] = {0, FALLOC_FL_ZERO_RANGE, FALLOC_FL_PUNCH_HOLE};
	int fd = open(path, O_RDWR | O_CLOEXEC), punch = modes[2] | FALLOC_FL_KEEP_SIZE;
	uint64_t off = rng_below(&m->rng, c->size) / page * page;
	uint64_t len = (rng_below(&m->rng, c->size) / page + 1) * page;
	/* whatever the cluster size of its chain, this is whole clusters */
	uint64_t from = (off + (2u << 20) - 1) & ~((UINT64_C(2) << 20) - 1);
	uint64_t to = off + len >= c->size ? c->size : (off + len) & ~((UINT64_C(2) << 20) - 1);

	if (fd < 0)
		fail(m, "open %s for a hole: %s", path, strerror(errno));
	if (fallocate(fd, modes[rng_below(&m->rng, 2)], (off_t)off, (off_t)len) == 0 ||
	    errno != EROFS)
		fail(m, "fallocate of %s: %s", path, strerror(errno));
	if (pwrite(fd, "x", 1, (off_t)off) >= 0 || errno != EROFS)
		fail(m, "write to %s: %s", path, strerror(errno));
	if (fallocate(fd, punch, (off_t)off + 1, (off_t)len) == 0 || errno != EINVAL)
		fail(m, "a hole in %s within a page: %s", path, strerror(errno));
	if (fallocate(fd, punch, (off_t)off, (off_t)len) < 0)
		fail(m, "a hole in %s: %s", path, strerror(errno));
	if (from < to && (pread(fd, m->buf2, 1, (off_t)from) >= 0 || errno != EIO))
		fail(m, "%s: %llu was given up: %s", path, (unsigned long long)from,
		     strerror(errno));
	m->released++;
	close(fd);
}

bool op_snap_consume(struct model *m)
{
	char base[PATH_LEN], path[PATH_LEN];
	struct inode *dir;
	struct snap *s;
	struct ent *e;

	if (!m->nsnaps)
		return false;
	s = m->snaps[rng_below(&m->rng, m->nsnaps)];
	if (s->given_up || !tree_pick(m, s->root, I_REG, &dir, &e) || !e->ino->data.size)
		return false;
	if (!s->checked)
		check_snap(m, s);
	snap_path(m, s->name, base);
	path_of(base, dir, e->name, path);
	note(m, "consume, and a hole in %s", path);
	if (setxattr(path, "user.fleecefs.consume", "1", 1, 0) < 0)
		fail(m, "%s: consume: %s", path, strerror(errno));
	frozen_close_all(m, s);
	s->consumed = true;
	give_up(m, path, &e->ino->data);
	if (setxattr(path, "user.fleecefs.consume", "0", 1, 0) < 0)
		fail(m, "%s: consume off: %s", path, strerror(errno));
	check_snap(m, s);
	return true;
}

bool op_frozen_open(struct model *m)
{
	struct open_file *f = &m->frozen[rng_below(&m->rng, MAX_FROZEN)];
	struct inode *dir;
	struct ent *e;
	char base[PATH_LEN], path[PATH_LEN];

	if (f->fd >= 0 || !m->nsnaps)
		return false;
	f->snap = m->snaps[rng_below(&m->rng, m->nsnaps)];
	if (f->snap->given_up || f->snap->consumed)
		return false;
	if (!tree_pick(m, f->snap->root, I_REG, &dir, &e))
		return false;
	snap_path(m, f->snap->name, base);
	path_of(base, dir, e->name, path);
	note(m, "open frozen %s", path);
	f->ino = e->ino;
	f->fd = open(path, O_RDONLY | O_CLOEXEC | (rng_one_in(&m->rng, 2) ? O_DIRECT : 0));
	if (f->fd < 0)
		fail(m, "open %s: %s", path, strerror(errno));
	return true;
}

bool op_frozen_close(struct model *m)
{
	struct open_file *f = &m->frozen[rng_below(&m->rng, MAX_FROZEN)];

	if (f->fd < 0)
		return false;
	note(m, "close a frozen file");
	if (close(f->fd) < 0)
		fail(m, "close of a frozen file: %s", strerror(errno));
	f->fd = -1;
	return true;
}

static int try_change(struct model *m, unsigned what, const char *path, const char *dir)
{
	static const struct timespec now[2] = {{0, UTIME_NOW}, {0, UTIME_NOW}};
	char other[PATH_LEN];
	int fd;

	snprintf(other, sizeof other, "%.900s/other", dir);
	switch (what) {
	case 0:
		fd = open(path, O_RDWR | O_CLOEXEC);
		break;
	case 1:
		fd = open(path, O_WRONLY | O_TRUNC | O_CLOEXEC);
		break;
	case 2:
		fd = open(other, O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
		break;
	case 3:
		return unlink(path);
	case 4:
		return rename(path, other);
	case 5:
		return truncate(path, 1);
	case 6:
		return chmod(path, 0600);
	case 7:
		return setxattr(path, "user.k0", "x", 1, 0);
	case 8:
		return utimensat(AT_FDCWD, path, now, 0);
	case 9:
		return link(path, other);
	case 10:
		return symlink("x", other);
	case 11:
		return mkdir(other, 0700);
	case 12:
		return mknod(other, S_IFIFO | 0600, 0);
	default:
		return chown(path, 1, 1);
	}
	if (fd >= 0)
		close(fd);
	return fd;
}

bool op_frozen_change(struct model *m)
{
	struct snap *s;
	struct inode *dir;
	struct ent *e;
	char base[PATH_LEN], path[PATH_LEN], parent[PATH_LEN];
	unsigned what = (unsigned)rng_below(&m->rng, 14);

	if (!m->nsnaps)
		return false;
	s = m->snaps[rng_below(&m->rng, m->nsnaps)];
	if (!tree_pick(m, s->root, I_REG, &dir, &e))
		return false;
	snap_path(m, s->name, base);
	path_of(base, dir, e->name, path);
	path_of(base, dir, NULL, parent);
	note(m, "try change %u on %s", what, path);
	if (try_change(m, what, path, parent) >= 0 || errno != EROFS)
		fail(m, "change %u of frozen %s: %s, want EROFS", what, path, strerror(errno));
	return true;
}

bool op_remount(struct model *m)
{
	static const uint32_t sizes[] = {4096, 8192, 65536, 1u << 20};

	/* Old images keep the cluster size that they were made with. */
	if (rng_one_in(&m->rng, 2))
		m->mnt.cluster_size = sizes[rng_below(&m->rng, 4)];
	else
		m->mnt.cluster_size = m->cluster;
	note(m, "unmount and mount, new images with clusters of %u", m->mnt.cluster_size);
	close_all(m);
	frozen_close_all(m, NULL);
	if (mnt_stop(&m->mnt) || mnt_start(&m->mnt))
		fail(m, "unmounting and mounting again");
	m->remounts++;
	check_snap_list(m);
	for (unsigned i = 0; i < m->nsnaps; i++)
		check_tree_frozen(m, m->snaps[i]);
	return true;
}
