/*
 * Checks what holds a fleece directory together: manifests, the images that they name, chains.
 */
#ifndef FF_CTL_STRUCTURE_H
#define FF_CTL_STRUCTURE_H

#include "cow/ctl/source.h"

/* One thing that was found. */
struct remark {
	bool damage; /* else a note */
	char *text;  /* begins with the name of the file, or directory, that it is about */
};

struct remarks {
	struct remark *list;
	size_t count;
};

/* LIVE: a mount has the directory; what only the next mount could judge is left out. */
int structure_check(int fleece_fd, struct inventory *inv, const struct source *src, bool live,
                    struct remarks *out);
void remarks_free(struct remarks *r);
/* Leaves in A what B says as well, word for word. */
void remarks_keep_common(struct remarks *a, const struct remarks *b);

#endif
