/*
 * One image, looked through from beginning to end without changing it.
 *
 * Order: header → refcount table, L1, L2 (each entry where the layout has it, within the file, no
 * host cluster used twice) → with it the data, in runs, against the checksums → refcounts →
 * libqcow.
 *
 * While a mount has the image it grows beneath us, and a drop gives clusters up. A save writes
 * data, checksum, refcount, L1 and then the L2 entry, so what an entry leads to is there when the
 * entry is seen; and refcounts are read after all entries. A release goes the other way: an entry
 * that was read before it may lead to what is gone after it; and eight bytes may be read while they
 * are being written. All these pass, at once and for good, for a guest cluster is saved once and
 * released once. So the caller looks again, at what was found, and keeps what is found each time
 * (audit_keep_common()).
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "cow/ctl/audit.h"
#include "cow/io.h"
#include "cow/ledger_file.h"
#include "ff_util.h"

enum { RUN_BYTES = 1 << 20, CHUNK_BYTES = CLUSTERMAP_CHUNK_BITS / 8 };

struct run {
	uint64_t guest, host, count;
};

struct work {
	const struct audit_how *how;
	struct audit *out;
	struct view v;
	uint64_t end;     /* whole clusters in the file */
	uint64_t missing; /* number + 1 of the table that L1 was last read again for */
	struct clustermap blocks, tables, refs;
	struct run run;
	uint64_t run_max;
	uint8_t *data, *sums;
};

static bool has(const struct audit *a, enum finding_kind kind, uint64_t index)
{
	for (size_t i = 0; i < a->count; i++)
		if (a->findings[i].kind == kind && a->findings[i].index == index)
			return true;
	return false;
}

static int found(struct audit *a, enum finding_kind kind, uint64_t index, const char *why,
                 int error)
{
	a->total++;
	if (a->count < FINDINGS_MAX)
		a->findings[a->count++] = (struct finding){kind, index, why, error};
	return 0;
}

/* Of tables that are looked at twice. */
static int found_once(struct audit *a, enum finding_kind kind, uint64_t index)
{
	return has(a, kind, index) ? 0 : found(a, kind, index, NULL, 0);
}

void audit_keep_common(struct audit *a, const struct audit *b)
{
	size_t n = 0;

	for (size_t i = 0; i < a->count; i++)
		if (has(b, a->findings[i].kind, a->findings[i].index))
			a->findings[n++] = a->findings[i];
	/* those that had no room are known of no more, but for their number */
	a->total = n == a->count ? FF_MIN(a->total, FF_MAX(b->total, (uint64_t)n)) : n;
	a->count = n;
}

static int take_bit(struct clustermap *map, uint64_t i)
{
	int r = clustermap_reserve(map, i, 1);

	if (!r)
		clustermap_set(map, i, 1);
	return r;
}

static int on_block(void *ctx, uint64_t i, uint64_t entry)
{
	struct work *w = ctx;
	const struct qcow2_layout *l = &w->v.l;
	int r;

	if (i >= l->rb_count || entry != (l->rb_first + i) * l->cluster_size)
		return found_once(w->out, FINDING_BLOCK, i);
	r = take_bit(&w->blocks, i);
	return r ? r : take_bit(&w->refs, l->rb_first + i);
}

static int on_table(void *ctx, uint64_t t, uint64_t entry)
{
	struct work *w = ctx;
	const struct qcow2_layout *l = &w->v.l;
	int r;

	if (t >= l->l2_count || entry != (QCOW2_COPIED | ((l->l2_first + t) * l->cluster_size)))
		return found_once(w->out, FINDING_TABLE, t);
	r = take_bit(&w->tables, t);
	return r ? r : take_bit(&w->refs, l->l2_first + t);
}

/* --- data --------------------------------------------------------------------------------------
 */

