/*
 * Changes of names, and disks that lose theirs.
 *
 * A disk that a snapshot needs must stay an inode of SOURCE. So before a name of it goes (unlink,
 * rename over) it gets another, in a directory that the mount never shows, and then the system call
 * is made as it is: the live tree changes in one step, and a crash in between leaves an additional
 * name at the worst. The name aside is not counted in the st_nlink that the mount reports. It goes
 * when the last view of the disk goes, and with it, perhaps, the inode.
 *
 * The newest image of each chain names its source by path. Renames keep that right: a file's is
 * looked up by its inode; a directory's are all disks whose path leads through it.
 *
 * All of it happens with names held shared and the lock `paths` held, so that the order in which
 * paths are noted is that of the system calls.
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/fs.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <xxhash.h>

#include "cow/engine.h"
#include "cow/io.h"
#include "cow/reasons.h"
#include "ff_log.h"
#include "ff_util.h"

int aside_home(int fleece_fd, char *out, size_t size)
{
	struct identity id;
	int r = identity_of(fleece_fd, "", &id, NULL);

	if (r)
		return r;
	id.dev = 0;
	snprintf(out, size, "%s/.aside-%016llx", FF_HIDDEN_NAME,
	         (unsigned long long)XXH3_64bits(&id, sizeof id));
	return 0;
}

int aside_path(const struct ff_store *s, const struct identity *id, char *out, size_t size)
{
	int n = snprintf(out, size, "%s/%llx-%llx-%x", s->aside_path, (unsigned long long)id->ino,
	                 (unsigned long long)id->btime_sec, id->btime_nsec);

	return n < 0 || (size_t)n >= size ? -ENAMETOOLONG : 0;
}

/* One of the two directories. Whoever may write it could take disks away, or have us delete what is
 * not ours: it must be ours alone. */
static int open_private(const struct ff_store *s, const char *path, bool tell, int *out)
{
	ff_autoclose int fd = -1;
	struct stat st;
	int r = io_open_beneath(s->source_fd, path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW, 0, &fd);

	if (!r)
		r = io_fstat(fd, &st);
	if (!r && (st.st_mode & 022 || (st.st_uid != geteuid() && st.st_uid != 0)))
		r = -EPERM;
	if (!r && st.st_dev != s->source_dev)
		r = -EXDEV; /* no disk can have a name there */
	if (!r)
		*out = ff_take_fd(&fd);
	else if (r != -ENOENT && (tell || r != -EXDEV))
		ff_error("%s/%s: must be a directory that only the user who mounts may write: %s",
		         s->source_path, path, strerror(-r));
	return r;
}

int aside_find(const struct ff_store *s, int *fd)
{
	ff_autoclose int hidden = -1;
	int r = open_private(s, FF_HIDDEN_NAME, false, &hidden);

	return r ? r : open_private(s, s->aside_path, true, fd);
}

int aside_open(const struct ff_store *s, bool durable, int *fd)
{
	ff_autoclose int hidden = -1;
	int r = aside_find(s, fd);

	if (r != -ENOENT)
		return r;
	r = io_mkdirat(s->source_fd, FF_HIDDEN_NAME, 0700);
	if (!r || r == -EEXIST)
		r = open_private(s, FF_HIDDEN_NAME, true, &hidden);
	if (!r)
		r = io_mkdirat(s->source_fd, s->aside_path, 0700);
	if ((!r || r == -EEXIST) && durable) {
		r = io_fsync(hidden);
		if (!r)
			r = io_fsync(s->source_fd);
	}
	if (!r || r == -EEXIST)
		r = open_private(s, s->aside_path, true, fd);
	return r;
}

/* Notes that the disk lies aside: the one path that no change of names takes away. Lock: paths. */
static int move_aside(struct ff_disk *d)
{
	char path[PATH_MAX], *copy;
	int r = aside_path(d->store, &d->id, path, sizeof path);

	if (r)
		return r;
	copy = strdup(path);
	if (!copy)
		return -ENOMEM;
	free(d->path);
	d->path = copy;
	disk_repath(d);
	return 0;
}

