/*
 * A manifest: any bytes, with the checksum at their end put right, so that what is behind it is
 * reached. What the decoder accepts must be a tree as the accessors of the frozen tree need it, and
 * must encode to the very same bytes.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

#include "cow/engine.h"
#include "cow/manifest.h"
#include "cow/names.h"
#include "ff_util.h"
#include "fuzz.h"

enum { TAIL = 8 };

static void check_xattrs(const struct ff_snap *snap, const struct ff_frozen *f)
{
	size_t len, again, value;
	ff_autofree char *list = NULL;

	FUZZ_CHECK(ff_frozen_listxattr(snap, f, NULL, 0, &len) == 0);
	list = malloc(len + 1);
	FUZZ_CHECK(list && ff_frozen_listxattr(snap, f, list, len + 1, &again) == 0);
	FUZZ_CHECK(again == len && (len == 0 || list[len - 1] == '\0'));
	if (len > 1)
		FUZZ_CHECK(ff_frozen_listxattr(snap, f, list, len - 1, &again) == -ERANGE);
	for (const char *p = list; p < list + len; p += strlen(p) + 1) {
		ff_autofree char *buf = NULL;

		FUZZ_CHECK(ff_frozen_getxattr(snap, f, p, NULL, 0, &value) == 0);
		FUZZ_CHECK(value <= f->xattr_len);
		buf = malloc(value + 1);
		FUZZ_CHECK(buf && ff_frozen_getxattr(snap, f, p, buf, value + 1, &again) == 0);
		FUZZ_CHECK(again == value);
		if (value > 1)
			FUZZ_CHECK(ff_frozen_getxattr(snap, f, p, buf, value - 1, &again) ==
			           -ERANGE);
	}
	FUZZ_CHECK(ff_frozen_getxattr(snap, f, "", NULL, 0, &value) == -ENODATA);
}

static bool component(const char *name)
{
	size_t n = strlen(name);

	return n >= 1 && n <= 255 && !strchr(name, '/') && strcmp(name, ".") && strcmp(name, "..");
}

static void check_dir(const struct ff_snap *snap, const struct ff_frozen *dir)
{
	const struct tree *t = snap->tree;
	const struct ff_frozen *up = dir, *child, *found;
	const char *name;
	uint32_t steps = 0;

	for (; up != ff_snap_root(snap); up = ff_frozen_parent(snap, up)) {
		FUZZ_CHECK(steps++ <= t->count && up > t->inodes && up < t->inodes + t->count);
		FUZZ_CHECK(S_ISDIR(ff_frozen_parent(snap, up)->st.st_mode));
	}
	if (dir->disk == TREE_UNFROZEN) {
		FUZZ_CHECK(dir->entry_count == 0 && dir != t->inodes);
		FUZZ_CHECK(ff_frozen_entry(snap, dir, 0, &name, &child) == -EIO);
		FUZZ_CHECK(ff_frozen_lookup(snap, dir, "x", &found) == -EIO);
		return;
	}
	for (uint32_t i = 0; i < dir->entry_count; i++) {
		FUZZ_CHECK(ff_frozen_entry(snap, dir, i, &name, &child) == 0);
		FUZZ_CHECK(child > t->inodes && child < t->inodes + t->count && component(name));
		FUZZ_CHECK(ff_frozen_lookup(snap, dir, name, &found) == 0 && found == child);
		FUZZ_CHECK(!S_ISDIR(child->st.st_mode) || ff_frozen_parent(snap, child) == dir);
	}
	FUZZ_CHECK(ff_frozen_entry(snap, dir, dir->entry_count, &name, &child) == -ENOENT);
	FUZZ_CHECK(ff_frozen_lookup(snap, dir, "", &found) == -ENOENT);
	FUZZ_CHECK(ff_frozen_lookup(snap, dir, "..", &found) == -ENOENT);
}

static void check_inode(const struct ff_snap *snap, const struct ff_frozen *f)
{
	const struct tree *t = snap->tree;
	const struct ff_frozen *found;
	struct stat st;

	ff_frozen_stat(snap, f, &st);
	FUZZ_CHECK(st.st_ino >> 62 == 1 && st.st_size >= 0);
	switch (st.st_mode & S_IFMT) {
	case S_IFDIR:
		check_dir(snap, f);
		break;
	case S_IFREG:
	case S_IFLNK:
	case S_IFIFO:
	case S_IFSOCK:
	case S_IFCHR:
	case S_IFBLK:
		FUZZ_CHECK(f->entry_count == 0);
		FUZZ_CHECK(ff_frozen_lookup(snap, f, "x", &found) == -ENOTDIR);
		break;
	default:
		FUZZ_CHECK(!"a type that no file has");
	}
	FUZZ_CHECK(!!ff_frozen_readlink(snap, f) == !!S_ISLNK(st.st_mode));
	FUZZ_CHECK(S_ISREG(st.st_mode) == (f->disk != TREE_NO_DISK) || f->disk == TREE_UNFROZEN);
	if (f->disk != TREE_NO_DISK && f->disk != TREE_UNFROZEN) {
		FUZZ_CHECK(f->disk < t->disk_count && &t->inodes[t->disks[f->disk]] == f);
		FUZZ_CHECK(names_safe_path(f->image));
	}
	check_xattrs(snap, f);
}

static void check(const struct manifest *m, const uint8_t *buf, size_t size)
{
	struct ff_snap snap = {.tree = m->tree, .lock = PTHREAD_MUTEX_INITIALIZER};
	void *again;
	size_t len;

	FUZZ_CHECK(m->seq > 0);
	for (uint32_t i = 0; i < m->tree->count; i++)
		check_inode(&snap, &m->tree->inodes[i]);
	FUZZ_CHECK(manifest_encode(m, &again, &len) == 0);
	FUZZ_CHECK(len == size && memcmp(again, buf, size) == 0);
	free(again);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	ff_autofree uint8_t *buf = malloc(size + (size == 0));
	struct manifest m = {0};
	const char *why;
	int r;

	FUZZ_CHECK(buf != NULL);
	memcpy(buf, data, size);
	r = manifest_decode(buf, size, &m, &why);
	FUZZ_CHECK(r == 0 || (r == -EINVAL && why && !m.tree));
	if (r && size >= TAIL) {
		ff_put_be64(buf + size - TAIL, XXH3_64bits(buf, size - TAIL));
		r = manifest_decode(buf, size, &m, &why);
		FUZZ_CHECK(r == 0 || (r == -EINVAL && why && !m.tree));
	}
	if (r == 0) {
		check(&m, buf, size);
		tree_free(m.tree);
	}
	return 0;
}

#ifdef FUZZ_LIBFUZZER

static unsigned draw(unsigned *seed, unsigned below)
{
	return (unsigned)rand_r(seed) % below;
}

static void set_text(char **at, unsigned *seed)
{
	static const char *const texts[] = {"a",  "b/c",      "..",         "/abs", "a//b", ".",
	                                    "\n", "manifest", "\377\376.x", "../x", "zzz",  NULL};
	const char *text = texts[draw(seed, FF_ARRAY_SIZE(texts))];
	char *copy = text ? strdup(text) : NULL;

	free(*at);
	*at = copy;
}

/* One change of a tree which keeps the lengths in its encoding right. */
static void change(struct tree *t, unsigned *seed)
{
	struct ff_frozen *f = &t->inodes[draw(seed, t->count)];
	struct tree_entry *e = f->entry_count ? &f->entries[draw(seed, f->entry_count)] : NULL;

	switch (draw(seed, 9)) {
	case 0:
		f->parent = draw(seed, t->count + 1);
		break;
	case 1:
		f->st.st_mode = (f->st.st_mode & 07777) | draw(seed, 16) << 12;
		break;
	case 2:
		f->disk = draw(seed, 2)   ? TREE_NO_DISK
		          : draw(seed, 2) ? TREE_UNFROZEN
		                          : draw(seed, t->disk_count + 1);
		break;
	case 3:
		set_text(&f->image, seed);
		break;
	case 4:
		set_text(&f->target, seed);
		break;
	case 5:
		if (e)
			e->inode = draw(seed, t->count + 1);
		break;
	case 6:
		if (e)
			set_text(&e->name, seed);
		break;
	case 7:
		f->st.st_size = (off_t)(UINT64_C(1) << draw(seed, 64));
		break;
	default:
		if (f->xattr_len)
			LLVMFuzzerMutate((uint8_t *)f->xattrs, f->xattr_len, f->xattr_len);
	}
}

/* Half of the time a change of the tree, else of the bytes. */
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max_size, unsigned seed)
{
	struct manifest m;
	const char *why;
	void *buf = NULL;
	size_t len = 0;

	if (size >= TAIL)
		ff_put_be64(data + size - TAIL, XXH3_64bits(data, size - TAIL));
	if (draw(&seed, 2) || manifest_decode(data, size, &m, &why))
		return LLVMFuzzerMutate(data, size, max_size);
	for (unsigned n = draw(&seed, 3) + 1; n; n--)
		change(m.tree, &seed);
	m.durable = draw(&seed, 2);
	if (manifest_encode(&m, &buf, &len) == 0 && len <= max_size) {
		memcpy(data, buf, len);
		size = len;
	}
	free(buf);
	tree_free(m.tree);
	return size;
}

#endif
