/*
 * The directory of a snapshot that is being made, and how it is told from all others.
 *
 * FLEECE_DIR may hold what is none of ours, and a snapshot of ours may lose its manifest. Neither
 * may be taken for a mkdir that was cut short, which the next mount undoes. So that one has a mark,
 * an empty file called NAMES_MAKING, from before the directory has its name:
 *
 *   1. make a directory with the name of a dropped snapshot's, .dropped-N
 *   2. make the mark in it
 *   3. rename it to NAME: in the place of an empty directory, if somebody has made one, and of
 *      nothing else
 *   4. the snapshot is made (freeze.c), and has its manifest
 *   5. remove the mark
 *
 * Killed before 3, there is a dropped snapshot without images, which the next mount removes; before
 * 4, a directory NAME with the mark and without a manifest, which it undoes; before 5, a snapshot,
 * of which it removes the mark. What fails is undone the other way round: it gets the name of a
 * dropped snapshot's before anything in it goes.
 *
 * Where snapshots are to be durable the mark is on storage before 3, and the name of 3 is gone from
 * there before the mark is. Elsewhere a loss of power can take the mark alone only on filesystems
 * that do not keep the order of changes of directories; what is left of the mkdir then is shown as
 * a damaged snapshot, or taken for somebody else's: nothing that anybody may need is deleted.
 *
 * No state. Locks: admin.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "cow/engine.h"
#include "cow/io.h"
#include "cow/names.h"
#include "ff_log.h"
#include "ff_util.h"

/* Steps 1 to 3. */
static int make_dir(struct ff_store *s, struct fleece_dir *dir)
{
	ff_autoclose int mark = -1;
	char hidden[DROPPED_MAX];
	int r = drop_mkdir(s, hidden, sizeof hidden);

	if (r)
		return r;
	r = io_openat(s->fleece_fd, hidden, O_RDONLY | O_DIRECTORY | O_NOFOLLOW, 0, &dir->fd);
	if (!r)
		r = io_openat(dir->fd, NAMES_MAKING, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW, 0600,
		              &mark);
	if (!r && s->cfg.durable)
		r = io_fsync(dir->fd);
	if (!r)
		r = io_renameat(s->fleece_fd, hidden, s->fleece_fd, dir->name, 0);
	if (!r)
		return 0;
	if (mark >= 0)
		io_unlinkat(dir->fd, NAMES_MAKING, 0);
	io_unlinkat(s->fleece_fd, hidden, AT_REMOVEDIR);
	return r == -ENOTEMPTY || r == -ENOTDIR ? -EEXIST : r;
}

int making_begin(struct ff_store *s, const char *name, struct fleece_dir **out)
{
	struct fleece_dir *dir = calloc(1, sizeof *dir);
	int r = -ENOMEM;

	if (dir)
		dir->fd = -1;
	if (dir && (dir->name = strdup(name))) {
		r = make_dir(s, dir);
		if (!r) {
			*out = dir;
			return 0;
		}
		ff_error(
		    "%s/%s: cannot make the directory: %s%s", s->fleece_path, name, strerror(-r),
		    r == -EEXIST  ? "; it belongs to no snapshot, move it away"
		    : r == -EBUSY ? "; something is mounted there, unmount it or take another name"
		                  : "");
		if (dir->fd >= 0)
			close(dir->fd);
		free(dir->name);
	}
	free(dir);
	return r;
}

bool making_marked(int dirfd)
{
	struct statx sx;

	return io_statx(dirfd, NAMES_MAKING, &sx) == 0 && S_ISREG(sx.stx_mode);
}

int making_done(struct ff_store *s, struct fleece_dir *dir)
{
	int r = io_unlinkat(dir->fd, NAMES_MAKING, 0);

	if (!r || r == -ENOENT)
		return 0;
	ff_error("%s/%s/" NAMES_MAKING ": cannot be removed: %s", s->fleece_path, dir->name,
	         strerror(-r));
	return r;
}
