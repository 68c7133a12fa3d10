/*
 * Reads a fleece directory: see inventory.h. What recovery (cow/recover_list.c, recover_load.c)
 * makes of the same files at a mount is the model; but that takes the directory over and mends, and
 * this only looks.
 *
 * A mount may change all of it meanwhile. What goes between two calls is left out; the caller reads
 * again where that could matter.
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "cow/ctl/inventory.h"
#include "cow/ctl/view.h"
#include "cow/engine.h"
#include "cow/io.h"
#include "cow/ledger_format.h"
#include "cow/names.h"
#include "cow/open_regular.h"
#include "ff_util.h"

enum { MANIFEST_MAX = 1 << 30 };

struct reading {
	int fleece_fd;
	struct inventory *inv;
	size_t dir;
	dev_t fleece_dev;
	bool foreign; /* the directory has a file that is not ours */
	bool making;  /* the directory has the mark of a snapshot that is being made */
	bool ours;    /* it has an image of ours */
};

bool inv_ends_with(const char *s, const char *end)
{
	size_t n = strlen(s), m = strlen(end);

	return n >= m && strcmp(s + n - m, end) == 0;
}

/* Errors of what went, or changed its kind, while it was looked at. */
static bool is_gone(int r)
{
	return r == -ENOENT || r == -ENOTDIR || r == -ELOOP;
}

static uint64_t space_of(int dirfd, const char *path)
{
	struct statx sx;

	return io_statx(dirfd, path, &sx) ? 0 : sx.stx_blocks * 512;
}

static int add_stray(struct reading *rd, const char *path)
{
	struct inventory *inv = rd->inv;
	void *p = realloc(inv->strays, (inv->stray_count + 1) * sizeof *inv->strays);
	struct inv_stray stray = {strdup(path), space_of(rd->fleece_fd, path)};

	if (p)
		inv->strays = p;
	if (!p || !stray.path) {
		free(stray.path);
		return -ENOMEM;
	}
	inv->strays[inv->stray_count++] = stray;
	return 0;
}

static int add_image(struct reading *rd, const char *path)
{
	struct inventory *inv = rd->inv;
	struct inv_image img = {.dir = rd->dir};
	struct qcow2_head head;
	struct qcow2_layout l;

	if (inv->image_count == inv->image_room) {
		size_t room = inv->image_room ? inv->image_room * 2 : 64;
		void *p = realloc(inv->images, room * sizeof *inv->images);

		if (!p)
			return -ENOMEM;
		inv->images = p;
		inv->image_room = room;
	}
	img.error = view_head(rd->fleece_fd, path, &head, &l, &img.why);
	if (img.error == -ENOMEM || img.error == -EMFILE || is_gone(img.error))
		return is_gone(img.error) ? 0 : img.error;
	rd->ours |= !img.error || img.error == -EIO;
	img.path = strdup(path);
	if (!img.error) {
		img.desc = head.desc;
		img.backing = strdup(head.backing);
		img.raw = strcmp(head.format, "qcow2") != 0;
	}
	if (!img.path || (!img.error && !img.backing)) {
		free(img.path);
		free(img.backing);
		return -ENOMEM;
	}
	img.allocated = space_of(rd->fleece_fd, path);
	inv->images[inv->image_count++] = img;
	return 0;
}

/* Is there the image that the file at PATH, which ends with SUFFIX, would be of, or should there
 * be? */
static bool has_image(const struct reading *rd, const char *path, const char *suffix)
{
	const struct inv_dir *dir = &rd->inv->dirs[rd->dir];
	const struct tree *t = dir->manifest.tree;
	ff_autofree char *image = NULL;
	struct statx sx;

	if (asprintf(&image, "%.*s.qcow2", (int)(strlen(path) - strlen(suffix)), path) < 0) {
		image = NULL;
		return true;
	}
	if (io_statx(rd->fleece_fd, image, &sx) != -ENOENT)
		return true;
	for (uint32_t k = 0; t && k < t->disk_count; k++)
		if (strcmp(t->inodes[t->disks[k]].image, image + strlen(dir->name) + 1) == 0)
			return true;
	return false;
}

/* Does the file at PATH lie right in the directory? */
static bool is_in(const struct inv_dir *dir, const char *path)
{
	return !strchr(path + strlen(dir->name) + 1, '/');
}

