/*
 * snapshots/NAME/.xxh128: the XXH128 of each frozen file, a line for each path, in the format that
 * `xxhsum -c` reads, run in the directory of the restored files:
 *
 *   DIGEST  PATH       DIGEST: 32 hexadecimal digits; PATH: below the snapshot's root
 *   \DIGEST  PATH      PATH has a newline or a carriage return: these and backslashes are escaped
 *
 * (A backslash alone is left as it is: every version of xxhsum reads that right, and versions
 * before 0.8.2 know no escaping.) Lines are in the order of the directories' bytes.
 *
 * The length of each line follows from its path, so the size is known without reading a disk. All
 * digests are computed before the first byte is given: a file that cannot be read makes every read
 * EIO, and there is no manifest that lacks a line. Computing takes as long as reading all disks, in
 * a thread that no other request waits for; the kernel asks past its cache (FOPEN_DIRECT_IO), so
 * that a reader who is interrupted stops the computing. What was computed is kept by the engine.
 *
 * States of an open one: content NULL → set, once, under `lock`; read without after that (release,
 * acquire). The thread that computes holds `lock`; another reader of the same handle waits for it,
 * and asks now and then whether it should give up.
 *
 * The file tells names and digests of files that not everybody may see: it is for the owner of the
 * snapshot's root alone.
 */
#include <linux/fuse.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "ff_log.h"
#include "ff_util.h"
#include "fusefs/derived.h"
#include "fusefs/frozen_walk.h"

enum { DIGITS = 32, SALT_DIGESTS = 1 };

struct manifest_size {
	uint64_t bytes;
	int error;
};

struct manifest_file {
	struct derived_file file;
	size_t size;
	pthread_mutex_t lock;
	char *_Atomic content;
};

static struct manifest_file *manifest_of(struct handle *h)
{
	return FF_CONTAINER(h, struct manifest_file, file.h);
}

struct lines {
	struct frozen_walk walk;
	uint64_t bytes; /* counted */
	char *out, *end;
	bool (*stop)(void *ctx);
	void *ctx;
};

/* --- a line --- */

static bool needs_escape(const char *path)
{
	return strpbrk(path, "\n\r") != NULL;
}

/* Writes PATH to OUT as it stands in a line, without a NUL; NULL: only counts. */
static size_t put_path(const char *path, char *out)
{
	bool escape = needs_escape(path);
	size_t n = 0;

	for (const char *p = path; *p; p++) {
		char c = *p == '\n' ? 'n' : *p == '\r' ? 'r' : *p == '\\' ? '\\' : 0;

		if (escape && c) {
			if (out)
				out[n] = '\\';
			n++;
		}
		if (out)
			out[n] = escape && c ? c : *p;
		n++;
	}
	return n;
}

static size_t line_size(const char *path)
{
	return (size_t)needs_escape(path) + DIGITS + 2 + put_path(path, NULL) + 1;
}

static int add_size(struct frozen_walk *w, const struct ff_frozen *dir, const char *name,
                    const struct ff_frozen *f)
{
	FF_CONTAINER(w, struct lines, walk)->bytes += line_size(w->path);
	return 0;
}

static int add_line(struct frozen_walk *w, const struct ff_frozen *dir, const char *name,
                    const struct ff_frozen *f)
{
	struct lines *l = FF_CONTAINER(w, struct lines, walk);
	uint8_t digest[DIGITS / 2];
	char hex[DIGITS + 1];
	int r;

	if (l->stop(l->ctx))
		return -EINTR;
	r = ff_frozen_digest(w->snap, f, l->stop, l->ctx, digest);
	if (r < 0) {
		if (r != -EINTR)
			ff_error(".xxh128: %s cannot be read, so there is no manifest of its "
			         "snapshot: %s",
			         w->path, strerror(-r));
		return r;
	}
	if (line_size(w->path) > (size_t)(l->end - l->out))
		return -EIO; /* the tree does not change */
	for (size_t i = 0; i < sizeof digest; i++)
		snprintf(hex + 2 * i, 3, "%02x", digest[i]);
	if (needs_escape(w->path))
		*l->out++ = '\\';
	l->out = mempcpy(l->out, hex, DIGITS);
	l->out = mempcpy(l->out, "  ", 2);
	l->out += put_path(w->path, l->out);
	*l->out++ = '\n';
	return 0;
}

/* --- the open file --- */

