/*
 * Where the user wants to look: a mount, found in /proc/self/mountinfo and known by its
 * status.json, or a fleece directory.
 *
 * A mount may cover its own SOURCE, and with it a fleece directory that lies in there: then the
 * path leads into the mount. The directory itself is reached through a descriptor of the daemon
 * (/proc/PID/fd). Whichever way, it must be one whose lock is held.
 *
 * No lock is left held: the one of a fleece directory is tried, shared, and given back at once. A
 * mount that wants it at that very moment tries again.
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "cow/ctl/ctl.h"
#include "cow/io.h"
#include "cow/open_regular.h"
#include "ff_store.h"
#include "ff_util.h"

enum { STATUS_MAX = 256 << 20 };

#define STATUS "/" FF_HIDDEN_NAME "/status.json"

/* "\040" and the like, in place. */
static void unescape(char *s)
{
	char *out = s;

	for (; *s; s++, out++) {
		if (s[0] == '\\' && strspn(s + 1, "01234567") >= 3) {
			*out = (char)((s[1] - '0') << 6 | (s[2] - '0') << 3 | (s[3] - '0'));
			s += 3;
		} else {
			*out = *s;
		}
	}
	*out = '\0';
}

struct mounts {
	char **list;
	size_t count;
};

static void mounts_free(struct mounts *m)
{
	for (size_t i = 0; i < m->count; i++)
		free(m->list[i]);
	free(m->list);
}

static int mounts_add(struct mounts *m, const char *path)
{
	void *p;

	for (size_t i = 0; i < m->count; i++)
		if (strcmp(m->list[i], path) == 0)
			return 0;
	p = realloc(m->list, (m->count + 1) * sizeof(char *));
	if (!p)
		return -ENOMEM;
	m->list = p;
	m->list[m->count] = strdup(path);
	return m->list[m->count] ? (m->count++, 0) : -ENOMEM;
}

/* Where each fleecefs is mounted that can be seen from here. */
static int mounts_read(struct mounts *m)
{
	FILE *f = fopen("/proc/self/mountinfo", "re");
	ff_autofree char *line = NULL;
	size_t room = 0;
	int r = 0;

	if (!f)
		return -errno;
	while (!r && getline(&line, &room, f) > 0) {
		char *rest = strstr(line, " - "), *point = line, *save;

		if (!rest || strncmp(rest + 3, "fuse.fleecefs ", 14) != 0)
			continue;
		for (int i = 0; i < 4 && point; i++) {
			point = strchr(point, ' ');
			point += point != NULL;
		}
		point = point ? strtok_r(point, " ", &save) : NULL;
		if (!point)
			continue;
		unescape(point);
		r = mounts_add(m, point);
	}
	fclose(f);
	return r;
}

static bool mounts_have(const struct mounts *m, const char *path)
{
	for (size_t i = 0; i < m->count; i++)
		if (strcmp(m->list[i], path) == 0)
			return true;
	return false;
}

/* The whole file, whose size may not be known before. */
static int read_all(const char *path, char **out, size_t *len)
{
	ff_autofree char *buf = NULL;
	ff_autoclose int fd = -1;
	size_t room = 0, used = 0, got;
	int r = io_openat(AT_FDCWD, path, O_RDONLY, 0, &fd);

	while (!r) {
		if (used == room) {
			room = room ? room * 2 : 65536;
			void *p = room > STATUS_MAX ? NULL : realloc(buf, room + 1);

			if (!p)
				return room > STATUS_MAX ? -EFBIG : -ENOMEM;
			buf = p;
		}
		r = io_pread(fd, buf + used, room - used, used, &got);
		if (!r && !got)
			break;
		used += r ? 0 : got;
	}
	if (r)
		return r;
	buf[used] = '\0';
	*out = ff_take_ptr(&buf);
	*len = used;
	return 0;
}

int place_reload(struct place *p)
{
	ff_autofree char *path = NULL, *text = NULL;
	json_error_t error;
	json_t *status;
	size_t len = 0;
	int r;

	if (asprintf(&path, "%s" STATUS, p->mountpoint) < 0) {
		path = NULL;
		return ctl_fail(p->mountpoint, -ENOMEM);
	}
	r = read_all(path, &text, &len);
	if (r == -ENOENT || r == -ENOTCONN) {
		ctl_error("%s: %s", p->mountpoint,
		          r == -ENOENT ? "the fleecefs that is mounted there has no status: it is "
		                         "of an older version, or it has ended"
		                       : "its fleecefs has died: umount it");
		return CTL_NOT_MOUNTED;
	}
	if (r)
		return ctl_fail(path, r);
	status = json_loadb(text, len, JSON_REJECT_DUPLICATES, &error);
	if (!json_is_object(status)) {
		ctl_error("%s: %s", path, status ? "not an object" : error.text);
		json_decref(status);
		return CTL_IO;
	}
	json_decref(p->status);
	p->status = status;
	free(p->status_text);
	p->status_text = ff_take_ptr(&text);
	return 0;
}

