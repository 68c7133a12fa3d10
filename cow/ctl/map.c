/*
 * map: which clusters of a frozen disk are read from where.
 *
 * A view's cluster is read from the first image, from its own to the newest, that has it, else from
 * the live disk. So the images of the chain are looked through in that order, and what one has is
 * not asked of the next. A cluster of zeros in an image is a hole. What the view has given up, and
 * what changed without being kept (of a checkpoint: all that changed), is gone, by the ledgers. Of
 * the rest, the frozen file (of a mount) or the disk itself (of a fleece directory) tells what is a
 * hole.
 *
 * A picture of a mount that is written to is one of a short time, not of a moment.
 */
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "cow/clustermap.h"
#include "cow/ctl/ctl.h"
#include "cow/ctl/inventory.h"
#include "cow/ctl/map.h"
#include "cow/ctl/source.h"
#include "cow/ctl/view.h"
#include "cow/io.h"
#include "cow/ledger_file.h"
#include "ff_util.h"

enum { ROWS = 16, WIDTH_MIN = 8, WIDTH_DEFAULT = 64, WIDTH_OWN = 128, WIDTH_MAX = 1000 };

struct job {
	struct place place;
	struct inventory inv;
	char *name, *disk; /* the two parts of the argument */
	struct map map;
	struct clustermap preserved, hole, gone;
	const struct inv_image *own, *newest;
};

/* --- gathering ---------------------------------------------------------------------------------
 */

/* The frozen inode at PATH of a tree, or NULL. */
static const struct ff_frozen *walk(const struct tree *t, const char *path)
{
	const struct ff_frozen *at = &t->inodes[0];

	while (at && *path) {
		size_t len = strcspn(path, "/");
		const struct ff_frozen *next = NULL;

		for (uint32_t i = 0; len && i < at->entry_count && !next; i++)
			if (strncmp(at->entries[i].name, path, len) == 0 &&
			    !at->entries[i].name[len])
				next = &t->inodes[at->entries[i].inode];
		at = len ? next : at;
		path += len + (path[len] == '/');
	}
	return at;
}

static int find_image(struct job *j)
{
	const struct inv_dir *d = inventory_find(&j->inv, j->name);
	const struct ff_frozen *f;

	if (!d) {
		ctl_error("%s: no such snapshot", j->name);
		return CTL_NO_INPUT;
	}
	if (d->error) {
		ctl_error("%s/manifest: %s", d->name,
		          d->why && d->error == -EINVAL ? d->why : strerror(-d->error));
		return CTL_IO;
	}
	f = walk(d->manifest.tree, j->disk);
	if (!f || !S_ISREG(f->st.st_mode)) {
		ctl_error("%s/%s: %s", j->name, j->disk, f ? "not a disk" : "no such disk");
		return CTL_NO_INPUT;
	}
	if (f->disk >= d->manifest.tree->disk_count || d->of_disk[f->disk] == SIZE_MAX) {
		ctl_error("%s/%s: its fleecing image is missing", j->name, j->disk);
		return CTL_IO;
	}
	j->own = &j->inv.images[d->of_disk[f->disk]];
	if (j->own->error) {
		ctl_error("%s: %s", j->own->path,
		          j->own->why ? j->own->why : strerror(-j->own->error));
		return CTL_IO;
	}
	j->map.size = j->own->desc.size;
	j->map.cluster_size = j->own->desc.cluster_size;
	j->map.clusters = ff_div_up(j->map.size, j->map.cluster_size);
	return 0;
}

static int on_saved(void *ctx, uint64_t cluster, uint64_t host)
{
	struct job *j = ctx;
	struct clustermap *map = host ? &j->preserved : &j->hole;
	int r;

	if (cluster >= j->map.clusters || clustermap_test(&j->preserved, cluster) ||
	    clustermap_test(&j->hole, cluster) || clustermap_test(&j->gone, cluster))
		return 0;
	r = clustermap_reserve(map, cluster, 1);
	if (!r)
		clustermap_set(map, cluster, 1);
	return r;
}

static int set_gone(struct job *j, uint64_t cluster)
{
	int r = cluster < j->map.clusters ? clustermap_reserve(&j->gone, cluster, 1) : 0;

	if (!r && cluster < j->map.clusters) {
		clustermap_set(&j->gone, cluster, 1);
		clustermap_clear(&j->preserved, cluster, 1);
		clustermap_clear(&j->hole, cluster, 1);
	}
	return r;
}

struct ledger_of {
	struct job *job;
	bool own; /* only the view's own says what it has given up */
};