/* Waits for the lock of a thread that computes, at most as long as its own reader waits. */
static int lock_or_stop(pthread_mutex_t *lock, bool (*stop)(void *ctx), void *ctx)
{
	while (pthread_mutex_trylock(lock) != 0) {
		if (stop(ctx))
			return -EINTR;
		nanosleep(&(struct timespec){.tv_nsec = 20000000}, NULL);
	}
	return 0;
}

static int compute(struct manifest_file *m, bool (*stop)(void *ctx), void *ctx)
{
	struct lines l = {
	    .walk = {.snap = m->file.h.node->snap, .file = add_line}, .stop = stop, .ctx = ctx};
	char *content = malloc(m->size + 1);
	int r;

	if (!content)
		return -ENOMEM;
	l.out = content;
	l.end = content + m->size;
	r = frozen_walk(&l.walk);
	if (r == 0 && l.out != l.end)
		r = -EIO;
	if (r < 0) {
		free(content);
		return r == -ESTALE || r == -EINTR || r == -ENOMEM ? r : -EIO;
	}
	atomic_store_explicit(&m->content, content, memory_order_release);
	return 0;
}

static int manifest_read(struct handle *h, void *buf, size_t size, off_t off, size_t *got)
{
	struct manifest_file *m = manifest_of(h);
	const char *content = atomic_load_explicit(&m->content, memory_order_acquire);

	if (!content)
		return -EINPROGRESS;
	*got = derived_copy(content, m->size, buf, size, off);
	return 0;
}

static int manifest_read_long(struct handle *h, void *buf, size_t size, off_t off, size_t *got,
                              bool (*stop)(void *ctx), void *ctx)
{
	struct manifest_file *m = manifest_of(h);
	int r = lock_or_stop(&m->lock, stop, ctx);

	if (r < 0)
		return r;
	if (!atomic_load(&m->content))
		r = compute(m, stop, ctx);
	pthread_mutex_unlock(&m->lock);
	return r < 0 ? r : manifest_read(h, buf, size, off, got);
}

static void manifest_free(struct handle *h)
{
	struct manifest_file *m = manifest_of(h);

	derived_file_fini(&m->file);
	pthread_mutex_destroy(&m->lock);
	free(atomic_load(&m->content));
	free(m);
}

static const struct handle_ops manifest_file_ops = {
    .read = manifest_read,
    .read_long = manifest_read_long,
    .sync = derived_nothing_to_sync,
    .flush = derived_flush,
    .free = manifest_free,
};

/* --- the node --- */

static int manifest_open(struct fs *fs, struct node *node, int flags, struct handle **out)
{
	const struct manifest_size *size = node->made;
	struct manifest_file *m;
	int r;

	if (size->error)
		return size->error;
	m = calloc(1, sizeof *m);
	if (!m)
		return -ENOMEM;
	r = derived_file_init(&m->file, &manifest_file_ops, fs, node, flags);
	if (r < 0) {
		free(m);
		return r;
	}
	m->size = (size_t)size->bytes;
	pthread_mutex_init(&m->lock, NULL);
	m->file.h.open_flags = FOPEN_DIRECT_IO;
	*out = &m->file.h;
	return 0;
}

static int manifest_getattr(struct fs *fs, struct node *node, struct handle *handle,
                            struct stat *out)
{
	const struct manifest_size *size = node->made;

	derived_stat(node->snap, node->frozen, SALT_DIGESTS, out);
	out->st_mode = S_IFREG | 0400;
	out->st_nlink = 1;
	out->st_size = (off_t)size->bytes;
	out->st_blocks = (blkcnt_t)ff_div_up(size->bytes, 512);
	return 0;
}

static const struct node_ops manifest_node_ops = {
    .denied = -EROFS,
    .lasting = true,
    .getattr = manifest_getattr,
    .open = manifest_open,
};

int digests_enter(struct fs *fs, struct ff_snap *snap, struct entry *out)
{
	const struct ff_frozen *root = ff_snap_root(snap);
	struct lines l = {.walk = {.snap = snap, .file = add_size}};
	struct manifest_size *size = calloc(1, sizeof *size);
	int r;

	if (!size)
		return -ENOMEM;
	/* a directory that could not be frozen: opening it gives the error */
	size->error = frozen_walk(&l.walk);
	size->bytes = size->error ? 0 : l.bytes;
	r = derived_enter(fs, &manifest_node_ops, snap, root,
	                  (const uint64_t[]){(uintptr_t)snap, 0}, size, free, out);
	return r < 0 ? r : manifest_getattr(fs, out->node, NULL, &out->st);
}