void aside_adopt(struct ff_disk *d)
{
	d->aside = true;
	atomic_store(&d->has_aside, true);
	atomic_fetch_add(&d->store->asides, 1);
}

/* Gives the disk behind FD its name aside. Lock: paths. */
static int keep(struct ff_disk *d, int fd)
{
	struct ff_store *s = d->store;
	char path[PATH_MAX];
	const char *name;
	int r = s->aside_fd >= 0 ? 0 : aside_open(s, atomic_load(&d->durable), &s->aside_fd);

	if (!r)
		r = aside_path(s, &d->id, path, sizeof path);
	if (r)
		return r;
	name = strrchr(path, '/') + 1;
	r = io_linkfd(fd, s->aside_fd, name);
	if (r == -EEXIST) { /* the name says which inode it is: this one */
		r = io_unlinkat(s->aside_fd, name, 0);
		if (!r)
			r = io_linkfd(fd, s->aside_fd, name);
	}
	/* The other name is about to go: not before this one is sure to stay. */
	if (!r && atomic_load(&d->durable))
		r = io_fsync(s->aside_fd);
	if (r)
		return r;
	aside_adopt(d);
	return move_aside(d);
}

void aside_release(struct ff_disk *d)
{
	struct ff_store *s = d->store;
	char path[PATH_MAX];

	FF_GUARD(&s->paths);
	if (atomic_load(&d->top))
		return;
	if (d->aside) {
		int r = aside_path(s, &d->id, path, sizeof path);

		if (!r)
			r = io_unlinkat(s->source_fd, path, 0);
		if (r && r != -ENOENT)
			ff_warning("%s/%s: cannot delete: %s", s->source_path, path, strerror(-r));
		d->aside = false;
		atomic_store(&d->has_aside, false);
		atomic_fetch_sub(&s->asides, 1);
		guard_unnamed(s, d->id.dev, d->id.ino);
	}
	free(ff_take_ptr(&d->path));
}

void aside_sweep(struct ff_store *s)
{
	int fd = -1;
	const struct dirent *e;
	DIR *dir;

	if (aside_find(s, &fd) || io_fdopendir(fd, &dir))
		return;
	while (io_readdir(dir, &e) == 0 && e) {
		struct identity id;
		struct ff_disk *d;

		if (e->d_name[0] == '.' || identity_of(fd, e->d_name, &id, NULL))
			continue;
		d = disk_peek(s, id.dev, id.ino);
		if (!d || !atomic_load(&d->has_aside))
			io_unlinkat(fd, e->d_name, 0);
		if (d)
			disk_unref(d);
	}
	closedir(dir);
}

void ff_store_fix_stat(struct ff_store *store, struct stat *st)
{
	struct ff_disk *d;

	if (!S_ISREG(st->st_mode) || atomic_load(&store->asides) == 0)
		return;
	d = disk_peek(store, st->st_dev, st->st_ino);
	if (!d)
		return;
	if (atomic_load(&d->has_aside) && st->st_nlink > 0)
		st->st_nlink--;
	disk_unref(d);
}

/* The disk called NAME that has a chain: a reference and a descriptor of it, or *OUT NULL. */
static int chained_disk(struct ff_store *s, int parent, const char *name, struct ff_disk **out,
                        int *fd)
{
	struct identity id;
	struct ff_disk *d;
	struct stat st;
	int r = identity_of(parent, name, &id, &st);

	*out = NULL;
	if (r) /* what cannot be told is not to go */
		return r == -ENOENT ? 0 : r;
	if (!S_ISREG(st.st_mode) || disk_find(s, &id, false, &d))
		return 0;
	if (!atomic_load(&d->top)) {
		disk_unref(d);
		return 0;
	}
	r = io_openat(parent, name, O_PATH | O_NOFOLLOW, 0, fd);
	if (!r)
		r = identity_of(*fd, "", &id, NULL);
	if (!r && !identity_same(&id, &d->id))
		r = -EBUSY; /* SOURCE is being changed behind the mount, this instant */
	if (r)
		disk_unref(d);
	else
		*out = d;
	return r;
}

