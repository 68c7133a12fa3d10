/*
 * SOURCE and MOUNTPOINT, and that FLEECE_DIR lies apart from the latter.
 *
 * Both are made absolute before anything else, for the process changes its directory and its
 * mount may cover either. One inside the other is refused unless they are equal: a mount inside
 * its own source would show itself for ever, and a mount above its source would cover the paths
 * that the fleecing images give for their backing files.
 *
 * A mount whose process died stays, and answers every call with ENOTCONN. If it is of our type it
 * is in the way of nothing but the new mount: it is detached.
 *
 * Nor may SOURCE lie inside that of another mount, or around it, as far as the mounts that are seen
 * from here tell. (Two of the same SOURCE are told apart by a lock: see cow/guard.c.)
 */
#include "fusefs/mountpoint.h"

#include <fcntl.h>
#include <libgen.h>
#include <limits.h>
#include <linux/magic.h>
#include <spawn.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mount.h>
#include <sys/vfs.h>
#include <sys/wait.h>

#include "ff_log.h"
#include "ff_util.h"

extern char **environ;

#define TYPE "fuse.fleecefs"

/* Undoes the octal escapes of /proc/self/mountinfo, in place. */
static void unescape(char *s)
{
	char *to = s;

	for (; *s; s++) {
		if (s[0] == '\\' && s[1] && s[2] && s[3]) {
			*to++ = (char)((s[1] - '0') << 6 | (s[2] - '0') << 3 | (s[3] - '0'));
			s += 3;
		} else {
			*to++ = *s;
		}
	}
	*to = '\0';
}

/* A line of mountinfo: the words that matter, which stand in `line`. */
struct mount_line {
	char *line;
	size_t size;
	char *at, *type, *source, *options; /* the last: of the filesystem */
};

/* Takes the line apart; false: it is no such line. */
static bool take_apart(struct mount_line *m)
{
	char *rest = NULL, *word, *dash = strstr(m->line, " - ");

	if (!dash)
		return false;
	*dash = '\0';
	word = strtok_r(m->line, " ", &rest);
	for (int i = 0; i < 4 && word; i++)
		word = strtok_r(NULL, " ", &rest);
	m->at = word;
	m->type = strtok_r(dash + 3, " ", &rest);
	m->source = strtok_r(NULL, " ", &rest);
	m->options = strtok_r(NULL, " \n", &rest);
	if (!m->at || !m->type || !m->source || !m->options)
		return false;
	unescape(m->at);
	unescape(m->source);
	return true;
}

/* Calls FN for each mount, lowest first, until it returns false. */
static void each_mount(bool (*fn)(void *ctx, const struct mount_line *m), void *ctx)
{
	FILE *f = fopen("/proc/self/mountinfo", "re");
	struct mount_line m = {0};

	if (!f)
		return;
	while (getline(&m.line, &m.size, f) > 0)
		if (take_apart(&m) && !fn(ctx, &m))
			break;
	free(m.line);
	fclose(f);
}

struct topmost {
	const char *path;
	bool ours;
};

static bool look_at(void *ctx, const struct mount_line *m)
{
	struct topmost *t = ctx;

	if (!strcmp(m->at, t->path))
		t->ours = !strcmp(m->type, TYPE);
	return true;
}

/* Is the topmost mount at PATH one of fleecefs? */
static bool is_ours(const char *path)
{
	struct topmost t = {path, false};

	each_mount(look_at, &t);
	return t.ours;
}

static bool detach(const char *path)
{
	char *const argv[] = {"fusermount3", "-u", "-z", "--", (char *)path, NULL};
	pid_t pid;
	int status;

	if (umount2(path, MNT_DETACH) == 0)
		return true;
	if (posix_spawnp(&pid, argv[0], NULL, NULL, argv, environ) != 0)
		return false;
	return waitpid(pid, &status, 0) == pid && status == 0;
}

bool mountpoint_recover(const char *path)
{
	struct statx stx;

	/* forced: the kernel may still have the attributes of a mount that died just now;
	 * ECONNABORTED: it dies while we ask */
	if (statx(AT_FDCWD, path, AT_STATX_FORCE_SYNC, STATX_TYPE, &stx) == 0 ||
	    (errno != ENOTCONN && errno != ECONNABORTED) || !is_ours(path))
		return false;
	if (!detach(path)) {
		ff_error("%s: cannot take away a dead mount; try umount -l %s", path, path);
		return false;
	}
	mountpoint_recover(path); /* there may be one below */
	return true;
}

/* The absolute path of PATH, which may be a dead mount. */
static int absolute(const char *what, const char *path, char **out)
{
	*out = realpath(path, NULL);
	if (*out)
		return 0;
	ff_error("%s %s: %m", what, path);
	return -errno;
}

/* Is A below B? */
static bool is_below(const char *a, const char *b)
{
	size_t len = strlen(b);

	if (len == 1)
		return a[1] != '\0';
	return !strncmp(a, b, len) && a[len] == '/';
}

static int check_directory(const char *what, const char *path)
{
	struct stat st;

	if (stat(path, &st) < 0) {
		int r = -errno;

		ff_error("%s %s: %m%s", what, path,
		         r == -ENOTCONN ? " (a dead mount of something else; unmount it)" : "");
		return r;
	}
	if (S_ISDIR(st.st_mode))
		return 0;
	ff_error("%s %s: not a directory", what, path);
	return -ENOTDIR;
}

