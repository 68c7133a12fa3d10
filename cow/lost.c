/*
 * The record that a view is lost, for good.
 *
 * A view breaks when old data that it needs could not be saved. The guest's write may destroy that
 * data only after the loss stands somewhere that outlives this process: else a daemon killed and
 * started again would show what the write left there. Two places are tried:
 *
 *   1. the header of the view's image. But whatever kept the data from being saved (storage that is
 *      read-only, fails, hangs) may well keep the header from being written too, so then
 *   2. a note on SOURCE's side: an empty file .lost-SEQ-INO-BTIME-NSEC beside the disks kept aside.
 *      SOURCE is about to take a write of the guest's, so it is there and writable; and making an
 *      empty file happens as a whole or not at all.
 *
 * Where neither can be had the guest's write fails, and each later one that relies on the loss
 * tries again: no view is ever right in the eyes of the next mount that was broken in those of this
 * one.
 *
 * A view is: whole → broken, being recorded (disk.recording counts it) → recorded
 *                                                                      → unrecorded → recorded
 * Writers that rely on a loss wait while any is being recorded, and go on when none is unrecorded.
 * A later mount may take a view for whole that is not recorded; so what it needs is kept (needs.c).
 *
 * An image that is not there, or cannot be read, when a mount begins may be there again at a later
 * one, and knows nothing of what was changed meanwhile. So it gets a note, too, before the first
 * change, which stays for as long as its snapshot.
 *
 * Storage that hangs is not waited for: the note is written at once, and the header by a job that
 * ends when the storage answers, and then removes the note. A note that stays is found by the next
 * mount, which puts it into the header.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>

#include "cow/engine.h"
#include "cow/io.h"
#include "cow/late.h"
#include "cow/reasons.h"
#include "ff_log.h"
#include "ff_util.h"

#define NOTE "/.lost-"

enum { NOTE_MAX = 160 };

/* The path below SOURCE of the note on the image SEQ of a disk. */
static void note_path(const struct ff_store *s, const struct identity *id, uint64_t seq,
                      char out[NOTE_MAX])
{
	snprintf(out, NOTE_MAX, "%s" NOTE "%llx-%llx-%llx-%x", s->aside_path,
	         (unsigned long long)seq, (unsigned long long)id->ino,
	         (unsigned long long)id->btime_sec, id->btime_nsec);
}

int lost_note(struct ff_store *s, const struct identity *id, uint64_t seq, bool durable)
{
	ff_autoclose int dir = -1, fd = -1;
	char path[NOTE_MAX];
	int r = aside_open(s, durable, &dir);

	note_path(s, id, seq, path);
	if (!r)
		r = io_openat(dir, strrchr(path, '/') + 1, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW,
		              0600, &fd);
	if (r == -EEXIST) /* that there is one says it all */
		r = 0;
	return !r && durable ? io_fsync(dir) : r;
}

static void unlink_note(struct ff_store *s, const struct identity *id, uint64_t seq)
{
	char path[NOTE_MAX];
	int r;

	note_path(s, id, seq, path);
	r = io_unlinkat(s->source_fd, path, 0);
	if (r && r != -ENOENT)
		ff_warning("%s/%s: cannot delete: %s", s->source_path, path, strerror(-r));
}

void lost_forget_missing(const struct ff_snap *snap)
{
	if (snap->absent) /* a note under its number is of another's image */
		return;
	for (size_t i = 0; i < snap->link_count && i < snap->tree->disk_count; i++) {
		const struct ff_frozen *f = &snap->tree->inodes[snap->tree->disks[i]];
		struct identity id = {snap->store->source_dev, f->st.st_ino, f->btime_sec,
		                      f->btime_nsec};

		if (!snap->links[i])
			unlink_note(snap->store, &id, snap->seq);
	}
}

static int write_note(struct link *l)
{
	int r = lost_note(l->disk->store, &l->disk->id, ff_image_desc(l->img)->seq,
	                  atomic_load(&l->disk->durable));

	if (!r)
		atomic_store(&l->noted, true);
	return r;
}

static void remove_note(struct link *l)
{
	if (atomic_exchange(&l->noted, false))
		unlink_note(l->disk->store, &l->disk->id, ff_image_desc(l->img)->seq);
}

static int write_header(struct link *l)
{
	int r = ff_image_set_broken(l->img, reason_number(atomic_load(&l->why)));

	if (!r && atomic_load(&l->disk->durable))
		r = ff_image_flush(l->img);
	if (!r)
		remove_note(l);
	return r;
}

/* A job that may go on when nobody waits for it any more; it has a pin of its own. */
static int write_header_job(void *ctx)
{
	struct link *l = ctx;
	int r = write_header(l);

	atomic_fetch_sub(&l->pins, 1);
	return r;
}

/* Waits at most SECONDS. -ETIMEDOUT: it goes on by itself. */
static int write_header_timed(struct link *l, unsigned seconds)
{
	struct ff_store *s = l->disk->store;
	int r;

	atomic_fetch_add(&l->pins, 1);
	r = late_run(write_header_job, l, seconds, &s->late);
	if (r == -EAGAIN)
		r = write_header_job(l);
	return r;
}