static int on_sector(void *ctx, enum ledger_part part, uint64_t first, const uint64_t *words)
{
	const struct ledger_of *l = ctx;
	struct job *j = l->job;
	int r = 0;

	for (unsigned i = 0; i < LEDGER_BITS && !r; i++) {
		uint64_t c = first + i;

		if (!(words[i / 64] >> i % 64 & 1) || (part == LEDGER_RELEASED && !l->own))
			continue;
		/* an older image has it, or this one still */
		if (part == LEDGER_CHANGED &&
		    (clustermap_test(&j->preserved, c) || clustermap_test(&j->hole, c)))
			continue;
		r = set_gone(j, c);
	}
	return r;
}

/* After what the image itself has. */
static int read_ledger(struct job *j, const struct inv_image *img, const struct view *v)
{
	struct ledger_of l = {j, img == j->own};
	uint64_t hash = 0, bad;
	ff_autoclose int fd = -1;
	int r;

	if (!v->head.desc.ledger)
		return 0;
	r = ledger_open(j->place.fleece_fd, img->path, &v->head.desc, v->l.clusters, O_RDONLY, &fd);
	if (!r)
		r = ledger_scan(fd, &v->head.desc, v->l.clusters, on_sector, &l, &hash, &bad);
	if (r == -ENOENT && j->place.live)
		return 0;
	if (r == -EINVAL)
		ctl_error("%s: its record of changes is damaged", img->path);
	return r;
}

static int read_chain(struct job *j)
{
	ff_autofree struct inv_image **all = NULL;
	size_t n;
	int r = 0;

	all = inventory_chains(&j->inv, &n);
	if (!all)
		return ctl_fail(j->map.title, -ENOMEM);
	for (size_t i = 0; i < n && !r; i++) {
		const char *why = NULL;
		struct view v;

		if (!inv_same_disk(all[i], j->own) || all[i]->desc.seq < j->own->desc.seq)
			continue;
		j->newest = all[i];
		if (all[i]->desc.cluster_size != j->map.cluster_size)
			continue;
		r = view_open(j->place.fleece_fd, all[i]->path, &v, &why);
		if (r == -ENOENT && j->place.live) {
			r = 0; /* dropped meanwhile: nobody needs it */
			continue;
		}
		if (!r) {
			r = view_saved(&v, on_saved, j);
			if (!r)
				r = read_ledger(j, all[i], &v);
			view_close(&v);
		}
		if (r && why)
			ctl_error("%s: %s", all[i]->path, why);
		r = r ? (why ? CTL_IO : ctl_fail(all[i]->path, r)) : 0;
	}
	return r;
}

/* The file that tells where holes are, or -1. */
static int open_holes(struct job *j, int *fd)
{
	ff_autofree char *path = NULL;
	struct stat st;

	*fd = -1;
	if (!j->place.mountpoint) {
		if (j->newest && j->newest->raw && source_is(j->newest, j->newest->backing, &st) &&
		    S_ISREG(st.st_mode))
			io_openat(AT_FDCWD, j->newest->backing, O_RDONLY | O_NOFOLLOW | O_NONBLOCK,
			          0, fd);
		return 0;
	}
	if (asprintf(&path, "%s/%s/%s/%s", j->place.mountpoint, j->place.snapdir, j->name,
	             j->disk) < 0) {
		path = NULL;
		return -ENOMEM;
	}
	io_openat(AT_FDCWD, path, O_RDONLY | O_NOFOLLOW | O_NONBLOCK, 0, fd);
	return 0;
}

/* Whole clusters in [FROM, TO) that are not preserved are holes. */
static int set_hole(struct job *j, uint64_t from, uint64_t to)
{
	uint64_t cs = j->map.cluster_size, at = ff_div_up(from, cs), end;
	int r = 0;

	end = to >= j->map.size ? j->map.clusters : to / cs;
	while (!r && at < end) {
		bool set;
		uint64_t n = clustermap_run(&j->preserved, at, end - at, &set);

		if (!set)
			n = clustermap_run(&j->gone, at, n, &set);
		if (!set) {
			r = clustermap_reserve(&j->hole, at, n);
			if (!r)
				clustermap_set(&j->hole, at, n);
		}
		at += n;
	}
	return r;
}

static int read_holes(struct job *j)
{
	ff_autoclose int fd = -1;
	uint64_t at = 0, data, hole;
	int r = open_holes(j, &fd);

	while (!r && fd >= 0 && at < j->map.size) {
		r = io_seek(fd, at, SEEK_DATA, &data);
		if (r == -ENXIO)
			return set_hole(j, at, j->map.size);
		if (!r)
			r = set_hole(j, at, FF_MIN(data, j->map.size));
		if (!r)
			r = io_seek(fd, data, SEEK_HOLE, &hole);
		at = hole;
	}
	return r == -EIO ? 0 : r; /* a lost view cannot be asked */
}

