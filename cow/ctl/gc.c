/*
 * gc: what a hard failure left in a fleece directory that no fleecefs has.
 *
 * The lock of the directory is held while anything is removed, so no mount comes in between; a dry
 * run holds none, and looks at the end whether one has come.
 *
 * An image is needed if a view can lead to it: it is a snapshot's, or hidden and named, over other
 * hidden ones perhaps, by one that is. All others are removed, the oldest of a disk first, so that
 * at no moment an image is named that is not there. Where an image cannot be read, or one that is
 * named is missing, nobody can tell what else it would lead to, and what could be meant stays:
 *
 *   an image of a snapshot cannot be read        no image and no disk kept aside is removed
 *   a chain names one that is not there          none of that disk, and none that cannot be read
 *   what so stays cannot be read                 no disk kept aside
 *
 * Only files of names that fleecefs gives are removed, and directories when they are empty.
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <unistd.h>

#include "cow/ctl/ctl.h"
#include "cow/ctl/source.h"
#include "cow/io.h"
#include "cow/ledger_file.h"
#include "cow/names.h"
#include "cow/open_regular.h"
#include "ff_util.h"

struct gc {
	struct place place;
	struct inventory inv;
	struct source src;
	bool dry;
	bool *keep;      /* by image */
	bool unreadable; /* some image that is kept cannot be read */
	bool lost;       /* some chain names one that is not there */
	bool visible_unreadable;
	uint64_t removed, bytes;
	int error; /* the first that could not be removed */
};

/* --- what is needed ----------------------------------------------------------------------------
 */

static size_t index_of(const struct gc *g, const struct inv_image *i)
{
	return (size_t)(i - g->inv.images);
}

/* Marks what the views of one disk can lead to. */
static void mark_chain(struct gc *g, struct inv_image **chain, size_t n)
{
	bool lost = false, missing, exact;

	for (size_t i = 0; i < n; i++) {
		const struct inv_image *a = chain[i], *next;

		if (!inventory_visible(&g->inv, a))
			continue;
		g->keep[index_of(g, a)] = true;
		for (;; a = next) {
			next = inv_next(g->place.fleece_fd, &g->inv, a, chain, n, &missing, &exact);
			lost |= missing;
			if (!next || next->desc.seq <= a->desc.seq || g->keep[index_of(g, next)])
				break;
			g->keep[index_of(g, next)] = true;
		}
	}
	for (size_t i = 0; i < n && lost; i++)
		g->keep[index_of(g, chain[i])] = true;
	g->lost |= lost;
}

static int mark(struct gc *g)
{
	ff_autofree struct inv_image **all = NULL;
	size_t n, first = 0;

	g->keep = calloc(g->inv.image_count + 1, sizeof *g->keep);
	all = inventory_chains(&g->inv, &n);
	if (!g->keep || !all)
		return -ENOMEM;
	for (size_t i = 1; i <= n; i++) {
		if (i < n && inv_same_disk(all[i], all[first]))
			continue;
		mark_chain(g, all + first, i - first);
		first = i;
	}
	for (size_t i = 0; i < g->inv.image_count; i++) {
		const struct inv_image *img = &g->inv.images[i];

		g->visible_unreadable |= img->error && inventory_visible(&g->inv, img);
	}
	for (size_t i = 0; i < g->inv.image_count; i++) {
		const struct inv_image *img = &g->inv.images[i];

		if (g->visible_unreadable || (img->error && g->lost))
			g->keep[i] = true;
		g->unreadable |= img->error && g->keep[i];
	}
	return 0;
}

/* --- removing ----------------------------------------------------------------------------------
 */

static void removed(struct gc *g, const char *path, uint64_t bytes, int r)
{
	if (r && r != -ENOENT) {
		ctl_error("%s: cannot be removed: %s", path, strerror(-r));
		g->error = g->error ? g->error : r;
		return;
	}
	ctl_say("%s %s (%s)", g->dry ? "would remove" : "removed", path,
	        text_size((double)bytes).s);
	g->removed++;
	g->bytes += bytes;
}

/* The files beside it first: while the image is there, it leads to all. */
static void remove_image(struct gc *g, const struct inv_image *img)
{
	int dir = g->place.fleece_fd, r = 0;
	uint64_t bytes = img->allocated;

	for (size_t i = 0; !r && names_suffixes[i]; i++) {
		ff_autofree char *path = names_beside(img->path, names_suffixes[i]);
		struct statx sx;

		r = path ? 0 : -ENOMEM;
		if (!r && !io_statx(dir, path, &sx))
			bytes += sx.stx_blocks * 512;
		if (!r && !g->dry)
			r = io_unlinkat(dir, path, 0);
		r = r == -ENOENT ? 0 : r;
	}
	if (!r && !g->dry)
		r = io_unlinkat(dir, img->path, 0);
	removed(g, img->path, bytes, r);
}

