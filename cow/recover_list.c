/*
 * Recovery, before all else: which directories of FLEECE_DIR are ours.
 *
 *   called .dropped-N              a dropped snapshot's
 *   with a manifest                a snapshot, whatever the manifest says
 *   with the mark of making.c      a mkdir that was cut short
 *   with an image of ours in it    a snapshot that has lost its manifest: damaged, but nothing that
 *                                  was promised to be kept may go unseen
 *   none of these                  somebody else's: passed over
 *
 * An image of ours has a name and a head as we make them. It is looked for below the directory, but
 * not on other filesystems, where we make nothing, and which may not answer. What cannot be looked
 * at there is none of ours. lost+found is the filesystem's, whatever a repair has put into it.
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "cow/io.h"
#include "cow/manifest.h"
#include "cow/names.h"
#include "cow/open_regular.h"
#include "cow/qcow2_format.h"
#include "cow/recovery.h"
#include "ff_log.h"
#include "ff_util.h"

bool recovery_is_gone(int error)
{
	return error == -ENOENT || error == -ELOOP || error == -ENOTDIR;
}

/* Does the error tell of us, and not of what is looked at? */
static bool may_pass(int error)
{
	return error == -ENOMEM || error == -EMFILE || error == -ENFILE;
}

static int is_image(int dirfd, const char *name, bool *out)
{
	ff_autoclose int fd = -1;
	struct qcow2_head head;
	struct qcow2_layout l;
	const char *why;
	int r = open_regular(dirfd, name, O_RDONLY, &fd);

	if (!r)
		r = ff_image_head(fd, &head, &l, &why);
	/* storage that fails has perhaps taken the manifest, too */
	*out = !r || r == -EIO;
	return may_pass(r) ? r : 0;
}

static bool is_elsewhere(const struct ff_store *s, const struct statx *sx)
{
	return makedev(sx->stx_dev_major, sx->stx_dev_minor) != s->fleece_dev;
}

/* Looks for an image of ours in the directory FD, which is closed, and below it. */
static int look_for_image(const struct ff_store *s, int fd, bool *found)
{
	const struct dirent *e;
	DIR *d = NULL;
	int r = io_fdopendir(fd, &d);

	while (!r && !*found && !(r = io_readdir(d, &e)) && e) {
		struct statx sx;
		int sub;

		if (e->d_type != DT_UNKNOWN && e->d_type != DT_DIR && !names_is_image(e->d_name))
			continue;
		r = io_statx(fd, e->d_name, &sx);
		if (!r && S_ISREG(sx.stx_mode) && names_is_image(e->d_name)) {
			r = is_image(fd, e->d_name, found);
		} else if (!r && S_ISDIR(sx.stx_mode) && !is_elsewhere(s, &sx)) {
			r = io_openat(fd, e->d_name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW, 0, &sub);
			if (!r)
				r = look_for_image(s, sub, found);
		}
		r = may_pass(r) ? r : 0;
	}
	if (d)
		closedir(d);
	return may_pass(r) ? r : 0;
}

/* FD, which is closed: the directory, of which SX tells. */
static int kind_of(const struct ff_store *s, const char *name, const struct statx *sx, int fd,
                   enum dir_kind *out)
{
	bool found = false;
	struct statx any;
	int r = 0;

	if (io_statx(fd, MANIFEST_NAME, &any) != -ENOENT) {
		*out = DIR_SNAPSHOT; /* what is wrong with it is said when it is read */
		close(fd);
	} else if (making_marked(fd)) {
		*out = DIR_UNMADE;
		close(fd);
	} else if (names_is_systems(name) || is_elsewhere(s, sx)) {
		*out = DIR_STRANGE;
		close(fd);
	} else {
		r = look_for_image(s, fd, &found);
		*out = found ? DIR_SNAPSHOT : DIR_STRANGE;
	}
	return r;
}

static int add_name(struct names *names, const char *name, enum dir_kind kind)
{
	void *p = realloc(names->list, (names->count + 1) * sizeof *names->list);

	if (!p)
		return -ENOMEM;
	names->list = p;
	names->list[names->count].kind = kind;
	names->list[names->count].name = strdup(name);
	return names->list[names->count].name ? (names->count++, 0) : -ENOMEM;
}

/* One entry of FLEECE_DIR, which is open as DIRFD. */
static int take_entry(struct ff_store *s, int dirfd, const char *name, struct names *names)
{
	bool dropped = strncmp(name, DROPPED, strlen(DROPPED)) == 0;
	enum dir_kind kind = DIR_DROPPED;
	struct statx sx;
	int fd, r;

	if (!dropped && !snap_name_valid(name))
		return 0;
	r = io_statx(dirfd, name, &sx);
	/* a mount point that nobody serves any more is no directory that we have made */
	if (r == -ENOENT || r == -ENOTCONN || (!r && !S_ISDIR(sx.stx_mode)))
		return 0;
	if (!r && !dropped) {
		r = io_openat(dirfd, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW, 0, &fd);
		if (recovery_is_gone(r) || (r == -EACCES && names_is_systems(name)))
			return 0;
		if (!r)
			r = kind_of(s, name, &sx, fd, &kind);
	}
	if (r) {
		ff_error("%s/%s: %s%s", s->fleece_path, name, strerror(-r),
		         r == -EACCES ? ": chown it to the user who mounts, or, if fleecefs has "
		                        "not made it, move it away"
		                      : "");
		return r;
	}
	return kind == DIR_STRANGE ? 0 : add_name(names, name, kind);
}

int recovery_list(struct ff_store *s, struct names *names)
{
	int fd, r = io_openat(s->fleece_fd, ".", O_RDONLY | O_DIRECTORY, 0, &fd);
	const struct dirent *e;
	DIR *d;

	if (!r)
		r = io_fdopendir(fd, &d);
	if (r)
		return r;
	while (!r && !(r = io_readdir(d, &e)) && e)
		r = take_entry(s, fd, e->d_name, names);
	closedir(d);
	return r;
}
