/*
 * Loss of power at random moments, on storage that keeps, loses, tears and reorders whatever no
 * sync covers (emu_disk.h), under writers and with snapshots coming and going (power_writers.c).
 *
 *   powerloss [--seed=N] [--cases=N] [--kind=N] [-v]
 *
 * Each case has a seed of its own, N, N + 1 and so on; one that fails says how it is run alone.
 * (With several writers a run is not the same each time: --repeat=N tries.)
 */
#include <err.h>
#include <ftw.h>
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "ff_log.h"
#include "power_world.h"

enum kind { DURABLE, PLAIN, MIXED, CLEAN, TWICE, KINDS };

static const char *const kind_names[] = {"durable", "plain", "mixed", "clean", "twice"};

static int remove_one(const char *path, const struct stat *st, int type, struct FTW *ftw)
{
	return remove(path);
}

/* Some number of events until the cut: often few, sometimes many. */
static unsigned some_events(struct emu_rng *rng)
{
	return 1 + emu_random(rng, 20u << emu_random(rng, 8));
}

/* Opens, works and, in the end, closes: a life that the cut ends or not. */
static void live(struct world *w, enum kind kind, struct emu_rng *rng)
{
	bool durable = kind == PLAIN ? false : kind == MIXED ? emu_random(rng, 2) : true;
	int rounds = kind == MIXED ? 2 + (int)emu_random(rng, 2) : 1, r;

	if (kind == CLEAN)
		durable = emu_random(rng, 2);
	if (kind != CLEAN)
		emu_cut_in(some_events(rng), world_on_cut, w);
	for (int i = 0; i < rounds; i++, durable = !durable) {
		r = world_open(w, durable);
		if (r) {
			complain(w, "the store does not open: %s", strerror(-r));
			return;
		}
		if (i == rounds - 1 && kind == MIXED && !emu_is_cut())
			emu_cut_in(some_events(rng), world_on_cut, w);
		world_work(w, rng);
		if (kind == CLEAN)
			emu_cut_in(emu_random(rng, 2) ? 1 + emu_random(rng, 30) : 0, world_on_cut,
			           w);
		if (i == rounds - 1 && kind != CLEAN)
			emu_cut_now();
		world_close(w);
	}
	emu_cut_now();
}

/* The power is back. */
static void look_again(struct world *w, struct emu_rng *rng, bool cut_again)
{
	uint64_t before;
	int r;

	emu_power_loss(rng);
	check_sources(w);
	check_note_manifests(w);
	before = check_sum(w);
	if (cut_again)
		emu_cut_in(1 + emu_random(rng, 10u << emu_random(rng, 6)), world_on_cut, w);
	r = world_open(w, w->durable);
	if (r) {
		complain(w, "the store does not open: %s", strerror(-r));
		return;
	}
	if (check_sum(w) != before)
		complain(w, "recovery has changed SOURCE");
	check_snaps(w);
	if (cut_again && !emu_is_cut())
		world_work(w, rng);
	if (cut_again) {
		emu_cut_now();
	} else {
		world_work(w, rng);
		check_snaps(w);
		check_drop_all(w);
	}
	world_close(w);
}

static bool run_case(unsigned seed, int kind)
{
	static const uint32_t clusters[] = {4096, 4096, 16384, 65536};
	struct world *w = calloc(1, sizeof *w);
	struct emu_rng rng = {seed * UINT64_C(0x9e3779b97f4a7c15) + 77};
	enum emu_names names;
	const char *dir = access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/var/tmp";
	bool ok;

	if (!w)
		err(1, "no memory");
	for (int i = 0; i < 4; i++)
		emu_random(&rng, 2);
	if (kind < 0)
		kind = (int)emu_random(&rng, KINDS);
	snprintf(w->root, sizeof w->root, "%s/fleecefs-power-XXXXXX", dir);
	if (!mkdtemp(w->root))
		err(1, "%s", w->root);
	names = (enum emu_names)emu_random(&rng, EMU_NAMES);
	w->one = emu_random(&rng, 4) == 0;
	w->threads = emu_random(&rng, 2) ? 1 : 2 + emu_random(&rng, 3);
	w->cluster = clusters[emu_random(&rng, 4)];
	w->mixed = kind == MIXED;
	w->ops = 10 + emu_random(&rng, 10u << emu_random(&rng, 5));
	world_begin(w);
	emu_start(w->root, names, w->one, w->threads > 1 ? emu_random(&rng, 2) * 30 : 0);
	live(w, (enum kind)kind, &rng);
	if (!w->violations && (kind == TWICE || emu_random(&rng, 6) == 0))
		look_again(w, &rng, true);
	if (!w->violations)
		look_again(w, &rng, false);
	ok = w->violations == 0;
	if (!ok)
		printf(
		    "case %u fails (%s, %u writers, clusters of %u, %s; names: %d): run it alone "
		    "with --seed=%u --cases=1\n",
		    seed, kind_names[kind], w->threads, w->cluster,
		    w->one ? "one filesystem" : "two filesystems", names, seed);
	emu_stop();
	world_end(w);
	nftw(w->root, remove_one, 16, FTW_DEPTH | FTW_PHYS);
	free(w);
	return ok;
}

int main(int argc, char **argv)
{
	static const struct option options[] = {{"seed", required_argument, NULL, 's'},
	                                        {"cases", required_argument, NULL, 'c'},
	                                        {"kind", required_argument, NULL, 'k'},
	                                        {"repeat", required_argument, NULL, 'r'},
	                                        {0}};
	unsigned seed = (unsigned)time(NULL), cases = 300, failed = 0, repeat = 1;
	int c, kind = -1;

	ff_log_threshold(FF_LOG_ERROR - 1);
	setvbuf(stdout, NULL, _IOLBF, 0);
	while ((c = getopt_long(argc, argv, "v", options, NULL)) != -1)
		switch (c) {
		case 's':
			seed = (unsigned)strtoul(optarg, NULL, 10);
			break;
		case 'c':
			cases = (unsigned)strtoul(optarg, NULL, 10);
			break;
		case 'k':
			kind = atoi(optarg);
			break;
		case 'r':
			repeat = (unsigned)strtoul(optarg, NULL, 10);
			break;
		case 'v':
			ff_log_threshold(FF_LOG_DEBUG);
			break;
		default:
			errx(2, "usage: %s [--seed=N] [--cases=N] [--kind=0..%d] [--repeat=N] [-v]",
			     argv[0], KINDS - 1);
		}
	printf("seed %u, %u cases\n", seed, cases);
	for (unsigned i = 0; i < cases; i++)
		for (unsigned k = 0; k < repeat; k++)
			failed += !run_case(seed + i, kind);
	printf("%u cases, %u failed\n", cases * repeat, failed);
	return failed != 0;
}
