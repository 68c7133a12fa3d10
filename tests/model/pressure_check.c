/*
 * What a view of the pressure test must be, and the proof that anything else is noticed. Pure
 * functions.
 */
#include "pressure.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct unit {
	uint64_t n;
	uint64_t at; /* of this unit on its disk */
	uint32_t writer, disk;
	uint64_t check;
};

_Static_assert(sizeof(struct unit) == 32, "records are multiples of it");

void record_fill(const struct shape *s, unsigned t, uint64_t n, uint8_t *buf)
{
	unsigned k = record_disk(s, t, n);
	uint64_t at = record_offset(s, t, k, record_slot(s, n));

	for (uint32_t i = 0; i < record_size(k); i += sizeof(struct unit)) {
		struct unit u = {.n = n, .at = at + i, .writer = t, .disk = k};

		u.check = (u.n * 31 + u.at) * UINT64_C(0x9e3779b97f4a7c15);
		memcpy(buf + i, &u, sizeof u);
	}
}

static uint64_t stamp(const uint8_t *p)
{
	uint64_t n;

	memcpy(&n, p, sizeof n);
	return n;
}

static int check_slot(const struct shape *s, uint8_t *const *disks, unsigned t, unsigned k,
                      unsigned slot, uint64_t n, char *why, size_t why_len)
{
	static const uint8_t zeros[RECORD_MAX];
	const uint8_t *got = disks[k] + record_offset(s, t, k, slot), *want = zeros;
	uint8_t record[RECORD_MAX];
	uint32_t i;

	if (n) {
		record_fill(s, t, n, record);
		want = record;
	}
	if (memcmp(got, want, record_size(k)) == 0)
		return 0;
	for (i = 0; got[i] == want[i]; i++)
		;
	snprintf(why, why_len,
	         "disk %u, writer %u, slot %u at %llu: must be write %llu, byte %u of %u differs; "
	         "the record begins as write %llu and ends as write %llu",
	         k, t, slot, (unsigned long long)record_offset(s, t, k, slot),
	         (unsigned long long)n, i, record_size(k), (unsigned long long)stamp(got),
	         (unsigned long long)stamp(got + record_size(k) - sizeof(struct unit)));
	return -EIO;
}

static int check_writer(const struct shape *s, uint8_t *const *disks, unsigned t, uint64_t *out,
                        char *why, size_t why_len)
{
	uint64_t p = 0, round = (uint64_t)s->disks * SLOTS;
	uint64_t last[MAX_DISKS][SLOTS] = {{0}};

	for (unsigned k = 0; k < s->disks; k++)
		for (unsigned i = 0; i < SLOTS; i++) {
			uint64_t n = stamp(disks[k] + record_offset(s, t, k, i));

			p = n > p ? n : p;
		}
	for (uint64_t n = p; n > 0 && p - n < round; n--) {
		uint64_t *at = &last[record_disk(s, t, n)][record_slot(s, n)];

		*at = *at ? *at : n;
	}
	*out = p;
	for (unsigned k = 0; k < s->disks; k++)
		for (unsigned i = 0; i < SLOTS; i++) {
			int r = check_slot(s, disks, t, k, i, last[k][i], why, why_len);

			if (r)
				return r;
		}
	return 0;
}

int view_check(const struct shape *s, uint8_t *const *disks, const uint64_t *before,
               const uint64_t *after, char *why, size_t why_len)
{
	for (unsigned t = 0; t < s->writers; t++) {
		uint64_t p;
		int r = check_writer(s, disks, t, &p, why, why_len);

		if (r)
			return r;
		if (p < before[t] || p > after[t]) {
			snprintf(why, why_len,
			         "writer %u: %llu writes are in the view, but %llu had returned "
			         "when the freeze began and %llu had begun when it ended",
			         t, (unsigned long long)p, (unsigned long long)before[t],
			         (unsigned long long)after[t]);
			return -EIO;
		}
	}
	return 0;
}

static void apply(const struct shape *s, uint8_t *const *disks, unsigned t, uint64_t n)
{
	unsigned k = record_disk(s, t, n);

	record_fill(s, t, n, disks[k] + record_offset(s, t, k, record_slot(s, n)));
}

static int expect(const struct shape *s, uint8_t *const *disks, const uint64_t *before,
                  const uint64_t *after, bool right, const char *what)
{
	char why[400] = "";

	if ((view_check(s, disks, before, after, why, sizeof why) == 0) == right)
		return 0;
	fprintf(stderr, "self test: %s: %s\n", what, right ? why : "not noticed");
	return -EIO;
}

static int spoil(const struct shape *s, uint8_t *const *disks, const uint64_t *p)
{
	uint64_t other[2] = {p[0], p[1] + 1}, round = (uint64_t)s->disks * SLOTS, n = p[1] - 3;
	unsigned k = record_disk(s, 1, n);
	uint8_t *at = disks[k] + record_offset(s, 1, k, record_slot(s, n)), saved[RECORD_MAX];
	int r = expect(s, disks, p, p, true, "a right view");

	r |= expect(s, disks, other, other, false, "a write that had returned is missing");
	other[1] = p[1] - 1;
	r |= expect(s, disks, p, other, false, "a write that had not begun is there");
	memcpy(saved, at, record_size(k));
	apply(s, disks, 1, n - round);
	r |= expect(s, disks, p, p, false, "an old record between newer ones");
	memcpy(at, saved, record_size(k));
	memset(at + record_size(k) - 32, 0, 32);
	r |= expect(s, disks, p, p, false, "a torn record");
	memcpy(at, saved, record_size(k));
	at[record_size(k) - 1] ^= 1;
	r |= expect(s, disks, p, p, false, "a flipped bit");
	memcpy(at, saved, record_size(k));
	return r | expect(s, disks, p, p, true, "the view put right");
}

int view_check_test(void)
{
	const struct shape s = {.writers = 2, .disks = 5};
	const uint64_t p[2] = {7, 100};
	uint8_t *disks[5] = {NULL};
	int r = 0;

	for (unsigned k = 0; k < s.disks; k++)
		if (!(disks[k] = calloc(1, disk_size(&s, k))))
			r = -ENOMEM;
	for (unsigned t = 0; t < s.writers && !r; t++)
		for (uint64_t n = 1; n <= p[t]; n++)
			apply(&s, disks, t, n);
	if (!r)
		r = spoil(&s, disks, p) ? -EIO : 0;
	for (unsigned k = 0; k < s.disks; k++)
		free(disks[k]);
	return r;
}
