/*
 * Operations on the names and metadata of the live tree.
 */
#include "model.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/xattr.h>
#include <unistd.h>

/* Names as users choose them, some meant to confuse who builds paths or patterns from them. */
static const char *const file_names[] = {
    "disk.raw",     "vm-100-disk-0",    "a b",   "c:disk", "-dash", "x\ny",
    "\xc3\xbc.img", "f-fleece-1.qcow2", "[q]*?", "nbd:h",  "%s%n",  "snapshots2",
};
static const char *const dir_names[] = {"d0", "images", "d 2"};

static struct inode *pick_dir(struct model *m)
{
	struct inode *dir;
	struct ent *e;

	if (rng_one_in(&m->rng, 3) || !tree_pick(m, m->root, I_DIR, &dir, &e))
		return m->root;
	return e->ino;
}

static const char *pick_name(struct model *m)
{
	return file_names[rng_below(&m->rng, sizeof file_names / sizeof file_names[0])];
}

/* A directory and a name that is free in it. */
static bool pick_free(struct model *m, struct inode **dir, const char **name)
{
	for (int i = 0; i < 20; i++) {
		*dir = pick_dir(m);
		*name = pick_name(m);
		if (!dir_find(*dir, *name))
			return true;
	}
	return false;
}

static void create_at(struct model *m, struct inode *dir, const char *name)
{
	struct inode *ino = inode_new(m, I_REG);
	char path[PATH_LEN];
	uint64_t off, len;
	int fd;

	path_of(m->live, dir, name, path);
	ino->mode = 0600 | (unsigned)rng_below(&m->rng, 0200);
	ino->big = !tree_big(m->root) && rng_one_in(&m->rng, 4);
	note(m, "create %s%s", name, ino->big ? " (big)" : "");
	fd = open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, ino->mode);
	if (fd < 0)
		fail(m, "create %s: %s", path, strerror(errno));
	if (ino->big || rng_one_in(&m->rng, 4)) {
		pick_range(m, ino, ino->big ? m->big_max : m->file_max, 1, &off, &len);
		if (ftruncate(fd, (off_t)off) < 0)
			fail(m, "truncate %s: %s", path, strerror(errno));
		content_resize(&ino->data, off);
	}
	if (rng_one_in(&m->rng, 2)) {
		pick_range(m, ino, m->file_max, 1u << 19, &off, &len);
		if (ino->big && len > 65536)
			len = 65536;
		rng_fill(&m->rng, m->buf, len);
		if (pwrite(fd, m->buf, len, (off_t)off) != (ssize_t)len)
			fail(m, "write %s: %s", path, strerror(errno));
		content_write(&ino->data, off, m->buf, len);
	}
	if (close(fd) < 0)
		fail(m, "close %s: %s", path, strerror(errno));
	dir_add(dir, name, ino);
	inode_put(ino);
}

bool op_create(struct model *m)
{
	struct inode *dir;
	const char *name;

	if (tree_count(m->root, I_REG) >= MAX_FILES || !pick_free(m, &dir, &name))
		return false;
	create_at(m, dir, name);
	return true;
}

static void unlink_at(struct model *m, struct inode *dir, const char *name)
{
	char path[PATH_LEN];

	path_of(m->live, dir, name, path);
	note(m, "unlink %s", path);
	if (unlink(path) < 0)
		fail(m, "unlink %s: %s", path, strerror(errno));
	dir_remove(dir, name);
}

bool op_unlink(struct model *m)
{
	struct inode *dir;
	struct ent *e;

	if (tree_count(m->root, I_REG) < 4 || !tree_pick(m, m->root, I_REG | I_LNK, &dir, &e))
		return false;
	unlink_at(m, dir, e->name);
	return true;
}

/* The same name, another file. */
bool op_recreate(struct model *m)
{
	struct inode *dir;
	struct ent *e;
	char name[NAME_LEN];

	if (!tree_pick(m, m->root, I_REG, &dir, &e))
		return false;
	memcpy(name, e->name, NAME_LEN);
	unlink_at(m, dir, e->name);
	create_at(m, dir, name);
	return true;
}

static void rename_to(struct model *m, struct inode *from_dir, const char *from,
                      struct inode *to_dir, const char *to)
{
	struct inode *ino = dir_find(from_dir, from)->ino;
	struct ent *victim = dir_find(to_dir, to);
	char a[PATH_LEN], b[PATH_LEN];

