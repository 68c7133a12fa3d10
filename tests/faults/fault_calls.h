/*
 * Makes single system calls of cow/ fail: this file's functions stand before those of cow/io.h
 * (linker option --wrap), and before those of the C library that io.c calls. Only what a thread
 * does within round_in_engine counts.
 */
#ifndef FF_TEST_FAULT_CALLS_H
#define FF_TEST_FAULT_CALLS_H

#include <stdbool.h>

/* FAULT_MEMORY: allocations fail, not calls. */
enum fault_side { FAULT_FLEECE, FAULT_SOURCE, FAULT_MEMORY };

/* FAULT_INTERRUPT: not an error but what a call must go on from. The Nth call (of those of the C
 * library that may be interrupted or moved short) gives EINTR, or, as its number is odd, moves half
 * of what it was to. */
enum { FAULT_INTERRUPT = -1 };

struct fault {
	enum fault_side side; /* told by the path of the call's descriptor */
	int error;            /* errno, or FAULT_INTERRUPT; counts only calls that can give it */
	bool all;             /* the Nth and every later one (interrupted: each once) */
	long nth;             /* from 1; 0: none, count only */
};

/* FLEECE: path of FLEECE_DIR; SOURCE: of the other; neither below the other. */
void fault_arm(const struct fault *f, const char *fleece, const char *source);
/* No more faults, and no counting. */
void fault_disarm(void);
void fault_rearm(void);
/* Calls counted since it was armed. */
long fault_count(void);
/* Faults since the last call of this. */
unsigned fault_fired(void);

/* For fault_alloc.c: is this allocation to fail? Sets errno. */
bool fault_alloc(void);

#endif
