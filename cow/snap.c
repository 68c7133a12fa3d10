/*
 * The set of snapshots and their names. The list is short (hundreds), in the order of making.
 *
 * A snapshot object outlives its drop for as long as somebody refers to it (the kernel may know its
 * directories for a while): its tree stays readable memory, its views cannot be opened any more.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <xxhash.h>

#include "cow/engine.h"
#include "cow/io.h"
#include "cow/rename_new.h"
#include "ff_log.h"
#include "ff_util.h"

bool snap_name_valid(const char *name)
{
	size_t len = strlen(name);

	return len >= 1 && len <= FF_SNAP_NAME_MAX && name[0] != '.' && !strchr(name, '/');
}

struct ff_snap *snap_new(struct ff_store *s, const char *name, uint64_t seq)
{
	struct ff_snap *snap = calloc(1, sizeof *snap);
	char *copy = strdup(name);
	pthread_condattr_t clock;

	if (!snap || !copy) {
		free(snap);
		free(copy);
		return NULL;
	}
	snap->store = s;
	snap->seq = seq;
	atomic_init(&snap->refs, 1);
	pthread_mutex_init(&snap->lock, NULL);
	/* a drop waits for some seconds, whatever becomes of the time of day */
	pthread_condattr_init(&clock);
	pthread_condattr_setclock(&clock, CLOCK_MONOTONIC);
	pthread_cond_init(&snap->idle, &clock);
	pthread_condattr_destroy(&clock);
	snap_set_name(snap, copy);
	return snap;
}

void snap_set_name(struct ff_snap *snap, char *name)
{
	FF_GUARD(&snap->store->snaps_lock);
	free(snap->name);
	snap->name = name;
	snap->naming = ++snap->store->namings;
	atomic_store(&snap->name_hash, XXH3_64bits(name, strlen(name)));
	clock_gettime(CLOCK_REALTIME, &snap->store->changed);
}

void snap_free_memory(struct ff_snap *snap)
{
	tree_free(snap->tree);
	free(snap->links);
	free(snap->digests);
	free(snap->name);
	pthread_mutex_destroy(&snap->lock);
	pthread_cond_destroy(&snap->idle);
	free(snap);
}

void snap_publish(struct ff_snap *snap)
{
	struct ff_snap **at = &snap->store->snaps;

	FF_GUARD(&snap->store->snaps_lock);
	while (*at && (*at)->seq < snap->seq)
		at = &(*at)->next;
	snap->next = *at;
	*at = snap;
	clock_gettime(CLOCK_REALTIME, &snap->store->changed);
}

int ff_snap_get(struct ff_store *store, const char *name, struct ff_snap **out)
{
	FF_GUARD(&store->snaps_lock);
	for (struct ff_snap *snap = store->snaps; snap; snap = snap->next)
		if (strcmp(snap->name, name) == 0) {
			*out = ff_snap_ref(snap);
			return 0;
		}
	return -ENOENT;
}

uint64_t ff_snap_naming(const struct ff_snap *snap, char name[FF_SNAP_NAME_MAX + 1])
{
	FF_GUARD(&snap->store->snaps_lock);
	snprintf(name, FF_SNAP_NAME_MAX + 1, "%s", snap->name);
	return snap->naming;
}

bool ff_snap_older(const struct ff_snap *snap, const struct ff_snap *than)
{
	return snap->seq < than->seq;
}

struct ff_snap *ff_snap_ref(struct ff_snap *snap)
{
	atomic_fetch_add(&snap->refs, 1);
	return snap;
}

void ff_snap_put(struct ff_snap *snap)
{
	if (atomic_fetch_sub(&snap->refs, 1) == 1)
		snap_free_memory(snap);
}

void hold_begin(struct ff_hold *hold, struct ff_snap *snap)
{
	*hold = (struct ff_hold){.snap = ff_snap_ref(snap)};
	snap->readers++;
	snap->unflushed_readers++;
}

