/*
 * One disk, a handle of it, and up to five snapshots, s0 to s4, with what they and the live disk
 * must hold. One test process, one thread.
 */
#ifndef FF_TEST_FIVE_H
#define FF_TEST_FIVE_H

#include "fixture.h"

enum { SIZE = 300000, SNAPS = 5, CLUSTER = 4096, CLUSTERS = (SIZE + CLUSTER - 1) / CLUSTER };

extern struct fixture fx;
extern struct ff_disk *disk;
extern int disk_fd;
extern char live[SIZE], views[SNAPS][SIZE];
/* By snapshot: which clusters were written to since it was made. */
extern bool touched[SNAPS][CLUSTERS];

void five_setup(void);
/* Gives the handle back, as closing the store needs. */
void five_give_back(void);
void five_teardown(void);
void five_remount(void);
void five_change(size_t off, size_t len, unsigned seed);
const char *five_name_of(int i);
void five_freeze(int i);
void five_expect(int i);
/* Makes all five, with changes after each. */
void five_make(void);
/* Runs a command of the shell with SOURCE and FLEECE_DIR in $S and $F. */
void five_shell(const char *command);

#endif
