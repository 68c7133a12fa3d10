/*
 * The lock-free bitmap, against an array of bytes, and with many threads.
 */
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include <criterion/criterion.h>
#include <criterion/parameterized.h>

#include "cow/clustermap.h"
#include "ff_util.h"

static uint64_t next_random(uint64_t *state)
{
	*state = *state * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
	return *state >> 33;
}

static void compare(const struct clustermap *map, const uint8_t *model, uint64_t size, uint64_t at)
{
	uint64_t n = 0;
	bool set;

	while (at + n < size && model[at + n] == model[at])
		n++;
	cr_assert_eq(clustermap_test(map, at), model[at]);
	if (model[at] || at + n < size)
		cr_assert_eq(clustermap_run(map, at, size - at, &set), n);
	else /* nothing is set beyond the end */
		cr_assert_eq(clustermap_run(map, at, size - at + 1000, &set), size - at + 1000);
	cr_assert_eq(set, model[at]);
	cr_assert_eq(clustermap_run(map, at, 1, &set), 1);
	cr_assert_eq(clustermap_run(map, at, FF_MAX(n / 2, UINT64_C(1)), &set),
	             FF_MAX(n / 2, UINT64_C(1)));
}

ParameterizedTestParameters(clustermap, equals_model)
{
	static uint64_t sizes[] = {1, 63, 64, 65, 1000, 32767, 32768, 32769, 65536, 200000};

	return cr_make_param_array(uint64_t, sizes, FF_ARRAY_SIZE(sizes));
}

ParameterizedTest(uint64_t *size, clustermap, equals_model)
{
	struct clustermap map;
	uint8_t *model = calloc(*size, 1);
	uint64_t rng = *size;

	cr_assert_eq(clustermap_init(&map, *size), 0);
	for (int i = 0; i < 600; i++) {
		uint64_t at = next_random(&rng) % *size;
		uint64_t max = i % 3 ? FF_MIN(*size - at, UINT64_C(130)) : *size - at;
		uint64_t n = 1 + next_random(&rng) % max;
		bool set = next_random(&rng) % 3;

		if (set) {
			cr_assert_eq(clustermap_reserve(&map, at, n), 0);
			clustermap_set(&map, at, n);
		} else {
			clustermap_clear(&map, at, n);
		}
		memset(model + at, set, n);
		compare(&map, model, *size, at);
		compare(&map, model, *size, next_random(&rng) % *size);
		if (at)
			compare(&map, model, *size, at - 1);
		if (at + n < *size)
			compare(&map, model, *size, at + n);
	}
	for (uint64_t i = 0; i < *size; i++)
		cr_assert_eq(clustermap_test(&map, i), model[i]);
	cr_assert_not(clustermap_test(&map, *size));
	cr_assert_not(clustermap_test(&map, UINT64_MAX));
	for (uint64_t i = 0; i < *size; i += 8) {
		const uint8_t *bytes = clustermap_bytes(&map, i);
		uint8_t want = 0;

		for (unsigned b = 0; b < 8 && i + b < *size; b++)
			want |= (uint8_t)(model[i + b] << b);
		cr_assert_eq(bytes ? *bytes : 0, want);
	}
	for (int i = 0; i < 300; i++) {
		uint64_t at = next_random(&rng) % (*size + 70), bits[4];
		unsigned n = 1 + (unsigned)(next_random(&rng) % 256);

		clustermap_bits(&map, at, n, bits);
		for (unsigned b = 0; b < (n + 63) / 64 * 64; b++)
			cr_assert_eq(bits[b / 64] >> b % 64 & 1,
			             b < n && at + b < *size && model[at + b], "%u of %u from %llu",
			             b, n, (unsigned long long)at);
	}
	clustermap_fini(&map);
	free(model);
}

Test(clustermap, none_set)
{
	struct clustermap map;
	bool set = true;

	cr_assert_eq(clustermap_init(&map, 0), 0);
	cr_assert_not(clustermap_test(&map, 0));
	cr_assert_eq(clustermap_run(&map, 0, 5, &set), 5);
	cr_assert_not(set);
	clustermap_fini(&map);
}

/* 1 TiB with 4 KiB clusters, little saved: counted by what was allocated. */
Test(clustermap, huge_is_small)
{
	struct clustermap map;
	uint64_t size = UINT64_C(1) << 28, chunks = 0;
	bool set;

	cr_assert_eq(clustermap_init(&map, size), 0);
	for (uint64_t i = 0; i < size; i += size / 100) {
		cr_assert_eq(clustermap_reserve(&map, i, 1), 0);
		clustermap_set(&map, i, 1);
	}
	for (uint64_t i = 0; i < size; i += CLUSTERMAP_CHUNK_BITS)
		chunks += clustermap_bytes(&map, i) != NULL;
	cr_assert_leq(chunks, 101);
	cr_assert_lt(map.chunk_count * sizeof *map.chunk + chunks * CLUSTERMAP_CHUNK_BITS / 8,
	             1u << 20);
	cr_assert_eq(clustermap_run(&map, 1, size, &set), size / 100 - 1);
	clustermap_fini(&map);
}

#define THREADS 8

struct job {
	struct clustermap *map;
	uint64_t *payload; /* written before the bit is set, read after it was seen */
	unsigned id;
	uint64_t errors;
};

/* Sets the bits i with i % THREADS == id, which share words with all others'. */
static void *set_thread(void *arg)
{
	struct job *j = arg;

	for (uint64_t i = j->id; i < j->map->size; i += THREADS) {
		j->payload[i] = i ^ 0x5555;
		if (clustermap_reserve(j->map, i, 1))
			j->errors++;
		clustermap_set(j->map, i, 1);
	}
	return NULL;
}

static void *watch_thread(void *arg)
{
	struct job *j = arg;

	for (int pass = 0; pass < 20; pass++)
		for (uint64_t i = 0; i < j->map->size; i++)
			if (clustermap_test(j->map, i) && j->payload[i] != (i ^ 0x5555))
				j->errors++;
	return NULL;
}

Test(clustermap, threads, .timeout = 60)
{
	struct clustermap map;
	struct job jobs[THREADS + 1];
	pthread_t thread[THREADS + 1];
	uint64_t *payload = calloc(100000, sizeof *payload);
	bool set;

	cr_assert_eq(clustermap_init(&map, 100000), 0);
	for (unsigned i = 0; i <= THREADS; i++) {
		jobs[i] = (struct job){&map, payload, i, 0};
		pthread_create(&thread[i], NULL, i < THREADS ? set_thread : watch_thread, &jobs[i]);
	}
	for (unsigned i = 0; i <= THREADS; i++) {
		pthread_join(thread[i], NULL);
		cr_assert_eq(jobs[i].errors, 0);
	}
	cr_assert_eq(clustermap_run(&map, 0, 100000, &set), 100000);
	cr_assert(set);
	clustermap_fini(&map);
	free(payload);
}
