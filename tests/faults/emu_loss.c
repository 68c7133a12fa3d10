/*
 * The loss of power: decides what is kept, and builds that. See emu_disk.h.
 */
#include <dirent.h>
#include <err.h>
#include <fcntl.h>
#include <ftw.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "emu_private.h"
#include "ff_util.h"

/* --- data ------------------------------------------------------------------------------------- */

static void need_room(struct emu_inode *in, uint64_t room)
{
	if (room <= in->room)
		return;
	room = FF_MAX(room, in->room * 2);
	in->data = realloc(in->data, room);
	if (!in->data)
		err(1, "no memory");
	memset(in->data + in->room, 0, room - in->room);
	in->room = room;
}

static bool chance(struct emu_rng *rng, unsigned percent)
{
	return !rng || emu_random(rng, 100) < percent;
}

/* Of a write, each sector and the size that it makes are kept or lost by themselves: bytes beyond
 * the size may stand in the buffer while changes are applied. */
void emu_apply(struct emu_inode *in, const struct emu_op *op, struct emu_rng *rng, unsigned percent)
{
	uint64_t end = op->kind == EMU_SIZE ? op->off : op->off + op->len, at, to;

	if (op->kind == EMU_SIZE) {
		if (!chance(rng, percent))
			return;
		if (in->room > end)
			memset(in->data + end, 0, in->room - end);
		in->size = end;
		return;
	}
	need_room(in, end);
	for (at = op->off; at < end; at = to) {
		to = FF_MIN((at / EMU_SECTOR + 1) * EMU_SECTOR, end);
		if (!chance(rng, percent))
			continue;
		if (op->kind == EMU_WRITE)
			memcpy(in->data + at, op->data + (at - op->off), to - at);
		else
			memset(in->data + at, 0, to - at);
	}
	if (op->kind == EMU_WRITE && end > in->size && chance(rng, percent))
		in->size = end;
}

/* What remains of one inode's bytes becomes its durable bytes. */
static void lose_data(struct emu_inode *in, struct emu_rng *rng, unsigned style)
{
	static const unsigned percents[] = {0, 100, 50, 90, 10};
	unsigned percent = percents[style < 5 ? style : emu_random(rng, 5)];
	bool torn = style >= 5 && emu_random(rng, 2), changed = in->ops != NULL;

	while (in->ops) {
		struct emu_op *op = in->ops;

		if (torn || op->kind == EMU_SIZE)
			emu_apply(in, op, rng, percent);
		else if (chance(rng, percent))
			emu_apply(in, op, NULL, 0);
		in->ops = op->next;
		free(op);
	}
	in->tail = &in->ops;
	if (in->room > in->size)
		memset(in->data + in->size, 0, in->room - in->size);
	if (changed && emu_random(rng, 2)) {
		in->mtime = in->durable_mtime;
		in->ctime = in->durable_ctime;
	}
	in->durable_mtime = in->mtime;
	in->durable_ctime = in->ctime;
}

/* --- names ------------------------------------------------------------------------------------ */

static bool same_name(const struct emu_setting *a, const struct emu_setting *b)
{
	return a->dir && a->dir == b->dir && strcmp(a->name, b->name) == 0;
}

/* Must A, if it is kept, have all that stands before it and follows B's side kept too? A name has
 * one history in any case, a directory and a whole journal perhaps. */
static bool ordered(const struct emu_change *a, const struct emu_change *b)
{
	for (int i = 0; i < 2; i++)
		for (int k = 0; k < 2; k++)
			if (emu.names == EMU_ANY ? same_name(&a->set[i], &b->set[k])
			                         : a->set[i].dir && a->set[i].dir == b->set[k].dir)
				return true;
	return emu.names == EMU_JOURNAL && a->fs == b->fs;
}

static void decide_names(struct emu_rng *rng)
{
	static const unsigned percents[] = {0, 100, 50, 90, 97};
	unsigned percent = percents[emu_random(rng, FF_ARRAY_SIZE(percents))];

	for (size_t n = emu.change_count; n-- > 0;)
		for (size_t i = 0; emu.changes[n].durable && i < n; i++)
			if (!emu.changes[i].durable && ordered(&emu.changes[n], &emu.changes[i]))
				emu.changes[i].durable = true;
	for (size_t n = 0; n < emu.change_count; n++) {
		struct emu_change *c = &emu.changes[n];

		c->keep = c->durable || chance(rng, percent);
		for (size_t i = 0; !c->durable && c->keep && i < n; i++)
			c->keep = emu.changes[i].keep || !ordered(c, &emu.changes[i]);
	}
}

