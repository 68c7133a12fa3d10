/*
 * Numbers are for good, for they stand in images: a new reason goes to the end. Those of system
 * calls' errors are the error and ERRORS. No state.
 */
#include "cow/reasons.h"

#include <string.h>

#include "ff_util.h"

enum { ERRORS = 64 };

static const char *const texts[] = {
    NULL,     WHY_TIMEOUT, WHY_NOT_DURABLE, WHY_REMOVED, WHY_REPLACED, WHY_SMALLER,   WHY_NO_DEVICE,
    WHY_GONE, WHY_CHANGED, WHY_LOST,        WHY_TWICE,   WHY_POWER,    WHY_UNMOUNTED, WHY_NOTED,
};
_Static_assert(sizeof texts / sizeof texts[0] <= ERRORS, "the rest are errors");

const char *reason_of_error(int error)
{
	const char *text =
	    strerrordesc_np(error < 0 ? -error : error); /* static, unlike strerror()'s */

	return text ? text : "unknown error";
}

uint8_t reason_number(const char *why)
{
	for (size_t i = 1; i < FF_ARRAY_SIZE(texts); i++)
		if (strcmp(texts[i], why) == 0)
			return (uint8_t)i;
	for (int e = 1; e <= UINT8_MAX - ERRORS; e++)
		if (strerrordesc_np(e) && strcmp(strerrordesc_np(e), why) == 0)
			return (uint8_t)(ERRORS + e);
	return 0;
}

const char *reason_text(uint8_t number)
{
	const char *text = NULL;

	if (number > ERRORS)
		text = strerrordesc_np(number - ERRORS);
	else if (number < FF_ARRAY_SIZE(texts))
		text = texts[number];
	return text ? text : "it broke before this mount; the log of that time says why";
}
