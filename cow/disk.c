/*
 * The table of disks: one struct ff_disk for each source inode that has a handle, a reader or a
 * link in a chain.
 *
 * An inode number alone does not tell a disk from a later file which got the same number, so each
 * look-up compares birth times as well. A disk found to be another file's is taken out of the table
 * (stale) and its views are broken, for what they would read is gone; that can happen only when
 * SOURCE was changed behind the mount, because a disk that a snapshot needs is never unlinked.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sysmacros.h>

#include "cow/device.h"
#include "cow/engine.h"
#include "cow/io.h"
#include "cow/reasons.h"
#include "ff_log.h"
#include "ff_util.h"

int identity_of(int dirfd, const char *path, struct identity *id, struct stat *st)
{
	struct statx sx;

	int r = io_statx(dirfd, path, &sx);

	if (r)
		return r;
	memset(id, 0, sizeof *id);
	id->dev = makedev(sx.stx_dev_major, sx.stx_dev_minor);
	id->ino = sx.stx_ino;
	if (sx.stx_mask & STATX_BTIME) {
		id->btime_sec = sx.stx_btime.tv_sec;
		id->btime_nsec = sx.stx_btime.tv_nsec;
	}
	if (st) {
		memset(st, 0, sizeof *st);
		st->st_mode = sx.stx_mode;
		st->st_nlink = sx.stx_nlink;
		st->st_size = (off_t)sx.stx_size;
		st->st_mtim = (struct timespec){sx.stx_mtime.tv_sec, sx.stx_mtime.tv_nsec};
		st->st_ctim = (struct timespec){sx.stx_ctime.tv_sec, sx.stx_ctime.tv_nsec};
	}
	return 0;
}

bool identity_same(const struct identity *a, const struct identity *b)
{
	return a->dev == b->dev && a->ino == b->ino && a->btime_sec == b->btime_sec &&
	       a->btime_nsec == b->btime_nsec;
}

static struct ff_disk **bucket(struct ff_store *s, ino_t ino)
{
	return &s->disks[(ino * UINT64_C(0x9e3779b97f4a7c15)) >> 50];
}

_Static_assert(DISK_BUCKETS == 1 << 14, "the shift above takes the upper 14 bits");

static struct ff_disk *disk_new(struct ff_store *s, const struct identity *id)
{
	struct ff_disk *d = calloc(1, sizeof *d);

	if (!d)
		return NULL;
	d->store = s;
	d->id = *id;
	d->refs = 1;
	atomic_init(&d->path_fd, -1);
	atomic_init(&d->source_fd, -1);
	atomic_init(&d->old_fd, -1);
	atomic_init(&d->direct_fd, -1);
	pthread_mutex_init(&d->claim_lock, NULL);
	pthread_cond_init(&d->claim_freed, NULL);
	pthread_mutex_init(&d->append, NULL);
	pthread_mutex_init(&d->fd_lock, NULL);
	return d;
}

static void disk_free(struct ff_disk *d)
{
	if (d->path_fd >= 0)
		close(d->path_fd);
	if (d->source_fd >= 0)
		close(d->source_fd);
	if (d->old_fd >= 0)
		close(d->old_fd);
	if (d->direct_fd >= 0)
		close(d->direct_fd);
	pthread_mutex_destroy(&d->claim_lock);
	pthread_cond_destroy(&d->claim_freed);
	pthread_mutex_destroy(&d->append);
	pthread_mutex_destroy(&d->fd_lock);
	free(d->path);
	free(d->next_path);
	free(d);
}

int disk_find(struct ff_store *s, const struct identity *id, bool make, struct ff_disk **out)
{
	struct ff_disk **at = bucket(s, id->ino), *stale = NULL, *d;

	pthread_mutex_lock(&s->disks_lock);
	while ((d = *at) && (d->id.ino != id->ino || d->id.dev != id->dev))
		at = &d->next;
	if (d && !identity_same(&d->id, id)) {
		*at = d->next;
		d->stale = true;
		d->refs++;
		stale = d;
		d = NULL;
		at = bucket(s, id->ino);
	}
	if (d) {
		d->refs++;
	} else if (make) {
		d = disk_new(s, id);
		if (d) {
			at = bucket(s, id->ino);
			d->next = *at;
			*at = d;
		}
	}
	pthread_mutex_unlock(&s->disks_lock);
	if (stale) {
		chain_break_all(stale, WHY_REPLACED);
		disk_unref(stale);
	}
	if (!d)
		return make ? -ENOMEM : -ENOENT;
	*out = d;
	return 0;
}

struct ff_disk *disk_peek(struct ff_store *s, dev_t dev, ino_t ino)
{
	struct ff_disk *d;

	FF_GUARD(&s->disks_lock);
	for (d = *bucket(s, ino); d && (d->id.ino != ino || d->id.dev != dev); d = d->next)
		;
	if (d)
		d->refs++;
	return d;
}

static _Atomic uint64_t *forgotten_word(struct ff_store *s, ino_t ino, uint64_t *bit)
{
	uint64_t hash = ino * UINT64_C(0x9e3779b97f4a7c15);

	*bit = UINT64_C(1) << (hash >> 58);
	return &s->forgotten[(hash >> 50) % FORGOTTEN_WORDS];
}

bool disk_was_forgotten(const struct ff_disk *d)
{
	uint64_t bit;
	_Atomic uint64_t *word = forgotten_word(d->store, d->id.ino, &bit);

	return atomic_load(word) & bit;
}

void disk_forget_none(struct ff_store *s)
{
	for (size_t i = 0; i < FORGOTTEN_WORDS; i++)
		atomic_store(&s->forgotten[i], 0);
}

void disk_ref(struct ff_disk *d)
{
	FF_GUARD(&d->store->disks_lock);
	d->refs++;
}

void disk_unref(struct ff_disk *d)
{
	struct ff_store *s = d->store;

	pthread_mutex_lock(&s->disks_lock);
	if (--d->refs > 0) {
		pthread_mutex_unlock(&s->disks_lock);
		return;
	}
	if (!d->stale) {
		struct ff_disk **at = bucket(s, d->id.ino);

		while (*at != d)
			at = &(*at)->next;
		*at = d->next;
	}
	if (atomic_load(&d->touched) == atomic_load(&s->epoch)) {
		uint64_t bit;
		_Atomic uint64_t *word = forgotten_word(s, d->id.ino, &bit);

		/* a freeze that has looked at the file before that must look again */
		atomic_fetch_or(word, bit);
	}
	pthread_mutex_unlock(&s->disks_lock);
	disk_free(d);
}