/* Both places. HANGS: the first is known not to answer in time. */
static int record(struct link *l, bool hangs)
{
	struct ff_store *s = l->disk->store;
	unsigned limit = s->cfg.cbw_timeout;
	char dir[NAME_MAX + 1];
	int r, noted;

	link_dir_name(l, dir);
	if (hangs) {
		noted = write_note(l);
		r = write_header_timed(l, 0);
		if (r == -ETIMEDOUT)
			r = noted;
	} else {
		r = limit ? write_header_timed(l, limit) : write_header(l);
		if (r) {
			ff_warning("%s/%s/%s: cannot be marked as broken (%s): noted in %s/%s",
			           s->fleece_path, dir, ff_image_path(l->img), strerror(-r),
			           s->source_path, s->aside_path);
			r = write_note(l);
		}
	}
	if (r)
		ff_error("%s/%s/%s: that this view is lost can be recorded neither there nor in "
		         "%s/%s (%s): writes that rely on it fail; make one of them writable",
		         s->fleece_path, dir, ff_image_path(l->img), s->source_path, s->aside_path,
		         strerror(-r));
	return r;
}

int lost_record(struct link *l, bool hangs)
{
	struct ff_disk *d = l->disk;
	int r;

	disk_use(d);
	r = record(l, hangs);
	disk_unuse(d);

	if (!r)
		atomic_store(&l->recorded, true);
	FF_GUARD(&d->claim_lock);
	d->recording--;
	if (r && !l->unrecorded) {
		l->unrecorded = true;
		d->unrecorded++;
	} else if (!r && l->unrecorded) {
		l->unrecorded = false;
		d->unrecorded--;
	}
	pthread_cond_broadcast(&d->claim_freed);
	return r;
}

/* The next link of the disk that is unrecorded, pinned and announced, or NULL. */
static struct link *next_unrecorded(struct ff_disk *d)
{
	FF_GUARD(&d->store->chain);
	FF_GUARD(&d->claim_lock);
	for (struct link *l = atomic_load(&d->top); l; l = l->older)
		if (l->unrecorded) {
			atomic_fetch_add(&l->pins, 1);
			d->recording++;
			return l;
		}
	return NULL;
}

int lost_settled(struct ff_disk *d)
{
	struct link *l;
	bool failed;
	int r = 0;

	pthread_mutex_lock(&d->claim_lock);
	while (d->recording > 0)
		pthread_cond_wait(&d->claim_freed, &d->claim_lock);
	failed = d->unrecorded > 0;
	pthread_mutex_unlock(&d->claim_lock);
	while (failed && !r && (l = next_unrecorded(d))) {
		r = lost_record(l, d->store->cfg.cbw_timeout > 0);
		atomic_fetch_sub(&l->pins, 1);
	}
	return r;
}

void lost_forget(struct link *l)
{
	struct ff_disk *d = l->disk;

	remove_note(l);
	FF_GUARD(&d->claim_lock);
	if (l->unrecorded)
		d->unrecorded--;
	l->unrecorded = false;
}

/* What a note is about. False: it is none of ours. */
static bool parse_note(const char *name, struct identity *id, uint64_t *seq)
{
	unsigned long long number, ino, sec;

	if (sscanf(name, "%llx-%llx-%llx-%x", &number, &ino, &sec, &id->btime_nsec) != 4)
		return false;
	id->ino = ino;
	id->btime_sec = (int64_t)sec;
	*seq = number;
	return true;
}

/* The link of the disk's image SEQ, or NULL. */
static struct link *link_of(struct ff_store *s, const struct identity *id, uint64_t seq)
{
	struct ff_disk *d;
	struct link *l;

	if (disk_find(s, id, false, &d))
		return NULL;
	for (l = atomic_load(&d->top); l && ff_image_desc(l->img)->seq != seq; l = l->older)
		;
	disk_unref(d); /* a link holds it */
	return l;
}

/* Takes notice of the note NAME in the directory DIRFD. */
static void recall(struct ff_store *s, int dirfd, const char *name, const char *what,
                   bool (*missing)(void *ctx, const struct identity *id, uint64_t seq), void *ctx)
{
	struct identity id = {.dev = s->source_dev};
	struct link *l = NULL;
	uint64_t seq;
	bool ours = parse_note(what, &id, &seq);

	if (ours)
		l = link_of(s, &id, seq);
	if (!l && ours && missing(ctx, &id, seq))
		return;
	if (!l) {
		io_unlinkat(dirfd, name, 0);
		return;
	}
	atomic_store(&l->noted, true);
	atomic_store(&l->why, WHY_NOTED);
	atomic_store(&l->broken, true);
	atomic_store(&l->recorded, true);
	stats_notable(l);
	chain_recount(l->disk);
	if (write_header(l))
		ff_warning("%s/%s stays until the view's image can be written", s->aside_path,
		           name);
}

int lost_recall(struct ff_store *s,
                bool (*missing)(void *ctx, const struct identity *id, uint64_t seq), void *ctx)
{
	const size_t prefix = strlen(NOTE) - 1;
	const struct dirent *e;
	DIR *dir;
	int fd, r = aside_find(s, &fd);

	/* One that is not ours has no notes of ours, nor can anything be made of it. */
	if (r == -ENOENT || r == -EPERM || r == -ELOOP || r == -ENOTDIR || r == -EXDEV)
		return 0;
	if (!r)
		r = io_fdopendir(fd, &dir);
	if (r) {
		ff_error("%s/%s: cannot be looked through for lost views: %s", s->source_path,
		         s->aside_path, strerror(-r));
		return r;
	}
	while (!(r = io_readdir(dir, &e)) && e)
		if (strncmp(e->d_name, NOTE + 1, prefix) == 0)
			recall(s, fd, e->d_name, e->d_name + prefix, missing, ctx);
	closedir(dir);
	return r;
}
