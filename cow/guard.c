/*
 * Keeping others off SOURCE: a lock on the directory, and one on each disk.
 *
 * SOURCE's directory carries an flock(2), so that no second fleecefs (with another FLEECE_DIR, or
 * by another path to the same directory) changes disks which the first believes its own. One that
 * ends turns its exclusive lock into a shared one: who comes meanwhile gets a shared one too, knows
 * that it need only wait, and waits.
 *
 * Each disk carries what QEMU takes for "I do not share writing": a shared OFD lock on byte 201. So
 * no virtual machine is started on a source, past the mount, by mistake; programs that only read
 * (qemu-img check, info, convert) are not hindered. Virtual machines on the mount have the locks of
 * the FUSE inode, which are others.
 *
 * A lock lives as long as the descriptor it was taken with. That costs a descriptor a disk, so
 * there is a budget, and of more files than that the largest are taken first; a file opened or made
 * through the mount later is taken while the budget lasts. And it holds the inode, so the lock goes
 * with the disk's last name, lest the space of a deleted disk stays taken.
 *
 * The table is under its own lock, a leaf. A guard is made whole before it is put in.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#include "cow/engine.h"
#include "cow/io.h"
#include "cow/tree.h"
#include "ff_log.h"
#include "ff_util.h"

enum {
	MOST = 16384,
	SHARE = 8, /* this part of all descriptors, at most */
	BUCKETS = 4096,
	POLL_MS = 20,
	BEGIN_MS = 1500,   /* an end may be about to begin */
	ENDING_MS = 60000, /* it has begun */
	QEMU_WRITES = 101, /* held by who writes */
	QEMU_UNSHARES_WRITING = 201,
};

struct guard {
	dev_t dev;
	ino_t ino;
	int fd;
	struct guard *next;
};

struct guards {
	pthread_mutex_t lock; /* the following; a leaf */
	size_t count, budget;
	bool said_full, said_unsupported;
	struct guard *buckets[BUCKETS];
};

static struct guard **bucket(struct guards *g, ino_t ino)
{
	return &g->buckets[(ino * UINT64_C(0x9e3779b97f4a7c15)) >> 52];
}

_Static_assert(BUCKETS == 1 << 12, "the shift above takes the upper 12 bits");

/* Where the guard of this inode is pointed to from, or NULL. Lock held. */
static struct guard **find(struct guards *g, dev_t dev, ino_t ino)
{
	for (struct guard **at = bucket(g, ino); *at; at = &(*at)->next)
		if ((*at)->ino == ino && (*at)->dev == dev)
			return at;
	return NULL;
}

/* Takes out what *AT points to. Lock held. */
static void take_out(struct guards *g, struct guard **at)
{
	struct guard *gone = *at;

	*at = gone->next;
	g->count--;
	close(gone->fd);
	free(gone);
}

/* Is there none yet, and room for one? */
static bool wants(struct guards *g, dev_t dev, ino_t ino)
{
	FF_GUARD(&g->lock);
	if (find(g, dev, ino))
		return false;
	if (g->count < g->budget)
		return true;
	if (!g->said_full)
		ff_warning(
		    "more files than descriptors for their locks (%zu): QEMU is not kept "
		    "off the smaller and newer ones of SOURCE; raise the limit of open files "
		    "to have more",
		    g->budget);
	g->said_full = true;
	return false;
}

static int put_in(struct guards *g, const struct stat *st, int fd)
{
	struct guard *guard = malloc(sizeof *guard), **at = bucket(g, st->st_ino);

	if (!guard)
		return -ENOMEM;
	*guard = (struct guard){st->st_dev, st->st_ino, fd, NULL};
	FF_GUARD(&g->lock);
	if (find(g, st->st_dev, st->st_ino)) {
		free(guard);
		return -EEXIST;
	}
	guard->next = *at;
	*at = guard;
	g->count++;
	return 0;
}

static void say_unsupported(struct guards *g, int error)
{
	FF_GUARD(&g->lock);
	if (!g->said_unsupported)
		ff_warning("SOURCE's filesystem has no locks (%s): QEMU is not kept off its files",
		           strerror(-error));
	g->said_unsupported = true;
}

/* Locks the regular file behind FD (O_PATH will do). NAME: for messages, or NULL. -EACCES: it may
 * not be read. */
static int guard_file(struct ff_store *s, int fd, const char *name)
{
	ff_autoclose int own = -1;
	struct stat st;
	bool writer = false;
	int r = io_fstat(fd, &st);

	if (r || !S_ISREG(st.st_mode) || st.st_nlink == 0 ||
	    !wants(s->guards, st.st_dev, st.st_ino))
		return r;
	r = io_reopen(fd, O_RDONLY, &own);
	if (r)
		return r;
	if (name && io_is_locked(own, QEMU_WRITES, &writer) == 0 && writer)
		ff_warning(
		    "%s/%s: another program (QEMU?) has it open for writing, past the mount: "
		    "what it writes spoils snapshots; let it use the file in the mount",
		    s->source_path, name);
	r = io_lock_shared(own, QEMU_UNSHARES_WRITING);
	if (r == -EAGAIN || r == -EACCES) {
		ff_warning("%s/%s: another program has locked it", s->source_path,
		           name ? name : "(opened)");
		return 0;
	}
	if (r) {
		say_unsupported(s->guards, r);
		return 0;
	}
	r = put_in(s->guards, &st, own);
	if (!r)
		ff_take_fd(&own);
	return r == -EEXIST ? 0 : r;
}