static int take_file(struct reading *rd, const char *name, const char *path)
{
	const char *dot = strrchr(name, '.');

	if (strcmp(name, MANIFEST_NAME) == 0)
		return 0;
	if (!names_ours(name)) {
		rd->foreign = true;
		return 0;
	}
	if (inv_ends_with(name, ".qcow2"))
		return add_image(rd, path);
	if (inv_ends_with(name, ".backing"))
		return 0;
	for (size_t i = 0; dot && names_suffixes[i]; i++)
		if (strcmp(dot + 1, names_suffixes[i]) == 0 && has_image(rd, path, dot))
			return 0;
	if (strcmp(name, NAMES_CHECKPOINT) == 0 && is_in(&rd->inv->dirs[rd->dir], path)) {
		rd->inv->dirs[rd->dir].checkpoint = true;
		return 0;
	}
	if (strcmp(name, NAMES_MAKING) == 0 && is_in(&rd->inv->dirs[rd->dir], path) &&
	    rd->inv->dirs[rd->dir].error == -ENOENT) {
		rd->making = true; /* it goes last, with the directory */
		return 0;
	}
	return add_stray(rd, path);
}

static bool is_elsewhere(const struct reading *rd, const struct statx *sx)
{
	return makedev(sx->stx_dev_major, sx->stx_dev_minor) != rd->fleece_dev;
}

/* All below the directory FD, whose path is in PATH, LEN bytes of a buffer of PATH_MAX. */
static int read_below(struct reading *rd, int fd, char *path, size_t len)
{
	bool lost = rd->inv->dirs[rd->dir].error == -ENOENT; /* the manifest */
	const struct dirent *e;
	DIR *d;
	int r = io_fdopendir(fd, &d);

	if (r)
		return r;
	while (!r && !(r = io_readdir(d, &e)) && e) {
		size_t n = strlen(e->d_name);
		struct statx sx;
		int sub;

		if (len + n + 2 > PATH_MAX)
			continue;
		path[len] = '/';
		memcpy(path + len + 1, e->d_name, n + 1);
		r = io_statx(fd, e->d_name, &sx);
		if (!r && S_ISDIR(sx.stx_mode) && lost && is_elsewhere(rd, &sx))
			continue;
		if (!r && !S_ISDIR(sx.stx_mode))
			r = take_file(rd, e->d_name, path);
		else if (!r)
			r = io_openat(fd, e->d_name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW, 0, &sub);
		if (!r && S_ISDIR(sx.stx_mode))
			r = read_below(rd, sub, path, len + 1 + n);
		r = is_gone(r) || (r == -EACCES && lost) ? 0 : r;
	}
	closedir(d);
	return r;
}

/* The manifest of the directory FD, as manifest_read() does it, but without a word in the log. A
 * snapshot without one is as old as its directory. */
static int read_manifest(int fd, struct inv_dir *dir)
{
	ff_autoclose int file = -1;
	ff_autofree void *buf = NULL;
	struct stat st;
	int r = open_regular(fd, MANIFEST_NAME, O_RDONLY, &file);

	if (!r)
		r = io_fstat(file, &st);
	if (r == -ENOENT && io_fstat(fd, &st) == 0)
		dir->made = st.st_mtim;
	if (r == -EINVAL)
		dir->why = "it is not a regular file";
	if (r)
		return r;
	dir->made = st.st_mtim;
	if (st.st_size > MANIFEST_MAX) {
		dir->why = "it is too large";
		return -EINVAL;
	}
	buf = malloc((size_t)st.st_size + 1);
	r = buf ? io_pread_full(file, buf, (size_t)st.st_size, 0) : -ENOMEM;
	return r ? r : manifest_decode(buf, (size_t)st.st_size, &dir->manifest, &dir->why);
}

struct by_name {
	const char *image;
	uint32_t disk;
};

static int compare_names(const void *a, const void *b)
{
	return strcmp(((const struct by_name *)a)->image, ((const struct by_name *)b)->image);
}

/* Marks the images that the manifest names, and finds each disk's. */
static int match(struct inventory *inv, struct inv_dir *dir)
{
	const struct tree *t = dir->manifest.tree;
	size_t n = strlen(dir->name) + 1, count = t ? t->disk_count : 0;
	ff_autofree struct by_name *names = calloc(count + 1, sizeof *names);

	dir->of_disk = calloc(count + 1, sizeof *dir->of_disk);
	if (!names || !dir->of_disk)
		return -ENOMEM;
	for (uint32_t k = 0; k < count; k++) {
		names[k] = (struct by_name){t->inodes[t->disks[k]].image, k};
		dir->of_disk[k] = SIZE_MAX;
	}
	if (count)
		qsort(names, count, sizeof *names, compare_names);
	for (size_t i = dir->first; i < dir->first + dir->count; i++) {
		struct by_name key = {inv->images[i].path + n, 0}, *hit;

		hit = count ? bsearch(&key, names, count, sizeof *names, compare_names) : NULL;
		if (hit) {
			inv->images[i].named = true;
			dir->of_disk[hit->disk] = i;
		}
	}
	return 0;
}

/* Recovery's judgement: see cow/recover_list.c. */
static enum inv_kind kind_of(const struct reading *rd, const struct inv_dir *dir)
{
	if (strncmp(dir->name, DROPPED, strlen(DROPPED)) == 0)
		return INV_DROPPED;
	if (dir->error != -ENOENT)
		return INV_SNAPSHOT;
	if (rd->making)
		return rd->foreign ? INV_FOREIGN : INV_UNMADE;
	return rd->ours && !names_is_systems(dir->name) ? INV_SNAPSHOT : INV_FOREIGN;
}