static int fill(struct place *p, const char *path)
{
	const char *text;
	int r;

	*p = (struct place){.fleece_fd = -1, .live = true, .mountpoint = strdup(path)};
	if (!p->mountpoint)
		return ctl_fail(path, -ENOMEM);
	r = place_reload(p);
	if (r)
		return r;
	text = json_text(p->status, "snapdir");
	p->snapdir = strdup(*text ? text : "snapshots");
	p->fleece_path = strdup(json_text(p->status, "fleece_dir"));
	p->source_path = strdup(json_text(p->status, "source"));
	if (!p->snapdir || !p->fleece_path || !p->source_path)
		return ctl_fail(path, -ENOMEM);
	return 0;
}

static int only_mount(const struct mounts *m, struct place *p)
{
	if (m->count == 1)
		return fill(p, m->list[0]);
	if (!m->count) {
		ctl_error("no fleecefs is mounted here");
		return CTL_NOT_MOUNTED;
	}
	ctl_error("several are mounted; say which:");
	for (size_t i = 0; i < m->count; i++)
		ctl_error("  %s", m->list[i]);
	return CTL_USAGE;
}

int place_mount(const char *path, struct place *p)
{
	ff_autofree char *real = NULL;
	struct mounts m = {0};
	int r = mounts_read(&m);

	*p = (struct place){.fleece_fd = -1};
	if (r) {
		r = ctl_fail("/proc/self/mountinfo", r);
	} else if (!path) {
		r = only_mount(&m, p);
	} else if (mounts_have(&m, path)) {
		r = fill(p, path); /* realpath() of a dead one fails */
	} else if (!(real = realpath(path, NULL))) {
		r = ctl_fail(path, -errno);
	} else if (!mounts_have(&m, real)) {
		ctl_error("%s: no fleecefs is mounted there", path);
		r = CTL_NOT_MOUNTED;
	} else {
		r = fill(p, real);
	}
	mounts_free(&m);
	return r;
}

/* Opens PATH; *OUT is a fleece directory by its looks. */
static int open_fleece(const char *path, int *out)
{
	ff_autoclose int fd = -1, lock = -1;
	int r = io_openat(AT_FDCWD, path, O_RDONLY | O_DIRECTORY, 0, &fd);

	if (!r)
		r = open_regular(fd, ".lock", O_RDONLY, &lock);
	if (!r)
		*out = ff_take_fd(&fd);
	return r;
}

bool place_is_one(const char *path)
{
	ff_autofree char *real = realpath(path, NULL);
	ff_autoclose int fd = -1;
	struct mounts m = {0};
	bool is =
	    mounts_read(&m) == 0 && (mounts_have(&m, path) || (real && mounts_have(&m, real)));

	mounts_free(&m);
	return is || open_fleece(path, &fd) == 0;
}

/* Is the lock of a fleece directory held by a fleecefs? -ENOENT: it has none. */
static int is_locked(int fleece_fd, bool *held)
{
	ff_autoclose int fd = -1;
	int r = open_regular(fleece_fd, ".lock", O_RDONLY, &fd);

	if (!r)
		r = io_flock(fd, LOCK_SH);
	*held = r == -EWOULDBLOCK;
	return *held ? 0 : r;
}

/* A mount changes the lock's file when it begins and when it ends. */
static int lock_time(int fleece_fd, struct timespec *out)
{
	struct statx sx;
	int r = io_statx(fleece_fd, ".lock", &sx);

	if (!r)
		*out = (struct timespec){sx.stx_ctime.tv_sec, sx.stx_ctime.tv_nsec};
	return r;
}

bool place_was_mounted(const struct place *p)
{
	struct timespec now;
	bool held;

	return lock_time(p->fleece_fd, &now) || now.tv_sec != p->since.tv_sec ||
	       now.tv_nsec != p->since.tv_nsec || is_locked(p->fleece_fd, &held) || held;
}