void guard_add(struct ff_store *s, int fd)
{
	if (s->guards)
		guard_file(s, fd, NULL);
}

void guard_unnamed(struct ff_store *s, dev_t dev, ino_t ino)
{
	struct guard **at;
	struct stat st;

	if (!s->guards)
		return;
	FF_GUARD(&s->guards->lock);
	at = find(s->guards, dev, ino);
	if (at && (io_fstat((*at)->fd, &st) || st.st_nlink == 0))
		take_out(s->guards, at);
}

void guard_sweep(struct ff_store *s)
{
	if (!s->guards)
		return;
	FF_GUARD(&s->guards->lock);
	for (size_t i = 0; i < BUCKETS; i++)
		for (struct guard **at = &s->guards->buckets[i]; *at;) {
			struct stat st;

			if (io_fstat((*at)->fd, &st) || st.st_nlink == 0)
				take_out(s->guards, at);
			else
				at = &(*at)->next;
		}
}

static int larger_first(const void *a, const void *b)
{
	off_t x = (*(struct ff_frozen *const *)a)->st.st_size;
	off_t y = (*(struct ff_frozen *const *)b)->st.st_size;

	return FF_ORDER(y, x);
}

/* Locks the largest files of the tree. */
static int guard_tree(struct ff_store *s, const struct tree *t)
{
	ff_autofree const struct ff_frozen **disks =
	    calloc((size_t)t->disk_count + 1, sizeof *disks);
	size_t unreadable = 0, n = 0;
	int r = 0;

	if (!disks)
		return -ENOMEM;
	for (uint32_t i = 0; i < t->disk_count; i++)
		if (t->inodes[t->disks[i]].st.st_size > 0)
			disks[n++] = &t->inodes[t->disks[i]];
	qsort(disks, n, sizeof *disks, larger_first);
	for (size_t i = 0; i < n && r != -ENOMEM && r != -EMFILE; i++) {
		ff_autoclose int fd = -1;

		if (!wants(s->guards, s->source_dev, disks[i]->st.st_ino))
			continue;
		r = io_open_beneath(s->source_fd, disks[i]->path, O_PATH | O_NOFOLLOW, 0, &fd);
		if (!r)
			r = guard_file(s, fd, disks[i]->path);
		unreadable += r == -EACCES || r == -EPERM;
	}
	if (unreadable)
		ff_warning("%zu files of SOURCE may not be read: QEMU is not kept off them",
		           unreadable);
	return r == -ENOMEM || r == -EMFILE ? r : 0;
}

int guard_open(struct ff_store *s)
{
	struct tree_walk how = {.source_fd = s->source_fd,
	                        .dev = s->source_dev,
	                        .hide_dev = s->fleece_dev,
	                        .hide_ino = s->fleece_ino,
	                        .hide_name = FF_HIDDEN_NAME};
	struct guards *g;
	struct rlimit rl;
	struct tree *t;
	int r;

	if (!s->cfg.source_lock)
		return 0;
	g = calloc(1, sizeof *g);
	if (!g)
		return -ENOMEM;
	pthread_mutex_init(&g->lock, NULL);
	g->budget = MOST;
	if (getrlimit(RLIMIT_NOFILE, &rl) == 0)
		g->budget = FF_MIN(g->budget, rl.rlim_cur / SHARE);
	s->guards = g;
	r = tree_walk(&how, &t);
	if (!r) {
		r = guard_tree(s, t);
		tree_free(t);
	}
	if (r && r != -ENOMEM) {
		ff_warning("%s: QEMU is not kept off all of its files: %s", s->source_path,
		           strerror(-r));
		r = 0;
	}
	return r;
}

void guard_close(struct ff_store *s)
{
	if (s->guards) {
		for (size_t i = 0; i < BUCKETS; i++)
			while (s->guards->buckets[i])
				take_out(s->guards, &s->guards->buckets[i]);
		pthread_mutex_destroy(&s->guards->lock);
		free(s->guards);
	}
	if (s->source_lock_fd >= 0)
		close(s->source_lock_fd);
}

int guard_source(struct ff_store *s)
{
	int r = io_openat(s->source_fd, ".", O_RDONLY | O_DIRECTORY, 0, &s->source_lock_fd);

	for (int waited = 0, most = BEGIN_MS; !r; waited += POLL_MS) {
		r = io_flock(s->source_lock_fd, LOCK_EX);
		if (!r)
			return 0;
		if (r != -EWOULDBLOCK)
			break;
		/* Who ends lets others share. It is given back before the next try. */
		if (io_flock(s->source_lock_fd, LOCK_SH) == 0) {
			most = ENDING_MS;
			io_flock(s->source_lock_fd, LOCK_UN);
		}
		r = waited >= most ? -EBUSY : 0;
		if (!r)
			nanosleep(&(struct timespec){.tv_nsec = POLL_MS * 1000000L}, NULL);
	}
	if (r == -EBUSY) {
		ff_error("%s: another fleecefs has this SOURCE mounted: unmount that first",
		         s->source_path);
	} else {
		ff_warning("%s: cannot be locked (%s): see to it yourself that no other fleecefs "
		           "mounts it",
		           s->source_path, strerror(-r));
		r = 0;
	}
	return r;
}

int guard_ending(struct ff_store *s)
{
	return s->source_lock_fd < 0 ? 0 : io_flock(s->source_lock_fd, LOCK_SH);
}
