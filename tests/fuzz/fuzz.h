/*
 * What the fuzz targets share. A target is one file fuzz_NAME.c with LLVMFuzzerTestOneInput(). It
 * is linked with libFuzzer where the build is made for that (-Dfuzz=true, clang), and with
 * replay.c, a main() that runs files, everywhere else. A wrong answer ends the process by
 * fuzz_fail().
 */
#ifndef FF_TEST_FUZZ_H
#define FF_TEST_FUZZ_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerInitialize(int *argc, char ***argv);
#ifdef FUZZ_LIBFUZZER
size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t max_size);
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max_size, unsigned seed);
#endif

_Noreturn void fuzz_fail(const char *file, int line, const char *what);

#define FUZZ_CHECK(cond)                                                                           \
	do {                                                                                       \
		if (!(cond))                                                                       \
			fuzz_fail(__FILE__, __LINE__, #cond);                                      \
	} while (0)

/* Numbers taken from the front of an input; zeros when it has ended. */
struct input {
	const uint8_t *p, *end;
};

static inline uint64_t input_take(struct input *in, unsigned bytes)
{
	uint64_t v = 0;

	for (; bytes; bytes--)
		v = v << 8 | (in->p < in->end ? *in->p++ : 0);
	return v;
}

/* A directory of this process, in memory where possible; removed at exit. */
int fuzz_dir(void);
/* Makes NAME in it anew with these bytes. */
void fuzz_put(const char *name, const void *data, size_t size);

#endif
