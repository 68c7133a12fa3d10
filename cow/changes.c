/*
 * What changed between two snapshots.
 *
 * While a link is the newest of its disk, every change of a cluster marks it there before it is
 * made (save.c). So a cluster that no link from OLD's up to, not including, NEW's has marked
 * reads the same in both views. The answer is the union of those marks, and two things more:
 *
 *   - what lies beyond the end of any of these links' disks: the disk was shorter for a while, and
 *     what came after that end is marked nowhere. A last cluster that is a part only counts as
 *     whole, filled up with zeros, in saves as well as here.
 *   - nothing else. The links of dropped snapshots stay between the others for as long as their
 *     marks matter: collect.c gives up in such a link what an older one has marked too, or what
 *     lies beyond the end of an older one, and takes it out when nothing else is left. Both are in
 *     the union without it.
 *
 * The answer is fixed once NEW is there. Saves go into the newest link alone; one that began when
 * an older link was the newest may still come to its end, and mark there what is the same in both:
 * such a save had its clusters claimed before the freeze, for who claims later finds the newer
 * link. So they are few, and changes_begin() waits until there are none. Marks that a drop adds are
 * in the union already. So two who ask at different times get the same answer, through drops,
 * renames and remounts (an image's entries say what its marks said).
 *
 * What cannot be known. A view breaks when a cluster that it needed was changed without a save: it
 * is one that no link from the view's own on had marked. So as long as OLD's view is not broken,
 * the marks from it on are whole, whatever broke between (recovery, too, breaks all views that are
 * older than what it found lost, torn or damaged). If OLD's view is broken there is no answer, even
 * if it broke after NEW was made.
 *
 * A walk along the chain is made within the barrier `reads`, as readers make it.
 */
#include "cow/changes.h"
#include "cow/save.h"

#include <errno.h>
#include <string.h>
#include <time.h>

#include "ff_util.h"

enum { SETTLE_TRIES = 5000, SETTLE_MS = 2 };

int link_changed(struct link *l, uint64_t first, unsigned count, uint64_t *bits)
{
	ff_image_marks(l->img, first, count, bits);
	return 0;
}

/* Adds what was changed while L was the newest. */
static int add_changed(struct link *l, uint64_t first, unsigned count, uint64_t *bits)
{
	uint64_t more[CHANGES_WORDS];
	bool marked;
	int r;

	/* most of the time there is nothing */
	if (ff_image_run(l->img, first, count, &marked) >= count && !marked)
		return 0;
	r = link_changed(l, first, count, more);
	for (unsigned w = 0; !r && w * 64 < count; w++)
		bits[w] |= more[w];
	return r;
}

/* *END: the least number of clusters on the way. */
static int add_all(const struct changes *c, uint64_t first, unsigned count, uint64_t *bits,
                   uint64_t *end)
{
	struct barrier *reads = c->new->disk->store->reads;
	unsigned token = barrier_enter(reads);
	struct link *l = c->old;
	int r = 0;

	while (l && l != c->new && !r) {
		*end = FF_MIN(*end, l->clusters);
		r = add_changed(l, first, count, bits);
		l = atomic_load_explicit(&l->newer, memory_order_acquire);
	}
	barrier_exit(reads, token);
	return r ? r : l ? 0 : -EIO;
}

int changes_bits(const struct changes *c, uint64_t first, unsigned count, uint64_t *bits)
{
	uint64_t end = c->old ? c->new->clusters : 0;
	unsigned known;
	int r = 0;

	memset(bits, 0, ff_div_up(count, 64) * sizeof *bits);
	if (first >= c->new->clusters)
		return 0;
	count = (unsigned)FF_MIN(count, c->new->clusters - first);
	if (c->old)
		r = add_all(c, first, count, bits, &end);
	known = end > first ? (unsigned)FF_MIN(count, end - first) : 0;
	bits_set(bits, known, count);
	return r;
}

uint64_t changes_next(const struct changes *c, uint64_t first)
{
	struct barrier *reads = c->new->disk->store->reads;
	uint64_t next = c->old ? c->new->clusters : first;
	struct link *l = c->old;
	unsigned token;

	if (next <= first)
		return next;
	token = barrier_enter(reads);
	for (; next > first && l && l != c->new; l = atomic_load(&l->newer)) {
		bool marked = first >= l->clusters; /* what it has not got counts as changed */
		uint64_t n = 0;

		if (!marked)
			n = ff_image_run(l->img, first, FF_MIN(next, l->clusters) - first, &marked);
		next = marked ? first : first + n;
	}
	barrier_exit(reads, token);
	return next;
}

/* Was the disk in OLD, though no link says so: is its image lost? */
static bool was_there(const struct ff_snap *old, const struct ff_disk *d)
{
	for (uint32_t i = 0; i < old->tree->disk_count; i++) {
		const struct ff_frozen *f = &old->tree->inodes[old->tree->disks[i]];

		if (f->st.st_ino == d->id.ino && f->btime_sec == d->id.btime_sec &&
		    f->btime_nsec == d->id.btime_nsec)
			return true;
	}
	return false;
}

/* The link of the same disk in OLD, or NULL. */
static struct link *link_in(struct link *l, const struct ff_snap *old)
{
	FF_GUARD(&l->disk->store->chain);
	while (l && l->snap != old)
		l = l->older;
	return l;
}

static bool saves_end(const struct changes *c)
{
	for (int i = 0; save_is_before(c->new); i++) {
		if (i == SETTLE_TRIES)
			return false;
		nanosleep(&(struct timespec){.tv_nsec = SETTLE_MS * 1000000L}, NULL);
	}
	return true;
}

/* Why what changed since the older one cannot be known; NULL: it can. */
static const char *unknown(const struct changes *c)
{
	if (atomic_load(&c->old->broken))
		return "the older snapshot's view of it is broken";
	if (ff_image_desc(c->old->img)->cluster_size != ff_image_desc(c->new->img)->cluster_size)
		return "the two have different cluster sizes";
	if (!saves_end(c))
		return "a save from before the newer snapshot does not end";
	/* one of the saves that were waited for may have failed */
	if (atomic_load(&c->old->broken))
		return "the older snapshot's view of it is broken";
	return NULL;
}

int changes_begin(struct ff_snap *new, const struct ff_frozen *f, struct ff_snap *old,
                  struct changes *out, const char **why)
{
	struct changes c = {.new = new->links[f->disk]};

	*why = NULL;
	if (!c.new || atomic_load(&c.new->broken))
		*why = "its own view is broken";
	else if (old && old->damaged)
		*why = "the older snapshot's manifest is damaged";
	else if (old)
		c.old = link_in(c.new, old);
	if (!*why && c.old)
		*why = unknown(&c);
	else if (!*why && old && was_there(old, c.new->disk))
		*why = "the older snapshot's image of it is lost";
	if (*why)
		return -EIO;
	*out = c;
	return 0;
}