static int remove_images(struct gc *g)
{
	ff_autofree struct inv_image **all = NULL;
	size_t n;

	all = inventory_chains(&g->inv, &n);
	if (!all)
		return -ENOMEM;
	for (size_t i = 0; i < n; i++)
		if (!g->keep[index_of(g, all[i])])
			remove_image(g, all[i]);
	for (size_t i = 0; i < g->inv.image_count; i++)
		if (g->inv.images[i].error && !g->keep[i])
			remove_image(g, &g->inv.images[i]);
	for (size_t i = 0; i < g->inv.stray_count; i++) {
		const struct inv_stray *s = &g->inv.strays[i];

		removed(g, s->path, s->allocated,
		        g->dry ? 0 : io_unlinkat(g->place.fleece_fd, s->path, 0));
	}
	return 0;
}

/* Removes what is left of a directory that held hidden images, if all of it is ours. */
static int remove_below(int dirfd, const char *name)
{
	const struct dirent *e;
	DIR *dir;
	int fd, r = io_openat(dirfd, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW, 0, &fd);

	if (!r)
		r = io_fdopendir(fd, &dir);
	if (r)
		return r;
	while (!r && !(r = io_readdir(dir, &e)) && e) {
		struct statx sx;

		r = io_statx(fd, e->d_name, &sx);
		if (!r && S_ISDIR(sx.stx_mode))
			r = remove_below(fd, e->d_name);
		else if (!r && (names_ours(e->d_name) || strcmp(e->d_name, MANIFEST_NAME) == 0))
			r = io_unlinkat(fd, e->d_name, 0);
		else if (!r)
			r = -ENOTEMPTY;
	}
	closedir(dir);
	return r ? r : io_unlinkat(dirfd, name, AT_REMOVEDIR);
}

static void remove_dirs(struct gc *g)
{
	for (size_t i = 0; i < g->inv.dir_count; i++) {
		const struct inv_dir *d = &g->inv.dirs[i];
		bool needed = d->kind != INV_DROPPED && d->kind != INV_UNMADE;
		int r = 0;

		for (size_t k = d->first; k < d->first + d->count; k++)
			needed |= g->keep[k];
		if (needed || g->error)
			continue;
		if (!g->dry)
			r = remove_below(g->place.fleece_fd, d->name);
		if (r == -ENOTEMPTY)
			ctl_say("%s holds what fleecefs has not made: left alone", d->name);
		else
			removed(g, d->name, 0, r);
	}
}

/* --- disks kept aside in SOURCE ----------------------------------------------------------------
 */

/* Does a manifest speak of this disk, whose image may be missing? */
static bool is_listed(const struct gc *g, uint64_t ino, int64_t sec, uint32_t nsec)
{
	for (size_t i = 0; i < g->inv.dir_count; i++) {
		const struct tree *t = g->inv.dirs[i].manifest.tree;

		for (uint32_t k = 0; t && g->inv.dirs[i].kind == INV_SNAPSHOT && k < t->disk_count;
		     k++) {
			const struct ff_frozen *f = &t->inodes[t->disks[k]];

			if (f->st.st_ino == ino && f->btime_sec == sec && f->btime_nsec == nsec)
				return true;
		}
	}
	return false;
}

/* Is there still an image of this disk, or, with a number, that one? */
static bool has_disk(const struct gc *g, uint64_t ino, int64_t sec, uint32_t nsec, uint64_t seq)
{
	for (size_t i = 0; i < g->inv.image_count; i++) {
		const struct ff_image_desc *d = &g->inv.images[i].desc;

		if (g->keep[i] && d->disk_ino == ino && d->disk_btime_sec == sec &&
		    d->disk_btime_nsec == nsec && (!seq || d->seq == seq))
			return true;
	}
	return is_listed(g, ino, sec, nsec);
}

/* Is NAME one that nobody needs: of a disk, or a note that a view of one is lost (cow/lost.c)? */
static bool is_orphan(const struct gc *g, int fd, const char *name)
{
	static const char note[] = ".lost-";
	unsigned long long seq = 0, ino, sec;
	struct identity id;
	struct stat st;
	unsigned nsec;
	int end = 0;

	if (strncmp(name, note, strlen(note)) == 0)
		return sscanf(name + strlen(note), "%llx-%llx-%llx-%x%n", &seq, &ino, &sec, &nsec,
		              &end) == 4 &&
		       !name[strlen(note) + (size_t)end] &&
		       !has_disk(g, ino, (int64_t)sec, nsec, seq);
	return sscanf(name, "%llx-%llx-%x%n", &ino, &sec, &nsec, &end) == 3 && !name[end] &&
	       identity_of(fd, name, &id, &st) == 0 && S_ISREG(st.st_mode) && id.ino == ino &&
	       id.btime_sec == (int64_t)sec && id.btime_nsec == nsec &&
	       !has_disk(g, ino, (int64_t)sec, nsec, 0);
}

static int open_aside(struct gc *g, int *fd)
{
	ff_autofree struct ff_store *s = calloc(1, sizeof *s);
	struct stat st;
	int r = s ? io_fstat(g->src.fd, &st) : -ENOMEM;

	if (r)
		return r;
	s->source_fd = g->src.fd;
	s->source_path = g->src.path;
	s->source_dev = st.st_dev;
	r = aside_home(g->place.fleece_fd, s->aside_path, sizeof s->aside_path);
	return r ? r : aside_find(s, fd);
}

