/*
 * The drop: rmdir snapshots/NAME.
 *
 *   1. Wait for readers that are about to close; mark the snapshot dropped.
 *   2. Rename its directory to .dropped-SEQ: from here on it is dropped, for the next mount too.
 *   3. Collect: links with no older one leave their chains, and so do newer hidden ones that they
 *      kept alive. The rest become hidden: what an older view reads before it comes to them is
 *      marked (never save that here) and given up; if nothing is left, and no older disk was longer
 *      (its end is what says "zeros" for older views), they leave the chain as well.
 *   4. Put right the backing names of what stayed, delete the images that left.
 *
 * A daemon killed anywhere in 3 or 4 leaves .dropped-SEQ; the next mount loads its images as hidden
 * links and collects again.
 *
 * Links leave a chain while names are held, the barrier is closed and the chain lock is held. A
 * writer may still be saving to such a link (it has it pinned): it finds another newest link
 * afterwards and saves there, before it changes the source. A reader of an older view may stand on
 * it: the barrier `reads` is closed once before it is freed.
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "cow/engine.h"
#include "cow/io.h"
#include "cow/manifest.h"
#include "ff_log.h"
#include "ff_util.h"

enum { READERS_WAIT_S = 5, QUIET_MS = 200, QUIET_TRIES = 150, KINDS = 512 };

struct collect {
	struct ff_store *store;
	struct link **links; /* those whose snapshot goes */
	size_t count;
	uint64_t *saves;        /* per link: saves when it was found empty, or NOT_EMPTY */
	struct link *gone;      /* taken out, by `older` */
	struct ff_disk **disks; /* touched, each with a reference */
	size_t disk_count;
};

#define NOT_EMPTY UINT64_MAX