/* NAME is about to go. Not if it is another name of the inode SPARED. Lock: paths. */
static int before_loss(struct ff_store *s, int parent, const char *name,
                       const struct identity *spared)
{
	ff_autoclose int fd = -1;
	struct ff_disk *d;
	int r = chained_disk(s, parent, name, &d, &fd);

	if (r || !d)
		return r;
	if (d->aside && !(spared && identity_same(spared, &d->id)))
		r = move_aside(d); /* its path may be the name that goes */
	if (!d->aside && !(spared && identity_same(spared, &d->id))) {
		r = keep(d, fd);
		if (r && s->cfg.policy == FF_BREAK_SNAPSHOT) {
			r = chain_break_all(d, WHY_REMOVED);
		}
	}
	disk_unref(d);
	return r;
}

int ff_store_unlink(struct ff_store *store, int parent_fd, const char *name)
{
	struct identity id;
	bool known;
	int r;

	pthread_rwlock_rdlock(&store->names);
	pthread_mutex_lock(&store->paths);
	known = store->guards && identity_of(parent_fd, name, &id, NULL) == 0;
	r = before_loss(store, parent_fd, name, NULL);
	if (!r)
		r = io_unlinkat(parent_fd, name, 0);
	if (!r && known)
		guard_unnamed(store, id.dev, id.ino);
	pthread_mutex_unlock(&store->paths);
	pthread_rwlock_unlock(&store->names);
	return r;
}

/* The path below SOURCE of the entry NAME of PARENT. */
static int path_below(struct ff_store *s, int parent, const char *name, char *out, size_t size)
{
	char proc[40], dir[PATH_MAX], top[PATH_MAX];
	size_t m;
	int r;

	snprintf(proc, sizeof proc, "/proc/self/fd/%d", parent);
	r = io_readlinkat(AT_FDCWD, proc, dir, sizeof dir);
	snprintf(proc, sizeof proc, "/proc/self/fd/%d", s->source_fd);
	if (!r)
		r = io_readlinkat(AT_FDCWD, proc, top, sizeof top);
	if (r)
		return r;
	m = strlen(top);
	if (m == 1)
		m = 0; /* SOURCE is the root directory */
	if (strncmp(dir, top, m) != 0 || (dir[m] && dir[m] != '/'))
		return -ESTALE;
	r = snprintf(out, size, "%s%s%s", dir[m] ? dir + m + 1 : "",
	             dir[m] && dir[m + 1] ? "/" : "", name);
	return r < 0 || (size_t)r >= size ? -ENAMETOOLONG : 0;
}

/* Both ends of a move. Deeper than paths reach, where nothing is frozen, there is nothing to note:
 * the path is then empty, and no disk's. But nothing goes down there that may have to be found
 * again. */
static int paths_of_move(struct ff_store *s, int old_parent, const char *old_name, char *from,
                         int new_parent, const char *new_name, char *to, bool exchange)
{
	int up = path_below(s, old_parent, old_name, from, PATH_MAX);
	int down = path_below(s, new_parent, new_name, to, PATH_MAX);

	if (up == -ENAMETOOLONG && (down == -ENAMETOOLONG || !exchange))
		*from = '\0';
	else if (up)
		return up;
	if (down == -ENAMETOOLONG && !*from)
		*to = '\0';
	else if (down)
		return down;
	return 0;
}

/* Does FLEECE_DIR lie below PATH in SOURCE? Moved away with it, the next mount would not find it.
 */
static bool holds_fleece_dir(struct ff_store *s, const char *path)
{
	char own[PATH_MAX];
	size_t n = strlen(path);

	return path_below(s, s->fleece_fd, "", own, sizeof own) == 0 &&
	       strncmp(own, path, n) == 0 && own[n] == '/';
}

struct move {
	const char *from, *to;
	bool exchange;
	struct identity id, other; /* of what is moved, and of what stands at TO */
	mode_t mode, other_mode;   /* 0: nothing stands there */
};