/* Makes of the changes kept a list of settings, each name once: durable changes of a new list. */
static void replay_names(void)
{
	struct emu_change *now = calloc(emu.change_count * 2 + 1, sizeof *now);
	size_t count = 0;

	if (!now)
		err(1, "no memory");
	for (size_t n = 0; n < emu.change_count; n++)
		for (int k = 0; k < 2; k++) {
			struct emu_setting s = emu.changes[n].set[k];
			size_t i = 0;

			if (!s.dir)
				continue;
			while (i < count && (now[i].set[0].dir != s.dir ||
			                     strcmp(now[i].set[0].name, s.name) != 0))
				i++;
			if (!emu.changes[n].keep) {
				free(s.name);
			} else if (i < count) {
				now[i].set[0].to = s.to;
				free(s.name);
			} else {
				now[count++] = (struct emu_change){
				    .fs = emu.changes[n].fs, .durable = true, .set = {s}};
			}
		}
	free(emu.changes);
	emu.changes = now;
	emu.change_count = count;
	emu.change_room = 0;
	for (size_t i = 0; i < count; i++)
		if (!now[i].set[0].to) { /* a name that is gone */
			free(now[i].set[0].name);
			now[i--] = now[--count];
			emu.change_count = count;
		}
	emu.change_room = emu.change_count;
}

/* --- building --------------------------------------------------------------------------------- */

static int remove_one(const char *path, const struct stat *st, int type, struct FTW *ftw)
{
	return remove(path);
}

static void write_file(const struct emu_inode *in, int dirfd, const char *name)
{
	static const uint8_t zeros[4096];
	int fd = openat(dirfd, name, O_CREAT | O_EXCL | O_WRONLY, 0600);

	if (fd < 0 || ftruncate(fd, (off_t)in->size))
		err(1, "%s", name);
	for (uint64_t at = 0; at < in->size; at += sizeof zeros) {
		size_t len = (size_t)FF_MIN(sizeof zeros, in->size - at);

		/* the size may have been set far beyond what was written */
		len = at < in->room ? FF_MIN(len, (size_t)(in->room - at)) : 0;
		if (!len || memcmp(in->data + at, zeros, len) == 0)
			continue;
		if (pwrite(fd, in->data + at, len, (off_t)at) != (ssize_t)len)
			err(1, "%s", name);
	}
	close(fd);
}

static void build_dir(struct emu_inode *dir, int fd);

static void build_one(struct emu_inode *in, int dirfd, const char *name)
{
	struct stat st;
	int fd;

	if (in->built) { /* another name of it */
		char path[240];
		struct emu_inode *first = in;

		snprintf(path, sizeof path, "%s/links/%u", emu.root, first->number);
		if (S_ISREG(in->mode) && linkat(AT_FDCWD, path, dirfd, name, 0))
			err(1, "%s", name);
		return;
	}
	in->built = true;
	if (S_ISDIR(in->mode)) {
		if (mkdirat(dirfd, name, 0700))
			err(1, "%s", name);
		fd = openat(dirfd, name, O_RDONLY | O_DIRECTORY);
		build_dir(in, fd);
		close(fd);
	} else if (S_ISLNK(in->mode)) {
		if (symlinkat(in->target, dirfd, name))
			err(1, "%s", name);
	} else {
		char path[240];

		write_file(in, dirfd, name);
		snprintf(path, sizeof path, "%s/links/%u", emu.root, in->number);
		if (linkat(dirfd, name, AT_FDCWD, path, 0))
			err(1, "%s", path);
	}
	if (!S_ISLNK(in->mode) && fchmodat(dirfd, name, in->mode & 07777, 0))
		err(1, "%s", name);
	if (fstatat(dirfd, name, &st, AT_SYMLINK_NOFOLLOW))
		err(1, "%s", name);
	emu_bind(in, &st);
}

static void build_dir(struct emu_inode *dir, int fd)
{
	for (size_t i = 0; i < emu.change_count; i++)
		if (emu.changes[i].set[0].dir == dir)
			build_one(emu.changes[i].set[0].to, fd, emu.changes[i].set[0].name);
}

static void free_inode(struct emu_inode *in)
{
	while (in->ops) {
		struct emu_op *op = in->ops;

		in->ops = op->next;
		free(op);
	}
	free(in->data);
	free(in->name);
	free(in->target);
	free(in);
}

