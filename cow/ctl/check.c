/*
 * check: structure first, then each image from beginning to end.
 *
 * Nothing is locked and nothing changed. While a mount has the directory what is read may be in the
 * middle of a change: a mkdir sets names one after the other, a drop deletes. So what seems wrong
 * is looked at again, ROUNDS times with a pause between, and only what is said each time, word for
 * word, is reported. A change that is under way either ends in between or goes on elsewhere: images
 * bear the number of their snapshot, and a cluster is saved once. An image that has gone by then
 * was dropped, and is no damage.
 *
 * A view of NAME is read from its images and from newer ones of the same disks, so all those are
 * checked for it.
 */
#include <errno.h>
#include <getopt.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "cow/ctl/audit.h"
#include "cow/ctl/ctl.h"
#include "cow/ctl/structure.h"
#include "ff_util.h"

enum { ROUNDS = 6, PAUSE_MS = 60, SHOWN = 10 };

struct check {
	struct place place;
	struct inventory inv;
	struct source src;
	struct remarks remarks;
	const char *name; /* of the one snapshot, or NULL */
	bool quick, quiet;
	bool *wanted; /* by image */
	struct progress progress;
	uint64_t images, empty, clusters, damaged, leaks;
};

static void pause_ms(int ms)
{
	nanosleep(&(struct timespec){.tv_nsec = ms * 1000000L}, NULL);
}

static int read_structure(struct check *c, struct remarks *out)
{
	int r;

	inventory_free(&c->inv);
	r = inventory_read(c->place.fleece_fd, &c->inv);
	if (!r && !c->place.live && !c->src.path && c->src.fd < 0)
		r = source_find(c->place.fleece_fd, c->place.fleece_path, &c->inv, NULL, &c->src);
	return r ? r : structure_check(c->place.fleece_fd, &c->inv, &c->src, c->place.live, out);
}

static int check_structure(struct check *c)
{
	struct remarks again = {0};
	int r = read_structure(c, &c->remarks);

	for (int i = 1; !r && c->place.live && c->remarks.count && i < ROUNDS; i++) {
		pause_ms(PAUSE_MS);
		r = read_structure(c, &again);
		if (!r)
			remarks_keep_common(&c->remarks, &again);
		remarks_free(&again);
	}
	return r;
}

/* Chooses the images to look through: all that views are read from, or those that NAME's are. */
static int choose(struct check *c)
{
	const struct inv_dir *only = c->name ? inventory_find(&c->inv, c->name) : NULL;
	ff_autofree struct inv_image **all = NULL;
	size_t n, first = 0;
	bool needed = false;

	c->wanted = calloc(c->inv.image_count + 1, sizeof *c->wanted);
	all = inventory_chains(&c->inv, &n);
	if (!c->wanted || !all)
		return -ENOMEM;
	if (c->name && !only)
		return -ENOENT;
	for (size_t i = 0; i < n; i++) {
		if (!inv_same_disk(all[i], all[first])) {
			first = i;
			needed = false;
		}
		needed |= inventory_visible(&c->inv, all[i]) &&
		          (!only || only == &c->inv.dirs[all[i]->dir]);
		c->wanted[all[i] - c->inv.images] = needed;
	}
	return 0;
}

/* One image, as often as it takes. -ENOENT: it has gone. */
static int audit(struct check *c, const struct inv_image *img, struct audit *a)
{
	ff_autofree struct audit *again = NULL;
	struct audit_how how = {.sums = !c->quick, .progress = &c->progress};
	int r = audit_image(c->place.fleece_fd, img->path, &how, a);

	if (r || !a->count || !c->place.live)
		return r;
	again = malloc(sizeof *again);
	if (!again)
		return -ENOMEM;
	how.before = a;
	how.progress = NULL;
	for (int i = 1; !r && a->count && i < ROUNDS; i++) {
		pause_ms(PAUSE_MS);
		r = audit_image(c->place.fleece_fd, img->path, &how, again);
		if (!r)
			audit_keep_common(a, again);
	}
	return r;
}

/* Are its L2 entries not those of the clean end? */
static bool entries_changed(const struct check *c, const struct inv_image *img,
                            const struct audit *a)
{
	struct identity id = {.ino = img->desc.disk_ino,
	                      .btime_sec = img->desc.disk_btime_sec,
	                      .btime_nsec = img->desc.disk_btime_nsec};

	return !c->place.live && c->src.told && c->src.ending == ENDED_CLEAN &&
	       session_entries_changed(c->src.record, &id, img->desc.seq, a->hash);
}

static void report(struct check *c, const struct inv_image *img, const struct audit *a)
{
	bool changed = entries_changed(c, img, a), bad = a->total || changed;

	c->images++;
	c->empty += a->data + a->zeros == 0 && !bad;
	c->clusters += a->data + a->zeros;
	c->leaks += c->place.live ? 0 : a->leaks;
	c->damaged += bad;
	if (!bad && (c->quiet || a->data + a->zeros == 0))
		return;
	progress_clear(&c->progress);
	for (size_t i = 0; i < FF_MIN(a->count, (size_t)SHOWN); i++)
		audit_say(a, &a->findings[i], img->path);
	if (a->total > SHOWN)
		ctl_say("  %s: %llu more of the kind", img->path,
		        (unsigned long long)(a->total - SHOWN));
	if (changed)
		ctl_say("  %s: its L2 tables are not what they were when fleecefs ended",
		        img->path);
	if (!bad)
		ctl_say("  %s: ok, %llu clusters%s%s", img->path,
		        (unsigned long long)(a->data + a->zeros),
		        a->leaks && !c->place.live ? ", and space that nothing refers to" : "",
		        a->broken ? "; its view is lost" : "");
}

