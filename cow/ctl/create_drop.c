/*
 * create and drop: mkdir and rmdir in the directory of snapshots, with words for what goes wrong.
 */
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "cow/ctl/ctl.h"
#include "cow/io.h"
#include "ff_store.h"
#include "ff_util.h"

enum { HOLDERS_MAX = 10 };

struct request {
	struct place place;
	const char *name;
	char *path;
};

/* Reads the arguments, which both commands have in common. */
static int prepare(int argc, char **argv, struct request *rq)
{
	static const struct option options[] = {{"on", required_argument, NULL, 'o'}, {0}};
	const char *on = NULL;
	int c, r;

	while ((c = getopt_long(argc, argv, "o:", options, NULL)) != -1) {
		if (c != 'o')
			return ctl_usage(argv[0]);
		on = optarg;
	}
	if (argc - optind != 1)
		return ctl_usage(argv[0]);
	rq->name = argv[optind];
	if (!*rq->name || rq->name[0] == '.' || strchr(rq->name, '/') ||
	    strlen(rq->name) > FF_SNAP_NAME_MAX) {
		ctl_error("%s: not a name for a snapshot: it has 1 to %d bytes, no slash and no "
		          "dot at its beginning",
		          rq->name, FF_SNAP_NAME_MAX);
		return CTL_USAGE;
	}
	r = place_mount(on, &rq->place);
	if (!r && asprintf(&rq->path, "%s/%s/%s", rq->place.mountpoint, rq->place.snapdir,
	                   rq->name) < 0) {
		rq->path = NULL;
		r = ctl_fail(rq->name, -ENOMEM);
	}
	return r;
}

static void release(struct request *rq)
{
	place_free(&rq->place);
	free(rq->path);
}

static int explain_create(const struct request *rq, int error)
{
	const char *why = strerror(error);
	int status = CTL_CANNOT_CREATE;

	switch (error) {
	case EEXIST:
		why = "there is such a snapshot already, or the fleece directory holds something "
		      "else of that name; drop the one or move the other away, or take another "
		      "name";
		break;
	case EBUSY:
		why = "something is mounted on the directory of that name in the fleece "
		      "directory; unmount it, or take another name";
		break;
	case ENOSPC:
	case EDQUOT:
		why = "no space for its fleecing images: see 'fleecectl status' for limit and "
		      "reserve; drop other snapshots, or make room on the fleece storage";
		break;
	case ETIMEDOUT:
		why = "a write to a disk did not end in time, so nothing was frozen; is the "
		      "storage of SOURCE well? Try again";
		break;
	case EMFILE:
	case ENFILE:
		why = "too few descriptors: raise LimitNOFILE= of the service, or ulimit -Hn, and "
		      "mount again";
		break;
	case EROFS:
		why = "read-only: was it mounted with -o ro?";
		break;
	case EACCES:
	case EPERM:
		why = "only whoever may write the directory of snapshots can make one";
		status = CTL_NO_PERMISSION;
		break;
	case ENOTCONN:
		why = "the fleecefs there has died: umount it and mount again";
		status = CTL_NOT_MOUNTED;
		break;
	}
	ctl_error("%s: %s", rq->path, why);
	return status;
}

int cmd_create(int argc, char **argv)
{
	struct request rq = {.place = {.fleece_fd = -1}};
	int r = prepare(argc, argv, &rq);

	if (!r && mkdir(rq.path, 0755))
		r = explain_create(&rq, errno);
	release(&rq);
	return r;
}

static void process_name(const char *pid, char *out, size_t size)
{
	char path[64];
	ff_autoclose int fd = -1;
	size_t got = 0;

	snprintf(path, sizeof path, "/proc/%.20s/comm", pid);
	if (io_openat(AT_FDCWD, path, O_RDONLY, 0, &fd) || io_pread(fd, out, size - 1, 0, &got))
		got = 0;
	out[got] = '\0';
	out[strcspn(out, "\n")] = '\0';
}

/* Is what LINK (in /proc) leads to PATH or below it? TARGET: PATH_MAX bytes. */
static bool leads_below(const char *link, const char *path, char *target)
{
	size_t n = strlen(path);

	return io_readlinkat(AT_FDCWD, link, target, PATH_MAX) == 0 &&
	       strncmp(target, path, n) == 0 && (!target[n] || target[n] == '/');
}

/* The first file below PATH that the process has open. */
static bool holds(const char *pid, const char *path, char *target)
{
	char name[320];
	struct dirent *e;
	bool found = false;
	DIR *dir;

	snprintf(name, sizeof name, "/proc/%.20s/fd", pid);
	dir = opendir(name);
	while (dir && !found && (e = readdir(dir))) {
		snprintf(name, sizeof name, "/proc/%.20s/fd/%.20s", pid, e->d_name);
		found = e->d_name[0] != '.' && leads_below(name, path, target);
	}
	if (dir)
		closedir(dir);
	return found;
}

static void say_holders(const char *path)
{
	char target[PATH_MAX], comm[64];
	struct dirent *e;
	unsigned n = 0;
	DIR *dir = opendir("/proc");

	while (dir && n < HOLDERS_MAX && (e = readdir(dir)))
		if (isdigit((unsigned char)e->d_name[0]) && atol(e->d_name) != getpid() &&
		    holds(e->d_name, path, target)) {
			process_name(e->d_name, comm, sizeof comm);
			ctl_error("  process %s (%s) has %s open", e->d_name, comm, target);
			n++;
		}
	if (dir)
		closedir(dir);
	if (!n)
		ctl_error("  by whom cannot be seen: a process of another user, or of the kernel "
		          "(a loop device, an NFS server)");
}

static int explain_drop(const struct request *rq, int error)
{
	switch (error) {
	case EBUSY:
		ctl_error("%s: a frozen file of it is open:", rq->path);
		say_holders(rq->path);
		return CTL_BUSY;
	case ENOENT:
		ctl_error("%s: no such snapshot", rq->path);
		return CTL_NO_INPUT;
	case EACCES:
	case EPERM:
		ctl_error("%s: only whoever may write the directory of snapshots can drop one",
		          rq->path);
		return CTL_NO_PERMISSION;
	default:
		return ctl_fail(rq->path, -error);
	}
}

int cmd_drop(int argc, char **argv)
{
	struct request rq = {.place = {.fleece_fd = -1}};
	int r = prepare(argc, argv, &rq);

	if (!r && rmdir(rq.path))
		r = explain_drop(&rq, errno);
	release(&rq);
	return r;
}
