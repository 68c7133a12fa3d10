/*
 * Small helpers shared by cow/ and fusefs/: scopes that clean up after themselves, checked
 * arithmetic, array sizes. Everything here is a macro or a static inline function, thread-safe and
 * free of state.
 */
#ifndef FF_UTIL_H
#define FF_UTIL_H

#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <unistd.h>

#define FF_ARRAY_SIZE(a) (sizeof(a) / sizeof((a)[0]))
#define FF_MIN(a, b)     ((a) < (b) ? (a) : (b))
#define FF_MAX(a, b)     ((a) > (b) ? (a) : (b))
/* For qsort(3): negative, 0 or positive. */
#define FF_ORDER(a, b) (((a) > (b)) - ((a) < (b)))

/* The object of type TYPE whose member MEMBER is at PTR. */
#define FF_CONTAINER(ptr, type, member) ((type *)(void *)((char *)(ptr)-offsetof(type, member)))

static inline void ff_free_cleanup(void *p)
{
	free(*(void **)p);
}

static inline void ff_close_cleanup(int *fd)
{
	if (*fd >= 0)
		close(*fd);
}

static inline void ff_unlock_cleanup(pthread_mutex_t **m)
{
	if (*m)
		pthread_mutex_unlock(*m);
}

/* ff_autofree: free() at the end of the scope. ff_autoclose: close() unless negative. Both keep
 * errno only as far as free() and close() do: take errno before the scope ends. */
#define ff_autofree  __attribute__((cleanup(ff_free_cleanup)))
#define ff_autoclose __attribute__((cleanup(ff_close_cleanup)))

/* Holds the mutex M until the end of the enclosing scope. */
#define FF_GUARD_(m, n)                                                                            \
	pthread_mutex_t *ff_guard_##n __attribute__((cleanup(ff_unlock_cleanup), unused)) = (m);   \
	pthread_mutex_lock(ff_guard_##n)
#define FF_GUARD__(m, n) FF_GUARD_(m, n)
#define FF_GUARD(m)      FF_GUARD__(m, __COUNTER__)

/* An array of characters without a NUL at the end. */
#ifdef __has_attribute
#if __has_attribute(nonstring)
#define FF_NONSTRING __attribute__((nonstring))
#endif
#endif
#ifndef FF_NONSTRING
#define FF_NONSTRING
#endif

/* Gives the fd away: returns it and leaves -1 behind, so that ff_autoclose does nothing. */
static inline int ff_take_fd(int *fd)
{
	int r = *fd;

	*fd = -1;
	return r;
}

/* Gives a pointer away: returns *P and leaves NULL behind. */
#define ff_take_ptr(p)                                                                             \
	({                                                                                         \
		__typeof__(*(p)) ff_tmp_ = *(p);                                                   \
		*(p) = NULL;                                                                       \
		ff_tmp_;                                                                           \
	})

/* Checked 64-bit arithmetic: 0, or -EOVERFLOW with *out untouched. */
static inline int ff_add_u64(uint64_t a, uint64_t b, uint64_t *out)
{
	uint64_t r;

	if (__builtin_add_overflow(a, b, &r))
		return -EOVERFLOW;
	*out = r;
	return 0;
}

static inline int ff_mul_u64(uint64_t a, uint64_t b, uint64_t *out)
{
	uint64_t r;

	if (__builtin_mul_overflow(a, b, &r))
		return -EOVERFLOW;
	*out = r;
	return 0;
}

static inline uint64_t ff_div_up(uint64_t a, uint64_t b)
{
	return a / b + (a % b != 0);
}

/* a rounded up to a multiple of B, a power of two; wraps only for a > 2^64 - b. */
static inline uint64_t ff_round_up(uint64_t a, uint64_t b)
{
	return (a + b - 1) & ~(b - 1);
}

/* Big-endian loads and stores at any alignment (qcow2 is big-endian throughout). */
static inline uint32_t ff_be32(const void *p)
{
	uint32_t v;

	__builtin_memcpy(&v, p, sizeof v);
	return __builtin_bswap32(v);
}

static inline uint64_t ff_be64(const void *p)
{
	uint64_t v;

	__builtin_memcpy(&v, p, sizeof v);
	return __builtin_bswap64(v);
}

static inline void ff_put_be32(void *p, uint32_t v)
{
	v = __builtin_bswap32(v);
	__builtin_memcpy(p, &v, sizeof v);
}

static inline void ff_put_be64(void *p, uint64_t v)
{
	v = __builtin_bswap64(v);
	__builtin_memcpy(p, &v, sizeof v);
}

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "big-endian hosts are not supported: the load and store helpers swap unconditionally"
#endif

#endif