void ff_hold_flushed(struct ff_hold *hold)
{
	FF_GUARD(&hold->snap->lock);
	if (!hold->flushed) {
		hold->flushed = true;
		hold->snap->unflushed_readers--;
		pthread_cond_broadcast(&hold->snap->idle);
	}
}

void hold_end(struct ff_hold *hold)
{
	struct ff_snap *snap = hold->snap;

	ff_hold_flushed(hold);
	pthread_mutex_lock(&snap->lock);
	snap->readers--;
	pthread_cond_broadcast(&snap->idle);
	pthread_mutex_unlock(&snap->lock);
	ff_snap_put(snap);
}

int ff_snap_hold(struct ff_snap *snap, struct ff_hold **out)
{
	struct ff_hold *hold = malloc(sizeof *hold);

	if (!hold)
		return -ENOMEM;
	FF_GUARD(&snap->lock);
	if (snap->dropped) {
		free(hold);
		return -ESTALE;
	}
	hold_begin(hold, snap);
	*out = hold;
	return 0;
}

void ff_hold_release(struct ff_hold *hold)
{
	hold_end(hold);
	free(hold);
}

bool ff_snap_dropped(const struct ff_snap *snap)
{
	struct ff_snap *s = (struct ff_snap *)snap; /* only the lock is taken */

	FF_GUARD(&s->lock);
	return s->dropped;
}

int ff_snap_each(struct ff_store *store, int (*fn)(void *ctx, const char *name), void *ctx)
{
	int r = 0;

	FF_GUARD(&store->snaps_lock);
	for (struct ff_snap *snap = store->snaps; snap && !r; snap = snap->next)
		r = fn(ctx, snap->name);
	return r;
}

struct timespec ff_store_snaps_changed(struct ff_store *store)
{
	FF_GUARD(&store->snaps_lock);
	return store->changed;
}

/* Renames the directory; for good, where views were promised to survive power loss. *MOVED: it has
 * the new name, which may be so after an error too, if it cannot be taken back. */
static int rename_dir(struct ff_snap *snap, const char *from, const char *to, bool *moved)
{
	struct ff_store *s = snap->store;
	bool durable = false;
	int r = rename_new(s->fleece_fd, from, s->fleece_fd, to);

	for (size_t i = 0; i < snap->link_count; i++)
		durable |= snap->links[i] && atomic_load(&snap->links[i]->disk->durable);
	*moved = r == 0;
	if (r || !durable)
		return r;
	r = io_fsync(s->fleece_fd);
	if (r)
		*moved = rename_new(s->fleece_fd, to, s->fleece_fd, from) != 0;
	return r;
}

/* The images older than this snapshot's name its directory: put the new name in. */
static void rename_backings(struct ff_snap *snap)
{
	for (size_t i = 0; i < snap->link_count; i++)
		if (snap->links[i] && snap->links[i]->older)
			link_set_backing(snap->links[i]->older, snap->links[i]);
}

int ff_store_rename_snap(struct ff_store *store, const char *from, const char *to)
{
	struct ff_snap *snap, *other;
	char *list_name, *dir_name;
	bool moved = false;
	int r;

	if (!snap_name_valid(to))
		return -EINVAL;
	FF_GUARD(&store->admin);
	r = ff_snap_get(store, from, &snap);
	if (r)
		return r;
	if (strcmp(from, to) == 0) {
		ff_snap_put(snap);
		return 0;
	}
	if (ff_snap_get(store, to, &other) == 0) {
		ff_snap_put(other);
		ff_snap_put(snap);
		return -EEXIST;
	}
	list_name = strdup(to);
	dir_name = strdup(to);
	r = list_name && dir_name ? rename_dir(snap, from, to, &moved) : -ENOMEM;
	if (r)
		ff_error("%s: cannot rename the snapshot %s to %s%s: %s", store->fleece_path, from,
		         to, moved ? " durably; it has the new name for now" : "", strerror(-r));
	if (!moved) {
		free(list_name);
		free(dir_name);
	} else {
		fleece_dir_renamed(store, snap->dir, dir_name);
		rename_backings(snap);
		snap_set_name(snap, list_name);
	}
	ff_snap_put(snap);
	return r;
}
