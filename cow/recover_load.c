/*
 * Recovery, steps 1 and 2: reads the directories of FLEECE_DIR and the images in them. See
 * recover.c.
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "cow/io.h"
#include "cow/manifest.h"
#include "cow/names.h"
#include "cow/recovery.h"
#include "ff_log.h"
#include "ff_util.h"

/* Takes the image over, also on error. */
static int add_found(struct recovery *rc, const struct found *f)
{
	if (rc->count == rc->room) {
		size_t room = rc->room ? rc->room * 2 : 64;
		void *p = realloc(rc->found, room * sizeof *rc->found);

		if (!p) {
			if (f->img)
				ff_image_free(f->img);
			return -ENOMEM;
		}
		rc->found = p;
		rc->room = room;
	}
	rc->found[rc->count++] = *f;
	return 0;
}

static void fleece_dir_close(struct fleece_dir *dir)
{
	close(dir->fd);
	free(dir->name);
	free(dir);
}

static int open_dir(struct ff_store *s, const char *name, struct fleece_dir **out)
{
	struct fleece_dir *dir = calloc(1, sizeof *dir);
	int r = -ENOMEM;

	if (dir && (dir->name = strdup(name)))
		r = io_openat(s->fleece_fd, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW, 0, &dir->fd);
	if (r) {
		ff_error("%s/%s: %s", s->fleece_path, name, strerror(-r));
		if (dir)
			free(dir->name);
		free(dir);
		return r;
	}
	*out = dir;
	return 0;
}

/* Is the image itself no good? Other errors may pass, and must not cost a view for good: then the
 * mount fails, and can be tried again. */
static bool is_lost(int error)
{
	return error == -EINVAL || error == -ENOENT || error == -ELOOP || error == -ENOTDIR ||
	       error == -EISDIR || error == -EIO || error == -EFBIG || error == -EUCLEAN ||
	       error == -EBADMSG;
}

static bool is_image(const char *name)
{
	size_t n = strlen(name);

	return n > 6 && strcmp(name + n - 6, ".qcow2") == 0;
}

/* Loads every image below the directory, for want of a manifest. PATH is a buffer of PATH_MAX. */
static int load_all(struct recovery *rc, struct fleece_dir *dir, struct ff_snap *snap, int fd,
                    char *path, size_t len)
{
	const struct dirent *e;
	DIR *d;
	int r = io_fdopendir(fd, &d);

	if (r)
		return r;
	while (!r && !(r = io_readdir(d, &e)) && e) {
		size_t n = strlen(e->d_name);
		int sub;

		if (len + n + 2 > PATH_MAX)
			continue;
		memcpy(path + len, e->d_name, n + 1);
		r = io_openat(fd, e->d_name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW, 0, &sub);
		if (!r) {
			path[len + n] = '/';
			r = load_all(rc, dir, snap, sub, path, len + n + 1);
			continue;
		}
		if (!is_lost(r))
			break;
		r = 0;
		if (is_image(e->d_name)) {
			struct found f = {.dir = dir, .snap = snap};
			const struct ff_image_desc *desc;

			r = ff_image_load(dir->fd, path, &f.img);
			if (r && is_lost(r)) {
				r = 0; /* said in the log; the older one that names it knows */
				continue;
			}
			if (r)
				break;
			ff_image_park(f.img); /* there may be more than descriptors */
			desc = ff_image_desc(f.img);
			f.ino = desc->disk_ino;
			f.btime_sec = desc->disk_btime_sec;
			f.btime_nsec = desc->disk_btime_nsec;
			f.seq = desc->seq;
			f.durable = desc->durable;
			f.number = snap ? snap->link_count++ : 0;
			r = add_found(rc, &f);
		}
	}
	closedir(d);
	return r;
}

static int load_below(struct recovery *rc, struct fleece_dir *dir, struct ff_snap *snap)
{
	char path[PATH_MAX];
	int fd, r = io_openat(dir->fd, ".", O_RDONLY | O_DIRECTORY, 0, &fd);

	return r ? r : load_all(rc, dir, snap, fd, path, 0);
}

