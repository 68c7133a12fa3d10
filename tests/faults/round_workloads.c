/*
 * What rounds do. Each begins with a closed store and may leave it open: what comes then is the
 * business of whoever runs it.
 */
#include "round.h"

#include "ff_util.h"

/* A first write to each kind of place, with one snapshot. */
static const struct round_step writes[] = {
    {ROUND_OPEN},
    {ROUND_FREEZE, "s1"},
    {ROUND_WRITE, "a", .off = 8192, .len = 4096, .seed = 1},
    {ROUND_WRITE, "a", .off = 20000, .len = 9001, .seed = 2},
    {ROUND_REWRITE, "a", .off = 40960, .len = 4096},
    {ROUND_WRITE, "sub/b", .off = 4096, .len = 4096, .seed = 3},  /* into a hole */
    {ROUND_WRITE, "sub/b", .off = 39900, .len = 3000, .seed = 4}, /* over the end */
    {ROUND_WRITE, "d", .off = 0, .len = 20480, .seed = 5},        /* zeros, then data */
    {ROUND_APPEND, "e", .len = 9000, .seed = 6},
    {ROUND_WRITE, "a", .off = 0, .len = 81920, .seed = 7}, /* long */
    {ROUND_READ, "s1"},
    {ROUND_SYNC, "a"},
    {ROUND_CLOSE},
};

/* Changes that are no writes. */
static const struct round_step changes[] = {
    {ROUND_OPEN},
    {ROUND_FREEZE, "s1"},
    {ROUND_TRUNCATE, "a", .off = 30000},
    {ROUND_PUNCH, "d", .off = 5000, .len = 10000},
    {ROUND_ZERO, "sub/b", .off = 100, .len = 15000},
    {ROUND_COPY, "c", "d", .off = 4000, .len = 6000, .seed = 9000},
    {ROUND_TRUNCATE, "a", .off = 70000},
    {ROUND_FREEZE, "s2"},
    {ROUND_TRUNCATE, "a", .off = 0},
    {ROUND_TRUNCATE, "e", .off = 40000},
    {ROUND_WRITE, "a", .off = 100, .len = 5000, .seed = 11},
    {ROUND_READ, "s1"},
    {ROUND_READ, "s2"},
    {ROUND_DROP, "s1"},
    {ROUND_READ, "s2"},
    {ROUND_SYNC, "d"},
    {ROUND_CLOSE},
    {ROUND_OPEN},
    {ROUND_READ, "s2"},
    {ROUND_DROP, "s2"},
};

/* Disks that change and lose their names. */
static const struct round_step names[] = {
    {ROUND_OPEN},
    {ROUND_FREEZE, "s1"},
    {ROUND_RENAME, "a", "sub/new"},
    {ROUND_WRITE, "sub/new", .off = 0, .len = 4096, .seed = 1},
    {ROUND_UNLINK, "sub/b"},
    {ROUND_UNLINK, "c"}, /* "sub/c2" stays */
    {ROUND_WRITE, "sub/c2", .off = 100, .len = 8000, .seed = 2},
    {ROUND_CREATE, "new"},
    {ROUND_WRITE, "new", .off = 0, .len = 6000, .seed = 3},
    {ROUND_RENAME, "new", "d"},
    {ROUND_FREEZE, "s2"},
    {ROUND_WRITE, "d", .off = 5000, .len = 100, .seed = 4},
    {ROUND_READ, "s1"},
    {ROUND_RENAME_SNAP, "s1", "t1"},
    {ROUND_UNLINK, "sub/c2"},
    {ROUND_DROP, "s2"},
    {ROUND_CLOSE},
    {ROUND_OPEN},
    {ROUND_READ, "t1"},
    {ROUND_DROP, "t1"},
    {ROUND_CLOSE},
};

/* Three views, dropped from the middle, the old and the new end. */
static const struct round_step chain[] = {
    {ROUND_OPEN},
    {ROUND_FREEZE, "s1"},
    {ROUND_WRITE, "a", .off = 0, .len = 12288, .seed = 1},
    {ROUND_FREEZE, "s2"},
    {ROUND_WRITE, "a", .off = 4096, .len = 12288, .seed = 2},
    {ROUND_TRUNCATE, "d", .off = 6000},
    {ROUND_FREEZE, "s3"},
    {ROUND_WRITE, "a", .off = 8192, .len = 12288, .seed = 3},
    {ROUND_WRITE, "d", .off = 4000, .len = 9000, .seed = 4},
    {ROUND_DROP, "s2"},
    {ROUND_WRITE, "a", .off = 0, .len = 4096, .seed = 5},
    {ROUND_READ, "s1"},
    {ROUND_FREEZE, "s2"}, /* the name comes back */
    {ROUND_WRITE, "a", .off = 12288, .len = 20000, .seed = 6},
    {ROUND_DROP, "s1"},
    {ROUND_PULSE},
    {ROUND_CLOSE},
    {ROUND_OPEN},
    {ROUND_WRITE, "a", .off = 16384, .len = 20000, .seed = 7},
    {ROUND_DROP, "s2"},
    {ROUND_READ, "s3"},
    {ROUND_DROP, "s3"},
    {ROUND_FREEZE, "s4"},
    {ROUND_WRITE, "e", .off = 10, .len = 10, .seed = 8},
};

