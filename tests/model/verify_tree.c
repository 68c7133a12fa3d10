/*
 * Comparing names and metadata: listings, what stat shows, symlinks, extended attributes, and the
 * inode numbers that backup tools remember.
 */
#include "model.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/xattr.h>
#include <unistd.h>

struct seen {
	ino_t ino;
	uint64_t id;
};

struct walk {
	struct snap *snap; /* NULL: the live tree */
	struct seen seen[64];
	unsigned n;
};

static bool same_time(struct timespec a, struct timespec b)
{
	return a.tv_sec == b.tv_sec && a.tv_nsec == b.tv_nsec;
}

static void check_time(struct model *m, const char *path, const char *which, struct timespec got,
                       struct timespec want)
{
	if (!same_time(got, want))
		fail(m, "%s: %s is %lld.%09ld, want %lld.%09ld", path, which, (long long)got.tv_sec,
		     got.tv_nsec, (long long)want.tv_sec, want.tv_nsec);
}

/* One inode number for an inode, another for another; for a snapshot the one that its name gave
 * this inode before; never the live file's. */
static void check_ino(struct model *m, struct walk *w, const char *path, const struct inode *ino,
                      const struct stat *st)
{
	struct known_ino *k;

	for (unsigned i = 0; i < w->n; i++)
		if ((w->seen[i].ino == st->st_ino) != (w->seen[i].id == ino->id))
			fail(m, "%s: st_ino %llu: the same as another inode's, or two for one",
			     path, (unsigned long long)st->st_ino);
	if (w->n < sizeof w->seen / sizeof w->seen[0])
		w->seen[w->n++] = (struct seen){st->st_ino, ino->id};
	if (!w->snap)
		return;
	if (st->st_ino == ino->st.st_ino && ino->type == I_REG)
		fail(m, "%s: st_ino %llu is the live file's", path, (unsigned long long)st->st_ino);
	for (size_t i = 0; i < m->nknown; i++) {
		k = &m->known[i];
		if (k->id != ino->id || strcmp(k->name, w->snap->name) != 0)
			continue;
		if (k->ino != st->st_ino)
			fail(m, "%s: st_ino is %llu, was %llu in an earlier snapshot of this name",
			     path, (unsigned long long)st->st_ino, (unsigned long long)k->ino);
		return;
	}
	if (m->nknown == m->known_cap) {
		m->known_cap = m->known_cap * 2 + 64;
		m->known = realloc(m->known, m->known_cap * sizeof *m->known);
		if (!m->known)
			abort();
	}
	k = &m->known[m->nknown++];
	*k = (struct known_ino){.id = ino->id, .ino = st->st_ino};
	snprintf(k->name, sizeof k->name, "%s", w->snap->name);
}

static void check_xattrs(struct model *m, const char *path, const struct inode *ino)
{
	char list[1024], name[16], value[64];
	ssize_t n, total = llistxattr(path, list, sizeof list);
	unsigned want = 0, got = 0;

	if (total < 0)
		fail(m, "%s: listxattr: %s", path, strerror(errno));
	for (char *p = list; p < list + total; p += strlen(p) + 1)
		got += strncmp(p, "user.k", 6) == 0;
	for (unsigned i = 0; i < NXATTR; i++) {
		snprintf(name, sizeof name, "user.k%u", i);
		n = lgetxattr(path, name, value, sizeof value);
		if (!ino->xattr[i][0]) {
			if (n >= 0 || errno != ENODATA)
				fail(m, "%s: has an xattr %s that it should not have", path, name);
			continue;
		}
		want++;
		if (n != (ssize_t)strlen(ino->xattr[i]) || memcmp(value, ino->xattr[i], (size_t)n))
			fail(m, "%s: xattr %s is %.*s (%zd), want %s", path, name,
			     n > 0 ? (int)n : 0, value, n, ino->xattr[i]);
	}
	if (got != want)
		fail(m, "%s: lists %u xattrs, want %u", path, got, want);
}

static unsigned type_of(const struct stat *st)
{
	return S_ISREG(st->st_mode) ? I_REG : S_ISDIR(st->st_mode) ? I_DIR : I_LNK;
}

