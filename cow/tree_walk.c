/*
 * The walk of SOURCE: see tree.h.
 *
 * It opens each directory relative to its parent and follows no symlink. It is made twice for a
 * freeze: once beforehand, when names may change under it (an entry that vanishes is then
 * left out), and once while names are held still. Directories are read one after the other, their
 * entries sorted by the bytes of their names, so the same tree gives the same result.
 *
 * Anyone who may write to SOURCE can make directories deeper than paths reach, and an administrator
 * may have mounted another filesystem on one. They must not keep the rest from being frozen, nor be
 * left out unnoticed: they are TREE_UNFROZEN, unless they are excluded.
 *
 * On NFS a file that was unlinked while something had it open (a guest, or we) stays under a name
 * that the client gives it, until that ends. It is no part of the tree, as it would not be
 * elsewhere; and a snapshot that took it for a disk would have lost one when it goes.
 */
#include "cow/tree.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cow/io.h"
#include "cow/names.h"
#include "cow/tree_look.h"
#include "ff_log.h"
#include "ff_util.h"

/* Names of inodes that have several, to find them again. Open addressing, 0 is empty. */
struct hard_links {
	uint32_t *slots; /* index of the inode + 1 */
	size_t size, used;
};

struct walk {
	const struct tree_walk *how;
	struct tree *tree;
	struct hard_links links;
	char path[PATH_MAX];
	bool nfs;       /* SOURCE is on NFS */
	bool told;      /* of the error that ends it */
	bool told_deep; /* of what is too deep */
};

static size_t link_slot(const struct walk *w, ino_t ino)
{
	size_t i = (size_t)(ino * UINT64_C(0x9e3779b97f4a7c15)) & (w->links.size - 1);

	while (w->links.slots[i] && w->tree->inodes[w->links.slots[i] - 1].st.st_ino != ino)
		i = (i + 1) & (w->links.size - 1);
	return i;
}

static int link_grow(struct walk *w)
{
	struct hard_links old = w->links;

	w->links.size = old.size ? old.size * 2 : 64;
	w->links.slots = calloc(w->links.size, sizeof(uint32_t));
	if (!w->links.slots) {
		w->links = old;
		return -ENOMEM;
	}
	for (size_t i = 0; i < old.size; i++)
		if (old.slots[i])
			w->links.slots[link_slot(w, w->tree->inodes[old.slots[i] - 1].st.st_ino)] =
			    old.slots[i];
	free(old.slots);
	return 0;
}

static bool excluded(const struct walk *w, const char *name)
{
	for (size_t i = 0; i < w->how->exclude_count; i++)
		if (fnmatch(w->how->exclude[i], w->path, 0) == 0 ||
		    fnmatch(w->how->exclude[i], name, 0) == 0)
			return true;
	return false;
}

static int by_name(const void *a, const void *b)
{
	return strcmp(((const struct tree_entry *)a)->name, ((const struct tree_entry *)b)->name);
}

/* The names in the directory, sorted, without "." and ".."; to the inode's entries. */
static int read_names(struct walk *w, int fd, uint32_t index)
{
	struct tree_entry *entries = NULL;
	uint32_t count = 0, room = 0;
	DIR *dir;
	int r = 0, copy;

	r = io_openat(fd, ".", O_RDONLY | O_DIRECTORY, 0, &copy);
	if (r)
		return r;
	r = io_fdopendir(copy, &dir);
	if (r)
		return r;
	for (;;) {
		const struct dirent *e;

		r = io_readdir(dir, &e);
		if (r || !e)
			break;
		if (index == 0 && w->how->hide_name && strcmp(e->d_name, w->how->hide_name) == 0)
			continue;
		if (w->nfs && names_is_nfs_unlinked(e->d_name))
			continue;
		if (count == room) {
			void *p = realloc(entries, (room = room ? room * 2 : 16) * sizeof *entries);

			if (!p) {
				r = -ENOMEM;
				break;
			}
			entries = p;
		}
		entries[count].name = strdup(e->d_name);
		entries[count].inode = UINT32_MAX;
		if (!entries[count].name) {
			r = -ENOMEM;
			break;
		}
		count++;
	}
	closedir(dir);
	if (count)
		qsort(entries, count, sizeof *entries, by_name);
	w->tree->inodes[index].entries = entries;
	w->tree->inodes[index].entry_count = count;
	return r;
}

static int walk_dir(struct walk *w, int fd, uint32_t index, size_t path_len);

/* Adds the inode, unless another name of it was met before. */
static int add_inode(struct walk *w, const struct ff_frozen *f, uint32_t *out, bool *known)
{
	/* Renamed behind the mount, a disk may come by twice; it must stay one disk. */
	bool several = S_ISREG(f->st.st_mode) || (!S_ISDIR(f->st.st_mode) && f->st.st_nlink > 1);
	size_t slot = 0;
	int r;

	*known = false;
	if (several) {
		if (w->links.used * 2 >= w->links.size && (r = link_grow(w)))
			return r;
		slot = link_slot(w, f->st.st_ino);
		if (w->links.slots[slot]) {
			*out = w->links.slots[slot] - 1;
			*known = true;
			return 0;
		}
	}
	r = tree_add(w->tree, f, out);
	if (!r && several) {
		w->links.slots[slot] = *out + 1;
		w->links.used++;
	}
	return r;
}

/* Takes the entry NAME in, by itself: F is what it is, *FD its descriptor if it is a directory.
 * KNOWN: another name of it was met before. DEEP: its path does not fit. -ENOENT: it is not to be
 * in the tree. */
