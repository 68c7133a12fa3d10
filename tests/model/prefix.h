/*
 * The prefix test: what its writers write, and what a view of it must be.
 *
 * Thread T's write number N (from 1) is one record, in one file, at one slot, all of them functions
 * of T and N alone. So the state of the files after the first P writes of each thread can be
 * computed, and a view of the files tells each thread's P: the highest number in it.
 */
#ifndef TESTS_MODEL_PREFIX_H
#define TESTS_MODEL_PREFIX_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define NFILES      6
#define NSLOTS      16 /* of each thread in each file */
#define MAX_THREADS 16
#define MAX_RECORD  65536u

/* The slots of the threads lie interleaved, so that neighbours in a cluster are different threads'.
 */
struct layout {
	unsigned threads;
};

/* Bytes of a record in file K. */
static inline uint32_t record_size(unsigned k)
{
	static const uint32_t sizes[NFILES] = {512, 4096, 65536, 512, 4096, 65536};

	return sizes[k];
}

/* Is file K written with O_DIRECT in write number N? The smallest records lie several to a page and
 * are always buffered: mixing both within a page is undefined. */
static inline bool record_direct(unsigned k, uint64_t n)
{
	return k == 4 || k == 5 || (k == 2 && n % 3 == 0);
}

static inline unsigned record_file(unsigned t, uint64_t n)
{
	/* Each thread goes round the files in its own order: 1 and 5 are prime to NFILES. */
	return (unsigned)((n * (t % 2 ? 5 : 1) + t) % NFILES);
}

static inline unsigned record_slot(uint64_t n)
{
	return (unsigned)(n / NFILES % NSLOTS);
}

static inline uint64_t record_offset(const struct layout *l, unsigned t, uint64_t n)
{
	return ((uint64_t)record_slot(n) * l->threads + t) * record_size(record_file(t, n));
}

static inline uint64_t file_size(const struct layout *l, unsigned k)
{
	return (uint64_t)NSLOTS * l->threads * record_size(k);
}

/* Fills BUF with the record of thread T's write N in file K. */
void record_fill(uint8_t *buf, unsigned k, unsigned t, uint64_t n);

/* Checks the files' bytes of one view: FILES[k] holds file_size(k) bytes, zeros beyond the file's
 * end. BEFORE and AFTER, for each thread: writes that had returned before the snapshot was asked
 * for, and that had begun after it was made. 0, or -EIO with WHY (of size WHY_LEN) filled. */
int prefix_check(const struct layout *l, uint8_t *const files[NFILES], const uint64_t *before,
                 const uint64_t *after, char *why, size_t why_len);

/* Makes a view of exact prefixes, spoils it in every way that matters, and sees that prefix_check()
 * finds each: the test of the test. 0, or -EIO after a line on stderr. */
int prefix_self_test(void);

#endif
