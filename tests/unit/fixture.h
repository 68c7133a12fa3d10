/*
 * A SOURCE and a FLEECE_DIR in a temporary directory, and a store on them, without any FUSE.
 */
#ifndef FF_TEST_FIXTURE_H
#define FF_TEST_FIXTURE_H

#include <stddef.h>
#include <stdint.h>

#include "cow/engine.h"
#include "ff_store.h"

struct fixture {
	char root[64];
	char source[96], fleece[96];
	int source_fd;
	struct ff_store_config config;
	struct ff_store *store;
};

void fixture_init(struct fixture *fx, uint32_t cluster_size);
void fixture_open(struct fixture *fx);
void fixture_close(struct fixture *fx);
/* Everything away; the store may be open or closed. */
void fixture_done(struct fixture *fx);

/* Writes SIZE bytes that depend on SEED and on their offset to NAME in SOURCE, past the store. */
void fixture_file(struct fixture *fx, const char *name, size_t size, unsigned seed);
void fill(char *buf, size_t len, unsigned seed);

/* Opens NAME for reading and writing, as a live handle would. */
int live_open(struct fixture *fx, const char *name, struct ff_disk **disk);
int live_write(struct ff_disk *d, int fd, const void *buf, size_t len, off_t off);

/* Asserts that NAME in SNAPSHOT reads as these LEN bytes, whatever the sizes of the reads, and that
 * its holes and data are what they claim to be. */
void expect_frozen(struct fixture *fx, const char *snapshot, const char *name, const char *want,
                   size_t len);
/* Result of reading the whole file: 0, or the error of opening or reading. */
int frozen_error(struct fixture *fx, const char *snapshot, const char *name);

/* Files called *.qcow2 anywhere below FLEECE_DIR. */
size_t count_images(struct fixture *fx);
/* Clusters that the snapshot's image of disk NUMBER has stored itself, of either kind. */
size_t count_saved(struct fixture *fx, const char *snapshot, size_t number);

#endif
