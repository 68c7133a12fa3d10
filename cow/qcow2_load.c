/*
 * Opening an image that is already there. Nothing in it is believed: not its header, not a table,
 * not one entry. Everything that a save reads back later has been checked here once, and each read
 * checks again what it uses.
 *
 * Order: header (exactly what we would write, see qcow2_format.c) → size of the file → refcount
 * table, L1, L2 (each entry where the layout has it, within the file, none used twice) → refcounts.
 * The tables are scanned by what is no hole in them, so the cost is that of what was saved.
 *
 * A killed process may leave refcounts of clusters that nothing refers to, and a file that is
 * longer than needed (as does the release of its last clusters). Both are mended here: refcounts
 * are made to match the tables, the file is cut after its last cluster in use. (A refcount that is
 * too low, or a refcount block that is not in the table, is never left by a kill, but by a loss of
 * power amid a durable save (qcow2_image.c), or by a storage that lost writes; it is mended too,
 * and the checksums tell whether the data is there.)
 *
 * An entry that is cleared on the storage, or becomes "zeros", cannot be told from one that was
 * written so. A clean end therefore leaves a hash of all entries (session.c), which recovery
 * compares with the one that is taken here.
 *
 * The image belongs to one thread until ff_image_load() returns; no lock is taken.
 */
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>

#include "cow/io.h"
#include "cow/qcow2_private.h"
#include "ff_log.h"
#include "ff_util.h"

#define SCAN_BYTES 65536u

struct load {
	struct ff_image *img;
	int fd;
	uint64_t end;  /* whole clusters in the file that refcounts reach */
	uint64_t next; /* after the last data cluster in use */
	uint64_t hash; /* of the L2 entries so far */
};

typedef int (*entry_fn)(struct load *ld, uint64_t index, uint64_t entry);

static int bad(const struct load *ld, const char *what, uint64_t index)
{
	ff_error("%s: %s %llu is damaged: drop the snapshot to get rid of the image", ld->img->path,
	         what, (unsigned long long)index);
	return -EINVAL;
}

/* Calls FN for each be64 that is not 0 in LEN bytes at OFF, a multiple of 8. */
static int scan_piece(struct load *ld, uint64_t off, size_t len, uint64_t base, uint8_t *buf,
                      entry_fn fn)
{
	int r = io_pread_full(ld->fd, buf, len, off);

	for (size_t i = 0; !r && i < len; i += 8) {
		uint64_t entry = ff_be64(buf + i);

		if (entry)
			r = fn(ld, (off + i - base) / 8, entry);
	}
	return r;
}

/* The same for an area of COUNT host clusters, without reading its holes. */
static int scan_area(struct load *ld, uint64_t first, uint64_t count, entry_fn fn)
{
	uint64_t cs = ld->img->l.cluster_size, base = first * cs, end = base + count * cs;
	uint64_t at = base, data, hole;
	ff_autofree uint8_t *buf = malloc(SCAN_BYTES);

	if (!buf)
		return -ENOMEM;
	while (at < end) {
		int r = io_seek(ld->fd, at, SEEK_DATA, &data);

		if (r == -ENXIO || (!r && data >= end))
			return 0;
		if (!r)
			r = io_seek(ld->fd, data, SEEK_HOLE, &hole);
		if (r)
			return r;
		hole = FF_MIN(ff_round_up(hole, 8), end);
		for (at = data & ~UINT64_C(7); !r && at < hole;) {
			size_t len = (size_t)FF_MIN(hole - at, (uint64_t)SCAN_BYTES);

			r = scan_piece(ld, at, len, base, buf, fn);
			at += len;
		}
		if (r)
			return r;
	}
	return 0;
}

static int take_bit(struct clustermap *map, uint64_t i)
{
	int r = clustermap_reserve(map, i, 1);

	if (!r)
		clustermap_set(map, i, 1);
	return r;
}

static int on_block(struct load *ld, uint64_t i, uint64_t entry)
{
	const struct qcow2_layout *l = &ld->img->l;
	int r;

	if (i >= l->rb_count || entry != (l->rb_first + i) * l->cluster_size)
		return bad(ld, "refcount table entry", i);
	r = take_bit(&ld->img->blocks, i);
	return r ? r : take_bit(&ld->img->refs, l->rb_first + i);
}

static int on_table(struct load *ld, uint64_t t, uint64_t entry)
{
	const struct qcow2_layout *l = &ld->img->l;
	int r;

	if (t >= l->l2_count || entry != (QCOW2_COPIED | ((l->l2_first + t) * l->cluster_size)))
		return bad(ld, "L1 table entry", t);
	r = take_bit(&ld->img->tables, t);
	return r ? r : take_bit(&ld->img->refs, l->l2_first + t);
}

