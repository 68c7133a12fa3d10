/*
 * One case of nth_call.c: what it is, how it is called, and running it.
 */
#ifndef FF_TESTS_NTH_CASE_H
#define FF_TESTS_NTH_CASE_H

#include <stdbool.h>

#include "round.h"

enum end { HEALED, KILLED, ENDS };
enum { CASE_VARIANTS = 2 * 2 * 2 /* guest, all, end */ };

/* ERROR is below case_errors. */
struct instance {
	unsigned workload, error;
	bool durable, guest, all;
	enum end end;
	long nth;
};

extern const unsigned case_errors;
/* Is it an allocation that fails? */
bool case_is_memory(unsigned error);

void case_name(const struct instance *c, char out[128]);
/* What case_name() gave. */
bool case_parse(const char *text, struct instance *c);
/* Calls of the workload that can give the error. */
long case_calls(struct round *r, unsigned workload, unsigned error, bool durable);
/* Ends the process with status 1 if something was wrong, which is told. */
void case_run(struct round *r, const struct instance *c, const char *program);

#endif
