/*
 * The names in a directory of made-up files, which follow those of the frozen directory:
 *
 *   a directory        the same name
 *   the image of NAME  NAME.qcow2, with one more ".qcow2" for each time that there is a directory
 *                      of the name that came out; in the middle a hash where that is longer than
 *                      names may be, or as long as they may be and looks like one with a hash
 *   the ranges of NAME NAME, found and not listed
 *
 * A name may fit two: beside a disk "a" and a disk "a.qcow2", "a.qcow2" is the image of the first
 * and not the ranges of the second. What is listed wins, directories before images. So each
 * directory and each image can be reached, and ranges that are hidden in this way are still told
 * in changes.json.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

#include "cow/since.h"
#include "cow/names.h"
#include "ff_util.h"

#define SUFFIX ".qcow2"
enum { SUFFIX_LEN = 6, HASH_LEN = 17, NAME_LEN = FF_SINCE_NAME_MAX };

static bool is_dir(const struct ff_snap *snap, const struct ff_frozen *dir, const char *name)
{
	const struct ff_frozen *f;

	return ff_frozen_lookup(snap, dir, name, &f) == 0 && S_ISDIR(f->st.st_mode);
}

static bool is_disk(const struct ff_frozen *f)
{
	return S_ISREG(f->st.st_mode);
}

/* The name of the image of NAME in DIR. */
static void image_name(const struct ff_snap *snap, const struct ff_frozen *dir, const char *name,
                       char out[NAME_LEN + 1])
{
	char whole[NAME_LEN * 2];
	size_t len = strlen(name);
	bool hashed = len + SUFFIX_LEN == NAME_LEN && names_looks_hashed(name, len);
	XXH64_hash_t seed = 0;

	snprintf(whole, sizeof whole, "%s", name);
	do {
		snprintf(whole + len, sizeof whole - len, SUFFIX);
		len += SUFFIX_LEN;
	} while (len <= NAME_LEN && is_dir(snap, dir, whole));
	if (len <= NAME_LEN && !hashed) {
		memcpy(out, whole, len + 1);
		return;
	}
	do
		snprintf(out, NAME_LEN + 1, "%.*s~%016llx" SUFFIX, NAME_LEN - SUFFIX_LEN - HASH_LEN,
		         name,
		         (unsigned long long)XXH3_64bits_withSeed(name, strlen(name), seed++));
	while (is_dir(snap, dir, out));
}

int ff_since_entry(const struct ff_snap *snap, const struct ff_frozen *dir, size_t i,
                   char name[FF_SINCE_NAME_MAX + 1], enum ff_since_kind *kind,
                   const struct ff_frozen **out)
{
	const char *frozen;
	int r = ff_frozen_entry(snap, dir, i, &frozen, out);

	if (r)
		return r;
	*kind = FF_SINCE_NONE;
	if (S_ISDIR((*out)->st.st_mode)) {
		*kind = FF_SINCE_DIR;
		snprintf(name, NAME_LEN + 1, "%s", frozen);
	} else if (is_disk(*out)) {
		*kind = FF_SINCE_IMAGE;
		image_name(snap, dir, frozen, name);
	}
	return 0;
}

static int frozen_entry_of(const struct ff_snap *snap, const struct ff_frozen *dir,
                           const char *name, const char **stored, const struct ff_frozen **out)
{
	int r = ff_frozen_lookup(snap, dir, name, out);

	if (!r)
		*stored = dir->entries[frozen_entry_at(dir, name)].name;
	return r;
}

/* The disk whose image is called NAME. */
static int find_image(const struct ff_snap *snap, const struct ff_frozen *dir, const char *name,
                      const char **stored, const struct ff_frozen **out)
{
	char stem[NAME_LEN + 1], image[NAME_LEN + 1];
	size_t len = strlen(name);
	int r;

	if (len > NAME_LEN)
		return -ENAMETOOLONG;
	memcpy(stem, name, len + 1);
	while (len > SUFFIX_LEN && strcmp(stem + len - SUFFIX_LEN, SUFFIX) == 0) {
		stem[len -= SUFFIX_LEN] = '\0';
		r = frozen_entry_of(snap, dir, stem, stored, out);
		if (r && r != -ENOENT)
			return r;
		if (!r && S_ISDIR((*out)->st.st_mode))
			continue;
		if (!r && is_disk(*out)) {
			image_name(snap, dir, stem, image);
			if (strcmp(image, name) == 0)
				return 0;
		}
		break;
	}
	if (strlen(name) != NAME_LEN)
		return -ENOENT;
	/* perhaps one with a hash */
	for (uint32_t i = 0; i < dir->entry_count; i++) {
		*out = &snap->tree->inodes[dir->entries[i].inode];
		*stored = dir->entries[i].name;
		if (!is_disk(*out))
			continue;
		image_name(snap, dir, *stored, image);
		if (strcmp(image, name) == 0)
			return 0;
	}
	return -ENOENT;
}

