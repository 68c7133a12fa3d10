/*
 * A frozen disk as against an older snapshot: what of it changed, as ranges, as a sparse file and
 * as an image (since_image.c).
 *
 * All of these are made up when they are read and never change while the newer snapshot lives,
 * whatever guests write meanwhile: which clusters changed is fixed (changes.c), which of them are
 * zeros is settled once and kept (zeros.c), and their bytes are frozen. So nothing else of
 * an image needs to be kept but counts: how many clusters of data lie before each chunk of 32768
 * clusters, and which L2 tables it has; 24 bytes for each 128 MiB of disk with the smallest
 * clusters. They are made without reading the disk: what it costs to know them is a look at the
 * marks between the two snapshots and at the extents of what changed. Should they be freed and made
 * again they come out the same.
 *
 * A struct ff_since is constant once made, and keeps both snapshots in memory but not from being
 * dropped. A struct ff_since_file keeps them from that too (struct ff_hold, for both: the links
 * between them say what changed), and the disk's descriptors open (its reader). The making holds
 * both as well, and as flushed, so that a drop waits for it.
 *
 * Where the older snapshot has the disk, but what changed since cannot be known, the making fails
 * with EIO, and the log says that the next backup has to be a full one. A disk that it does not
 * have counts as changed altogether, and its image leads to no other.
 */
#include "cow/since.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "ff_log.h"
#include "ff_util.h"

/* -EIO: not known. */
static int look(const struct changes *c, size_t chunk, struct since_view *out)
{
	uint64_t zero[CHANGES_WORDS];
	int r;

	memset(out->changed, 0, sizeof out->changed);
	memset(out->data, 0, sizeof out->data);
	out->count = changes_count(c->new, chunk);
	r = changes_bits(c, (uint64_t)chunk * CHANGES_MAX, out->count, out->changed);
	if (r || bits_find(out->changed, 0, out->count, true) == out->count)
		return r;
	r = zeros_bits(c->new, chunk, out->changed, zero);
	for (unsigned w = 0; !r && w < CHANGES_WORDS; w++)
		out->data[w] = out->changed[w] & ~zero[w];
	return r;
}

static uint64_t count_data(const struct since_view *v)
{
	uint64_t n = 0;

	for (unsigned w = 0; w < CHANGES_WORDS; w++)
		n += (unsigned)__builtin_popcountll(v->data[w]);
	return n;
}

int since_view(struct ff_since_file *f, size_t chunk, struct since_view *out)
{
	const struct ff_since *s = f->since;
	int r;

	FF_GUARD(&f->lock);
	if (f->kept_chunk != chunk) {
		f->kept_chunk = s->chunks;
		r = look(&f->changes, chunk, &f->kept);
		if (r)
			return r;
		if (count_data(&f->kept) != s->before[chunk + 1] - s->before[chunk]) {
			ff_error("%s: what is known to have changed is not what it was: what is "
			         "made from it cannot be read",
			         ff_image_path(f->changes.new->img));
			return -EIO;
		}
		f->kept_chunk = chunk;
	}
	*out = f->kept;
	return 0;
}

/* --- making --- */

static void count_chunk(struct ff_since *s, size_t chunk, const struct since_view *v,
                        uint64_t cluster_size)
{
	const uint64_t *bits = s->whole ? v->data : v->changed;
	uint64_t first = (uint64_t)chunk * CHANGES_MAX, per_table = cluster_size / 8;

	for (unsigned w = 0; w < CHANGES_WORDS; w++) {
		uint64_t table = (first + w * 64) / per_table;

		s->changed += (unsigned)__builtin_popcountll(v->changed[w]) * cluster_size;
		if (bits[w])
			s->present[table / 64] |= UINT64_C(1) << (table % 64);
	}
	s->before[chunk + 1] = s->before[chunk] + count_data(v);
	if (v->count && first + v->count == ff_div_up(s->size, cluster_size) &&
	    v->changed[(v->count - 1) / 64] >> ((v->count - 1) % 64) & 1)
		s->changed -= (first + v->count) * cluster_size - s->size;
}