/* Of the block device behind FD, which is served and claimed. */
static int claimed_identity(struct ff_store *s, int fd, struct identity *id)
{
	struct device *dev;
	int r = device_of_fd(s, fd, &dev);

	if (!r)
		r = device_claim(dev);
	if (!r)
		*id = *device_id(dev);
	return r;
}

int ff_disk_get(struct ff_store *store, int fd, struct ff_disk **out)
{
	struct identity id;
	struct ff_disk *d;
	struct stat st;
	int r = identity_of(fd, "", &id, &st), path_fd;

	if (!r && S_ISBLK(st.st_mode))
		r = claimed_identity(store, fd, &id);
	else if (!r && !S_ISREG(st.st_mode))
		r = -EINVAL;
	if (!r)
		r = disk_find(store, &id, true, &d);
	if (r)
		return r;
	disk_use(d);
	if (atomic_load(&d->path_fd) < 0) {
		FF_GUARD(&d->fd_lock);
		if (atomic_load(&d->path_fd) < 0) {
			r = io_reopen(fd, O_PATH, &path_fd);
			if (!r)
				atomic_store(&d->path_fd, path_fd);
		}
	}
	if (r) {
		ff_disk_put(d);
		return r;
	}
	guard_add(store, fd);
	*out = d;
	return 0;
}

void ff_disk_put(struct ff_disk *disk)
{
	disk_unuse(disk);
	disk_unref(disk);
}

int disk_each(struct ff_store *s, int (*fn)(struct ff_disk *, void *), void *ctx)
{
	int r = 0;

	for (unsigned b = 0; b < DISK_BUCKETS && !r; b++) {
		struct ff_disk *d, *held = NULL;

		/* A held disk stays in its bucket, so the walk can go on from it. */
		pthread_mutex_lock(&s->disks_lock);
		for (d = s->disks[b]; d && !r;) {
			bool mine = atomic_load(&d->top) != NULL;

			if (mine) {
				d->refs++;
				pthread_mutex_unlock(&s->disks_lock);
				if (held)
					disk_unref(held);
				held = d;
				r = fn(d, ctx);
				pthread_mutex_lock(&s->disks_lock);
				if (d->stale)
					break;
			}
			d = d->next;
		}
		pthread_mutex_unlock(&s->disks_lock);
		if (held)
			disk_unref(held);
	}
	return r;
}