int ff_since_find(const struct ff_snap *snap, const struct ff_frozen *dir, const char *name,
                  enum ff_since_kind *kind, const char **stored, const struct ff_frozen **out)
{
	const struct ff_frozen *f;
	const char *at;
	int r = frozen_entry_of(snap, dir, name, &at, &f), image;

	if (r && r != -ENOENT)
		return r;
	if (!r && S_ISDIR(f->st.st_mode)) {
		*kind = FF_SINCE_DIR;
		*stored = at;
		*out = f;
		return 0;
	}
	image = find_image(snap, dir, name, stored, out);
	if (image != -ENOENT) {
		*kind = FF_SINCE_IMAGE;
		return image;
	}
	if (r || !is_disk(f))
		return -ENOENT;
	*kind = FF_SINCE_RANGES;
	*stored = at;
	*out = f;
	return 0;
}

/* --- paths --- */

/* A directory's name in the one that holds it. */
static const char *name_in(const struct ff_snap *snap, const struct ff_frozen *dir)
{
	const struct ff_frozen *parent = &snap->tree->inodes[dir->parent];
	uint32_t number = (uint32_t)(dir - snap->tree->inodes);

	for (uint32_t i = 0; i < parent->entry_count; i++)
		if (parent->entries[i].inode == number)
			return parent->entries[i].name;
	return "";
}

char *since_join(const struct ff_snap *snap, const struct ff_frozen *dir, const char *name)
{
	char *path = strdup(name);

	for (; path && dir != snap->tree->inodes; dir = &snap->tree->inodes[dir->parent]) {
		char *longer;

		if (asprintf(&longer, "%s/%s", name_in(snap, dir), path) < 0)
			longer = NULL;
		free(path);
		path = longer;
	}
	return path;
}

/* The directory of PATH and its last name. -ENOENT. */
static int directory_of(const struct ff_snap *snap, const char *path, const struct ff_frozen **dir,
                        const char **last)
{
	ff_autofree char *copy = strdup(path);
	char *at = copy, *slash;
	int r = copy ? 0 : -ENOMEM;

	*dir = snap->tree->inodes;
	while (!r && (slash = strchr(at, '/'))) {
		*slash = '\0';
		r = ff_frozen_lookup(snap, *dir, at, dir);
		at = slash + 1;
	}
	if (!r)
		*last = path + (at - copy);
	return r;
}

int since_path(const struct ff_snap *snap, uint32_t disk, const char *preferred, char **out)
{
	const struct tree *t = snap->tree;
	const struct ff_frozen *dir, *f;
	const char *last;

	if (disk >= t->disk_count)
		return -ENOENT;
	if (directory_of(snap, preferred, &dir, &last) == 0 &&
	    ff_frozen_lookup(snap, dir, last, &f) == 0 && f == &t->inodes[t->disks[disk]]) {
		*out = strdup(preferred);
		return *out ? 0 : -ENOMEM;
	}
	for (uint32_t i = 0; i < t->count; i++)
		for (uint32_t k = 0; k < t->inodes[i].entry_count; k++)
			if (t->inodes[i].entries[k].inode == t->disks[disk]) {
				*out =
				    since_join(snap, &t->inodes[i], t->inodes[i].entries[k].name);
				return *out ? 0 : -ENOMEM;
			}
	return -ENOENT;
}

char *since_image_path(const struct ff_snap *snap, const char *path)
{
	char name[NAME_LEN + 1], *out;
	const struct ff_frozen *dir;
	const char *last;

	if (directory_of(snap, path, &dir, &last))
		return NULL;
	image_name(snap, dir, last, name);
	return asprintf(&out, "%.*s%s", (int)(last - path), path, name) < 0 ? NULL : out;
}

/* --- disks that are no more --- */

static int by_identity(const void *a, const void *b)
{
	const struct ff_frozen *x = *(const struct ff_frozen *const *)a;
	const struct ff_frozen *y = *(const struct ff_frozen *const *)b;
	int r = FF_ORDER(x->st.st_ino, y->st.st_ino);

	if (!r)
		r = FF_ORDER(x->btime_sec, y->btime_sec);
	return r ? r : FF_ORDER(x->btime_nsec, y->btime_nsec);
}

int ff_since_deleted(const struct ff_snap *new, const struct ff_snap *old,
                     int (*fn)(void *ctx, const char *path), void *ctx)
{
	const struct tree *t = new->tree;
	ff_autofree const struct ff_frozen **now = calloc(t->disk_count + 1u, sizeof *now);
	int r = 0;

	if (!now)
		return -ENOMEM;
	for (uint32_t i = 0; i < t->disk_count; i++)
		now[i] = &t->inodes[t->disks[i]];
	if (t->disk_count)
		qsort(now, t->disk_count, sizeof *now, by_identity);
	for (uint32_t i = 0; i < old->tree->disk_count && !r; i++) {
		const struct ff_frozen *f = &old->tree->inodes[old->tree->disks[i]];
		char *path;

		if (t->disk_count && bsearch(&f, now, t->disk_count, sizeof *now, by_identity))
			continue;
		r = since_path(old, i, "", &path);
		if (!r) {
			r = fn(ctx, path);
			free(path);
		}
	}
	return r;
}