/* In any order: holes in the file and zeros come to the same. */
static int add_entry(struct load *ld, uint64_t cluster, uint64_t entry)
{
	ld->hash += qcow2_entry_hash(entry, cluster);
	return 0;
}

static int on_entry(struct load *ld, uint64_t cluster, uint64_t entry)
{
	struct ff_image *img = ld->img;
	enum ff_image_kind kind;
	uint64_t host;
	int r;

	if (cluster >= img->l.clusters ||
	    !clustermap_test(&img->tables, cluster / img->l.per_table) ||
	    qcow2_entry_decode(&img->l, entry, ld->end, &host, &kind) ||
	    (host && clustermap_test(&img->refs, host)))
		return bad(ld, "the L2 entry of cluster", cluster);
	add_entry(ld, cluster, entry);
	if (host) {
		r = take_bit(&img->refs, host);
		if (r)
			return r;
		ld->next = FF_MAX(ld->next, host + 1);
		atomic_fetch_add(&img->allocated, img->l.cluster_size);
	}
	return take_bit(&img->marks, cluster);
}

static uint64_t count_set(const struct clustermap *map)
{
	uint64_t n = 0, at = 0;

	while (at < map->size) {
		bool set;
		uint64_t run = clustermap_run(map, at, map->size - at, &set);

		n += set ? run : 0;
		at += run;
	}
	return n;
}

static int scan_tables(struct load *ld)
{
	struct ff_image *img = ld->img;
	const struct qcow2_layout *l = &img->l;
	int r = clustermap_reserve(&img->refs, 0, 1 + l->rt_count);

	if (!r)
		r = clustermap_reserve(&img->refs, l->l1_first, l->l1_count);
	if (r)
		return r;
	clustermap_set(&img->refs, 0, 1 + l->rt_count);
	clustermap_set(&img->refs, l->l1_first, l->l1_count);
	r = scan_area(ld, l->rt_first, l->rt_count, on_block);
	if (!r)
		r = scan_area(ld, l->l1_first, l->l1_count, on_table);
	if (!r)
		r = scan_area(ld, l->l2_first, l->l2_count, on_entry);
	atomic_store(&img->preserved, count_set(&img->marks));
	atomic_fetch_add(&img->allocated,
	                 (count_set(&img->blocks) + count_set(&img->tables)) * QCOW2_TABLE_CHARGE);
	return r;
}

/* Makes one piece of refcount bits, at most a chunk of the map, what it should be. */
static int mend_piece(struct load *ld, uint64_t host, uint8_t *buf, bool *mended)
{
	static const uint8_t none[CLUSTERMAP_CHUNK_BITS / 8];
	struct ff_image *img = ld->img;
	const uint8_t *want = clustermap_bytes(&img->refs, host);
	int r = io_pread_full(ld->fd, buf, sizeof none,
	                      img->l.rb_first * img->l.cluster_size + host / 8);

	if (r || memcmp(buf, want ? want : none, sizeof none) == 0)
		return r;
	*mended = true;
	return image_refs_write(img, host, CLUSTERMAP_CHUNK_BITS);
}

/* Every cluster in use must lie in a block that is entered. A kill leaves none that does not; a
 * loss of power may, of a save that had not come to its end. */
static int enter_blocks(struct load *ld, bool *mended)
{
	struct ff_image *img = ld->img;
	uint64_t at = 0, per = img->l.per_block;
	int r = 0;

	while (!r && at < img->l.capacity) {
		bool used;
		uint64_t run = clustermap_run(&img->refs, at, img->l.capacity - at, &used);
		uint64_t end = at + run;

		for (; !r && used && at < end; at = (at / per + 1) * per) {
			uint64_t b = at / per;

			if (clustermap_test(&img->blocks, b))
				continue;
			*mended = true;
			r = on_block(ld, b, (img->l.rb_first + b) * img->l.cluster_size);
			if (!r)
				r = image_hook_blocks(img, b, 1);
			atomic_fetch_add(&img->allocated, QCOW2_TABLE_CHARGE);
		}
		at = end;
	}
	return r;
}

/* Does the file have nothing in LEN bytes at OFF? *DATA: none before this, as far as is known. */
static bool is_hole(struct load *ld, uint64_t off, uint64_t len, uint64_t *data)
{
	int r = 0;

	if (off >= *data)
		r = io_seek(ld->fd, off, SEEK_DATA, data);
	if (r == -ENXIO)
		*data = UINT64_MAX;
	else if (r)
		*data = off; /* no telling: it is read */
	return off + len <= *data;
}

/* Goes by what there is, in memory or in the file: blocks are a bit for each of all clusters, and
 * for a large disk that is more than anyone would wait for. */