static int open_source(const struct options *o, struct places *p)
{
	struct stat st;

	p->source_fd = open(p->source, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (p->source_fd < 0) {
		ff_error("SOURCE %s: %m", p->source);
		return -errno;
	}
	if (fstatat(p->source_fd, o->snapdir, &st, AT_SYMLINK_NOFOLLOW) == 0) {
		ff_error("%s has an entry called '%s' already; choose another name with --snapdir",
		         p->source, o->snapdir);
		return -EEXIST;
	}
	return 0;
}

static int check_fuse(void)
{
	int fd = open("/dev/fuse", O_RDWR | O_CLOEXEC);

	if (fd < 0 && (errno == EACCES || errno == EPERM)) {
		/* libfuse may still find a way */
		ff_warning("/dev/fuse: %m; let this user open it (mode 0666 is usual), or mount as "
		           "root; in a container, allow it the device");
		return 0;
	}
	if (fd < 0) {
		ff_error("/dev/fuse: %m; is the fuse kernel module there (modprobe fuse)?");
		return -errno;
	}
	if (fd >= 0)
		close(fd);
	return 0;
}

/* The mount would cover a FLEECE_DIR within it, and lie among the snapshots of one around it. */
static int check_fleece_dir(const char *dir, const struct places *p)
{
	ff_autofree char *path = realpath(dir, NULL), *copy = NULL;

	if (!path && errno == ENOENT) { /* it will be made, in what is there */
		copy = strdup(dir);
		path = copy ? realpath(dirname(copy), NULL) : NULL;
	}
	if (!path || strcmp(p->source, p->mountpoint) == 0)
		return 0; /* whoever opens it tells what is wrong */
	if (strcmp(path, p->mountpoint) != 0 && !is_below(path, p->mountpoint) &&
	    (copy || !is_below(p->mountpoint, path)))
		return 0;
	ff_error("--fleece-dir=%s and %s: neither may lie inside the other", dir, p->mountpoint);
	return -EINVAL;
}

struct neighbour {
	const struct places *p;
	char *source; /* one that lies around ours, or inside; owned */
};

/* Is the mount root's, or our user's? Others may give theirs any name. */
static bool is_trusted(const struct mount_line *m)
{
	const char *id = strstr(m->options, "user_id=");
	unsigned long uid = id ? strtoul(id + strlen("user_id="), NULL, 10) : ULONG_MAX;

	return uid == 0 || uid == geteuid();
}

/* Its SOURCE is locked while it is at work (see cow/guard.c); no look can be had at one that its
 * mount covers. */
static bool is_at_work(const struct mount_line *m)
{
	ff_autoclose int fd = -1;

	if (strcmp(m->at, m->source) == 0)
		return true;
	fd = open(m->source, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	return fd < 0 || (flock(fd, LOCK_SH | LOCK_NB) < 0 && errno == EWOULDBLOCK);
}

static bool is_neighbour(void *ctx, const struct mount_line *m)
{
	struct neighbour *n = ctx;

	if (strcmp(m->type, TYPE) != 0 ||
	    (!is_below(m->source, n->p->source) && !is_below(n->p->source, m->source)) ||
	    !is_trusted(m) || !is_at_work(m))
		return true;
	n->source = strdup(m->source);
	return !n->source;
}

/* Of two mounts that share disks each changes them behind the other's back. Not so where ours are
 * those of the other's mount: they are on FUSE. */
static int check_neighbours(const struct options *o, const struct places *p)
{
	struct neighbour n = {.p = p};
	struct statfs st;

	if (!o->source_lock || (fstatfs(p->source_fd, &st) == 0 && st.f_type == FUSE_SUPER_MAGIC))
		return 0;
	each_mount(is_neighbour, &n);
	if (!n.source)
		return 0;
	ff_error(
	    "%s: another fleecefs has %s mounted, and neither would see what the other changes: "
	    "unmount that first, or see to it with exclude that no snapshot has both's "
	    "disks, and mount with --source-lock=off",
	    p->source, n.source);
	free(n.source);
	return -EBUSY;
}

int places_find(const struct options *o, struct places *out)
{
	int r;

	*out = (struct places){.source_fd = -1};
	r = absolute("SOURCE", o->source, &out->source);
	if (r == 0)
		r = absolute("MOUNTPOINT", o->mountpoint, &out->mountpoint);
	if (r < 0)
		return r;
	if (mountpoint_recover(out->mountpoint))
		ff_warning("%s: took away a dead mount", out->mountpoint);
	r = check_directory("SOURCE", out->source);
	if (r == 0)
		r = check_directory("MOUNTPOINT", out->mountpoint);
	if (r < 0)
		return r;
	if (is_below(out->mountpoint, out->source) || is_below(out->source, out->mountpoint)) {
		ff_error("%s and %s: neither may lie inside the other (they may be equal)",
		         out->source, out->mountpoint);
		return -EINVAL;
	}
	r = o->fleece_dir ? check_fleece_dir(o->fleece_dir, out) : 0;
	if (r == 0)
		r = check_fuse();
	if (r == 0)
		r = open_source(o, out);
	return r < 0 ? r : check_neighbours(o, out);
}

void places_free(struct places *p)
{
	free(p->source);
	free(p->mountpoint);
	if (p->source_fd >= 0)
		close(p->source_fd);
}
