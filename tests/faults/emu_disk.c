/*
 * What is durable, what is not yet, and what remains of it. See emu_disk.h.
 *
 * An inode has its durable bytes and a list of the changes since, oldest first. A sync notes where
 * the list ends when it begins, and when it has ended merges what stands before that. Names are one
 * list of changes for all directories, from an empty tree on; a change knows whether it is durable.
 *
 * The one lock covers everything; the real system calls that change something are made under it, so
 * that the lists are in the order of what really happened.
 */
#include "emu_disk.h"

#include <err.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "emu_private.h"

struct emu emu = {.lock = PTHREAD_MUTEX_INITIALIZER};

static __thread const char *guest_disk;
static __thread bool guest_writes;
static __thread uint64_t guest_from;

unsigned emu_random(struct emu_rng *rng, unsigned n)
{
	rng->state = rng->state * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
	return (unsigned)((rng->state >> 33) % n);
}

void emu_lock(void)
{
	pthread_mutex_lock(&emu.lock);
}

void emu_unlock(void)
{
	pthread_mutex_unlock(&emu.lock);
}

static void cut(void)
{
	emu.cut = true;
	if (emu.on_cut)
		emu.on_cut(emu.ctx);
}

static void event(void)
{
	emu.counts.events++;
	if (!emu.cut && emu.countdown && --emu.countdown == 0)
		cut();
}

void emu_cut_in(unsigned events, void (*fn)(void *ctx), void *ctx)
{
	emu_lock();
	emu.countdown = events;
	emu.on_cut = fn;
	emu.ctx = ctx;
	emu_unlock();
}

void emu_cut_now(void)
{
	emu_lock();
	if (!emu.cut)
		cut();
	emu_unlock();
}

bool emu_is_cut(void)
{
	return atomic_load(&emu.cut);
}

struct emu_counts emu_counts(void)
{
	struct emu_counts c;

	emu_lock();
	c = emu.counts;
	emu_unlock();
	return c;
}

static void check_order(const struct emu_inode *in, bool sync);

static void touch(struct emu_inode *in, bool data)
{
	clock_gettime(CLOCK_REALTIME, &in->ctime);
	if (data)
		in->mtime = in->ctime;
}

struct emu_inode *emu_find(const struct stat *st)
{
	struct emu_inode *in;

	for (in = emu.buckets[st->st_ino % EMU_BUCKETS]; in; in = in->next_real)
		if (in->real == st->st_ino && in->dev == st->st_dev)
			return in;
	return NULL;
}

struct emu_inode *emu_inode_of(int fd)
{
	struct stat st;

	return fstat(fd, &st) ? NULL : emu_find(&st);
}

struct emu_inode *emu_inode_at(int dirfd, const char *name)
{
	struct stat st;

	return fstatat(dirfd, name, &st, AT_SYMLINK_NOFOLLOW) ? NULL : emu_find(&st);
}

struct emu_inode *emu_dir_of(int dirfd)
{
	return emu_inode_of(dirfd);
}

void emu_bind(struct emu_inode *in, const struct stat *st)
{
	struct emu_inode **at = &emu.buckets[st->st_ino % EMU_BUCKETS];
	struct emu_inode *old = emu_find(st);

	if (old) /* the number is used again */
		old->real = 0;
	in->real = st->st_ino;
	in->dev = st->st_dev;
	in->next_real = *at;
	*at = in;
}

struct emu_inode *emu_make(const struct stat *st, int fs, const char *name)
{
	struct emu_inode *in = calloc(1, sizeof *in);

	if (!in)
		err(1, "no memory");
	in->number = ++emu.last_number;
	in->fs = fs;
	in->mode = st->st_mode;
	in->tail = &in->ops;
	in->name = strdup(name);
	touch(in, true);
	in->durable_mtime = in->mtime;
	in->durable_ctime = in->ctime;
	in->next = emu.inodes;
	emu.inodes = in;
	emu_bind(in, st);
	return in;
}

struct emu_inode *emu_new(int dirfd, const char *name)
{
	struct emu_inode *dir = emu_inode_of(dirfd), *in;
	char target[4096];
	struct stat st;
	ssize_t n;

	if (!dir || fstatat(dirfd, name, &st, AT_SYMLINK_NOFOLLOW))
		return NULL;
	in = emu_make(&st, dir->fs, name);
	if (S_ISLNK(st.st_mode)) {
		n = readlinkat(dirfd, name, target, sizeof target - 1);
		if (n < 0)
			err(1, "readlink");
		target[n] = '\0';
		in->target = strdup(target);
	}
	return in;
}

void emu_rename(struct emu_inode *in, const char *name)
{
	if (!in)
		return;
	free(in->name);
	in->name = strdup(name);
}

void emu_note_data(struct emu_inode *in, enum emu_kind kind, uint64_t off, uint64_t len,
                   const void *data)
{
	struct emu_op *op;

	if (!in)
		return;
	check_order(in, false);
	touch(in, true);
	if (emu.cut)
		return;
	op = calloc(1, sizeof *op + (data ? len : 0));
	if (!op)
		err(1, "no memory");
	*op = (struct emu_op){
	    .seq = ++emu.seq, .by = &guest_from, .kind = kind, .off = off, .len = len};
	if (data)
		memcpy(op->data, data, len);
	*in->tail = op;
	in->tail = &op->next;
	event();
}