/* Forgets what was found in the directory, which is the last one. */
static void forget(struct reading *rd, struct inv_dir *dir, size_t strays)
{
	struct inventory *inv = rd->inv;

	while (inv->image_count > dir->first) {
		free(inv->images[--inv->image_count].path);
		free(inv->images[inv->image_count].backing);
	}
	while (inv->stray_count > strays)
		free(inv->strays[--inv->stray_count].path);
	dir->count = 0;
}

static int take_dir(struct reading *rd, const char *name, const struct statx *sx)
{
	struct inventory *inv = rd->inv;
	struct inv_dir dir = {.first = inv->image_count}, *list;
	size_t strays = inv->stray_count;
	char path[PATH_MAX];
	int fd, r = io_openat(rd->fleece_fd, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW, 0, &fd);

	if (r)
		return is_gone(r) || (r == -EACCES && names_is_systems(name)) ? 0 : r;
	list = realloc(inv->dirs, (inv->dir_count + 1) * sizeof *list);
	if (list)
		inv->dirs = list;
	dir.name = strdup(name);
	dir.error = list && dir.name ? read_manifest(fd, &dir) : -ENOMEM;
	if (dir.error == -ENOMEM || dir.error == -EMFILE) {
		free(dir.name);
		close(fd);
		return dir.error;
	}
	rd->dir = inv->dir_count++;
	rd->foreign = rd->making = rd->ours = false;
	inv->dirs[rd->dir] = dir;
	if (dir.error == -ENOENT && is_elsewhere(rd, sx))
		close(fd);
	else
		r = read_below(rd, fd, path, (size_t)snprintf(path, sizeof path, "%s", name));
	list = &inv->dirs[rd->dir];
	list->count = inv->image_count - list->first;
	list->kind = kind_of(rd, list);
	if (list->kind == INV_FOREIGN)
		forget(rd, list, strays);
	return r ? r : match(inv, list);
}

static bool is_temporary(const char *name)
{
	return strcmp(name, ".source.tmp") == 0 || strcmp(name, ".session.tmp") == 0 ||
	       strcmp(name, ".clean.tmp") == 0 || strcmp(name, ".known.tmp") == 0 ||
	       strcmp(name, ".alive.tmp") == 0;
}

int inventory_read(int fleece_fd, struct inventory *out)
{
	struct reading rd = {.fleece_fd = fleece_fd, .inv = out};
	const struct dirent *e;
	struct stat st = {0};
	DIR *d;
	int fd, r = io_openat(fleece_fd, ".", O_RDONLY | O_DIRECTORY, 0, &fd);

	*out = (struct inventory){0};
	if (r)
		return r;
	r = io_fstat(fd, &st);
	rd.fleece_dev = st.st_dev;
	if (r)
		close(fd);
	else
		r = io_fdopendir(fd, &d);
	if (r)
		return r;
	while (!r && !(r = io_readdir(d, &e)) && e) {
		struct statx sx;

		if (is_temporary(e->d_name)) {
			r = add_stray(&rd, e->d_name);
			continue;
		}
		if (strncmp(e->d_name, DROPPED, strlen(DROPPED)) != 0 &&
		    !snap_name_valid(e->d_name))
			continue;
		r = io_statx(fd, e->d_name, &sx);
		if (!r && S_ISDIR(sx.stx_mode))
			r = take_dir(&rd, e->d_name, &sx);
		r = is_gone(r) ? 0 : r;
	}
	closedir(d);
	if (r)
		inventory_free(out);
	return r;
}

void inventory_free(struct inventory *inv)
{
	for (size_t i = 0; i < inv->dir_count; i++) {
		free(inv->dirs[i].name);
		free(inv->dirs[i].of_disk);
		tree_free(inv->dirs[i].manifest.tree);
	}
	for (size_t i = 0; i < inv->image_count; i++) {
		free(inv->images[i].path);
		free(inv->images[i].backing);
	}
	for (size_t i = 0; i < inv->stray_count; i++)
		free(inv->strays[i].path);
	free(inv->dirs);
	free(inv->images);
	free(inv->strays);
	*inv = (struct inventory){0};
}

const struct inv_dir *inventory_find(const struct inventory *inv, const char *name)
{
	for (size_t i = 0; i < inv->dir_count; i++)
		if (inv->dirs[i].kind == INV_SNAPSHOT && strcmp(inv->dirs[i].name, name) == 0)
			return &inv->dirs[i];
	return NULL;
}

bool inventory_visible(const struct inventory *inv, const struct inv_image *i)
{
	const struct inv_dir *d = &inv->dirs[i->dir];

	return d->kind == INV_SNAPSHOT && (d->error || i->named);
}