/* PATH with the part OLD replaced by NEW, if it is OLD or leads through it; else *OUT is NULL. */
static int replaced(const char *path, const char *old, const char *new, char **out)
{
	size_t n = strlen(old);

	*out = NULL;
	if (strncmp(path, old, n) != 0 || (path[n] && path[n] != '/'))
		return 0;
	return asprintf(out, "%s%s", new, path + n) < 0 ? -ENOMEM : 0;
}

/* Where it will be; what needs memory is done before the move. */
static int prepare_move(struct ff_disk *d, void *ctx)
{
	const struct move *m = ctx;
	int r;

	free(ff_take_ptr(&d->next_path));
	if (!d->path || d->path[0] == '/') /* a block device lies elsewhere */
		return 0;
	r = replaced(d->path, m->from, m->to, &d->next_path);
	if (!r && !d->next_path && m->exchange)
		r = replaced(d->path, m->to, m->from, &d->next_path);
	return r;
}

static int note_move(struct ff_disk *d, void *ctx)
{
	(void)ctx;
	if (d->next_path) {
		free(d->path);
		d->path = ff_take_ptr(&d->next_path);
		disk_repath(d);
	}
	return 0;
}

static int for_file(struct ff_store *s, const struct identity *id, mode_t mode,
                    int (*fn)(struct ff_disk *, void *), struct move *m)
{
	struct ff_disk *d;
	int r;

	if (!S_ISREG(mode) || disk_find(s, id, false, &d))
		return 0;
	r = fn(d, m);
	disk_unref(d);
	return r;
}

/* FN for each disk that may be in what is moved. */
static int for_moved(struct ff_store *s, struct move *m, int (*fn)(struct ff_disk *, void *))
{
	int r;

	if (S_ISDIR(m->mode) || (m->exchange && S_ISDIR(m->other_mode)))
		return disk_each(s, fn, m);
	r = for_file(s, &m->id, m->mode, fn, m);
	return r || !m->exchange ? r : for_file(s, &m->other, m->other_mode, fn, m);
}

static int rename_noted(struct ff_store *s, int old_parent, const char *old_name, int new_parent,
                        const char *new_name, unsigned flags)
{
	char from[PATH_MAX], to[PATH_MAX];
	struct move m = {.from = from, .to = to, .exchange = flags & RENAME_EXCHANGE};
	struct stat st = {0}, other = {0};
	int r = identity_of(old_parent, old_name, &m.id, &st), e = -ENOENT;

	if (m.exchange || s->guards)
		e = identity_of(new_parent, new_name, &m.other, &other);
	m.mode = st.st_mode;
	m.other_mode = e ? 0 : other.st_mode;
	if (!r && m.exchange)
		r = e;
	if (!r && !(flags & (RENAME_EXCHANGE | RENAME_NOREPLACE)))
		r = before_loss(s, new_parent, new_name, &m.id);
	if (!r)
		r = paths_of_move(s, old_parent, old_name, from, new_parent, new_name, to,
		                  m.exchange);
	if (!r && ((S_ISDIR(m.mode) && holds_fleece_dir(s, from)) ||
	           (m.exchange && holds_fleece_dir(s, to))))
		r = -EBUSY;
	if (!r)
		r = for_moved(s, &m, prepare_move);
	if (!r)
		r = io_renameat(old_parent, old_name, new_parent, new_name, flags);
	if (r)
		return r;
	if (m.other_mode)
		guard_unnamed(s, m.other.dev, m.other.ino);
	return for_moved(s, &m, note_move);
}

int ff_store_rename(struct ff_store *store, int old_parent_fd, const char *old_name,
                    int new_parent_fd, const char *new_name, unsigned flags)
{
	int r;

	pthread_rwlock_rdlock(&store->names);
	pthread_mutex_lock(&store->paths);
	r = rename_noted(store, old_parent_fd, old_name, new_parent_fd, new_name, flags);
	pthread_mutex_unlock(&store->paths);
	pthread_rwlock_unlock(&store->names);
	return r;
}
