/*
 * Makes single allocations fail: these functions stand before the C library's, so that what it
 * allocates itself (opendir, strdup, asprintf, open_memstream) fails as well.
 *
 * An address sanitizer has functions of its own in that place. There only what our own code calls
 * is caught, by the linker (--wrap), so the calls of the library that allocate are caught too.
 */
#include <errno.h>
#include <malloc.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "fault_calls.h"

#if defined(__SANITIZE_ADDRESS__)
#define OURS(name)   __wrap_##name
#define THEIRS(name) __real_##name
#else
#define OURS(name)   name
#define THEIRS(name) __libc_##name
#endif

void *THEIRS(malloc)(size_t size);
void *THEIRS(calloc)(size_t n, size_t size);
void *THEIRS(realloc)(void *p, size_t size);
void *OURS(malloc)(size_t size);
void *OURS(calloc)(size_t n, size_t size);
void *OURS(realloc)(void *p, size_t size);
void *OURS(aligned_alloc)(size_t align, size_t size);

void *OURS(malloc)(size_t size)
{
	return fault_alloc() ? NULL : THEIRS(malloc)(size);
}

void *OURS(calloc)(size_t n, size_t size)
{
	return fault_alloc() ? NULL : THEIRS(calloc)(n, size);
}

void *OURS(realloc)(void *p, size_t size)
{
	return fault_alloc() ? NULL : THEIRS(realloc)(p, size);
}

#if defined(__SANITIZE_ADDRESS__)

void *__real_aligned_alloc(size_t align, size_t size);
char *__wrap_strdup(const char *s);
char *__real_strdup(const char *s);
int __wrap_asprintf(char **out, const char *fmt, ...);
FILE *__wrap_open_memstream(char **out, size_t *len);
FILE *__real_open_memstream(char **out, size_t *len);

void *__wrap_aligned_alloc(size_t align, size_t size)
{
	return fault_alloc() ? NULL : __real_aligned_alloc(align, size);
}

char *__wrap_strdup(const char *s)
{
	return fault_alloc() ? NULL : __real_strdup(s);
}

int __wrap_asprintf(char **out, const char *fmt, ...)
{
	va_list ap;
	int n;

	if (fault_alloc())
		return -1;
	va_start(ap, fmt);
	n = vasprintf(out, fmt, ap);
	va_end(ap);
	return n;
}

FILE *__wrap_open_memstream(char **out, size_t *len)
{
	return fault_alloc() ? NULL : __real_open_memstream(out, len);
}

#else

void *__libc_memalign(size_t align, size_t size);

void *aligned_alloc(size_t align, size_t size)
{
	return fault_alloc() ? NULL : __libc_memalign(align, size);
}

void *memalign(size_t align, size_t size)
{
	return fault_alloc() ? NULL : __libc_memalign(align, size);
}

int posix_memalign(void **out, size_t align, size_t size)
{
	*out = fault_alloc() ? NULL : __libc_memalign(align, size);
	return *out ? 0 : ENOMEM;
}

#endif