/* A directory of hidden images. */
static int take_hidden(struct recovery *rc, const char *name)
{
	struct fleece_dir *dir;
	int r = open_dir(rc->store, name, &dir);

	if (r)
		return recovery_is_gone(r) ? 0 : r;
	dir->next_hidden = rc->store->hidden;
	rc->store->hidden = dir;
	return load_below(rc, dir, NULL);
}

/* The images that the manifest names. */
static int take_images(struct recovery *rc, struct ff_snap *snap, const struct manifest *m)
{
	int r = 0;

	for (uint32_t i = 0; i < snap->tree->disk_count && !r; i++) {
		const struct ff_frozen *inode = &snap->tree->inodes[snap->tree->disks[i]];
		struct found f = {inode->st.st_ino,
		                  inode->btime_sec,
		                  inode->btime_nsec,
		                  m->seq,
		                  NULL,
		                  snap->dir,
		                  snap,
		                  i,
		                  false};
		const struct ff_image_desc *desc;

		r = ff_image_load(snap->dir->fd, inode->image, &f.img);
		if (r && !is_lost(r))
			return r;
		if (r == 0) {
			ff_image_park(f.img);
			desc = ff_image_desc(f.img);
			f.durable = desc->durable;
			if (desc->seq != f.seq || desc->disk_ino != f.ino ||
			    desc->disk_btime_sec != f.btime_sec ||
			    desc->disk_btime_nsec != f.btime_nsec ||
			    desc->size != (uint64_t)inode->st.st_size) {
				ff_error("%s/%s/%s is not the image that the manifest speaks of",
				         rc->store->fleece_path, snap->name, inode->image);
				ff_image_free(ff_take_ptr(&f.img));
			}
		} else {
			ff_error(
			    "%s/%s/%s, which the manifest names, is lost: the frozen views that "
			    "need it give EIO",
			    rc->store->fleece_path, snap->name, inode->image);
		}
		r = add_found(rc, &f);
	}
	return r;
}

/* A tree that is a root and nothing else, for a snapshot whose manifest cannot be used. */
static int bare_tree(int dirfd, struct tree **out)
{
	struct ff_frozen root = {.disk = TREE_NO_DISK};
	uint32_t index;
	int r = io_fstat(dirfd, &root.st);

	if (r)
		return r;
	*out = calloc(1, sizeof **out);
	return *out ? tree_add(*out, &root, &index) : -ENOMEM;
}

/* Looks for a file whose name is WANTED; *OTHER is one, or "". */
static int look_through(int dirfd, const char *name, bool (*wanted)(const char *name),
                        char other[NAME_MAX + 1])
{
	const struct dirent *e;
	DIR *dir;
	int fd, r = io_openat(dirfd, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW, 0, &fd);

	if (!r)
		r = io_fdopendir(fd, &dir);
	if (r)
		return r;
	while (!*other && !(r = io_readdir(dir, &e)) && e) {
		struct statx sx;

		r = io_statx(fd, e->d_name, &sx);
		if (!r && S_ISDIR(sx.stx_mode))
			r = look_through(fd, e->d_name, wanted, other);
		else if (!r && wanted(e->d_name))
			snprintf(other, NAME_MAX + 1, "%s", e->d_name);
		if (r)
			break;
	}
	closedir(dir);
	return r;
}

static bool is_not_ours(const char *name)
{
	return !names_ours(name);
}

/* Is it another directory's? It names no image that is here, and there are some. What it says would
 * cost views of other snapshots, and for good. */
static bool is_foreign(const struct fleece_dir *dir, const struct manifest *m)
{
	char other[NAME_MAX + 1] = "";

	for (uint32_t i = 0; i < m->tree->disk_count; i++) {
		const struct ff_frozen *inode = &m->tree->inodes[m->tree->disks[i]];
		ff_autoclose int fd = -1;

		if (io_open_beneath(dir->fd, inode->image, O_PATH | O_NOFOLLOW, 0, &fd) != -ENOENT)
			return false;
	}
	return look_through(dir->fd, ".", is_image, other) == 0 && *other;
}

static int read_manifest(struct fleece_dir *dir, struct manifest *m)
{
	int r = manifest_read(dir->fd, dir->name, m);

	if (!r && is_foreign(dir, m)) {
		ff_error("%s/manifest: it names none of the images that are there, and must be "
		         "another snapshot's",
		         dir->name);
		tree_free(m->tree);
		m->tree = NULL;
		r = -EINVAL;
	}
	return r;
}