static void compare(struct work *w, const struct run *run, size_t sums_got)
{
	uint32_t cs = w->v.l.cluster_size;

	for (uint64_t i = 0; i < run->count; i++)
		if ((i + 1) * 8 > sums_got ||
		    ff_be64(w->sums + i * 8) != qcow2_sum(w->data + i * cs, cs, run->guest + i))
			found(w->out, FINDING_SUM, run->guest + i, NULL, 0);
}

/* Reads what has been gathered, and begins anew. */
static void check_run(struct work *w)
{
	struct run run = w->run;
	uint64_t cs = w->v.l.cluster_size;
	size_t got = 0, sums_got = 0;
	int r;

	w->run.count = 0;
	if (!run.count)
		return;
	r = io_pread(w->v.fd, w->data, run.count * cs, run.host * cs, &got);
	if (!r)
		r = io_pread(w->v.sums_fd, w->sums, run.count * 8,
		             qcow2_sum_offset(&w->v.l, run.host), &sums_got);
	if (w->how->progress)
		progress_add(w->how->progress, (double)(run.count * cs));
	if (r) {
		found(w->out, FINDING_READ, run.guest, NULL, r);
		return;
	}
	memset(w->data + got, 0, run.count * cs - got);
	compare(w, &run, sums_got);
}

/* Is the data of this cluster to be read? */
static bool wants(const struct work *w, uint64_t guest)
{
	const struct audit *before = w->how->before;

	if (!w->how->sums || w->v.sums_fd < 0 || w->v.sums_wrong)
		return false;
	return !before || has(before, FINDING_SUM, guest) || has(before, FINDING_READ, guest) ||
	       has(before, FINDING_SUMS, 0);
}

static void add_data(struct work *w, uint64_t guest, uint64_t host)
{
	struct run *run = &w->run;

	if (!wants(w, guest))
		return;
	if (run->count && run->count < w->run_max && guest == run->guest + run->count &&
	    host == run->host + run->count) {
		run->count++;
		return;
	}
	check_run(w);
	*run = (struct run){guest, host, 1};
}

static int on_entry(void *ctx, uint64_t cluster, uint64_t entry)
{
	struct work *w = ctx;
	const struct qcow2_layout *l = &w->v.l;
	enum ff_image_kind kind = FF_KIND_NONE;
	uint64_t host = 0;
	int r;

	w->out->hash += qcow2_entry_hash(entry, cluster);
	r = qcow2_entry_decode(l, entry, w->end, &host, &kind);
	if (r && !view_end(&w->v, &w->end)) /* it may have grown */
		r = qcow2_entry_decode(l, entry, w->end, &host, &kind);
	if (!r && cluster < l->clusters && !clustermap_test(&w->tables, cluster / l->per_table)) {
		uint64_t t = cluster / l->per_table;

		/* its table may have come to be used since L1 was read */
		if (w->missing != t + 1)
			r = view_scan(&w->v, l->l1_first, l->l1_count, on_table, w);
		if (r)
			return r;
		w->missing = t + 1;
		if (!clustermap_test(&w->tables, t))
			return found(w->out, FINDING_ENTRY, cluster, "L1 has not its table", 0);
	}
	if (r || cluster >= l->clusters)
		return found(w->out, FINDING_ENTRY, cluster, NULL, 0);
	if (!host) {
		w->out->zeros++;
		return 0;
	}
	w->out->data++;
	if (clustermap_test(&w->refs, host))
		return found(w->out, FINDING_OVERLAP, cluster, NULL, 0);
	r = take_bit(&w->refs, host);
	if (!r)
		add_data(w, cluster, host);
	return r;
}

/* --- refcounts ----------------------------------------------------------------------------------
 */

/* The first lost bit of each byte is enough; bits too many are leaks. */
static void compare_refs(struct work *w, uint64_t host, const uint8_t *want, const uint8_t *have)
{
	for (unsigned i = 0; i < CHUNK_BYTES; i++) {
		uint8_t need = want ? want[i] : 0, lost = need & (uint8_t)~have[i];

		if (lost)
			found(w->out, FINDING_REFCOUNT,
			      host + i * 8 + (unsigned)__builtin_ctz(lost), NULL, 0);
		w->out->leaks += (unsigned)__builtin_popcount(have[i] & (uint8_t)~need);
	}
}