static int count_all(struct ff_since *s, const struct changes *c, uint32_t cluster_size)
{
	struct since_view v;
	int r = 0;

	s->chunks = (size_t)ff_div_up(c->new->clusters, CHANGES_MAX);
	s->tables = ff_div_up(c->new->clusters, cluster_size / 8);
	s->before = calloc(s->chunks + 1, sizeof *s->before);
	s->present = calloc((size_t)s->tables / 64 + 1, sizeof *s->present);
	s->present_before = calloc((size_t)s->tables / 64 + 1, sizeof *s->present_before);
	if (!s->before || !s->present || !s->present_before)
		return -ENOMEM;
	for (size_t i = 0; i < s->chunks && !r; i++) {
		uint64_t next = changes_next(c, (uint64_t)i * CHANGES_MAX);

		for (; i < s->chunks && (uint64_t)(i + 1) * CHANGES_MAX <= next; i++)
			s->before[i + 1] = s->before[i];
		if (i == s->chunks)
			break;
		r = look(c, i, &v);
		if (!r)
			count_chunk(s, i, &v, cluster_size);
	}
	return r ? r : since_layout(s, cluster_size);
}

struct text {
	char *out;
	size_t len, room; /* room: without the NUL */
};

static void put_text(struct text *t, const char *s)
{
	size_t n = strlen(s);

	if (t->len + n <= t->room)
		memcpy(t->out + t->len, s, n + 1);
	t->len += n;
}

/* Fills in s->backing. REL: the disk's path in NEW. */
static int name_backing(struct ff_since *s, const struct ff_since_pair *pair, const char *rel)
{
	ff_autofree char *image = since_image_path(s->old, s->old_path);
	struct text t = {.out = s->backing, .room = QCOW2_BACKING_MAX};

	if (!image)
		return -ENOMEM;
	for (const char *p = pair->backing ? pair->backing : "%u%o/%p"; *p; p++) {
		char one[2] = {*p};

		if (*p != '%') {
			put_text(&t, one);
			continue;
		}
		p++;
		if (*p == 'u') {
			put_text(&t, "../");
			for (const char *q = rel; (q = strchr(q, '/')); q++)
				put_text(&t, "../");
		} else if (*p == 'o') {
			put_text(&t, pair->old_name);
		} else if (*p == 'p') {
			put_text(&t, image);
		} else if (*p == '%') {
			put_text(&t, "%");
		} else {
			return -EINVAL;
		}
	}
	if (t.len <= t.room)
		return 0;
	s->backing[0] = '\0';
	ff_error("%s since %s: the name of its image's backing file would be longer than %u bytes",
	         rel, pair->old_name, QCOW2_BACKING_MAX);
	return -ENAMETOOLONG;
}

/* Is this a backing name's pattern? */
bool ff_since_backing_valid(const char *pattern)
{
	for (const char *p = pattern; *p; p++)
		if (*p == '%' && (!*++p || !strchr("uop%", *p)))
			return false;
	return *pattern != '\0';
}

static int make(struct ff_since *s, const struct ff_since_pair *pair, const char *rel)
{
	const char *why;
	struct changes c;
	int r = changes_begin(s->new, s->f, s->old, &c, &why);

	if (r) {
		ff_error("%s: what changed since %s cannot be known: %s: the next backup of it has "
		         "to be a full one",
		         rel, pair->old_name, why);
		return r;
	}
	s->whole = !c.old;
	if (c.old)
		r = since_path(s->old, c.old->number, rel, &s->old_path);
	if (!r && c.old)
		r = name_backing(s, pair, rel);
	if (r)
		return r == -ENOMEM || r == -ENAMETOOLONG ? r : -EIO;
	disk_use(c.new->disk);
	r = count_all(s, &c, ff_image_desc(c.new->img)->cluster_size);
	if (!r)
		r = zeros_keep(c.new);
	if (!r && atomic_load(&c.new->broken))
		r = -EIO;
	disk_unuse(c.new->disk);
	if (r)
		ff_error("%s: what changed since %s cannot be found out: %s", rel,
		         pair->old ? pair->old_name : "nothing", strerror(-r));
	return r;
}