static int meet(struct walk *w, int dirfd, uint32_t parent, const char *name, bool deep,
                struct ff_frozen *f, int *fd, uint32_t *out, bool *known)
{
	int r = excluded(w, name) ? -ENOENT : tree_look(w->how, w->path, dirfd, name, f, fd);

	if (r)
		return r;
	f->parent = parent;
	if (deep && (S_ISREG(f->st.st_mode) || S_ISDIR(f->st.st_mode)))
		f->disk = TREE_UNFROZEN;
	r = add_inode(w, f, out, known);
	if (r || *known) {
		free(f->target);
		return r;
	}
	/* of a device they would be the symlink's */
	if (w->how->xattrs && !f->device && f->disk != TREE_UNFROZEN)
		r = tree_read_xattrs(dirfd, name, &w->tree->inodes[*out]);
	return r == -ENOENT ? 0 : r; /* gone behind the mount, this instant: it is in already */
}

/* One entry with all that it holds, w->path being its path. -ENOENT as above. */
static int walk_entry(struct walk *w, int dirfd, uint32_t parent, const char *name, size_t path_len,
                      uint32_t *out)
{
	ff_autoclose int fd = -1;
	struct ff_frozen f;
	bool known = false;
	int r = meet(w, dirfd, parent, name, false, &f, &fd, out, &known);

	if (r || known)
		return r;
	if (f.disk == TREE_UNFROZEN) {
		if (w->how->tells)
			ff_warning(
			    "%s is on a filesystem of its own: it is live, and cannot be in "
			    "snapshots, where it reads as an I/O error; exclude it, or mount "
			    "it by a fleecefs of its own",
			    w->path);
		return 0;
	}
	if (S_ISREG(f.st.st_mode)) {
		w->tree->inodes[*out].path = strdup(w->path);
		r = w->tree->inodes[*out].path ? tree_add_disk(w->tree, *out) : -ENOMEM;
	}
	if (S_ISDIR(f.st.st_mode))
		r = walk_dir(w, fd, *out, path_len);
	return r;
}

/* The same for one whose path does not fit: w->path is its parent's. */
static int walk_too_deep(struct walk *w, int dirfd, uint32_t parent, const char *name,
                         uint32_t *out)
{
	ff_autoclose int fd = -1;
	struct ff_frozen f;
	bool known = false;
	int r = meet(w, dirfd, parent, name, true, &f, &fd, out, &known);

	if (!r && f.disk == TREE_UNFROZEN && w->how->tells && !w->told_deep) {
		ff_warning("%s/%s: the path is too long: in the snapshot, what is there and deeper "
		           "reads as an I/O error; exclude it",
		           w->path, name);
		w->told_deep = true;
	}
	return r;
}

/* Only once: an error ends the whole walk, and passes through all the directories above. */
static void tell(struct walk *w, int error)
{
	const char *hint = error == -EACCES || error == -EPERM
	                       ? "; let the user who mounts read it, or exclude it"
	                       : "";

	if (!w->told)
		ff_error("cannot read %s: %s%s", *w->path ? w->path : "SOURCE", strerror(-error),
		         hint);
	w->told = true;
}

/* The entry NAME of the directory FD, whose path has PATH_LEN bytes. */
static int walk_name(struct walk *w, int fd, uint32_t index, const char *name, size_t path_len,
                     uint32_t *out)
{
	size_t len = path_len, n = strlen(name);
	size_t longest = w->how->longest ? w->how->longest : sizeof w->path - 1;
	int r;

	if (len + 1 + n > longest) {
		r = walk_too_deep(w, fd, index, name, out);
	} else {
		if (len)
			w->path[len++] = '/';
		memcpy(w->path + len, name, n + 1);
		r = walk_entry(w, fd, index, name, len + n, out);
	}
	if (r && r != -ENOENT)
		tell(w, r);
	w->path[path_len] = '\0';
	return r;
}

static int walk_dir(struct walk *w, int fd, uint32_t index, size_t path_len)
{
	uint32_t kept = 0, total;
	int r = read_names(w, fd, index);

	if (r == -ENOENT) /* it was removed this instant: it is empty */
		r = 0;
	total = w->tree->inodes[index].entry_count;
	for (uint32_t i = 0; i < total; i++) {
		/* The array of inodes may move; that of this directory's entries does not. */
		struct tree_entry *entries = w->tree->inodes[index].entries;
		int found =
		    r ? r : walk_name(w, fd, index, entries[i].name, path_len, &entries[i].inode);

		if (found)
			free(entries[i].name);
		else
			entries[kept++] = entries[i];
		if (found && found != -ENOENT)
			r = found;
	}
	w->tree->inodes[index].entry_count = kept;
	return r;
}

int tree_walk(const struct tree_walk *how, struct tree **out)
{
	ff_autofree struct walk *w = calloc(1, sizeof *w);
	struct ff_frozen root;
	struct statx sx;
	uint32_t index;
	int r;

	if (!w)
		return -ENOMEM;
	w->how = how;
	w->nfs = io_is_nfs(how->source_fd);
	w->tree = calloc(1, sizeof *w->tree);
	if (!w->tree)
		return -ENOMEM;
	r = io_statx(how->source_fd, "", &sx);
	if (!r) {
		tree_take_statx(&sx, &root);
		r = tree_add(w->tree, &root, &index);
	}
	if (!r && how->xattrs)
		r = tree_read_xattrs(how->source_fd, NULL, &w->tree->inodes[0]);
	if (!r)
		r = walk_dir(w, how->source_fd, 0, 0);
	if (r)
		tell(w, r);
	free(w->links.slots);
	if (r) {
		tree_free(w->tree);
		return r;
	}
	*out = w->tree;
	return 0;
}
