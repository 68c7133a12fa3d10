/*
 * The frozen tree as the filesystem sees it: pure look-ups in a tree that does not change. The one
 * thing that does is the snapshot's name, and with it st_ino, which is a hash of the name and the
 * source's inode number: the same each time a snapshot of this name is made, so that backup tools
 * know an unchanged disk again, and never a live inode's (bit 62 is set, which no filesystem of
 * practical size reaches).
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

#include "cow/engine.h"
#include "ff_util.h"

const struct ff_frozen *ff_snap_root(const struct ff_snap *snap)
{
	return &snap->tree->inodes[0];
}

uint32_t frozen_entry_at(const struct ff_frozen *dir, const char *name)
{
	uint32_t lo = 0, hi = dir->entry_count;

	while (lo < hi) {
		uint32_t mid = lo + (hi - lo) / 2;

		if (strcmp(dir->entries[mid].name, name) < 0)
			lo = mid + 1;
		else
			hi = mid;
	}
	return lo;
}

/* May this directory be shown? */
static int shown(const struct ff_snap *snap, const struct ff_frozen *dir)
{
	struct ff_snap *s = (struct ff_snap *)snap; /* only the lock is taken */

	FF_GUARD(&s->lock);
	return s->dropped ? -ENOENT : s->damaged || dir->disk == TREE_UNFROZEN ? -EIO : 0;
}

int ff_frozen_lookup(const struct ff_snap *snap, const struct ff_frozen *dir, const char *name,
                     const struct ff_frozen **out)
{
	uint32_t i;
	int r;

	if (!S_ISDIR(dir->st.st_mode))
		return -ENOTDIR;
	r = shown(snap, dir);
	if (r)
		return r;
	i = frozen_entry_at(dir, name);
	if (i == dir->entry_count || strcmp(dir->entries[i].name, name) != 0)
		return -ENOENT;
	*out = &snap->tree->inodes[dir->entries[i].inode];
	return 0;
}

int ff_frozen_entry(const struct ff_snap *snap, const struct ff_frozen *dir, size_t i,
                    const char **name, const struct ff_frozen **out)
{
	int r = shown(snap, dir);

	if (r)
		return r;
	if (i >= dir->entry_count)
		return -ENOENT;
	*name = dir->entries[i].name;
	*out = &snap->tree->inodes[dir->entries[i].inode];
	return 0;
}

const struct ff_frozen *ff_frozen_parent(const struct ff_snap *snap, const struct ff_frozen *dir)
{
	return &snap->tree->inodes[dir->parent];
}

void ff_frozen_stat(const struct ff_snap *snap, const struct ff_frozen *f, struct stat *out)
{
	struct ff_snap *s = (struct ff_snap *)snap; /* atomics want no const */
	uint64_t ino = f->st.st_ino;

	*out = f->st;
	ino = XXH3_64bits_withSeed(&ino, sizeof ino, atomic_load(&s->name_hash));
	out->st_ino = (ino & ~(UINT64_C(3) << 62)) | UINT64_C(1) << 62;
}

const char *ff_frozen_readlink(const struct ff_snap *snap, const struct ff_frozen *f)
{
	return f->target;
}

int ff_frozen_getxattr(const struct ff_snap *snap, const struct ff_frozen *f, const char *name,
                       void *buf, size_t size, size_t *len)
{
	for (const char *p = f->xattrs; p && p < f->xattrs + f->xattr_len;) {
		size_t key = strlen(p) + 1, value = ff_be32(p + key);

		if (strcmp(p, name) == 0) {
			if (size && value > size)
				return -ERANGE;
			if (size)
				memcpy(buf, p + key + 4, value);
			*len = value;
			return 0;
		}
		p += key + 4 + value;
	}
	return -ENODATA;
}

int ff_frozen_listxattr(const struct ff_snap *snap, const struct ff_frozen *f, char *buf,
                        size_t size, size_t *len)
{
	size_t total = 0;

	for (const char *p = f->xattrs; p && p < f->xattrs + f->xattr_len;) {
		size_t key = strlen(p) + 1;

		if (size && total + key > size)
			return -ERANGE;
		if (size)
			memcpy(buf + total, p, key);
		total += key;
		p += key + 4 + ff_be32(p + key);
	}
	*len = total;
	return 0;
}