/* Holds both; OLD may be NULL. */
static int hold_both(struct ff_snap *new, struct ff_snap *old, struct ff_hold **new_hold,
                     struct ff_hold **old_hold)
{
	int r = ff_snap_hold(new, new_hold);

	*old_hold = NULL;
	if (!r && old) {
		r = ff_snap_hold(old, old_hold);
		if (r)
			ff_hold_release(*new_hold);
	}
	return r;
}

static void flushed_both(struct ff_hold *new_hold, struct ff_hold *old_hold)
{
	ff_hold_flushed(new_hold);
	if (old_hold)
		ff_hold_flushed(old_hold);
}

static void release_both(struct ff_hold *new_hold, struct ff_hold *old_hold)
{
	ff_hold_release(new_hold);
	if (old_hold)
		ff_hold_release(old_hold);
}

int ff_since_make(const struct ff_since_pair *pair, const struct ff_frozen *dir, const char *name,
                  const struct ff_frozen *f, struct ff_since **out)
{
	ff_autofree char *rel = since_join(pair->new, dir, name);
	struct ff_since *s = calloc(1, sizeof *s);
	struct ff_hold *new_hold, *old_hold;
	int r = s && rel ? 0 : -ENOMEM;

	if (!r && f->disk >= pair->new->link_count)
		r = -EIO;
	if (!r)
		r = hold_both(pair->new, pair->old, &new_hold, &old_hold);
	if (r) {
		free(s);
		return r;
	}
	flushed_both(new_hold, old_hold);
	s->new = ff_snap_ref(pair->new);
	s->old = pair->old ? ff_snap_ref(pair->old) : NULL;
	s->f = f;
	s->size = (uint64_t)f->st.st_size;
	if (ff_snap_is_checkpoint(s->new)) {
		ff_error("%s: a checkpoint has no data to make an image from", rel);
		r = -EIO;
	} else {
		r = make(s, pair, rel);
	}
	release_both(new_hold, old_hold);
	if (r)
		ff_since_free(s);
	else
		*out = s;
	return r;
}

void ff_since_free(struct ff_since *s)
{
	ff_snap_put(s->new);
	if (s->old)
		ff_snap_put(s->old);
	free(s->old_path);
	free(s->before);
	free(s->present);
	free(s->present_before);
	free(s);
}

uint64_t ff_since_changed(const struct ff_since *s)
{
	return s->changed;
}

const char *ff_since_old_path(const struct ff_since *s)
{
	return s->old_path;
}

/* --- reading --- */

static void file_free(struct ff_since_file *f)
{
	pthread_mutex_destroy(&f->lock);
	free(f);
}

int ff_since_open(const struct ff_since *s, struct ff_since_file **out)
{
	struct ff_since_file *f = calloc(1, sizeof *f);
	const char *why;
	int r;

	if (!f)
		return -ENOMEM;
	f->since = s;
	f->kept_chunk = s->chunks;
	pthread_mutex_init(&f->lock, NULL);
	r = hold_both(s->new, s->old, &f->new_hold, &f->old_hold);
	if (r) {
		file_free(f);
		return r;
	}
	r = ff_reader_open(s->new, s->f, &f->reader);
	if (!r) {
		ff_reader_flushed(f->reader);
		r = changes_begin(s->new, s->f, s->old, &f->changes, &why);
		if (!r && !f->changes.old != s->whole)
			r = -EIO;
		if (r)
			ff_reader_close(f->reader);
	}
	if (r) {
		release_both(f->new_hold, f->old_hold);
		file_free(f);
		return r;
	}
	*out = f;
	return 0;
}

