/*
 * What a view of the prefix test must be, and the proof that anything else is noticed.
 *
 * A record is filled with 16-byte units: the number of the write, the thread, and the unit's place.
 * A slot is right if it holds the record of the last write, among the first P of its thread, that
 * went there, whole; or zeros if there was none.
 */
#include "prefix.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct unit {
	uint64_t n;
	uint32_t thread;
	uint32_t place;
};

void record_fill(uint8_t *buf, unsigned k, unsigned t, uint64_t n)
{
	uint32_t i, count = record_size(k) / (uint32_t)sizeof(struct unit);

	for (i = 0; i < count; i++) {
		struct unit u = {n, t, k << 16 | i};

		memcpy(buf + i * sizeof u, &u, sizeof u);
	}
}

static uint64_t stamp_of(const uint8_t *p)
{
	uint64_t n;

	memcpy(&n, p, sizeof n);
	return n;
}

/* The highest number among thread T's stamps. */
static uint64_t find_prefix(const struct layout *l, uint8_t *const files[NFILES], unsigned t)
{
	uint64_t p = 0, n;
	unsigned k, s;

	for (k = 0; k < NFILES; k++)
		for (s = 0; s < NSLOTS; s++) {
			uint64_t size = record_size(k);

			n = stamp_of(files[k] + (s * l->threads + t) * size);
			p = n > p ? n : p;
		}
	return p;
}

static int check_slot(const struct layout *l, uint8_t *const files[NFILES], unsigned t, unsigned k,
                      unsigned s, uint64_t n, uint64_t p, char *why, size_t why_len)
{
	static const uint8_t zeros[MAX_RECORD];
	uint32_t size = record_size(k), i;
	uint64_t off = ((uint64_t)s * l->threads + t) * size;
	const uint8_t *got = files[k] + off, *want = zeros;
	uint8_t *record = malloc(size);
	int r = 0;

	if (!record)
		return -ENOMEM;
	if (n) {
		record_fill(record, k, t, n);
		want = record;
	}
	if (memcmp(got, want, size) != 0) {
		for (i = 0; got[i] == want[i]; i++)
			;
		snprintf(
		    why, why_len,
		    "thread %u, prefix %llu: file %u slot %u at %llu must hold write %llu; byte %u "
		    "of %u differs; it begins with stamp %llu and ends with stamp %llu",
		    t, (unsigned long long)p, k, s, (unsigned long long)off, (unsigned long long)n,
		    i, size, (unsigned long long)stamp_of(got),
		    (unsigned long long)stamp_of(got + size - sizeof(struct unit)));
		r = -EIO;
	}
	free(record);
	return r;
}

static int check_thread(const struct layout *l, uint8_t *const files[NFILES], unsigned t,
                        uint64_t p, char *why, size_t why_len)
{
	uint64_t last[NFILES][NSLOTS] = {{0}}, n;
	unsigned k, s;
	int r;

	/* All slots of a thread come round in this many writes. */
	for (n = p; n > 0 && p - n < NFILES * NSLOTS; n--) {
		uint64_t *l_n = &last[record_file(t, n)][record_slot(n)];

		*l_n = *l_n ? *l_n : n;
	}
	for (k = 0; k < NFILES; k++)
		for (s = 0; s < NSLOTS; s++) {
			r = check_slot(l, files, t, k, s, last[k][s], p, why, why_len);
			if (r)
				return r;
		}
	return 0;
}

int prefix_check(const struct layout *l, uint8_t *const files[NFILES], const uint64_t *before,
                 const uint64_t *after, char *why, size_t why_len)
{
	uint64_t p;
	unsigned t;
	int r;

	for (t = 0; t < l->threads; t++) {
		p = find_prefix(l, files, t);
		r = check_thread(l, files, t, p, why, why_len);
		if (r)
			return r;
		if (p < before[t] || p > after[t]) {
			snprintf(why, why_len,
			         "thread %u: the view holds its first %llu writes, but %llu had "
			         "returned "
			         "before and %llu begun after",
			         t, (unsigned long long)p, (unsigned long long)before[t],
			         (unsigned long long)after[t]);
			return -EIO;
		}
	}
	return 0;
}

static void put_record(const struct layout *l, uint8_t *const files[NFILES], unsigned t, uint64_t n)
{
	unsigned k = record_file(t, n);

	record_fill(files[k] + record_offset(l, t, n), k, t, n);
}

/* EXPECT: is the view to be found right? */
static int expect(const struct layout *l, uint8_t *const files[NFILES], const uint64_t *before,
                  const uint64_t *after, bool right, const char *what)
{
	char why[400] = "";
	int r = prefix_check(l, files, before, after, why, sizeof why);

	if ((r == 0) == right)
		return 0;
	fprintf(stderr, "self test: %s: %s\n", what, right ? why : "not noticed");
	return -EIO;
}

static int spoil(const struct layout *l, uint8_t *const files[NFILES], const uint64_t *p)
{
	uint64_t low[MAX_THREADS], high[MAX_THREADS], n = p[1] - 5;
	unsigned k = record_file(1, n);
	uint8_t *at = files[k] + record_offset(l, 1, n), saved[MAX_RECORD];
	int r;

	memcpy(low, p, sizeof low);
	memcpy(high, p, sizeof high);
	low[1]++;
	high[2]--;
	r = expect(l, files, p, p, true, "exact prefixes");
	r = r ? r : expect(l, files, low, p, false, "a returned write is missing");
	r = r ? r : expect(l, files, p, high, false, "a write from later");
	memcpy(saved, at, record_size(k));
	/* What was there before write N: an earlier write missing below a later one. */
	record_fill(at, k, 1, n - NFILES * NSLOTS);
	r = r ? r : expect(l, files, p, p, false, "a hole in the history");
	memcpy(at, saved, record_size(k));
	record_fill(at, k, 1, n);
	memset(at + record_size(k) - 16, 0, 16);
	r = r ? r : expect(l, files, p, p, false, "a torn record");
	memcpy(at, saved, record_size(k));
	record_fill(at, k, 0, n);
	r = r ? r : expect(l, files, p, p, false, "another thread's record");
	memcpy(at, saved, record_size(k));
	return r ? r : expect(l, files, p, p, true, "exact prefixes again");
}

int prefix_self_test(void)
{
	const struct layout l = {.threads = 3};
	uint64_t p[MAX_THREADS] = {0, 250, 999}, n;
	uint8_t *files[NFILES] = {NULL};
	unsigned k, t;
	int r = -ENOMEM;

	for (k = 0; k < NFILES; k++) {
		files[k] = calloc(1, file_size(&l, k));
		if (!files[k])
			goto out;
	}
	for (t = 0; t < l.threads; t++)
		for (n = 1; n <= p[t]; n++)
			put_record(&l, files, t, n);
	r = spoil(&l, files, p);
out:
	for (k = 0; k < NFILES; k++)
		free(files[k]);
	return r;
}