/* A mkdir that did not come to its end. What somebody has put there since is not for us to delete.
 */
static int undo_mkdir(struct recovery *rc, const char *name)
{
	struct ff_store *s = rc->store;
	char hidden[DROPPED_MAX], other[NAME_MAX + 1] = "";
	int r = look_through(s->fleece_fd, name, is_not_ours, other);

	if (*other) {
		ff_error("%s/%s is no snapshot, and holds what fleecefs has not made (%s): left "
		         "alone; move it away",
		         s->fleece_path, name, other);
		return 0;
	}
	if (!r)
		r = drop_rename(s, name, hidden, sizeof hidden);
	if (!r)
		r = io_fsync(s->fleece_fd); /* before its mark goes */
	if (r) {
		ff_error("%s/%s: an interrupted mkdir cannot be undone: %s", s->fleece_path, name,
		         strerror(-r));
		return r;
	}
	ff_info("%s/%s: an interrupted mkdir is undone", s->fleece_path, name);
	return take_hidden(rc, hidden);
}

static int take_snapshot(struct recovery *rc, const char *name)
{
	struct manifest m = {0};
	struct ff_store *s = rc->store;
	struct fleece_dir *dir;
	struct ff_snap *snap;
	bool checkpoint = false;
	int r = open_dir(s, name, &dir), bad;

	if (r)
		return recovery_is_gone(r) ? 0 : r;
	bad = read_manifest(dir, &m);
	if (bad == -ENOENT)
		ff_error("%s/%s/manifest is lost: what the snapshot shows gives EIO; remove it "
		         "with rmdir, or, if fleecefs has not made it, move it away",
		         s->fleece_path, name);
	r = checkpoint_marked(dir->fd, &checkpoint);
	if (r) {
		ff_error("%s/%s/" NAMES_CHECKPOINT ": %s", s->fleece_path, name, strerror(-r));
		tree_free(m.tree);
		fleece_dir_close(dir);
		return r;
	}
	making_done(s, dir); /* cut short between the manifest and that, or never called for */
	if (bad && !is_lost(bad)) {
		fleece_dir_close(dir);
		return bad;
	}
	snap = snap_new(s, name, bad ? 0 : m.seq);
	if (snap) {
		snap->tree = m.tree;
		r = bad ? bare_tree(dir->fd, &snap->tree) : 0;
	}
	if (!snap || r) {
		r = snap ? r : -ENOMEM;
		if (snap)
			snap_free_memory(snap);
		else
			tree_free(m.tree);
		fleece_dir_close(dir);
		return r;
	}
	snap->dir = dir;
	snap->made = bad ? 0 : m.made;
	snap->absent = !bad && !known_has(rc->known, m.made, m.seq, dir->fd);
	snap->ephemeral = !bad && m.ephemeral;
	snap->durable = !bad && m.durable;
	snap->checkpoint = checkpoint;
	snap->damaged = bad;
	snap->link_count = snap->tree->disk_count;
	snap_publish(snap); /* from here on it is freed with the store */
	if (snap->absent)
		ff_error("%s/%s: it was not there when fleecefs was mounted last, and lacks what "
		         "was changed then: all of its views are lost; remove it with rmdir",
		         s->fleece_path, name);
	else
		r = bad ? load_below(rc, dir, snap) : take_images(rc, snap, &m);
	if (r)
		return r;
	snap->links = calloc(snap->link_count + 1, sizeof(struct link *));
	return snap->links ? 0 : -ENOMEM;
}

static int take_dir(struct recovery *rc, const char *name, enum dir_kind kind)
{
	return kind == DIR_SNAPSHOT ? take_snapshot(rc, name)
	       : kind == DIR_UNMADE ? undo_mkdir(rc, name)
	                            : take_hidden(rc, name);
}

/* Takes the directories; the names were read before, for an interrupted mkdir is renamed here. */
int recovery_load(struct recovery *rc, const struct names *names)
{
	int r = 0;

	for (size_t i = 0; i < names->count && !r; i++)
		r = take_dir(rc, names->list[i].name, names->list[i].kind);
	return r;
}