static uint64_t count_set(const struct clustermap *map, uint64_t from, uint64_t to)
{
	uint64_t sum = 0;

	while (from < to) {
		bool set;
		uint64_t n = clustermap_run(map, from, to - from, &set);

		sum += set ? n : 0;
		from += n;
	}
	return sum;
}

static int fill_cells(struct job *j)
{
	struct map *m = &j->map;

	m->count = FF_MIN((uint64_t)m->width * ROWS, m->clusters);
	m->cells = calloc(m->count + 1, sizeof *m->cells);
	if (!m->cells)
		return -ENOMEM;
	for (uint64_t i = 0; i < m->count; i++) {
		/* clusters < 2^51 and cells < 2^14: no overflow in 128 bits, nor beyond */
		uint64_t from = (uint64_t)((unsigned __int128)m->clusters * i / m->count);
		uint64_t to = (uint64_t)((unsigned __int128)m->clusters * (i + 1) / m->count);

		m->cells[i] =
		    (struct map_cell){to - from, count_set(&j->preserved, from, to),
		                      count_set(&j->gone, from, to), count_set(&j->hole, from, to)};
		m->preserved += m->cells[i].preserved;
		m->hole += m->cells[i].hole;
		m->gone += m->cells[i].gone;
	}
	return 0;
}

static int gather(struct job *j)
{
	int r = place_open_fleece(&j->place);

	if (r)
		return r;
	r = inventory_read(j->place.fleece_fd, &j->inv);
	if (r)
		return ctl_fail(j->place.fleece_path, r);
	r = find_image(j);
	if (r)
		return r;
	r = clustermap_init(&j->preserved, j->map.clusters);
	if (!r)
		r = clustermap_init(&j->hole, j->map.clusters);
	if (!r)
		r = clustermap_init(&j->gone, j->map.clusters);
	if (r)
		return ctl_fail(j->map.title, r);
	r = read_chain(j);
	if (r)
		return r;
	r = read_holes(j);
	if (!r)
		r = fill_cells(j);
	return r ? ctl_fail(j->map.title, r) : 0;
}

/* --- the command -------------------------------------------------------------------------------
 */

static int split(struct job *j, const char *arg)
{
	const char *slash = strchr(arg, '/');

	if (!slash || slash == arg || !slash[1]) {
		ctl_error("%s: NAME/DISK is wanted", arg);
		return ctl_usage("map");
	}
	j->map.title = arg;
	j->name = strndup(arg, (size_t)(slash - arg));
	j->disk = strdup(slash + 1);
	return j->name && j->disk ? 0 : ctl_fail(arg, -ENOMEM);
}

static int parse_width(const char *text, unsigned *out)
{
	char *end;
	unsigned long n = strtoul(text, &end, 10);

	if (end == text || *end || n < WIDTH_MIN || n > WIDTH_MAX) {
		ctl_error("--width %s: %d to %d", text, WIDTH_MIN, WIDTH_MAX);
		return ctl_usage("map");
	}
	*out = (unsigned)n;
	return 0;
}

static int run(struct job *j, const char *on, const char *dir, bool svg)
{
	int r = dir ? place_any(dir, &j->place) : place_mount(on, &j->place);

	if (!r)
		r = gather(j);
	if (!r && svg)
		map_svg(&j->map);
	else if (!r)
		map_draw(&j->map);
	return r;
}

int cmd_map(int argc, char **argv)
{
	static const struct option options[] = {{"on", required_argument, NULL, 'o'},
	                                        {"fleece-dir", required_argument, NULL, 'd'},
	                                        {"svg", no_argument, NULL, 'S'},
	                                        {"width", required_argument, NULL, 'W'},
	                                        {0}};
	struct job j = {.place = {.fleece_fd = -1}};
	const char *on = NULL, *dir = NULL;
	bool svg = false;
	int c, r = 0;

	j.map.width = FF_MIN(FF_MAX(text_columns(stdout, WIDTH_DEFAULT), (unsigned)WIDTH_MIN),
	                     (unsigned)WIDTH_OWN);
	while (!r && (c = getopt_long(argc, argv, "o:d:W:", options, NULL)) != -1) {
		if (c == 'o')
			on = optarg;
		else if (c == 'd')
			dir = optarg;
		else if (c == 'S')
			svg = true;
		else
			r = c == 'W' ? parse_width(optarg, &j.map.width) : ctl_usage("map");
	}
	if (r)
		return r;
	if (argc - optind != 1 || (on && dir))
		return ctl_usage("map");
	r = split(&j, argv[optind]);
	if (!r)
		r = run(&j, on, dir, svg);
	clustermap_fini(&j.preserved);
	clustermap_fini(&j.hole);
	clustermap_fini(&j.gone);
	free(j.map.cells);
	free(j.name);
	free(j.disk);
	inventory_free(&j.inv);
	place_free(&j.place);
	return r;
}