static void check_inode(struct model *m, struct walk *w, const char *path, const char *below,
                        const struct inode *ino)
{
	char target[128];
	struct stat st, want;
	ssize_t n;

	if (lstat(path, &st) < 0)
		fail(m, "%s: lstat: %s", path, strerror(errno));
	want = ino->st;
	if (!w->snap && lstat(below, &want) < 0)
		fail(m, "%s: lstat: %s", below, strerror(errno));
	if (type_of(&st) != (unsigned)ino->type || (st.st_mode & 07777) != (want.st_mode & 07777) ||
	    (ino->parent && ino->type != I_LNK && (st.st_mode & 07777) != ino->mode))
		fail(m, "%s: mode %o, want %o", path, st.st_mode, want.st_mode);
	if (st.st_uid != want.st_uid || st.st_gid != want.st_gid)
		fail(m, "%s: owner %u:%u", path, st.st_uid, st.st_gid);
	if (!(w->snap && !ino->parent && ino->type == I_DIR &&
	      same_time(st.st_mtim, ino->mtime_after))) {
		check_time(m, path, "mtime", st.st_mtim, want.st_mtim);
		check_time(m, path, "ctime", st.st_ctim, want.st_ctim);
	}
	if (ino->type == I_REG && (uint64_t)st.st_size != ino->data.size)
		fail(m, "%s: size %lld, want %llu", path, (long long)st.st_size,
		     (unsigned long long)ino->data.size);
	if (ino->type != I_DIR && st.st_nlink != ino->nlink)
		fail(m, "%s: %lu links, want %u", path, (unsigned long)st.st_nlink, ino->nlink);
	if (ino->type == I_LNK) {
		n = readlink(path, target, sizeof target);
		if (n != (ssize_t)strlen(ino->target) || memcmp(target, ino->target, (size_t)n))
			fail(m, "%s: readlink: %.*s, want %s", path, n > 0 ? (int)n : 0, target,
			     ino->target);
		return;
	}
	check_xattrs(m, path, ino);
	if (ino->type == I_REG)
		check_ino(m, w, path, ino, &st);
}

/* The names that PATH lists are those of DIR. EXTRA, if not NULL: a name to skip, which must be
 * listed. */
static void check_listing(struct model *m, const char *path, struct inode *dir, const char *extra)
{
	DIR *d = opendir(path);
	struct dirent *e;
	unsigned n = 0;
	bool extra_seen = false;

	if (!d)
		fail(m, "%s: opendir: %s", path, strerror(errno));
	for (errno = 0; (e = readdir(d)); errno = 0) {
		struct ent *ent;

		if (strcmp(e->d_name, ".") == 0 || strcmp(e->d_name, "..") == 0)
			continue;
		if (extra && strcmp(e->d_name, extra) == 0) {
			extra_seen = true;
			continue;
		}
		ent = dir_find(dir, e->d_name);
		if (!ent)
			fail(m, "%s: lists '%s', which should not be there", path, e->d_name);
		if (e->d_type != DT_UNKNOWN && e->d_type != (ent->ino->type == I_REG   ? DT_REG
		                                             : ent->ino->type == I_DIR ? DT_DIR
		                                                                       : DT_LNK))
			fail(m, "%s: lists '%s' as of type %d", path, e->d_name, e->d_type);
		n++;
	}
	if (errno)
		fail(m, "%s: readdir: %s", path, strerror(errno));
	closedir(d);
	if (n != dir->nents)
		fail(m, "%s: lists %u names, want %u", path, n, dir->nents);
	if (extra && !extra_seen)
		fail(m, "%s: '%s' is not listed", path, extra);
}

