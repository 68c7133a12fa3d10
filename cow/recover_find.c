/*
 * Recovery, step 3: where in SOURCE a disk is whose images were found.
 *
 * A disk is an inode, so no name is believed before the inode behind it was looked at. Tried are
 * the path in the newest image's header, then the name that it would have aside, then all of
 * SOURCE, which is walked once a recovery. A block device is looked for by its identity alone. A
 * disk that is nowhere is no error: its views are lost. An error that may pass, however, ends the
 * mount, for it must not cost a view.
 */
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "cow/device.h"
#include "cow/io.h"
#include "cow/recovery.h"
#include "cow/tree.h"
#include "ff_log.h"
#include "ff_util.h"

int recovery_is_at(struct ff_store *s, const char *path, const struct identity *id, struct stat *st,
                   bool *there)
{
	ff_autoclose int fd = -1;
	struct identity found;
	int r = io_open_beneath(s->source_fd, path, O_PATH | O_NOFOLLOW, 0, &fd);

	if (!r)
		r = identity_of(fd, "", &found, st);
	*there = !r && identity_same(&found, id);
	if (r && r != -ENOENT && r != -ENOTDIR && r != -ELOOP && r != -EXDEV && r != -EACCES) {
		ff_error("%s/%s: cannot be looked at: %s", s->source_path, path, strerror(-r));
		return r;
	}
	return 0;
}

/* Looks for it everywhere. *OUT is malloc'd, NULL: it is nowhere. */
static int search_source(struct recovery *rc, const struct identity *id, struct stat *st,
                         char **out)
{
	struct ff_store *s = rc->store;
	bool there = false;
	int r = 0;

	if (!rc->source) {
		struct tree_walk how = {.source_fd = s->source_fd,
		                        .dev = s->source_dev,
		                        .hide_dev = s->fleece_dev,
		                        .hide_ino = s->fleece_ino,
		                        .hide_name = FF_HIDDEN_NAME};

		r = tree_walk(&how, &rc->source);
	}
	for (uint32_t i = 0; !r && !there && i < rc->source->disk_count; i++) {
		const struct ff_frozen *f = &rc->source->inodes[rc->source->disks[i]];

		if (f->st.st_ino != id->ino)
			continue;
		r = recovery_is_at(s, f->path, id, st, &there);
		if (there && !(*out = strdup(f->path)))
			r = -ENOMEM;
	}
	return r;
}

/* The same for a block device, which is told by its identity alone, whatever leads to it. Its views
 * may be in the hands of a program that has it claimed by now: then they are lost. */
static int find_device(struct ff_store *s, struct ff_image *newest, const struct identity *id,
                       struct stat *st, char **out)
{
	struct device *dev = device_find(s, id);
	int r = dev ? 0 : device_at(s, newest ? ff_image_backing(newest) : "", &dev);

	*out = NULL;
	if (!r && !identity_same(device_id(dev), id))
		return 0;
	if (!r)
		r = device_claim(dev);
	if (!r)
		r = device_evidence(device_path_fd(dev), st);
	if (!r)
		*out = strdup(device_path(dev));
	return r == -EMFILE || r == -ENFILE || r == -ENOMEM || (!r && !*out) ? (r ? r : -ENOMEM)
	                                                                     : 0;
}

int recovery_find_source(struct recovery *rc, struct ff_image *newest, const struct identity *id,
                         struct stat *st, char **out)
{
	struct ff_store *s = rc->store;
	const char *backing = newest ? ff_image_backing(newest) : "";
	size_t n = strlen(s->source_path);
	const char *at = backing + n + 1;
	char path[PATH_MAX];
	bool there = false;
	int r = 0;

	*out = NULL;
	if (identity_is_device(id))
		return find_device(s, newest, id, st, out);
	if (strncmp(backing, s->source_path, n) == 0 && backing[n] == '/')
		r = recovery_is_at(s, at, id, st, &there);
	if (!r && !there && aside_path(s, id, path, sizeof path) == 0) {
		at = path;
		r = recovery_is_at(s, at, id, st, &there);
	}
	if (r || !there)
		return r ? r : search_source(rc, id, st, out);
	*out = strdup(at);
	return *out ? 0 : -ENOMEM;
}