/* Forgets what nothing leads to. */
static void sweep(void)
{
	size_t count = 0;

	for (size_t i = 0; i < emu.change_count; i++)
		if (emu.changes[i].set[0].dir->built)
			emu.changes[count++] = emu.changes[i];
		else
			free(emu.changes[i].set[0].name);
	emu.change_count = count;
	for (struct emu_inode **at = &emu.inodes, *in; (in = *at);) {
		if (in->built) {
			at = &in->next;
			continue;
		}
		*at = in->next;
		free_inode(in);
	}
}

static void build(void)
{
	static const char *const names[] = {"source", "fleece"};
	char path[240], links[240];

	for (int i = 0; i < 2; i++) {
		snprintf(path, sizeof path, "%s/%s", emu.root, names[i]);
		nftw(path, remove_one, 16, FTW_DEPTH | FTW_PHYS);
	}
	memset(emu.buckets, 0, sizeof emu.buckets);
	snprintf(links, sizeof links, "%s/links", emu.root);
	if (mkdir(links, 0700))
		err(1, "%s", links);
	for (int i = 0; i < (emu.one ? 1 : 2); i++) {
		snprintf(path, sizeof path, "%s/%s", emu.root, names[i]);
		build_one(emu.roots[i], AT_FDCWD, path);
	}
	nftw(links, remove_one, 16, FTW_DEPTH | FTW_PHYS);
}

static void new_boot(void)
{
	FILE *f = fopen(emu.boot_id, "w");

	if (!f)
		err(1, "%s", emu.boot_id);
	fprintf(f, "boot-%u\n", ++emu.boots);
	fclose(f);
}

void emu_power_loss(struct emu_rng *rng)
{
	unsigned style = emu_random(rng, 8);

	for (struct emu_inode *in = emu.inodes; in; in = in->next) {
		lose_data(in, rng, style);
		in->built = false;
	}
	decide_names(rng);
	replay_names();
	build();
	sweep();
	new_boot();
	emu.cut = false;
	emu.countdown = 0;
}

/* --- beginning and end ------------------------------------------------------------------------ */

static void read_file(struct emu_inode *in, int dirfd, const char *name, uint64_t size)
{
	int fd = openat(dirfd, name, O_RDONLY);

	need_room(in, size);
	in->size = size;
	if (fd < 0 || read(fd, in->data, size) != (ssize_t)size)
		err(1, "%s", name);
	close(fd);
}

static void take_dir(struct emu_inode *dir, int fd)
{
	DIR *d = fdopendir(fd);
	const struct dirent *e;
	struct emu_inode *in;
	struct stat st;

	while (d && (e = readdir(d))) {
		if (strcmp(e->d_name, ".") == 0 || strcmp(e->d_name, "..") == 0)
			continue;
		if (fstatat(fd, e->d_name, &st, AT_SYMLINK_NOFOLLOW))
			err(1, "%s", e->d_name);
		in = emu_find(&st);
		if (!in)
			in = emu_new(fd, e->d_name);
		emu_note_names(dir, e->d_name, in, NULL, NULL, NULL);
		if (S_ISREG(st.st_mode))
			read_file(in, fd, e->d_name, (uint64_t)st.st_size);
		else if (S_ISDIR(st.st_mode))
			take_dir(in, openat(fd, e->d_name, O_RDONLY | O_DIRECTORY));
	}
	closedir(d);
}

void emu_start(const char *root, enum emu_names names, bool one, unsigned sync_us)
{
	static const char *const dirs[] = {"source", "fleece"};

	snprintf(emu.root, sizeof emu.root, "%s", root);
	snprintf(emu.boot_id, sizeof emu.boot_id, "%s/boot_id", root);
	emu.names = names;
	emu.one = one;
	emu.sync_us = sync_us;
	new_boot();
	for (int i = 0; i < (one ? 1 : 2); i++) {
		char path[240];
		struct stat st;

		snprintf(path, sizeof path, "%s/%s", root, dirs[i]);
		if (stat(path, &st))
			err(1, "%s", path);
		emu.roots[i] = emu_make(&st, i, dirs[i]);
		take_dir(emu.roots[i], open(path, O_RDONLY | O_DIRECTORY));
	}
	emu_settle();
}

void emu_stop(void)
{
	for (size_t i = 0; i < emu.change_count; i++)
		for (int k = 0; k < 2; k++)
			free(emu.changes[i].set[k].name);
	free(emu.changes);
	while (emu.inodes) {
		struct emu_inode *in = emu.inodes;

		emu.inodes = in->next;
		free_inode(in);
	}
	emu = (struct emu){.lock = PTHREAD_MUTEX_INITIALIZER};
}