/* Snapshots that become checkpoints: the newest, the oldest, one between others; and go. */
static const struct round_step points[] = {
    {ROUND_OPEN},
    {ROUND_FREEZE, "s1"},
    {ROUND_WRITE, "a", .off = 0, .len = 12288, .seed = 1},
    {ROUND_FREEZE, "s2"},
    {ROUND_WRITE, "a", .off = 4096, .len = 20000, .seed = 2},
    {ROUND_WRITE, "d", .off = 4000, .len = 5000, .seed = 3},
    {ROUND_CHECKPOINT, "s2"}, /* s1 needs what it has */
    {ROUND_WRITE, "a", .off = 8192, .len = 30000, .seed = 4},
    {ROUND_TRUNCATE, "d", .off = 6000},
    {ROUND_READ, "s1"},
    {ROUND_CHECKPOINT, "s1"},
    {ROUND_WRITE, "a", .off = 40960, .len = 5000, .seed = 5},
    {ROUND_READ, "s1"},
    {ROUND_FREEZE, "s3"},
    {ROUND_WRITE, "a", .off = 45000, .len = 9000, .seed = 6},
    {ROUND_WRITE, "e", .off = 10, .len = 2000, .seed = 7},
    {ROUND_DROP, "s1"},
    {ROUND_READ, "s3"},
    {ROUND_DROP, "s3"}, /* s2 must know what changed in its time */
    {ROUND_WRITE, "a", .off = 60000, .len = 9000, .seed = 8},
    {ROUND_SYNC, "a"},
    {ROUND_CLOSE},
    {ROUND_OPEN},
    {ROUND_WRITE, "a", .off = 70000, .len = 9000, .seed = 9},
    {ROUND_READ, "s2"},
    {ROUND_DROP, "s2"},
};

/* Views that give up a part of themselves. */
static const struct round_step parts[] = {
    {ROUND_OPEN},
    {ROUND_FREEZE, "s1"},
    {ROUND_WRITE, "a", .off = 0, .len = 20000, .seed = 1},
    {ROUND_FREEZE, "s2"},
    {ROUND_WRITE, "a", .off = 8192, .len = 40000, .seed = 2},
    {ROUND_RELEASE, "s2", "a", .off = 4096, .len = 30000}, /* s1 needs some of it */
    {ROUND_WRITE, "a", .off = 12288, .len = 40000, .seed = 3},
    {ROUND_READ, "s1"},
    {ROUND_RELEASE, "s1", "a", .off = 0, .len = 16384},
    {ROUND_WRITE, "a", .off = 0, .len = 9000, .seed = 4},
    {ROUND_RELEASE, "s1", "sub/b", .off = 8000, .len = 90000}, /* to its end, holes too */
    {ROUND_TRUNCATE, "sub/b", .off = 20000},
    {ROUND_READ, "s1"},
    {ROUND_READ, "s2"},
    {ROUND_FREEZE, "s3"},
    {ROUND_WRITE, "a", .off = 50000, .len = 9000, .seed = 5},
    {ROUND_DROP, "s2"},
    {ROUND_READ, "s1"},
    {ROUND_CHECKPOINT, "s1"},
    {ROUND_READ, "s3"},
    {ROUND_CLOSE},
    {ROUND_OPEN},
    {ROUND_RELEASE, "s3", "a", .off = 40960, .len = 12288},
    {ROUND_WRITE, "a", .off = 40960, .len = 9000, .seed = 6},
    {ROUND_READ, "s3"},
    {ROUND_DROP, "s1"},
    {ROUND_DROP, "s3"},
};

/* Images made up from views, which stay what they were while holes are filled and made. */
static const struct round_step images[] = {
    {ROUND_OPEN},
    {ROUND_WRITE, "a", .off = 20480, .len = 16384}, /* zeros that are data */
    {ROUND_PUNCH, "a", .off = 40960, .len = 16384},
    {ROUND_FREEZE, "s1"},
    {ROUND_WRITE, "a", .off = 0, .len = 8192, .seed = 1},
    {ROUND_SINCE, "s1"},
    {ROUND_PUNCH, "a", .off = 20480, .len = 8192},
    {ROUND_WRITE, "a", .off = 40960, .len = 8192}, /* over a hole */
    {ROUND_FREEZE, "s2"},
    {ROUND_READ, "s1"},
    {ROUND_SINCE, "s2"},
    {ROUND_CLOSE},
    {ROUND_OPEN},
    {ROUND_READ, "s1"},
    {ROUND_WRITE, "a", .off = 45056, .len = 20000, .seed = 2},
    {ROUND_PUNCH, "a", .off = 28672, .len = 8192},
    {ROUND_CHECKPOINT, "s1"},
    {ROUND_READ, "s2"},
    {ROUND_FREEZE, "s3"},
    {ROUND_SINCE, "s3"},
    {ROUND_WRITE, "sub/b", .off = 4096, .len = 8192}, /* over a hole */
    {ROUND_DROP, "s2"},
    {ROUND_CLOSE},
    {ROUND_OPEN},
    {ROUND_READ, "s3"},
    {ROUND_DROP, "s1"},
};

#define WORKLOAD(w)                                                                                \
	{                                                                                          \
#w, w, FF_ARRAY_SIZE(w)                                                            \
	}

const struct round_workload round_workloads[] = {
    WORKLOAD(writes), WORKLOAD(changes), WORKLOAD(names),  WORKLOAD(chain),
    WORKLOAD(points), WORKLOAD(parts),   WORKLOAD(images),
};
const size_t round_workload_count = FF_ARRAY_SIZE(round_workloads);
