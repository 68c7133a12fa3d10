/*
 * One disk, "a", and the images of .since that are made up from its snapshots.
 */
#ifndef FF_TEST_SINCE_DISK_H
#define FF_TEST_SINCE_DISK_H

#include "fixture.h"

enum { SIZE = 1 << 20, CLUSTER = 4096 };

extern struct fixture since_fx;

void since_setup(void);
void since_teardown(void);

void since_write(off_t off, size_t len, int with);
void since_punch(off_t off, size_t len);

/* What "a" is in NEW as against OLD; NULL: nothing. */
int since_make(const char *new, const char *old, struct ff_since **out);

/* All bytes of such an image; malloc'd. */
struct image {
	size_t size;
	char *bytes;
};
struct image since_image(const char *new, const char *old);
/* Frees those of B. */
void since_expect_same(struct image a, struct image b);

#endif
