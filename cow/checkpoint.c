/*
 * Checkpoints: snapshots that have given up their data, and know what has changed since.
 *
 *   1. Wait for readers that are about to close; from then on no view of the snapshot is opened.
 *   2. Make the mark, an empty file called NAMES_CHECKPOINT in its directory: as a whole or not at
 *      all. With it the snapshot is a checkpoint, for the next mount too; until then it is what it
 *      was. Where a view was promised to survive a loss of power, the mark is durable before 3.
 *   3. Its links become those of a checkpoint: writers save nothing for it any more, and note in
 *      its ledger, or in that of the newest link, that a cluster has changed.
 *   4. Sweep (needs.c): what no other view needs of what is saved becomes a bit, and goes. So does
 *      what was said of zeros (zeros.c).
 *
 * A daemon killed between 2 and the end of 4 leaves data that nobody needs: the next mount sweeps
 * again. None is given up before the mark stands, so there is no snapshot that lacks data.
 *
 * The images stay, empty, in their places: they say which disk they are of and what follows in the
 * chain, and recovery, damage and loss of power are for them what they are for any other. A
 * checkpoint whose image or ledger is lost is broken, as one whose changes could not be recorded.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>

#include "cow/changes.h"
#include "cow/engine.h"
#include "cow/io.h"
#include "cow/names.h"
#include "cow/needs.h"
#include "ff_log.h"
#include "ff_util.h"

int checkpoint_marked(int dirfd, bool *out)
{
	struct statx sx;
	int r = io_statx(dirfd, NAMES_CHECKPOINT, &sx);

	*out = !r; /* whatever it is: there would be data missing, were it none */
	return r == -ENOENT ? 0 : r;
}

static bool is_durable(const struct ff_snap *snap)
{
	for (size_t i = 0; i < snap->link_count; i++)
		if (snap->links[i] && atomic_load(&snap->links[i]->disk->durable))
			return true;
	return false;
}

/* Step 2. */
static int make_mark(struct ff_snap *snap)
{
	struct ff_store *s = snap->store;
	ff_autoclose int fd = -1;
	int r = io_openat(snap->dir->fd, NAMES_CHECKPOINT, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW,
	                  0600, &fd);

	if (!r && is_durable(snap)) {
		r = io_fsync(fd);
		if (!r)
			r = io_fsync(snap->dir->fd);
		if (r)
			io_unlinkat(snap->dir->fd, NAMES_CHECKPOINT, 0);
	}
	if (r)
		ff_error("%s/%s/" NAMES_CHECKPOINT ": cannot make a checkpoint of it: %s",
		         s->fleece_path, snap->dir->name, strerror(-r));
	return r;
}

void checkpoint_links(struct ff_snap *snap)
{
	FF_GUARD(&snap->store->chain);
	for (size_t i = 0; i < snap->link_count; i++) {
		struct link *l = snap->links[i];

		if (!l)
			continue;
		atomic_store(&l->checkpoint, true);
		stats_notable(l);
		chain_recount(l->disk);
	}
}

static int add(struct link ***list, size_t *count, struct link *l)
{
	struct link **more = reallocarray(*list, *count + 1, sizeof *more);

	if (!more)
		return -ENOMEM;
	*list = more;
	more[(*count)++] = l;
	return 0;
}

/* Step 4. */
static void sweep(struct ff_snap *snap)
{
	struct ff_store *s = snap->store;
	struct link **hidden = NULL;
	size_t count = 0;
	int r = 0;

	for (size_t i = 0; i < snap->link_count; i++) {
		struct link *l = snap->links[i];

		if (!l)
			continue;
		zeros_drop(l);
		needs_sweep(l->disk);
		for (l = atomic_load(&l->disk->top); l && !r; l = l->older)
			if (!l->snap)
				r = add(&hidden, &count, l);
	}
	if (r)
		ff_warning(
		    "no memory: images of dropped snapshots stay until the next drop or mount");
	else if (count)
		drop_collect(s, hidden, count);
	free(hidden);
}

bool ff_snap_is_checkpoint(struct ff_snap *snap)
{
	FF_GUARD(&snap->lock);
	return snap->checkpoint;
}

int ff_snap_checkpoint(struct ff_snap *snap)
{
	int r;

	FF_GUARD(&snap->store->admin);
	pthread_mutex_lock(&snap->lock);
	r = snap->dropped ? -ENOENT : snap->damaged ? -EIO : snap->checkpoint;
	pthread_mutex_unlock(&snap->lock);
	if (r)
		return FF_MIN(r, 0);
	r = snap_close_readers(snap, &snap->checkpoint);
	if (r)
		return r;
	r = make_mark(snap);
	if (r) {
		FF_GUARD(&snap->lock);
		snap->checkpoint = false;
		return r;
	}
	checkpoint_links(snap);
	sweep(snap);
	ff_info("%s: is a checkpoint now", snap->dir->name);
	return 0;
}
