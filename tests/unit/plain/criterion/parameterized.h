/* See criterion.h beside this file. */
#ifndef FF_TEST_PLAIN_PARAMETERIZED_H
#define FF_TEST_PLAIN_PARAMETERIZED_H

#include "criterion/criterion.h"

#define ParameterizedTestParameters(suite_, name_)                                                 \
	static struct plain_params suite_##_##name_##_params(void)

#define cr_make_param_array(type_, array_, count_, ...)                                            \
	((struct plain_params){sizeof(type_), count_, array_})

#define ParameterizedTest(param_, suite_, name_, ...)                                              \
	static void suite_##_##name_(param_);                                                      \
	PLAIN_TEST(suite_, name_, suite_##_##name_##_params, __VA_ARGS__)                          \
	static void suite_##_##name_##_run(void *plain_param)                                      \
	{                                                                                          \
		suite_##_##name_(plain_param);                                                     \
	}                                                                                          \
	static void suite_##_##name_(param_)

#endif