	path_of(m->live, from_dir, from, a);
	path_of(m->live, to_dir, to, b);
	note(m, "rename %s to %s%s", a, b, victim ? " (over)" : "");
	if (victim &&
	    (renameat2(AT_FDCWD, a, AT_FDCWD, b, RENAME_NOREPLACE) == 0 || errno != EEXIST))
		fail(m, "rename %s to %s with RENAME_NOREPLACE: %s", a, b, strerror(errno));
	if (renameat2(AT_FDCWD, a, AT_FDCWD, b,
	              victim || rng_one_in(&m->rng, 2) ? 0 : RENAME_NOREPLACE) < 0)
		fail(m, "rename %s to %s: %s", a, b, strerror(errno));
	/* Two names of one inode: POSIX has rename do nothing. */
	if (victim && victim->ino == ino)
		return;
	if (victim)
		dir_remove(to_dir, to);
	dir_add(to_dir, to, ino);
	dir_remove(from_dir, from);
	if (ino->type == I_DIR)
		ino->parent = to_dir;
}

bool op_rename(struct model *m)
{
	struct inode *dir, *to;
	struct ent *e;
	const char *name;
	char from[NAME_LEN];

	if (!tree_pick(m, m->root, I_REG | I_LNK | I_DIR, &dir, &e) || !pick_free(m, &to, &name))
		return false;
	if (e->ino->type == I_DIR && is_below(to, e->ino))
		return false;
	memcpy(from, e->name, NAME_LEN);
	rename_to(m, dir, from, to, name);
	return true;
}

bool op_rename_over(struct model *m)
{
	struct inode *dir, *to;
	struct ent *e, *f;
	char from[NAME_LEN], name[NAME_LEN];

	if (tree_count(m->root, I_REG) < 4 || !tree_pick(m, m->root, I_REG, &dir, &e) ||
	    !tree_pick(m, m->root, I_REG | I_LNK, &to, &f) || e == f)
		return false;
	memcpy(from, e->name, NAME_LEN);
	memcpy(name, f->name, NAME_LEN);
	rename_to(m, dir, from, to, name);
	return true;
}

bool op_exchange(struct model *m)
{
	struct inode *d1, *d2, *tmp;
	struct ent *e, *f;
	char a[PATH_LEN], b[PATH_LEN];

	if (!tree_pick(m, m->root, I_REG | I_DIR, &d1, &e) ||
	    !tree_pick(m, m->root, I_REG | I_LNK, &d2, &f) || e == f || is_below(d2, e->ino))
		return false;
	path_of(m->live, d1, e->name, a);
	path_of(m->live, d2, f->name, b);
	note(m, "exchange %s and %s", a, b);
	if (renameat2(AT_FDCWD, a, AT_FDCWD, b, RENAME_EXCHANGE) < 0)
		fail(m, "exchange %s and %s: %s", a, b, strerror(errno));
	tmp = e->ino;
	e->ino = f->ino;
	f->ino = tmp;
	if (tmp->type == I_DIR)
		tmp->parent = d2;
	return true;
}

bool op_link(struct model *m)
{
	struct inode *dir, *to;
	struct ent *e;
	const char *name;
	char a[PATH_LEN], b[PATH_LEN];

	if (tree_count(m->root, I_REG) >= MAX_FILES || !tree_pick(m, m->root, I_REG, &dir, &e) ||
	    !pick_free(m, &to, &name))
		return false;
	path_of(m->live, dir, e->name, a);
	path_of(m->live, to, name, b);
	note(m, "link %s as %s", a, b);
	if (link(a, b) < 0)
		fail(m, "link %s as %s: %s", a, b, strerror(errno));
	dir_add(to, name, e->ino);
	return true;
}

bool op_symlink(struct model *m)
{
	struct inode *dir, *ino;
	const char *name;
	char path[PATH_LEN], target[64];

	if (tree_count(m->root, I_LNK) >= 4 || !pick_free(m, &dir, &name))
		return false;
	snprintf(target, sizeof target, "../%s/%llu", pick_name(m),
	         (unsigned long long)rng_below(&m->rng, 100000));
	path_of(m->live, dir, name, path);
	note(m, "symlink %s", path);
	if (symlink(target, path) < 0)
		fail(m, "symlink %s: %s", path, strerror(errno));
	ino = inode_new(m, I_LNK);
	ino->mode = 0777;
	ino->target = strdup(target);
	dir_add(dir, name, ino);
	inode_put(ino);
	return true;
}

