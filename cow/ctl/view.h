/*
 * Reads a fleecing image without changing it: ff_image_load() mends what a killed process left, and
 * that is the mount's to do. Nothing read is believed; each function that decodes says so if what
 * is there cannot be. A view holds a descriptor and no lock.
 */
#ifndef FF_CTL_VIEW_H
#define FF_CTL_VIEW_H

#include "cow/clustermap.h"
#include "cow/qcow2_format.h"

struct view {
	int fd;
	int sums_fd;     /* -1: there is no checksum file of this image */
	bool sums_wrong; /* there is one, but it is another's or damaged */
	uint64_t file_size;
	struct qcow2_head head;
	struct qcow2_layout l;
};

/* Opens the image PATH below DIRFD. -EINVAL with *WHY, a static text: it is no good. */
int view_open(int dirfd, const char *path, struct view *out, const char **why);
void view_close(struct view *v);
/* Reads the head alone. */
int view_head(int dirfd, const char *path, struct qcow2_head *head, struct qcow2_layout *l,
              const char **why);

/* Calls FN for each be64 that is not 0 in COUNT host clusters from FIRST on, by its index there,
 * without reading holes. Stops when FN returns non-zero, and returns that. */
typedef int view_fn(void *ctx, uint64_t index, uint64_t entry);
int view_scan(const struct view *v, uint64_t first, uint64_t count, view_fn *fn, void *ctx);

/* The same for the L2 entries that say something valid, by guest cluster: HOST is 0 for a cluster
 * of zeros. */
typedef int view_saved_fn(void *ctx, uint64_t cluster, uint64_t host);
int view_saved(const struct view *v, view_saved_fn *fn, void *ctx);

/* Whole clusters in the file that refcounts reach, as it is now. */
int view_end(const struct view *v, uint64_t *end);

#endif