int place_any(const char *path, struct place *p)
{
	ff_autofree char *real = NULL;
	struct mounts m = {0};
	bool mounted = true;
	int r;

	if (path) {
		real = realpath(path, NULL);
		r = mounts_read(&m);
		mounted = !r && (mounts_have(&m, path) || (real && mounts_have(&m, real)));
		mounts_free(&m);
	}
	if (mounted)
		return place_mount(path, p);
	*p = (struct place){.fleece_fd = -1};
	r = open_fleece(path, &p->fleece_fd);
	if (r == -ENOENT && access(path, F_OK) == 0) {
		ctl_error("%s: neither a mount of fleecefs nor a fleece directory", path);
		return CTL_NO_INPUT;
	}
	if (!r)
		r = lock_time(p->fleece_fd, &p->since);
	if (!r)
		r = is_locked(p->fleece_fd, &p->live);
	if (!r && !(p->fleece_path = strdup(real ? real : path)))
		r = -ENOMEM;
	return r ? ctl_fail(path, r) : 0;
}

static bool is_held(int fd)
{
	bool held;

	return is_locked(fd, &held) == 0 && held;
}

/* The directory as the daemon has it open. */
static int open_through_daemon(struct place *p, int *out)
{
	long pid = (long)json_num(p->status, "pid");
	char path[64], entry[PATH_MAX], target[PATH_MAX];
	struct dirent *e;
	int r = -ENOENT;
	DIR *dir;

	snprintf(path, sizeof path, "/proc/%ld/fd", pid);
	dir = opendir(path);
	if (!dir)
		return -errno;
	while (r && (e = readdir(dir))) {
		int fd;

		snprintf(entry, sizeof entry, "%s/%.20s", path, e->d_name);
		if (io_readlinkat(AT_FDCWD, entry, target, sizeof target) ||
		    strcmp(target, p->fleece_path) != 0 || open_fleece(entry, &fd))
			continue;
		if (is_held(fd)) {
			*out = fd;
			r = 0;
		} else {
			close(fd);
		}
	}
	closedir(dir);
	return r;
}

int place_open_fleece(struct place *p)
{
	struct stat mount, st;
	int fd, r;

	if (p->fleece_fd >= 0)
		return 0;
	r = open_fleece(p->fleece_path, &fd);
	if (!r && (fstat(fd, &st) || stat(p->mountpoint, &mount) || st.st_dev == mount.st_dev ||
	           !is_held(fd))) {
		close(fd);
		r = -ENOENT;
	}
	if (r == -ENOENT || r == -ENOTDIR)
		r = open_through_daemon(p, &fd);
	if (r)
		return ctl_fail(p->fleece_path, r);
	p->fleece_fd = fd;
	return 0;
}

void place_free(struct place *p)
{
	free(p->mountpoint);
	free(p->snapdir);
	free(p->fleece_path);
	free(p->source_path);
	json_decref(p->status);
	free(p->status_text);
	if (p->fleece_fd >= 0)
		close(p->fleece_fd);
}

/* --- JSON ------------------------------------------------------------------------------------ */

double json_num(const json_t *o, const char *name)
{
	return json_number_value(json_object_get(o, name));
}

const char *json_text(const json_t *o, const char *name)
{
	const char *s = json_string_value(json_object_get(o, name));

	return s ? s : "";
}

bool json_has(const json_t *o, const char *name)
{
	const json_t *v = json_object_get(o, name);

	return v && !json_is_null(v);
}

static int set_repaired(json_t *o, const char *name, const char *value)
{
	size_t room = strlen(value) * 3 + 1, n = 0;
	ff_autofree char *text = malloc(room), *hex = malloc(room), *key = NULL;
	json_t *one;

	if (!text || !hex || asprintf(&key, "%s_hex", name) < 0)
		return -ENOMEM;
	for (const char *p = value; *p; p++)
		sprintf(hex + (p - value) * 2, "%02x", (unsigned char)*p);
	while (*value) {
		size_t len = 1;

		/* the shortest beginning that is a character */
		while (len <= 4 && !(one = json_stringn(value, strnlen(value, len))))
			len++;
		if (len > 4) {
			memcpy(text + n, "\xef\xbf\xbd", 3);
			n += 3;
			value++;
			continue;
		}
		json_decref(one);
		memcpy(text + n, value, len);
		n += len;
		value += len;
	}
	text[n] = '\0';
	return json_object_set_new(o, name, json_string(text)) ||
	               json_object_set_new(o, key, json_string(hex))
	           ? -ENOMEM
	           : 0;
}

int json_set_name(json_t *o, const char *name, const char *value)
{
	json_t *s = json_string(value);

	return s ? (json_object_set_new(o, name, s) ? -ENOMEM : 0) : set_repaired(o, name, value);
}