static int remove_aside(struct gc *g)
{
	const struct dirent *e;
	DIR *dir;
	int fd, r = open_aside(g, &fd);

	if (!r)
		r = io_fdopendir(fd, &dir);
	if (r)
		return r == -ENOENT ? 0 : r;
	while (!(r = io_readdir(dir, &e)) && e) {
		ff_autofree char *path = NULL;
		struct statx sx;

		if (!is_orphan(g, fd, e->d_name) || io_statx(fd, e->d_name, &sx))
			continue;
		if (asprintf(&path, "%s: %s, kept aside", g->src.path, e->d_name) < 0)
			path = NULL;
		removed(g, path ? path : e->d_name, sx.stx_nlink == 1 ? sx.stx_blocks * 512 : 0,
		        g->dry ? 0 : io_unlinkat(fd, e->d_name, 0));
	}
	closedir(dir);
	return r;
}

/* --- all of it ----------------------------------------------------------------------------------
 */

static int busy(const struct gc *g)
{
	ctl_error("%s: a fleecefs has it: unmount that first, or leave it to the mount, which "
	          "cleans by itself",
	          g->place.fleece_path);
	return CTL_BUSY;
}

/* What others may write could have us remove what is not ours; a mount refuses it as well. */
static int check_owner(const struct gc *g)
{
	struct stat st;
	int r = io_fstat(g->place.fleece_fd, &st);

	if (r)
		return ctl_fail(g->place.fleece_path, r);
	if (!(st.st_mode & 022) && (st.st_uid == geteuid() || st.st_uid == 0))
		return 0;
	ctl_error("%s may be written by others: chmod go-w it, and chown it to the user who mounts",
	          g->place.fleece_path);
	return CTL_NO_PERMISSION;
}

static int take_lock(struct gc *g, int *fd)
{
	int r = check_owner(g);

	if (r)
		return r;
	if (g->place.live)
		return busy(g);
	if (g->dry)
		return 0;
	r = open_regular(g->place.fleece_fd, ".lock", O_RDWR, fd);
	if (!r)
		r = io_flock(*fd, LOCK_EX);
	if (r == -EWOULDBLOCK)
		return busy(g);
	return r ? ctl_fail(g->place.fleece_path, r) : 0;
}

static void say_kept(const struct gc *g)
{
	for (size_t i = 0; i < g->inv.image_count; i++)
		if (g->inv.images[i].error)
			ctl_error("%s: cannot be read: %s", g->inv.images[i].path,
			          g->inv.images[i].why ? g->inv.images[i].why
			                               : strerror(-g->inv.images[i].error));
	if (g->visible_unreadable)
		ctl_error("so no image is removed: drop the snapshot first");
	else if (g->lost)
		ctl_error("a fleecing image that another names is missing: what could belong to "
		          "it is kept (see fleecectl check)");
}

static int collect(struct gc *g, const char *source)
{
	int r = inventory_read(g->place.fleece_fd, &g->inv);

	if (!r)
		r = mark(g);
	if (!r)
		r = source_find(g->place.fleece_fd, g->place.fleece_path, &g->inv, source, &g->src);
	if (r)
		return ctl_fail(g->place.fleece_path, r);
	if (source && !g->src.path) {
		ctl_error("%s: not the SOURCE of this fleece directory", source);
		return CTL_NO_INPUT;
	}
	say_kept(g);
	r = remove_images(g);
	if (!r)
		remove_dirs(g);
	if (!r && g->src.path && !g->unreadable)
		r = remove_aside(g);
	else if (!r && !g->src.path)
		ctl_say("SOURCE is not known: disks that it keeps for dropped snapshots are not "
		        "looked for (--source)");
	r = r ? r : g->error;
	return r ? ctl_fail(g->place.fleece_path, r) : 0;
}

static int run(struct gc *g, const char *path, const char *source)
{
	ff_autoclose int lock = -1;
	int r = place_any(path, &g->place);

	if (!r)
		r = take_lock(g, &lock);
	if (!r)
		r = collect(g, source);
	if (!r && g->dry && place_was_mounted(&g->place))
		r = busy(g);
	if (!r)
		ctl_say("%s: %llu %s, %s", g->place.fleece_path, (unsigned long long)g->removed,
		        g->dry ? "to remove" : "removed", text_size((double)g->bytes).s);
	return r;
}

int cmd_gc(int argc, char **argv)
{
	static const struct option options[] = {
	    {"dry-run", no_argument, NULL, 'n'}, {"source", required_argument, NULL, 's'}, {0}};
	struct gc g = {.place = {.fleece_fd = -1}, .src = {.fd = -1}};
	const char *source = NULL;
	int c, r;

	while ((c = getopt_long(argc, argv, "ns:", options, NULL)) != -1) {
		if (c == '?')
			return ctl_usage("gc");
		g.dry |= c == 'n';
		if (c == 's')
			source = optarg;
	}
	if (argc - optind != 1)
		return ctl_usage("gc");
	r = run(&g, argv[optind], source);
	free(g.keep);
	source_free(&g.src);
	inventory_free(&g.inv);
	place_free(&g.place);
	return r;
}
