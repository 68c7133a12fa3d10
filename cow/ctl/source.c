/*
 * Finds SOURCE: the directory whose inode and birth time stand in FLEECE_DIR/.source. The images
 * name their sources by absolute paths, so it is one of the directories above some of those; a
 * mount that covers it has no birth time and is not taken for it.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "cow/ctl/source.h"
#include "cow/device.h"
#include "cow/io.h"
#include "cow/open_regular.h"
#include "ff_util.h"

enum { NAMES_TRIED = 64 };

/* What .source says; "" if nothing. */
static void read_source(int fleece_fd, char *out, size_t size)
{
	ff_autoclose int fd = -1;
	size_t got = 0;

	if (open_regular(fleece_fd, ".source", O_RDONLY, &fd) ||
	    io_pread(fd, out, size - 1, 0, &got))
		got = 0;
	out[got] = '\0';
}

/* Is PATH the directory that WANTED speaks of? */
static bool is_source(const char *path, const char *wanted)
{
	struct identity id;
	char mine[96];

	if (!*wanted || identity_of(AT_FDCWD, path, &id, NULL))
		return false;
	snprintf(mine, sizeof mine, "%llu %lld %u\n", (unsigned long long)id.ino,
	         (long long)id.btime_sec, id.btime_nsec);
	return strcmp(mine, wanted) == 0;
}

/* PATH, or a directory above it, is cut to what is SOURCE. */
static bool cut_to_source(char *path, const char *wanted)
{
	for (char *end = path + strlen(path); end && end > path; end = strrchr(path, '/')) {
		*end = '\0';
		if (*path && is_source(path, wanted))
			return true;
	}
	return false;
}

static bool look(int fleece_fd, const char *fleece_path, const struct inventory *inv,
                 const char *hint, char **out)
{
	char wanted[96];
	unsigned tried = 0;

	read_source(fleece_fd, wanted, sizeof wanted);
	if (hint) {
		*out = strdup(hint);
		return is_source(hint, wanted);
	}
	*out = strdup(fleece_path);
	if (*out && cut_to_source(*out, wanted))
		return true;
	for (size_t i = 0; i < inv->image_count && tried < NAMES_TRIED; i++) {
		const struct inv_image *img = &inv->images[i];

		if (img->error || !img->raw || img->backing[0] != '/')
			continue;
		tried++;
		free(*out);
		*out = strdup(img->backing);
		if (*out && cut_to_source(*out, wanted))
			return true;
	}
	return false;
}

static bool has_clean(int fleece_fd)
{
	struct statx sx;

	return io_statx(fleece_fd, ".clean", &sx) == 0;
}

/* Asks the engine, which needs nothing of a store for it but the two directories. */
static int read_ending(int fleece_fd, const char *fleece_path, struct source *src)
{
	ff_autofree struct ff_store *s = NULL;
	int r;

	s = calloc(1, sizeof *s);
	if (!s)
		return -ENOMEM;
	s->fleece_fd = fleece_fd;
	s->source_fd = src->fd;
	s->fleece_path = (char *)fleece_path;
	r = known_load(s, &src->known);
	if (r == -ENOMEM || (src->fd < 0 && !has_clean(fleece_fd)))
		return r == -ENOMEM ? r : 0;
	s->source_path = src->path ? src->path : (char *)"SOURCE";
	r = session_ending(s, &src->ending, &src->record);
	if (!r)
		r = pulse_last(s, &src->alive_until);
	src->told = r == 0;
	return r == -ENOMEM ? r : 0;
}

int source_find(int fleece_fd, const char *fleece_path, const struct inventory *inv,
                const char *hint, struct source *out)
{
	int r;

	*out = (struct source){.fd = -1};
	if (!look(fleece_fd, fleece_path, inv, hint, &out->path)) {
		free(out->path);
		out->path = NULL;
	}
	if (out->path) {
		r = io_openat(AT_FDCWD, out->path, O_RDONLY | O_DIRECTORY, 0, &out->fd);
		if (r == -ENOMEM)
			return r;
	}
	return read_ending(fleece_fd, fleece_path, out);
}

void source_free(struct source *src)
{
	if (src->fd >= 0)
		close(src->fd);
	session_record_free(src->record);
	known_free(src->known);
	free(src->path);
}

bool source_is(const struct inv_image *img, const char *path, struct stat *st)
{
	struct identity id = {.btime_sec = img->desc.disk_btime_sec};
	ff_autoclose int fd = -1;

	if (identity_is_device(&id)) {
		if (device_open_path(path, &fd) || device_identify(fd, &id) ||
		    device_evidence(fd, st))
			return false;
	} else if (identity_of(AT_FDCWD, path, &id, st)) {
		return false;
	}
	return id.ino == img->desc.disk_ino && id.btime_sec == img->desc.disk_btime_sec &&
	       id.btime_nsec == img->desc.disk_btime_nsec;
}

bool source_changed(const struct source *src, const struct inv_image *img, const struct stat *st)
{
	struct identity id = {.ino = img->desc.disk_ino,
	                      .btime_sec = img->desc.disk_btime_sec,
	                      .btime_nsec = img->desc.disk_btime_nsec};

	if (!src->told)
		return false;
	if (src->ending == ENDED_CLEAN)
		return !session_unchanged(src->record, &id, st);
	return st->st_ctim.tv_sec > src->alive_until;
}