void ff_since_flushed(struct ff_since_file *f)
{
	flushed_both(f->new_hold, f->old_hold);
}

void ff_since_close(struct ff_since_file *f)
{
	ff_reader_close(f->reader);
	release_both(f->new_hold, f->old_hold);
	file_free(f);
}

/* Did something change in this chunk? Not if its tables are not there, which a whole image's may
 * not be for other reasons. */
static bool may_have_changed(const struct ff_since *s, size_t chunk)
{
	uint64_t per_table = s->l.cluster_size / 8, first = (uint64_t)chunk * CHANGES_MAX;
	uint64_t end = FF_MIN(ff_div_up(first + CHANGES_MAX, per_table), s->tables);

	for (uint64_t t = first / per_table; t < end; t++)
		if (s->present[t / 64] >> (t % 64) & 1)
			return true;
	return s->whole;
}

/* The first run from OFF on in chunk CHUNK; OUT->len 0: there is none. */
static int next_in(struct ff_since_file *f, size_t chunk, uint64_t off, bool kinds,
                   struct ff_since_run *out)
{
	const struct ff_since *s = f->since;
	uint64_t size = s->l.cluster_size, first = (uint64_t)chunk * CHANGES_MAX;
	struct since_view v;
	unsigned at = off / size > first ? (unsigned)(off / size - first) : 0, to;
	int r = since_view(f, chunk, &v);

	out->len = 0;
	if (r)
		return r;
	at = bits_find(v.changed, at, v.count, true);
	if (at == v.count)
		return 0;
	to = bits_find(v.changed, at, v.count, false);
	if (kinds) {
		out->zero = !(v.data[at / 64] >> (at % 64) & 1);
		to = FF_MIN(to, bits_find(v.data, at, v.count, out->zero));
	}
	out->off = FF_MAX(off, (first + at) * size);
	out->len = FF_MIN(s->size, (first + to) * size) - out->off;
	return 0;
}

int ff_since_next(struct ff_since_file *f, uint64_t off, bool kinds, struct ff_since_run *out)
{
	const struct ff_since *s = f->since;
	uint64_t per_chunk = (uint64_t)CHANGES_MAX * s->l.cluster_size;
	int r = 0;

	*out = (struct ff_since_run){0};
	if (off >= s->size)
		return -ENXIO;
	for (size_t i = (size_t)(off / per_chunk); !r && !out->len && i < s->chunks; i++)
		if (may_have_changed(s, i))
			r = next_in(f, i, off, kinds, out);
	if (!r && atomic_load(&f->changes.new->broken))
		r = -EIO;
	return r ? r : out->len ? 0 : -ENXIO;
}

int ff_since_read_ranges(struct ff_since_file *f, void *buf, size_t len, off_t off, size_t *got)
{
	uint64_t size = f->since->size, at = (uint64_t)off, end;
	char *p = buf;
	int r = 0;

	if (off < 0)
		return -EINVAL;
	*got = 0;
	if (at >= size)
		return 0;
	end = at + FF_MIN(len, size - at);
	while (at < end && !r) {
		struct ff_since_run run;
		uint64_t from, to;
		size_t n;

		r = ff_since_next(f, at, false, &run);
		if (r && r != -ENXIO)
			return r;
		from = r ? end : FF_MIN(run.off, end);
		to = r ? end : FF_MIN(run.off + run.len, end);
		memset(p, 0, (size_t)(from - at));
		p += from - at;
		r = 0;
		if (from < to) {
			r = ff_reader_read(f->reader, p, (size_t)(to - from), (off_t)from, &n);
			if (!r && n != to - from)
				r = -EIO;
		}
		p += to - from;
		at = to;
	}
	if (!r)
		*got = (size_t)(p - (char *)buf);
	return r;
}