static bool is_hole(const struct work *w, uint64_t off)
{
	uint64_t data;
	int r = io_seek(w->v.fd, off, SEEK_DATA, &data);

	return r == -ENXIO || (!r && data >= off + CHUNK_BYTES);
}

static int check_block(struct work *w, uint64_t block, uint8_t *have)
{
	const struct qcow2_layout *l = &w->v.l;
	uint64_t host = block * l->per_block, end = host + l->per_block;
	bool entered = clustermap_test(&w->blocks, block);
	int r = 0;

	for (; !r && host < end; host += CLUSTERMAP_CHUNK_BITS) {
		const uint8_t *want = clustermap_bytes(&w->refs, host);
		uint64_t off = l->rb_first * l->cluster_size + host / 8;

		if (!want && (!entered || is_hole(w, off)))
			continue;
		memset(have, 0, CHUNK_BYTES);
		if (entered)
			r = io_pread_full(w->v.fd, have, CHUNK_BYTES, off);
		if (!r)
			compare_refs(w, host, want, have);
	}
	return r;
}

static int check_refs(struct work *w)
{
	ff_autofree uint8_t *have = malloc(CHUNK_BYTES);
	const struct qcow2_layout *l = &w->v.l;
	int r = have ? 0 : -ENOMEM;

	/* blocks that came to be used meanwhile */
	if (!r)
		r = view_scan(&w->v, l->rt_first, l->rt_count, on_block, w);
	for (uint64_t b = 0; !r && b < l->rb_count; b++)
		r = check_block(w, b, have);
	return r;
}

/* --- all of it ----------------------------------------------------------------------------------
 */

static int begin(struct work *w)
{
	const struct qcow2_layout *l = &w->v.l;
	int r = clustermap_init(&w->blocks, l->rb_count);

	if (!r)
		r = clustermap_init(&w->tables, l->l2_count);
	if (!r)
		r = clustermap_init(&w->refs, l->capacity);
	if (!r)
		r = clustermap_reserve(&w->refs, 0, 1 + l->rt_count);
	if (!r)
		r = clustermap_reserve(&w->refs, l->l1_first, l->l1_count);
	if (r)
		return r;
	clustermap_set(&w->refs, 0, 1 + l->rt_count);
	clustermap_set(&w->refs, l->l1_first, l->l1_count);
	w->run_max = FF_MAX((uint64_t)RUN_BYTES / l->cluster_size, UINT64_C(1));
	w->data = malloc(w->run_max * l->cluster_size);
	w->sums = malloc(w->run_max * 8);
	if (!w->data || !w->sums)
		return -ENOMEM;
	return view_end(&w->v, &w->end);
}

static int on_sector(void *ctx, enum ledger_part part, uint64_t first, const uint64_t *words)
{
	struct work *w = ctx;

	for (unsigned i = 0; i < LEDGER_WORDS && part == LEDGER_CHANGED; i++)
		w->out->noted += (unsigned)__builtin_popcountll(words[i]);
	return 0;
}

/* The record of changes beside the image, if its head says that there is one. */
static int check_ledger(struct work *w, int dirfd, const char *path)
{
	const struct ff_image_desc *desc = &w->v.head.desc;
	uint64_t bad, clusters = w->v.l.clusters;
	ff_autoclose int fd = -1;
	int r;

	if (!desc->ledger)
		return 0;
	r = ledger_open(dirfd, path, desc, clusters, O_RDONLY, &fd);
	if (!r)
		r = ledger_scan(fd, desc, clusters, on_sector, w, &w->out->hash, &bad);
	if (r == -ENOMEM || r == -EMFILE)
		return r;
	return r ? found(w->out, FINDING_LEDGER, 0,
	                 r == -ENOENT   ? "its record of changes is missing"
	                 : r == -EINVAL ? "its record of changes is damaged"
	                                : "its record of changes cannot be read",
	                 r)
	         : 0;
}

