/*
 * The random numbers of the tests: splitmix64, so that a printed seed replays a run on any machine.
 * A struct rng belongs to one thread.
 */
#ifndef TESTS_MODEL_RNG_H
#define TESTS_MODEL_RNG_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

struct rng {
	uint64_t s;
};

static inline uint64_t rng_next(struct rng *r)
{
	uint64_t z = (r->s += 0x9e3779b97f4a7c15u);

	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
	z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
	return z ^ (z >> 31);
}

/* A number below N, which must not be 0. */
static inline uint64_t rng_below(struct rng *r, uint64_t n)
{
	return rng_next(r) % n;
}

/* True once in N times. */
static inline int rng_one_in(struct rng *r, uint64_t n)
{
	return rng_below(r, n) == 0;
}

static inline void rng_fill(struct rng *r, uint8_t *buf, size_t len)
{
	uint64_t v;

	for (; len >= sizeof v; buf += sizeof v, len -= sizeof v) {
		v = rng_next(r);
		memcpy(buf, &v, sizeof v);
	}
	v = rng_next(r);
	memcpy(buf, &v, len);
}

#endif
