/*
 * The drop: rmdir snapshots/NAME.
 *
 *   1. Wait for readers that are about to close; mark the snapshot dropped.
 *   2. Rename its directory to .dropped-NUMBER: from here on it is dropped, for the next mount too.
 *   3. Collect (collect.c): what no older view needs goes.
 *
 * Where a view was promised to survive power loss, step 2 is made durable before 3 begins.
 *
 * A daemon killed after step 2 leaves .dropped-NUMBER; the next mount loads its images as hidden
 * links, forgets what was said of their zeros (zeros.c), and collects again.
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "cow/changes.h"
#include "cow/engine.h"
#include "cow/io.h"
#include "cow/manifest.h"
#include "cow/rename_new.h"
#include "ff_log.h"
#include "ff_util.h"

enum { READERS_WAIT_S = 5 };

/* Removes NAME below DIRFD and all that is in it. */
static void remove_tree(int dirfd, const char *name)
{
	const struct dirent *e;
	DIR *dir;
	int fd;

	if (io_openat(dirfd, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW, 0, &fd) ||
	    io_fdopendir(fd, &dir))
		return;
	while (io_readdir(dir, &e) == 0 && e) {
		if (io_unlinkat(fd, e->d_name, 0) == -EISDIR)
			remove_tree(fd, e->d_name);
	}
	closedir(dir);
	io_unlinkat(dirfd, name, AT_REMOVEDIR);
}

void fleece_dir_renamed(struct ff_store *s, struct fleece_dir *dir, char *name)
{
	FF_GUARD(&s->snaps_lock);
	free(dir->name);
	dir->name = name;
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
	if (!dir->kept)
		remove_tree(s->fleece_fd, dir->name);
	close(dir->fd);
	free(dir->name);
	free(dir);
}

/* Step 1. */
int snap_close_readers(struct ff_snap *snap, bool *flag)
{
	struct timespec until;

	clock_gettime(CLOCK_MONOTONIC, &until);
	until.tv_sec += READERS_WAIT_S;
	FF_GUARD(&snap->lock);
	while (snap->readers > 0 || snap->looks > 0) {
		/* One that nobody has begun to close is in use. */
		if (snap->unflushed_readers > 0)
			return -EBUSY;
		if (snap->readers == 0)
			pthread_cond_wait(&snap->idle, &snap->lock);
		else if (pthread_cond_timedwait(&snap->idle, &snap->lock, &until) == ETIMEDOUT)
			return -EBUSY;
	}
	*flag = true;
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

void fleece_dir_leave(struct ff_store *s, struct fleece_dir *dir, bool needed)
{
	char hidden[DROPPED_MAX];
	int r = drop_rename(s, dir->name, hidden, sizeof hidden);

	if (!r && s->cfg.durable)
		io_fsync(s->fleece_fd); /* or the mark may go first: see making.c */
	if (!needed) /* else the next mount looks at it, and renames it if need be */
		remove_tree(s->fleece_fd, r ? dir->name : hidden);
	close(dir->fd);
	free(dir->name);
	free(dir);
}

/* Numbers are free but for what earlier mounts left. */
static void next_dropped(struct ff_store *s, char *out, size_t size)
{
	snprintf(out, size, DROPPED "%llu", (unsigned long long)s->next_drop++);
}

int drop_rename(struct ff_store *s, const char *name, char *out, size_t size)
{
	int r;

	do {
		next_dropped(s, out, size);
		r = rename_new(s->fleece_fd, name, s->fleece_fd, out);
	} while (r == -EEXIST);
	return r;
}

int drop_mkdir(struct ff_store *s, char *out, size_t size)
{
	int r;

	do {
		next_dropped(s, out, size);
		r = io_mkdirat(s->fleece_fd, out, 0700);
	} while (r == -EEXIST);
	return r;
}

/* Step 2. HIDDEN: its new name. */
static int rename_away(struct ff_snap *snap, char *hidden, size_t size)
{
	struct ff_store *s = snap->store;
	bool durable = false;
	int r = drop_rename(s, snap->dir->name, hidden, size);

	if (r == -ENOENT)
		return 0; /* somebody removed it by hand */
	for (size_t i = 0; snap->links && i < snap->link_count; i++)
		durable |= snap->links[i] && atomic_load(&snap->links[i]->disk->durable);
	if (!r && durable) {
		r = io_fsync(s->fleece_fd);
		if (r)
			io_renameat(s->fleece_fd, hidden, s->fleece_fd, snap->dir->name, 0);
	}
	if (r)
		ff_error("%s/%s: cannot drop: %s", s->fleece_path, snap->dir->name, strerror(-r));
	return r;
}

/* Storage has it no more: what is left to do. NAME: its directory's new one, malloc'd, or NULL. */
static void forget(struct ff_snap *snap, char *name)
{
	struct ff_store *s = snap->store;

	if (name)
		fleece_dir_renamed(s, snap->dir, name);
	unpublish(snap);
	if (snap->links) {
		for (size_t i = 0; i < snap->link_count; i++)
			if (snap->links[i])
				zeros_drop(snap->links[i]);
		drop_collect(s, snap->links, snap->link_count);
		lost_forget_missing(snap);
	}
	fleece_dir_release(s, ff_take_ptr(&snap->dir));
	ff_snap_put(snap);
}

int drop_snap(struct ff_snap *snap)
{
	char *name = malloc(DROPPED_MAX);
	int r = name ? snap_close_readers(snap, &snap->dropped) : -ENOMEM;

	if (!r)
		r = rename_away(snap, name, DROPPED_MAX);
	if (r) {
		free(name);
		FF_GUARD(&snap->lock);
		snap->dropped = false;
		return r;
	}
	forget(snap, name);
	return 0;
}

bool drop_unpublished(struct ff_snap *snap)
{
	char *name = malloc(DROPPED_MAX);

	if (name && rename_away(snap, name, DROPPED_MAX))
		free(ff_take_ptr(&name));
	if (!name) {
		/* With its mark and no manifest it is no snapshot, whatever its directory is
		 * called. */
		int r = io_unlinkat(snap->dir->fd, MANIFEST_NAME, 0);

		if (!r)
			r = io_fsync(snap->dir->fd);
		if (r && r != -ENOENT)
			return false;
	}
	forget(snap, name);
	return true;
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