static int look(struct work *w)
{
	const struct qcow2_layout *l = &w->v.l;
	enum finding_kind kind;
	int r = begin(w);

	if (!r)
		r = view_scan(&w->v, l->rt_first, l->rt_count, on_block, w);
	if (!r)
		r = view_scan(&w->v, l->l1_first, l->l1_count, on_table, w);
	if (!r)
		r = view_scan(&w->v, l->l2_first, l->l2_count, on_entry, w);
	if (!r)
		check_run(w);
	if (!r && w->out->data && (w->v.sums_fd < 0 || w->v.sums_wrong))
		found(w->out, FINDING_SUMS, 0,
		      w->v.sums_wrong ? "its checksum file is damaged, or another image's"
		                      : "its checksum file is missing",
		      0);
	if (!r)
		r = check_refs(w);
	/* libqcow refuses what is marked as corrupt, as a lost view's image is, and rightly */
	if (!r && !w->v.head.desc.broken) {
		r = second_opinion(w->v.fd, l->size, &kind);
		r = r > 0 ? found(w->out, kind, 0, NULL, 0) : r;
	}
	return r;
}

int audit_image(int dirfd, const char *path, const struct audit_how *how, struct audit *out)
{
	struct work w = {.how = how, .out = out, .v = {.fd = -1, .sums_fd = -1}};
	const char *why = NULL;
	int r;

	memset(out, 0, sizeof *out);
	r = view_open(dirfd, path, &w.v, &why);
	if (r == -ENOENT || r == -ENOMEM || r == -EMFILE || r == -EACCES)
		return r;
	if (r)
		return found(out, FINDING_OPEN, 0, r == -EINVAL ? why : NULL, r);
	out->cluster_size = w.v.l.cluster_size;
	out->broken = w.v.head.desc.broken;
	r = look(&w);
	if (!r)
		r = check_ledger(&w, dirfd, path);
	if (r == -EIO || r == -EUCLEAN)
		r = found(out, FINDING_OPEN, 0, NULL, r);
	view_close(&w.v);
	clustermap_fini(&w.blocks);
	clustermap_fini(&w.tables);
	clustermap_fini(&w.refs);
	free(w.data);
	free(w.sums);
	return r;
}

void audit_say(const struct audit *a, const struct finding *f, const char *path)
{
	unsigned long long i = f->index, off = i * a->cluster_size;

	switch (f->kind) {
	case FINDING_OPEN:
		ctl_say("  %s: %s", path, f->why ? f->why : strerror(-f->error));
		break;
	case FINDING_BLOCK:
		ctl_say("  %s: refcount table entry %llu is damaged", path, i);
		break;
	case FINDING_TABLE:
		ctl_say("  %s: L1 table entry %llu is damaged", path, i);
		break;
	case FINDING_ENTRY:
		ctl_say("  %s: the L2 entry of the disk's offset %llu is damaged%s%s", path, off,
		        f->why ? ": " : "", f->why ? f->why : "");
		break;
	case FINDING_OVERLAP:
		ctl_say("  %s: the cluster of the disk's offset %llu is another's too", path, off);
		break;
	case FINDING_REFCOUNT:
		ctl_say("  %s: the image's offset %llu is in use, but its refcount is 0", path,
		        off);
		break;
	case FINDING_SUMS:
	case FINDING_LEDGER:
		ctl_say("  %s: %s", path, f->why);
		break;
	case FINDING_SUM:
		ctl_say("  %s: the saved cluster of the disk's offset %llu does not match its "
		        "checksum",
		        path, off);
		break;
	case FINDING_READ:
		ctl_say("  %s: the saved cluster of the disk's offset %llu cannot be read: %s",
		        path, off, strerror(-f->error));
		break;
	case FINDING_LIBQCOW:
		ctl_say("  %s: libqcow does not open it", path);
		break;
	case FINDING_SIZE:
		ctl_say("  %s: libqcow finds another size", path);
		break;
	}
}
