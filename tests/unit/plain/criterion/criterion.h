/*
 * A stand-in for Criterion in builds with the thread sanitizer, in whose address space Criterion's
 * shared arena finds no room. It has what the tests here use, runs each test in a process of its
 * own, one after the other, and prints totals in the same form.
 */
#ifndef FF_TEST_PLAIN_CRITERION_H
#define FF_TEST_PLAIN_CRITERION_H

#include <stddef.h>
#include <stdlib.h>
#include <string.h>

struct plain_options {
	void (*init)(void);
	void (*fini)(void);
	double timeout;
};

struct plain_params {
	size_t size, count;
	void *params;
};

struct plain_test {
	const char *suite, *name;
	void (*run)(void *param);
	struct plain_params (*params)(void); /* NULL: once, with none */
	struct plain_options options;
	struct plain_test *next;
};

void plain_register(struct plain_test *test);
void plain_register_suite(const char *suite, const struct plain_options *options);
void plain_fail(const char *file, int line, const char *what, const char *fmt, ...)
    __attribute__((format(printf, 4, 5), noreturn));
void plain_skip(const char *fmt, ...) __attribute__((format(printf, 1, 2), noreturn));

#define PLAIN_TEST(suite_, name_, params_, ...)                                                    \
	static void suite_##_##name_##_run(void *);                                                \
	__attribute__((constructor)) static void suite_##_##name_##_register(void)                 \
	{                                                                                          \
		static struct plain_test test = {.suite = #suite_,                                 \
		                                 .name = #name_,                                   \
		                                 .run = suite_##_##name_##_run,                    \
		                                 .params = params_,                                \
		                                 .options = {__VA_ARGS__}};                        \
		plain_register(&test);                                                             \
	}

#define Test(suite_, name_, ...)                                                                   \
	static void suite_##_##name_(void);                                                        \
	PLAIN_TEST(suite_, name_, NULL, __VA_ARGS__)                                               \
	static void suite_##_##name_##_run(void *plain_unused)                                     \
	{                                                                                          \
		suite_##_##name_();                                                                \
	}                                                                                          \
	static void suite_##_##name_(void)

#define TestSuite(suite_, ...)                                                                     \
	__attribute__((constructor)) static void suite_##_options(void)                            \
	{                                                                                          \
		static const struct plain_options options = {__VA_ARGS__};                         \
		plain_register_suite(#suite_, &options);                                           \
	}                                                                                          \
	struct plain_options

/* most assertions come without a message of their own */
#pragma GCC diagnostic ignored "-Wformat-zero-length"

#define PLAIN_CHECK(ok, what, ...)                                                                 \
	do {                                                                                       \
		if (!(ok))                                                                         \
			plain_fail(__FILE__, __LINE__, what, "" __VA_ARGS__);                      \
	} while (0)

#define cr_assert(c, ...)               PLAIN_CHECK(c, #c, __VA_ARGS__)
#define cr_assert_not(c, ...)           PLAIN_CHECK(!(c), "not " #c, __VA_ARGS__)
#define cr_assert_eq(a, b, ...)         PLAIN_CHECK((a) == (b), #a " == " #b, __VA_ARGS__)
#define cr_assert_neq(a, b, ...)        PLAIN_CHECK((a) != (b), #a " != " #b, __VA_ARGS__)
#define cr_assert_gt(a, b, ...)         PLAIN_CHECK((a) > (b), #a " > " #b, __VA_ARGS__)
#define cr_assert_geq(a, b, ...)        PLAIN_CHECK((a) >= (b), #a " >= " #b, __VA_ARGS__)
#define cr_assert_lt(a, b, ...)         PLAIN_CHECK((a) < (b), #a " < " #b, __VA_ARGS__)
#define cr_assert_leq(a, b, ...)        PLAIN_CHECK((a) <= (b), #a " <= " #b, __VA_ARGS__)
#define cr_assert_null(a, ...)          PLAIN_CHECK((a) == NULL, #a " is NULL", __VA_ARGS__)
#define cr_assert_not_null(a, ...)      PLAIN_CHECK((a) != NULL, #a " is not NULL", __VA_ARGS__)
#define cr_assert_str_eq(a, b, ...)     PLAIN_CHECK(!strcmp(a, b), #a " is " #b, __VA_ARGS__)
#define cr_assert_str_neq(a, b, ...)    PLAIN_CHECK(strcmp(a, b), #a " is not " #b, __VA_ARGS__)
#define cr_assert_arr_eq(a, b, n, ...)  PLAIN_CHECK(!memcmp(a, b, n), #a " is " #b, __VA_ARGS__)
#define cr_assert_arr_neq(a, b, n, ...) PLAIN_CHECK(memcmp(a, b, n), #a " is not " #b, __VA_ARGS__)
#define cr_assert_fail(...)             PLAIN_CHECK(0, "reached", __VA_ARGS__)
#define cr_fatal(...)                   PLAIN_CHECK(0, "reached", __VA_ARGS__)
#define cr_skip_test(...)               plain_skip("" __VA_ARGS__)
#define cr_skip(...)                    plain_skip("" __VA_ARGS__)

#endif
