/*
 * The SOURCE of a fleece directory that is not mounted, and how its last mount ended.
 */
#ifndef FF_CTL_SOURCE_H
#define FF_CTL_SOURCE_H

#include "cow/ctl/inventory.h"
#include "cow/ending.h"
#include "cow/engine.h"

struct source {
	char *path; /* NULL: not found */
	int fd;     /* of the directory, or -1 */
	bool told;  /* how the last mount ended, in the next three */
	enum ending ending;
	int64_t alive_until;          /* after a killed one */
	struct ending_record *record; /* after a clean one */
	struct known *known;          /* the snapshots that it had; NULL: cannot be told */
};

/* Looks for it at HINT (NULL: none given), above the fleece directory, and where the images say.
 * Nothing is an error but of memory: what cannot be told is left open. */
int source_find(int fleece_fd, const char *fleece_path, const struct inventory *inv,
                const char *hint, struct source *out);
void source_free(struct source *src);

/* Would the next mount find that this disk was changed since? *ST: of its source; the disk's image
 * that names it is IMG. False also where that cannot be told. */
bool source_changed(const struct source *src, const struct inv_image *img, const struct stat *st);
/* Is the disk of IMG at PATH? */
bool source_is(const struct inv_image *img, const char *path, struct stat *st);

#endif
