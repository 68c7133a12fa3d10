/*
 * Files that an image of a guest names: found in its snapshot, or nowhere.
 */
#ifndef FF_COW_RAW_FIND_H
#define FF_COW_RAW_FIND_H

#include "cow/engine.h"
#include "cow/qsource/names.h"

struct raw_place {
	const struct ff_frozen *dir; /* where its name is; names in it begin there */
	const struct ff_frozen *f;   /* a regular file */
};

/* Finds NAME, which an image in DIR has. Errors as of ff_raw_open(), with a WHY of QS_WHY bytes. */
int raw_find(const struct ff_snap *snap, const struct ff_raw_asker *asker,
             const struct ff_frozen *dir, const struct qs_name *name, struct raw_place *out,
             char *why);

#endif
