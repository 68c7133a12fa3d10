/*
 * From a name in an image to a frozen file.
 *
 * Names are resolved in the frozen tree, by the rules of the kernel: "..", and symlinks, whose
 * targets are read likewise. Nothing outside of the snapshot is ever looked at: an absolute path
 * means something if it begins with the path of SOURCE or of the mount, without symlinks or as it
 * was given, and ".." above the root is an error. QEMU takes the directory of an image to be that
 * of the name it was opened by, so this is what is kept of a file that was found through a symlink.
 *
 * The image is anybody's who may write to it, and the daemon may read all files: so whoever opens
 * it must be allowed to walk to the other file and to read it, by the frozen modes, as if it were
 * opened by its name. A list of rights (ACL) may take away from what the mode says; who is not the
 * owner of such a file is refused, as its rules are not repeated here.
 */
#include "cow/raw_find.h"

#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <linux/xattr.h>

#include "ff_util.h"

enum { SYMLINKS_MAX = 40, MAY_LOOK = 1, MAY_READ = 4 };

struct search {
	const struct ff_snap *snap;
	const struct ff_raw_asker *asker;
	unsigned symlinks;
	char *why;
};

static int fail(const struct search *s, int error, const char *what)
{
	snprintf(s->why, QS_WHY, "%s", what);
	return error;
}

static bool may(const struct search *s, const struct ff_frozen *f, mode_t what)
{
	struct stat st;
	size_t len;

	if (!s->asker->may)
		return true;
	ff_frozen_stat(s->snap, f, &st);
	return s->asker->may(
	    s->asker->ctx, &st,
	    ff_frozen_getxattr(s->snap, f, XATTR_NAME_POSIX_ACL_ACCESS, NULL, 0, &len) == 0, what);
}

/* The next part of *PATH, "" after the last; -ENAMETOOLONG. */
static int next_part(const char **path, char *part, size_t size)
{
	const char *p = *path + strspn(*path, "/");
	size_t len = strcspn(p, "/");

	*path = p + len;
	if (len >= size)
		return -ENAMETOOLONG;
	memcpy(part, p, len);
	part[len] = '\0';
	return 0;
}

/* What of PATH is below ROOT, both absolute; NULL: it is elsewhere. */
static const char *below(const char *path, const char *root)
{
	char a[NAME_MAX + 1], b[NAME_MAX + 1];

	while (next_part(&root, a, sizeof a) == 0 && *a) {
		do {
			if (next_part(&path, b, sizeof b))
				return NULL;
		} while (strcmp(b, ".") == 0);
		if (strcmp(a, b) != 0)
			return NULL;
	}
	return path;
}

/* Where PATH, seen from *DIR, begins: *PATH and *DIR are set to that. */
static int begin(const struct search *s, const char **path, const struct ff_frozen **dir)
{
	const char *rest;

	if (**path != '/')
		return 0;
	rest = below(*path, s->snap->store->source_path);
	for (const char *const *root = s->asker->roots; !rest && root && *root; root++)
		if (**root == '/')
			rest = below(*path, *root);
	if (!rest)
		return fail(s, -EIO, "it lies outside of the directory that is mounted");
	*path = rest;
	*dir = ff_snap_root(s->snap);
	return 0;
}

static int walk(struct search *s, const struct ff_frozen *dir, const char *path,
                struct raw_place *out);

/* PART of DIR, through symlinks. */
static int step(struct search *s, const struct ff_frozen *dir, const char *part,
                const struct ff_frozen **out)
{
	struct raw_place place;
	const char *target;
	int r;

	if (!S_ISDIR(dir->st.st_mode))
		return fail(s, -EIO, "its path leads through something that is no directory");
	if (!may(s, dir, MAY_LOOK))
		return fail(s, -EACCES, "the caller may not look into its directory");
	if (strcmp(part, "..") == 0) {
		if (dir == ff_snap_root(s->snap))
			return fail(s, -EIO, "it lies outside of the directory that is mounted");
		*out = ff_frozen_parent(s->snap, dir);
		return 0;
	}
	r = ff_frozen_lookup(s->snap, dir, part, out);
	if (r)
		return fail(s, -EIO, "it is not in the snapshot");
	if (!S_ISLNK((*out)->st.st_mode))
		return 0;
	target = ff_frozen_readlink(s->snap, *out);
	if (!target)
		return fail(s, -EIO, "it is not in the snapshot");
	if (++s->symlinks > SYMLINKS_MAX)
		return fail(s, -EIO, "its path leads through too many symlinks");
	r = walk(s, dir, target, &place);
	*out = place.f;
	return r;
}

static int walk(struct search *s, const struct ff_frozen *dir, const char *path,
                struct raw_place *out)
{
	char part[NAME_MAX + 1];
	int r = begin(s, &path, &dir);

	if (r)
		return r;
	*out = (struct raw_place){dir, dir};
	while ((r = next_part(&path, part, sizeof part)) == 0 && *part) {
		const struct ff_frozen *next;

		if (strcmp(part, ".") == 0)
			continue;
		r = step(s, out->f, part, &next);
		if (r)
			return r;
		*out = (struct raw_place){out->f, next};
	}
	return r ? fail(s, -EIO, "its name is too long") : 0;
}

int raw_find(const struct ff_snap *snap, const struct ff_raw_asker *asker,
             const struct ff_frozen *dir, const struct qs_name *name, struct raw_place *out,
             char *why)
{
	struct search s = {.snap = snap, .asker = asker, .why = why};
	int r = walk(&s, dir, name->path, out);

	if (r)
		return r;
	if (!S_ISREG(out->f->st.st_mode))
		return fail(&s, -EIO, "it is no regular file");
	if (!may(&s, out->f, MAY_READ))
		return fail(&s, -EACCES, "the caller may not read it");
	return 0;
}