bool op_mkdir(struct model *m)
{
	struct inode *dir = pick_dir(m), *ino;
	const char *name = dir_names[rng_below(&m->rng, 3)];
	char path[PATH_LEN];

	if (tree_count(m->root, I_DIR) >= 5 || dir_find(dir, name))
		return false;
	path_of(m->live, dir, name, path);
	ino = inode_new(m, I_DIR);
	ino->mode = 0755;
	note(m, "mkdir %s", path);
	if (mkdir(path, ino->mode) < 0)
		fail(m, "mkdir %s: %s", path, strerror(errno));
	dir_add(dir, name, ino);
	inode_put(ino);
	return true;
}

bool op_rmdir(struct model *m)
{
	struct inode *dir;
	struct ent *e;
	char path[PATH_LEN];

	if (!tree_pick(m, m->root, I_DIR, &dir, &e))
		return false;
	path_of(m->live, dir, e->name, path);
	note(m, "rmdir %s", path);
	if (e->ino->nents) {
		if (rmdir(path) == 0 || errno != ENOTEMPTY)
			fail(m, "rmdir of %s, which is not empty: %s", path, strerror(errno));
		return true;
	}
	if (rmdir(path) < 0)
		fail(m, "rmdir %s: %s", path, strerror(errno));
	dir_remove(dir, e->name);
	return true;
}

bool op_chmod(struct model *m)
{
	struct inode *dir;
	struct ent *e;
	char path[PATH_LEN];

	if (!tree_pick(m, m->root, I_REG | I_DIR, &dir, &e))
		return false;
	path_of(m->live, dir, e->name, path);
	e->ino->mode = (e->ino->type == I_DIR ? 0700 : 0600) | (unsigned)rng_below(&m->rng, 0100);
	note(m, "chmod %o %s", e->ino->mode, path);
	if (chmod(path, e->ino->mode) < 0)
		fail(m, "chmod %s: %s", path, strerror(errno));
	return true;
}

bool op_utimens(struct model *m)
{
	struct inode *dir;
	struct ent *e;
	struct stat st;
	struct timespec ts[2];
	char path[PATH_LEN];

	if (!tree_pick(m, m->root, I_REG | I_DIR | I_LNK, &dir, &e))
		return false;
	path_of(m->live, dir, e->name, path);
	for (int i = 0; i < 2; i++) {
		ts[i].tv_sec = (time_t)rng_below(&m->rng, 1u << 31);
		ts[i].tv_nsec = (long)rng_below(&m->rng, 1000000000);
	}
	note(m, "utimens %s", path);
	if (utimensat(AT_FDCWD, path, ts, AT_SYMLINK_NOFOLLOW) < 0 || lstat(path, &st) < 0)
		fail(m, "utimens %s: %s", path, strerror(errno));
	if (st.st_mtim.tv_sec != ts[1].tv_sec || st.st_mtim.tv_nsec != ts[1].tv_nsec)
		fail(m, "utimens %s: another time is shown than was set", path);
	return true;
}

bool op_xattr(struct model *m)
{
	struct inode *dir;
	struct ent *e;
	char path[PATH_LEN], name[16];
	unsigned i = (unsigned)rng_below(&m->rng, NXATTR);
	int r;

	if (!tree_pick(m, m->root, I_REG | I_DIR, &dir, &e))
		return false;
	path_of(m->live, dir, e->name, path);
	snprintf(name, sizeof name, "user.k%u", i);
	if (e->ino->xattr[i][0] && rng_one_in(&m->rng, 3)) {
		note(m, "removexattr %s of %s", name, path);
		e->ino->xattr[i][0] = 0;
		r = removexattr(path, name);
	} else {
		note(m, "setxattr %s of %s", name, path);
		snprintf(e->ino->xattr[i], XATTR_LEN, "%llx",
		         (unsigned long long)rng_next(&m->rng));
		r = setxattr(path, name, e->ino->xattr[i], strlen(e->ino->xattr[i]), 0);
	}
	if (r < 0)
		fail(m, "xattr %s of %s: %s", name, path, strerror(errno));
	return true;
}