static int mend_blocks(struct load *ld, bool *mended)
{
	const struct qcow2_layout *l = &ld->img->l;
	ff_autofree uint8_t *buf = malloc(CLUSTERMAP_CHUNK_BITS / 8);
	uint64_t base = l->rb_first * l->cluster_size, data = 0;
	int r = buf ? 0 : -ENOMEM;

	for (uint64_t b = 0; !r && b < l->rb_count; b++) {
		uint64_t host = b * l->per_block, end = host + l->per_block;

		if (!clustermap_test(&ld->img->blocks, b))
			continue;
		for (; !r && host < end; host += CLUSTERMAP_CHUNK_BITS)
			if (clustermap_bytes(&ld->img->refs, host) ||
			    !is_hole(ld, base + host / 8, CLUSTERMAP_CHUNK_BITS / 8, &data))
				r = mend_piece(ld, host, buf, mended);
	}
	return r;
}

static int mend(struct load *ld)
{
	struct ff_image *img = ld->img;
	uint64_t size = ld->next * img->l.cluster_size, data = 0;
	struct stat st;
	bool mended = false;
	int r = enter_blocks(ld, &mended);

	if (!r)
		r = mend_blocks(ld, &mended);
	if (!r)
		r = io_fstat(ld->fd, &st);
	if (!r && (uint64_t)st.st_size > size) {
		/* what was released at the end is a hole, and no leak */
		mended |= !is_hole(ld, size, (uint64_t)st.st_size - size, &data);
		r = io_truncate(ld->fd, size);
	}
	if (!r && mended)
		ff_info("%s: gave back what an interrupted save had left", img->path);
	return r;
}

int ff_image_head(int fd, struct qcow2_head *head, struct qcow2_layout *l, const char **why)
{
	uint8_t buf[QCOW2_HEAD_SIZE];
	size_t got;
	int r = io_pread(fd, buf, sizeof buf, 0, &got);

	if (r)
		return r;
	*why = "it is too short";
	return got < sizeof buf ? -EINVAL : qcow2_head_decode(buf, head, l, why);
}

static int load_head(struct load *ld, uint64_t file_size)
{
	struct qcow2_head head;
	struct qcow2_layout l;
	const char *why;
	int r = ff_image_head(ld->fd, &head, &l, &why);

	if (r && r != -EINVAL)
		return r;
	if (!r && file_size / l.cluster_size < l.data_first) {
		why = "it was cut short";
		r = -EINVAL;
	}
	if (r) {
		ff_error("%s: %s", ld->img->path, why);
		return r;
	}
	/* a file may be longer than its refcounts reach: nothing of ours is there */
	ld->end = FF_MIN(file_size / l.cluster_size, l.capacity);
	ld->next = l.data_first;
	return image_setup(ld->img, &head, &l);
}

static int load_all(struct load *ld)
{
	struct stat st;
	int r = image_fd(ld->img, &ld->fd);

	if (!r)
		r = io_fstat(ld->fd, &st);
	if (r)
		return r;
	r = io_writeback_error(ld->fd);
	if (r) {
		ff_error("%s: some of it could not be written back: %s", ld->img->path,
		         strerror(-r));
		return -EIO;
	}
	ld->img->mode = st.st_mode & 0777;
	r = load_head(ld, (uint64_t)st.st_size);
	if (!r)
		r = scan_tables(ld);
	if (!r)
		r = image_ledger_load(ld->img, &ld->hash);
	if (!r)
		r = image_said_look(ld->img);
	if (!r)
		r = mend(ld);
	ld->img->loaded_hash = ld->hash;
	if (!r)
		ld->img->next = ld->next;
	return r;
}

int ff_image_entries_hash(struct ff_image *img, uint64_t *out)
{
	struct load ld = {.img = img, .fd = -1};
	int r = image_fd(img, &ld.fd);

	if (!r)
		r = scan_area(&ld, img->l.l2_first, img->l.l2_count, add_entry);
	if (!r)
		r = image_ledger_hash(img, &ld.hash);
	*out = ld.hash;
	return r;
}

uint64_t ff_image_loaded_hash(const struct ff_image *img)
{
	return img->loaded_hash;
}

int ff_image_load(int dirfd, const char *path, struct ff_image **out)
{
	struct load ld = {.fd = -1};
	int r = image_new(dirfd, path, &ld.img);

	if (r)
		return r;
	r = load_all(&ld);
	if (r) {
		if (r != -EINVAL)
			ff_error("%s: cannot be loaded: %s", path, strerror(-r));
		ff_image_free(ld.img);
		return r;
	}
	*out = ld.img;
	return 0;
}