static void walk_tree(struct model *m, struct walk *w, struct inode *dir, const char *base)
{
	char path[PATH_LEN], below[PATH_LEN];

	path_of(base, dir, NULL, path);
	path_of(m->below, dir, NULL, below);
	check_listing(m, path, dir, !w->snap && !m->plain && !dir->parent ? "snapshots" : NULL);
	check_inode(m, w, path, below, dir);
	for (unsigned i = 0; i < dir->nents; i++) {
		struct inode *ino = dir->ents[i].ino;

		if (ino->type == I_DIR) {
			walk_tree(m, w, ino, base);
			continue;
		}
		path_of(base, dir, dir->ents[i].name, path);
		path_of(m->below, dir, dir->ents[i].name, below);
		check_inode(m, w, path, below, ino);
	}
}

void check_tree_frozen(struct model *m, struct snap *s)
{
	struct walk w = {.snap = s};
	char base[PATH_LEN], path[PATH_LEN];
	struct stat st;

	snap_path(m, s->name, base);
	walk_tree(m, &w, s->root, base);
	snprintf(path, sizeof path, "%.900s/snapshots", base);
	if (lstat(path, &st) == 0 || errno != ENOENT)
		fail(m, "%s is there", path);
}

void check_tree_live(struct model *m)
{
	struct walk w = {.snap = NULL};

	walk_tree(m, &w, m->root, m->live);
}

void check_snap_list(struct model *m)
{
	char path[PATH_LEN];
	struct dirent *e;
	unsigned n = 0, i;
	DIR *d;

	snap_path(m, NULL, path);
	d = opendir(path);
	if (!d)
		fail(m, "%s: opendir: %s", path, strerror(errno));
	while ((e = readdir(d))) {
		if (e->d_name[0] == '.')
			continue;
		for (i = 0; i < m->nsnaps && strcmp(m->snaps[i]->name, e->d_name) != 0; i++)
			;
		if (i == m->nsnaps)
			fail(m, "%s lists '%s', which is no snapshot", path, e->d_name);
		n++;
	}
	closedir(d);
	if (n != m->nsnaps)
		fail(m, "%s lists %u snapshots, want %u", path, n, m->nsnaps);
}

static void record_below(struct model *m, struct inode *dir)
{
	char path[PATH_LEN];

	path_of(m->below, dir, NULL, path);
	if (lstat(path, &dir->st) < 0)
		fail(m, "%s: lstat: %s", path, strerror(errno));
	for (unsigned i = 0; i < dir->nents; i++) {
		struct inode *ino = dir->ents[i].ino;

		if (ino->type == I_DIR) {
			record_below(m, ino);
			continue;
		}
		path_of(m->below, dir, dir->ents[i].name, path);
		if (lstat(path, &ino->st) < 0)
			fail(m, "%s: lstat: %s", path, strerror(errno));
	}
}

void record_stats(struct model *m, struct inode *root)
{
	record_below(m, root);
}

static void check_contents(struct model *m, struct inode *dir, const char *base, const char *what,
                           bool given_up)
{
	char path[PATH_LEN];

	for (unsigned i = 0; i < dir->nents; i++) {
		struct inode *ino = dir->ents[i].ino;

		if (ino->type == I_DIR)
			check_contents(m, ino, base, what, given_up);
		if (ino->type != I_REG)
			continue;
		path_of(base, dir, dir->ents[i].name, path);
		if (given_up)
			check_given_up(m, path);
		else
			check_file(m, path, &ino->data, what);
	}
}

void check_snap(struct model *m, struct snap *s)
{
	char base[PATH_LEN];

	snap_path(m, s->name, base);
	check_tree_frozen(m, s);
	if (is_given_up(m, s) != s->given_up)
		fail(m, "%s: it is %sa checkpoint", base, s->given_up ? "not " : "");
	m->eio_ok = s->consumed;
	check_contents(m, s->root, base, "frozen", s->given_up);
	m->eio_ok = false;
	s->checked = true;
}

void check_live(struct model *m)
{
	check_tree_live(m);
	check_contents(m, m->root, m->live, "live", false);
	if (!m->plain)
		check_contents(m, m->root, m->below, "source", false);
}

void check_all(struct model *m)
{
	m->full_compares++;
	check_live(m);
	if (m->plain)
		return;
	check_snap_list(m);
	for (unsigned i = 0; i < m->nsnaps; i++)
		check_snap(m, m->snaps[i]);
}
