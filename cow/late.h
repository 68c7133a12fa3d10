/*
 * Work on fleece storage that may hang, done by a thread of its own, for a caller who waits only so
 * long. Used with a limit on how long a guest's write may wait for a save.
 */
#ifndef FF_COW_LATE_H
#define FF_COW_LATE_H

#include <stdatomic.h>

/* Runs fn(ctx) on another thread and waits for it at most SECONDS (0: not at all). Returns what FN
 * returned, -ETIMEDOUT when it has not ended, or -EAGAIN when there is no thread to be had and FN
 * was not run. FN owns CTX, which it may still use after a timeout. RUNNING counts the calls of FN
 * that have not ended. */
int late_run(int (*fn)(void *ctx), void *ctx, unsigned seconds, atomic_uint *running);

#endif
