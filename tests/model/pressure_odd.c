/*
 * The thread that changes names, sizes and holes of disks while all else goes on: each change is
 * one call of the store, so a freeze sees it whole or not at all. One thread makes the changes;
 * the history is read by those who make snapshots (odd.lock). `started` and `returned` enclose the
 * call; the history has the new state before the call begins.
 */
#include "pressure.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

struct odd_unit {
	uint64_t gen, block, at, check;
};

void disk_path(unsigned k, bool in_b, char out[32])
{
	snprintf(out, 32, "%c/disk%02u", in_b ? 'b' : 'a', k);
}

static void block_fill(uint64_t gen, uint64_t block, uint8_t *buf)
{
	for (uint64_t at = 0; at < ODD_BLOCK; at += sizeof(struct odd_unit)) {
		struct odd_unit u = {gen, block, at, (gen ^ block << 40) * 0x9e3779b97f4a7c15u};

		memcpy(buf + at, &u, sizeof u);
	}
}

int odd_decode(const uint8_t *buf, size_t len, struct odd_file *out)
{
	static const uint8_t zeros[ODD_BLOCK];
	uint8_t want[ODD_BLOCK];

	memset(out, 0, sizeof *out);
	if (len > (size_t)ODD_BLOCKS * ODD_BLOCK || len % ODD_BLOCK)
		return -EIO;
	out->there = 1;
	out->size = len;
	for (size_t b = 0; b * ODD_BLOCK < len; b++) {
		const uint8_t *got = buf + b * ODD_BLOCK;

		if (memcmp(got, zeros, ODD_BLOCK) == 0)
			continue;
		memcpy(&out->gen[b], got, sizeof out->gen[b]);
		block_fill(out->gen[b], b, want);
		if (memcmp(got, want, ODD_BLOCK) != 0)
			return -EIO;
	}
	return 0;
}

/* Where the view differs from the state after G changes. */
static void tell(const struct odd *odd, const struct odd_state *got, uint64_t g)
{
	const struct odd_state *want = &odd->history[g % HISTORY];

	for (unsigned k = 0; k < MAX_DISKS; k++)
		if (got->in_b[k] != want->in_b[k])
			fprintf(stderr, "after change %llu: disk %u is elsewhere\n",
			        (unsigned long long)g, k);
	for (unsigned i = 0; i < ODD_FILES; i++) {
		const struct odd_file *a = &got->files[i], *b = &want->files[i];
		unsigned at = 0;

		while (at < ODD_BLOCKS - 1 && a->gen[at] == b->gen[at])
			at++;
		if (memcmp(a, b, sizeof *a) != 0)
			fprintf(stderr,
			        "after change %llu: odd%u: there %d, must %d; %llu bytes, must "
			        "%llu; block %u of change %llu, must %llu\n",
			        (unsigned long long)g, i, (int)a->there, (int)b->there,
			        (unsigned long long)a->size, (unsigned long long)b->size, at,
			        (unsigned long long)a->gen[at], (unsigned long long)b->gen[at]);
	}
}

int odd_check(struct odd *odd, const struct odd_state *state, uint64_t before, uint64_t after)
{
	int r = -EIO;

	pthread_mutex_lock(&odd->lock);
	if (atomic_load(&odd->started) - before >= HISTORY - 1) {
		fprintf(stderr, "the history of names is too short for so slow a machine\n");
		r = -ERANGE;
	}
	for (uint64_t g = before; g <= after && r == -EIO; g++)
		if (memcmp(&odd->history[g % HISTORY], state, sizeof *state) == 0)
			r = 0;
	for (uint64_t g = after > before + 3 ? after - 3 : before; g <= after && r == -EIO; g++)
		tell(odd, state, g);
	pthread_mutex_unlock(&odd->lock);
	return r;
}

/* One change, decided before it is made. */
struct step {
	enum { WRITE, TRUNCATE, PUNCH, CREATE, UNLINK, RENAME, EXCHANGE, MOVE } kind;
	unsigned a, b; /* files; or the disk that moves */
	uint64_t first, count;
	uint64_t gen;
};

static void decide(struct odd *odd, struct step *st)
{
	unsigned roll = (unsigned)rng_below(&odd->rng, 100);
	bool there, other;

	st->a = (unsigned)rng_below(&odd->rng, ODD_FILES);
	st->b = (st->a + 1 + (unsigned)rng_below(&odd->rng, ODD_FILES - 1)) % ODD_FILES;
	st->first = rng_below(&odd->rng, ODD_BLOCKS);
	st->count = 1 + rng_below(&odd->rng, ODD_BLOCKS - st->first);
	there = odd->now.files[st->a].there;
	other = odd->now.files[st->b].there;
	if (roll < 8) {
		st->kind = MOVE;
		st->a = (unsigned)rng_below(&odd->rng, odd->shape.disks);
	} else if (!there)
		st->kind = CREATE;
	else if (roll < 60)
		st->kind = WRITE;
	else if (roll < 75)
		st->kind = TRUNCATE;
	else if (roll < 85)
		st->kind = PUNCH;
	else if (roll < 92)
		st->kind = UNLINK;
	else
		st->kind = other && roll < 96 ? EXCHANGE : RENAME;
}