static int check_images(struct check *c)
{
	ff_autofree struct audit *a = malloc(sizeof *a);
	double total = 0;
	int r = a ? 0 : -ENOMEM;

	for (size_t i = 0; i < c->inv.image_count; i++)
		total += c->wanted[i] ? (double)c->inv.images[i].allocated : 0;
	progress_begin(&c->progress, total);
	for (size_t i = 0; i < c->inv.image_count && !r; i++) {
		if (!c->wanted[i])
			continue;
		r = audit(c, &c->inv.images[i], a);
		if (!r)
			report(c, &c->inv.images[i], a);
		else if (r == -ENOENT && c->place.live)
			r = 0;
		else
			ctl_fail(c->inv.images[i].path, r);
	}
	progress_clear(&c->progress);
	return r;
}

static bool begins(const char *text, const char *name)
{
	size_t n = strlen(name);

	return strncmp(text, name, n) == 0 && (text[n] == '/' || text[n] == ':');
}

/* Does the remark belong to what was asked for? */
static bool concerns(const struct check *c, const struct remark *r)
{
	if (!c->name || begins(r->text, c->name))
		return true;
	for (size_t i = 0; i < c->inv.image_count; i++)
		if (c->wanted[i] && begins(r->text, c->inv.images[i].path))
			return true;
	return false;
}

static bool say_remarks(struct check *c)
{
	bool damage = false;

	for (size_t i = 0; i < c->remarks.count; i++) {
		const struct remark *r = &c->remarks.list[i];

		if (!concerns(c, r) || (c->quiet && !r->damage))
			continue;
		damage |= r->damage;
		ctl_say("  %s%s", r->damage ? "" : "note: ", r->text);
	}
	return damage;
}

static int summary(struct check *c, bool damage)
{
	size_t snapshots = 0;

	for (size_t i = 0; i < c->inv.dir_count; i++)
		snapshots += c->inv.dirs[i].kind == INV_SNAPSHOT;
	if (c->leaks && !c->quiet)
		ctl_say(
		    "  note: clusters of images that nothing uses: %llu; the next mount gives them "
		    "back",
		    (unsigned long long)c->leaks);
	damage |= c->damaged > 0;
	if (damage || !c->quiet)
		ctl_say("%s: snapshots %zu, images %llu (%llu empty), clusters %llu%s: %s",
		        c->name ? c->name : c->place.fleece_path, c->name ? 1 : snapshots,
		        (unsigned long long)c->images, (unsigned long long)c->empty,
		        (unsigned long long)c->clusters, c->quick ? " not read" : "",
		        damage ? "DAMAGE" : "all right");
	return damage ? CTL_DAMAGE : CTL_OK;
}

static int run(struct check *c)
{
	bool damage;
	int r = place_open_fleece(&c->place);

	if (r)
		return r;
	r = check_structure(c);
	if (!r)
		r = choose(c);
	if (r == -ENOENT && c->name) {
		ctl_error("%s: no such snapshot", c->name);
		return CTL_NO_INPUT;
	}
	if (r)
		return ctl_fail(c->place.fleece_path, r);
	damage = say_remarks(c);
	r = check_images(c);
	if (r)
		return r == -ENOENT ? CTL_IO : ctl_fail(c->place.fleece_path, r);
	if (!c->place.live && place_was_mounted(&c->place)) {
		ctl_error("%s: was mounted while it was checked: check again",
		          c->place.fleece_path);
		return CTL_BUSY;
	}
	return summary(c, damage);
}

int cmd_check(int argc, char **argv)
{
	static const struct option options[] = {
	    {"quick", no_argument, NULL, 'Q'}, {"quiet", no_argument, NULL, 'q'}, {0}};
	struct check c = {.place = {.fleece_fd = -1}, .src = {.fd = -1}};
	const char *place = NULL;
	int o, r;

	while ((o = getopt_long(argc, argv, "q", options, NULL)) != -1) {
		c.quick |= o == 'Q';
		c.quiet |= o == 'q';
		if (o == '?')
			return ctl_usage("check");
	}
	if (argc - optind > 2)
		return ctl_usage("check");
	if (argc - optind == 2 ||
	    (argc > optind && (strchr(argv[optind], '/') || place_is_one(argv[optind]))))
		place = argv[optind++];
	c.name = argv[optind];
	r = place_any(place, &c.place);
	if (!r)
		r = run(&c);
	free(c.wanted);
	remarks_free(&c.remarks);
	source_free(&c.src);
	inventory_free(&c.inv);
	place_free(&c.place);
	return r;
}