/* Removes NAME below DIRFD and all that is in it. */
static void remove_tree(int dirfd, const char *name)
{
	int fd = openat(dirfd, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
	DIR *dir = fd < 0 ? NULL : fdopendir(fd);
	struct dirent *e;

	if (!dir) {
		if (fd >= 0)
			close(fd);
		return;
	}
	while ((e = readdir(dir))) {
		if (strcmp(e->d_name, ".") == 0 || strcmp(e->d_name, "..") == 0)
			continue;
		if (io_unlinkat(fd, e->d_name, 0) == -EISDIR)
			remove_tree(fd, e->d_name);
	}
	closedir(dir);
	io_unlinkat(dirfd, name, AT_REMOVEDIR);
}

void fleece_dir_release(struct ff_store *s, struct fleece_dir *dir)
{
	struct fleece_dir **at;

	for (at = &s->hidden; *at && *at != dir; at = &(*at)->next_hidden)
		;
	if (dir->links > 0) {
		io_unlinkat(dir->fd, MANIFEST_NAME, 0);
		if (!*at) {
			dir->next_hidden = s->hidden;
			s->hidden = dir;
		}
		return;
	}
	if (*at)
		*at = dir->next_hidden;
	remove_tree(s->fleece_fd, dir->name);
	close(dir->fd);
	free(dir->name);
	free(dir);
}

/* Holds names, closes the barrier, takes the chain lock. A write that hangs must not hang the
 * others: the barrier is tried for a short time, again and again. */
static bool stop_writers(struct ff_store *s)
{
	for (int i = 0; i < QUIET_TRIES; i++) {
		pthread_rwlock_wrlock(&s->names);
		if (barrier_close(s->writes, QUIET_MS) == 0) {
			pthread_mutex_lock(&s->chain);
			return true;
		}
		pthread_rwlock_unlock(&s->names);
		nanosleep(&(struct timespec){.tv_nsec = QUIET_MS * 1000000L}, NULL);
	}
	ff_warning(
	    "a write to a disk does not end: images of dropped snapshots stay until the next "
	    "drop or mount");
	return false;
}

static void let_writers(struct ff_store *s)
{
	pthread_mutex_unlock(&s->chain);
	barrier_open(s->writes);
	pthread_rwlock_unlock(&s->names);
}

/* Takes L out of its chain. Writers are stopped. */
static void take_out(struct collect *c, struct link *l)
{
	struct link *newer = atomic_load(&l->newer), *older = l->older;

	if (newer)
		newer->older = older;
	else
		atomic_store(&l->disk->top, older);
	if (older)
		atomic_store_explicit(&older->newer, newer, memory_order_release);
	l->older = c->gone;
	l->out = true;
	c->gone = l;
}

/* Step 3, first part: of the hidden links, those that are the oldest leave. */
static void hide(struct collect *c)
{
	for (size_t i = 0; i < c->count; i++) {
		struct link *l = c->links[i];

		if (l->out || l->older)
			continue;
		while (l && !l->snap) {
			struct link *newer = atomic_load(&l->newer);

			take_out(c, l);
			l = newer;
		}
	}
}

/* Nobody reads the clusters [first, first+count) in L any more. */
static int give_up(struct link *l, uint64_t first, uint64_t count)
{
	int r = ff_image_skip(l->img, first, count);

	if (r)
		return r;
	/* No save begins there any more; those that had begun write entries of the same tables. */
	preserve_settle(l->disk, first, count);
	return ff_image_release(l->img, first, count);
}

static int give_up_marked(struct link *l, struct link *older)
{
	uint64_t end = FF_MIN(l->clusters, older->clusters);
	int r = 0;

	for (uint64_t at = 0, n; at < end && !r; at += n) {
		bool marked;

		n = ff_image_run(older->img, at, end - at, &marked);
		if (marked)
			r = give_up(l, at, n);
	}
	return r;
}

static bool holds_nothing(struct link *l)
{
	uint8_t kinds[KINDS];

	for (uint64_t at = 0, n; at < l->clusters; at += n) {
		bool marked;

		n = FF_MIN(ff_image_run(l->img, at, l->clusters - at, &marked), KINDS);
		if (!marked)
			continue;
		if (ff_image_kinds(l->img, at, n, kinds))
			return false;
		for (uint64_t i = 0; i < n; i++)
			if (kinds[i] != FF_KIND_NONE)
				return false;
	}
	return true;
}

/* Step 3, second part, with writers and readers going on: shrinks hidden L to what the views older
 * than it need. Returns its count of saves if it may leave, else NOT_EMPTY. */
static uint64_t shrink(struct link *l)
{
	uint64_t saves = atomic_load(&l->saves), end = l->clusters, longest = 0;
	int r = 0;

	for (struct link *o = l->older; o && !r; o = o->older) {
		r = give_up_marked(l, o);
		end = FF_MIN(end, o->clusters);
		longest = FF_MAX(longest, o->clusters);
		if (o->snap)
			break;
	}
	if (!r && end < l->clusters)
		r = give_up(l, end, l->clusters - end);
	if (r) {
		ff_warning("%s: cannot be made smaller: %s", ff_image_path(l->img), strerror(-r));
		return NOT_EMPTY;
	}
	return longest <= l->clusters && holds_nothing(l) ? saves : NOT_EMPTY;
}

static void leave_if_empty(struct collect *c)
{
	for (size_t i = 0; i < c->count; i++)
		if (c->saves[i] != NOT_EMPTY && atomic_load(&c->links[i]->saves) == c->saves[i])
			take_out(c, c->links[i]);
}

/* Step 4 for one disk. */
static void settle(struct ff_disk *d)
{
	struct link *l = atomic_load(&d->top), *newer = NULL;

	if (!l)
		aside_release(d);
	for (; l; newer = l, l = l->older)
		link_set_backing(l, newer);
}

static void free_gone(struct collect *c)
{
	struct ff_store *s = c->store;

	if (!c->gone)
		return;
	for (struct link *l = c->gone; l; l = l->older)
		while (atomic_load(&l->pins) > 0)
			nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
	while (barrier_close(s->reads, 1000))
		; /* reads that hang are waited for; they delay nobody but other reads */
	barrier_open(s->reads);
	while (c->gone) {
		struct link *l = c->gone;
		int r = ff_image_unlink(l->img);

		if (r && r != -ENOENT)
			ff_warning("%s/%s/%s: cannot delete: %s", s->fleece_path, l->dir->name,
			           ff_image_path(l->img), strerror(-r));
		space_charge(s, -(int64_t)ff_image_allocated(l->img));
		c->gone = l->older;
		link_free(l);
	}
}

/* Hides the links and takes a reference to their disks, for a link may go and its disk be needed.
 */
static void begin(struct collect *c)
{
	pthread_mutex_lock(&c->store->chain);
	for (size_t i = 0; i < c->count; i++)
		c->links[i]->snap = NULL;
	pthread_mutex_unlock(&c->store->chain);
	for (size_t i = 0; i < c->count; i++) {
		disk_ref(c->links[i]->disk);
		c->disks[c->disk_count++] = c->links[i]->disk;
	}
}

void drop_collect(struct ff_store *s, struct link **links, size_t count)
{
	struct collect c = {.store = s, .links = links};
	size_t candidates = 0;

	for (size_t i = 0; i < count; i++) /* close the gaps, so that disks[i] is links[i]'s */
		if (links[i])
			links[c.count++] = links[i];
	memset(links + c.count, 0, (count - c.count) * sizeof(struct link *));
	c.saves = calloc(c.count + 1, sizeof *c.saves);
	c.disks = calloc(c.count + 1, sizeof *c.disks);
	if (c.saves && c.disks)
		begin(&c);
	if (c.saves && c.disks && stop_writers(s)) {
		hide(&c);
		let_writers(s);
		for (size_t i = 0; i < c.count; i++) {
			c.saves[i] = links[i]->out ? NOT_EMPTY : shrink(links[i]);
			candidates += c.saves[i] != NOT_EMPTY;
		}
		if (candidates && stop_writers(s)) {
			leave_if_empty(&c);
			let_writers(s);
		}
		for (size_t i = 0; i < c.disk_count; i++)
			settle(c.disks[i]);
		free_gone(&c);
	}
	for (size_t i = 0; i < c.disk_count; i++)
		disk_unref(c.disks[i]);
	free(c.saves);
	free(c.disks);
	for (struct fleece_dir *dir = s->hidden, *next; dir; dir = next) {
		next = dir->next_hidden;
		if (dir->links == 0)
			fleece_dir_release(s, dir);
	}
}

/* Step 1. */
static int wait_for_readers(struct ff_snap *snap)
{
	struct timespec until;

	clock_gettime(CLOCK_REALTIME, &until);
	until.tv_sec += READERS_WAIT_S;
	FF_GUARD(&snap->lock);
	while (snap->readers > 0) {
		/* One that nobody has begun to close is in use. */
		if (snap->unflushed_readers > 0)
			return -EBUSY;
		if (pthread_cond_timedwait(&snap->idle, &snap->lock, &until) == ETIMEDOUT)
			return -EBUSY;
	}
	snap->dropped = true;
	return 0;
}

static void unpublish(struct ff_snap *snap)
{
	struct ff_store *s = snap->store;
	struct ff_snap **at = &s->snaps;

	FF_GUARD(&s->snaps_lock);
	while (*at && *at != snap)
		at = &(*at)->next;
	if (*at)
		*at = snap->next;
	clock_gettime(CLOCK_REALTIME, &s->changed);
}

int drop_snap(struct ff_snap *snap)
{
	struct ff_store *s = snap->store;
	char hidden[40];
	char *name;
	int r;

	snprintf(hidden, sizeof hidden, DROPPED "%llu", (unsigned long long)snap->seq);
	name = strdup(hidden);
	r = name ? wait_for_readers(snap) : -ENOMEM;
	if (!r) {
		r = io_renameat(s->fleece_fd, snap->dir->name, s->fleece_fd, hidden,
		                RENAME_NOREPLACE);
		if (r == -ENOENT)
			r = 0; /* somebody removed it by hand: nothing left to keep */
		if (r)
			ff_error("%s/%s: cannot drop: %s", s->fleece_path, snap->dir->name,
			         strerror(-r));
	}
	if (r) {
		FF_GUARD(&snap->lock);
		snap->dropped = false;
		free(name);
		return r;
	}
	free(snap->dir->name);
	snap->dir->name = name;
	unpublish(snap);
	if (snap->links)
		drop_collect(s, snap->links, snap->link_count);
	fleece_dir_release(s, ff_take_ptr(&snap->dir));
	ff_snap_put(snap);
	return 0;
}

int ff_store_drop(struct ff_store *store, const char *name)
{
	struct ff_snap *snap;
	int r;

	FF_GUARD(&store->admin);
	r = ff_snap_get(store, name, &snap);
	if (r)
		return r;
	r = drop_snap(snap);
	ff_snap_put(snap);
	return r;
}