/* What the state becomes. */
static void predict(struct odd_state *s, const struct step *st)
{
	struct odd_file *f = &s->files[st->a % ODD_FILES], swap;
	uint64_t end = st->first + st->count;

	switch (st->kind) {
	case WRITE:
		for (uint64_t b = st->first; b < end; b++)
			f->gen[b] = st->gen;
		f->size = f->size > end * ODD_BLOCK ? f->size : end * ODD_BLOCK;
		break;
	case TRUNCATE:
		f->size = st->first * ODD_BLOCK;
		for (uint64_t b = st->first; b < ODD_BLOCKS; b++)
			f->gen[b] = 0;
		break;
	case PUNCH:
		for (uint64_t b = st->first; b < end; b++)
			f->gen[b] = 0;
		break;
	case CREATE:
		memset(f, 0, sizeof *f);
		f->there = 1;
		break;
	case UNLINK:
		memset(f, 0, sizeof *f);
		break;
	case RENAME:
		s->files[st->b] = *f;
		memset(f, 0, sizeof *f);
		break;
	case EXCHANGE:
		swap = *f;
		*f = s->files[st->b];
		s->files[st->b] = swap;
		break;
	case MOVE:
		s->in_b[st->a] ^= 1;
		break;
	}
}

static int change_bytes(struct odd *odd, const struct step *st, const char *name)
{
	uint8_t buf[ODD_BLOCKS * ODD_BLOCK];
	struct ff_change c = {.off = (off_t)(st->first * ODD_BLOCK)};
	struct ff_disk *d;
	size_t done;
	int r;

	c.fd = openat(odd->source_fd, name, O_RDWR | O_CLOEXEC);
	if (c.fd < 0)
		return -errno;
	if (st->kind == WRITE) {
		c.kind = FF_WRITE;
		c.buf = buf;
		c.len = st->count * ODD_BLOCK;
		for (uint64_t b = 0; b < st->count; b++)
			block_fill(st->gen, st->first + b, buf + b * ODD_BLOCK);
	} else if (st->kind == TRUNCATE) {
		c.kind = FF_TRUNCATE;
	} else {
		c.kind = FF_FALLOCATE;
		c.mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
		c.len = st->count * ODD_BLOCK;
	}
	r = ff_disk_get(odd->store, c.fd, &d);
	if (!r) {
		r = ff_disk_change(d, &c, &done);
		if (!r && st->kind == WRITE && done != c.len)
			r = -EIO;
		ff_disk_put(d);
	}
	close(c.fd);
	return r;
}

static int create(struct odd *odd, const char *name)
{
	int fd, r = 0;

	ff_store_change_begin(odd->store);
	fd = openat(odd->source_fd, name, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
	if (fd < 0)
		r = -errno;
	else
		close(fd);
	ff_store_change_end(odd->store);
	return r;
}

/* Unlinked while it is open: what is written to it after that is in no view, and older views keep
 * what was there. */
static int unlink_open(struct odd *odd, const char *name)
{
	static const uint8_t junk[4096] = {0xee, 0xee};
	struct ff_change c = {.kind = FF_WRITE, .buf = junk, .len = sizeof junk};
	struct ff_disk *d;
	size_t done;
	int r;

	c.fd = openat(odd->source_fd, name, O_RDWR | O_CLOEXEC);
	if (c.fd < 0)
		return -errno;
	r = ff_disk_get(odd->store, c.fd, &d);
	if (!r) {
		r = ff_store_unlink(odd->store, odd->source_fd, name);
		if (!r)
			r = ff_disk_change(d, &c, &done);
		ff_disk_put(d);
	}
	close(c.fd);
	return r;
}

static int make(struct odd *odd, const struct step *st)
{
	char a[32], b[32];

	snprintf(a, sizeof a, "odd%u", st->a);
	snprintf(b, sizeof b, "odd%u", st->b);
	switch (st->kind) {
	case CREATE:
		return create(odd, a);
	case UNLINK:
		return unlink_open(odd, a);
	case RENAME:
		return ff_store_rename(odd->store, odd->source_fd, a, odd->source_fd, b, 0);
	case EXCHANGE:
		return ff_store_rename(odd->store, odd->source_fd, a, odd->source_fd, b,
		                       RENAME_EXCHANGE);
	case MOVE: {
		int from, to, r;

		disk_path(st->a, !odd->now.in_b[st->a], a);
		disk_path(st->a, odd->now.in_b[st->a], b);
		from = openat(odd->source_fd, odd->now.in_b[st->a] ? "a" : "b",
		              O_PATH | O_DIRECTORY | O_CLOEXEC);
		to = openat(odd->source_fd, odd->now.in_b[st->a] ? "b" : "a",
		            O_PATH | O_DIRECTORY | O_CLOEXEC);
		r = from < 0 || to < 0
		        ? -errno
		        : ff_store_rename(odd->store, from, a + 2, to, b + 2, RENAME_NOREPLACE);
		close(from);
		close(to);
		return r;
	}
	default:
		return change_bytes(odd, st, a);
	}
}

int odd_change(struct odd *odd)
{
	uint64_t g = atomic_load(&odd->returned) + 1;
	struct step st = {.gen = g};
	int r;

	decide(odd, &st);
	predict(&odd->now, &st);
	pthread_mutex_lock(&odd->lock);
	odd->history[g % HISTORY] = odd->now;
	atomic_store(&odd->started, g);
	pthread_mutex_unlock(&odd->lock);
	r = make(odd, &st);
	if (r)
		fprintf(stderr, "change %llu of names and sizes, kind %d, file %u: %s\n",
		        (unsigned long long)g, (int)st.kind, st.a, strerror(-r));
	atomic_store(&odd->returned, g);
	return r;
}
