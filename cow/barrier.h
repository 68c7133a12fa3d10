/*
 * A barrier that many threads pass through all the time and one closes now and then: the freeze.
 *
 * Threads hold it shared for the length of one change of a source (or of one frozen read, in a
 * second instance); the closer waits until none holds it, keeps newcomers out, flips what they
 * look at, and opens it again. Passing costs two atomic additions on a cache line that few threads
 * share; there is no common lock on that path.
 */
#ifndef FF_COW_BARRIER_H
#define FF_COW_BARRIER_H

struct barrier;

/* 0 or -ENOMEM. */
int barrier_new(struct barrier **out);
void barrier_free(struct barrier *b);

/* Holds the barrier shared, after waiting while it is closed. Returns a token for barrier_exit().
 * Does not nest. */
unsigned barrier_enter(struct barrier *b);
void barrier_exit(struct barrier *b, unsigned token);

/* Closes it and waits for all who hold it: 0, or -ETIMEDOUT after TIMEOUT_MS, and then it is open
 * again. One closer at a time (the caller's lock sees to that). */
int barrier_close(struct barrier *b, unsigned timeout_ms);
void barrier_open(struct barrier *b);

#endif