void emu_note_names(struct emu_inode *dir, const char *name, struct emu_inode *to,
                    struct emu_inode *dir2, const char *name2, struct emu_inode *to2)
{
	struct emu_change *c;

	if (!dir)
		return;
	touch(dir, true);
	if (to)
		touch(to, false);
	if (emu.cut)
		return;
	if (emu.change_count == emu.change_room) {
		emu.change_room = emu.change_room ? emu.change_room * 2 : 256;
		emu.changes = realloc(emu.changes, emu.change_room * sizeof *emu.changes);
		if (!emu.changes)
			err(1, "no memory");
	}
	c = &emu.changes[emu.change_count++];
	*c = (struct emu_change){.seq = ++emu.seq, .fs = dir->fs};
	c->set[0] = (struct emu_setting){dir, strdup(name), to};
	if (dir2)
		c->set[1] = (struct emu_setting){dir2, strdup(name2), to2};
	event();
}

/* Merges into the durable bytes what was noted up to SEQ. */
static void merge(struct emu_inode *in, uint64_t seq)
{
	while (in->ops && in->ops->seq <= seq) {
		struct emu_op *op = in->ops;

		emu_apply(in, op, NULL, 0);
		in->ops = op->next;
		free(op);
	}
	if (!in->ops)
		in->tail = &in->ops;
	in->durable_mtime = in->mtime;
	in->durable_ctime = in->ctime;
}

static bool concerns(const struct emu_change *c, const struct emu_inode *in)
{
	/* what names the file matters to a journal alone: there all before goes along anyhow */
	return c->set[0].dir == in || c->set[1].dir == in ||
	       (emu.names == EMU_JOURNAL && (c->set[0].to == in || c->set[1].to == in));
}

static void merge_names(const struct emu_inode *in, bool fs, uint64_t seq)
{
	size_t last = 0;

	for (size_t i = 0; i < emu.change_count && emu.changes[i].seq <= seq; i++) {
		struct emu_change *c = &emu.changes[i];

		if (c->fs != in->fs || !(fs || concerns(c, in)))
			continue;
		c->durable = true;
		last = i;
	}
	for (size_t i = 0; emu.names == EMU_JOURNAL && i < last; i++)
		if (emu.changes[i].fs == in->fs)
			emu.changes[i].durable = true;
}

static bool is_of(const struct emu_inode *in, const char *disk)
{
	return in && strncmp(in->name, disk, strlen(disk)) == 0;
}

/* SOURCE's file IN is about to be made durable or, if writes are watched, changed: what this thread
 * has saved of it must be durable, in a sync what it saved before that. (What another one is saving
 * belongs to a change that is not made yet.) */
static void check_order(const struct emu_inode *in, bool sync)
{
	if (!guest_disk || in->fs != 0 || !is_of(in, guest_disk) || !(sync || guest_writes))
		return;
	for (const struct emu_inode *i = emu.inodes; i; i = i->next)
		for (const struct emu_op *op = i->fs == 1 && is_of(i, guest_disk) ? i->ops : NULL;
		     op && (!sync || op->seq <= guest_from); op = op->next)
			if (op->by == &guest_from && op->kind == EMU_WRITE && op->off >= EMU_HEAD) {
				emu.order_violations++;
				return;
			}
}

void emu_guest(const char *disk, bool writes)
{
	emu_lock();
	guest_disk = disk;
	guest_writes = writes;
	guest_from = emu.seq;
	emu_unlock();
}

unsigned emu_pending(const char *disk)
{
	unsigned n = 0;

	emu_lock();
	for (const struct emu_inode *i = emu.inodes; i; i = i->next)
		n += is_of(i, disk) && i->ops;
	for (size_t i = 0; i < emu.change_count; i++)
		for (int k = 0; k < 2; k++)
			n += !emu.changes[i].durable && is_of(emu.changes[i].set[k].to, disk);
	emu_unlock();
	return n;
}

unsigned emu_order_violations(void)
{
	return emu.order_violations;
}

void emu_sync(struct emu_inode *in, bool fs)
{
	uint64_t seq;

	if (!in)
		return;
	emu_lock();
	seq = emu.seq;
	check_order(in, true);
	event();
	emu_unlock();
	if (emu.sync_us)
		nanosleep(&(struct timespec){.tv_nsec = emu.sync_us * 1000L}, NULL);
	emu_lock();
	emu.counts.syncs += !fs && in->fs == 1;
	if (!emu.cut) {
		for (struct emu_inode *i = emu.inodes; i; i = i->next)
			if (i == in || (fs && i->fs == in->fs))
				merge(i, seq);
		merge_names(in, fs, seq);
	}
	event();
	emu_unlock();
}

void emu_settle(void)
{
	emu_lock();
	for (struct emu_inode *i = emu.inodes; i; i = i->next)
		merge(i, emu.seq);
	for (size_t i = 0; i < emu.change_count; i++)
		emu.changes[i].durable = true;
	emu_unlock();
}

void emu_times(const struct emu_inode *in, uint64_t *ino, int64_t *btime, struct timespec *mtime,
               struct timespec *ctime)
{
	*ino = 1000 + in->number;
	*btime = 1000000 + in->number;
	*mtime = in->mtime;
	*ctime = in->ctime;
}

const char *emu_boot_id_path(void)
{
	return emu.boot_id;
}
