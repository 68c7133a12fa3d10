/*
 * What must be there after a kill.
 */
#include "kill.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static int wrong(const char *path, const char *what)
{
	fprintf(stderr, "%s: %s\n", path, what);
	return -EIO;
}

void extra_fill(uint8_t *buf, unsigned generation)
{
	struct rng rng = {generation};

	rng_fill(&rng, buf, EXTRA_SIZE);
}

void view_path(const struct kill_test *kt, const struct view *v, const char *below, char path[1024])
{
	if (v)
		snprintf(path, 1024, "%s/snapshots/%s/%s", kt->mnt.live, v->name, below);
	else
		snprintf(path, 1024, "%s/%s", kt->mnt.live, below);
}

/* All of a file, zeros beyond its end. */
static int read_whole(const char *path, uint8_t *buf, uint64_t max, uint64_t *size)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	uint64_t off = 0;
	struct stat st;
	ssize_t n = 1;

	if (fd < 0 || fstat(fd, &st) < 0) {
		fprintf(stderr, "%s: %s\n", path, strerror(errno));
		if (fd >= 0)
			close(fd);
		return -EIO;
	}
	memset(buf, 0, max);
	for (; n > 0 && off < max; off += (uint64_t)(n > 0 ? n : 0))
		n = pread(fd, buf + off, max - off, (off_t)off);
	if (n < 0)
		fprintf(stderr, "%s: read at %llu: %s\n", path, (unsigned long long)off,
		        strerror(errno));
	close(fd);
	*size = off;
	if (n >= 0 && off != (uint64_t)st.st_size)
		return wrong(path, "its size is not what can be read");
	return n < 0 ? -EIO : 0;
}

static int read_files(struct kill_test *kt, const struct view *v, uint8_t **files, uint64_t *sizes)
{
	char path[1024], name[16];

	for (unsigned k = 0; k < NFILES; k++) {
		snprintf(name, sizeof name, "file%u", k);
		view_path(kt, v, name, path);
		if (read_whole(path, files[k], file_size(&kt->layout, k), &sizes[k]))
			return -EIO;
	}
	return 0;
}

static int check_extras(struct kill_test *kt, const struct view *v)
{
	uint8_t want[EXTRA_SIZE], got[EXTRA_SIZE + 1];
	char path[1024], name[16];
	struct stat st;
	uint64_t size;

	for (unsigned i = 0; i < EXTRAS; i++) {
		snprintf(name, sizeof name, "extra%u", i);
		view_path(kt, v, name, path);
		if (!v->extras[i]) {
			if (lstat(path, &st) == 0 || errno != ENOENT)
				return wrong(path, "must not be there");
			continue;
		}
		extra_fill(want, v->extras[i]);
		if (read_whole(path, got, sizeof got, &size))
			return -EIO;
		if (size != EXTRA_SIZE || memcmp(want, got, EXTRA_SIZE) != 0)
			return wrong(path, "does not hold what it held at the freeze");
	}
	return 0;
}

int check_view(struct kill_test *kt, struct view *v)
{
	uint8_t **files = v->read ? kt->again : v->files;
	uint64_t sizes[NFILES];
	char path[1024], why[400];

	view_path(kt, v, "", path);
	if (read_files(kt, v, files, sizes) || check_extras(kt, v))
		return -EIO;
	if (!v->read) {
		if (prefix_check(&kt->layout, v->files, v->before, v->after, why, sizeof why))
			return wrong(path, why);
		memcpy(v->sizes, sizes, sizeof sizes);
		v->read = true;
		return 0;
	}
	for (unsigned k = 0; k < NFILES; k++)
		if (sizes[k] != v->sizes[k] ||
		    memcmp(files[k], v->files[k], file_size(&kt->layout, k)) != 0) {
			fprintf(stderr, "%s: file%u is not what it was\n", path, k);
			return -EIO;
		}
	return 0;
}

/* Of thread T's write N, which did not return, any unit may be there. Puts back what was there
 * before, for prefix_check(). */
static int take_back(struct kill_test *kt, unsigned t, uint64_t n)
{
	unsigned k = record_file(t, n);
	uint32_t size = record_size(k);
	uint8_t *at = kt->again[k] + record_offset(&kt->layout, t, n);
	uint8_t old[MAX_RECORD] = {0}, new[MAX_RECORD];

	if (n > NFILES * NSLOTS)
		record_fill(old, k, t, n - NFILES * NSLOTS);
	record_fill(new, k, t, n);
	for (uint32_t i = 0; i < size; i += 16)
		if (memcmp(at + i, old + i, 16) != 0 && memcmp(at + i, new + i, 16) != 0) {
			fprintf(stderr,
			        "thread %u: byte %u of write %llu, which was cut short, is "
			        "neither old nor new\n",
			        t, i, (unsigned long long)n);
			return -EIO;
		}
	memcpy(at, old, size);
	return 0;
}

int check_live(struct kill_test *kt)
{
	uint64_t returned[MAX_THREADS], sizes[NFILES];
	char why[400];

	if (read_files(kt, NULL, kt->again, sizes))
		return -EIO;
	for (unsigned t = 0; t < WRITERS; t++) {
		uint64_t started = atomic_load(&kt->writers[t].started);

		returned[t] = atomic_load(&kt->writers[t].returned);
		if (started > returned[t] && take_back(kt, t, started))
			return -EIO;
	}
	if (prefix_check(&kt->layout, kt->again, returned, returned, why, sizeof why))
		return wrong("live", why);
	return 0;
}

/* The generation that the extra holds: 0, none; -1: something else. */
static int extra_now(struct kill_test *kt, unsigned i, const unsigned *candidates, unsigned *out)
{
	uint8_t want[EXTRA_SIZE], got[EXTRA_SIZE + 1];
	char path[1024], name[16];
	struct stat st;
	uint64_t size;

	snprintf(name, sizeof name, "extra%u", i);
	view_path(kt, NULL, name, path);
	*out = 0;
	if (lstat(path, &st) < 0)
		return errno == ENOENT ? 0 : wrong(path, strerror(errno));
	if (read_whole(path, got, sizeof got, &size))
		return -EIO;
	for (unsigned c = 0; c < EXTRAS; c++)
		if (candidates[c]) {
			extra_fill(want, candidates[c]);
			if (size == EXTRA_SIZE && memcmp(want, got, EXTRA_SIZE) == 0) {
				*out = candidates[c];
				return 0;
			}
		}
	if (!kt->maybe_partial)
		return wrong(path, "holds what it never held");
	/* Of what was being written, a part; and then it goes. */
	extra_fill(want, kt->maybe_partial);
	if (size > EXTRA_SIZE || memcmp(want, got, size) != 0)
		return wrong(path, "holds no part of what was being written");
	return unlink(path) < 0 ? wrong(path, strerror(errno)) : 0;
}

int settle_extras(struct kill_test *kt)
{
	bool changing = kt->doing == CHANGING_EXTRAS;
	const unsigned *before = changing ? kt->old_extras : kt->extras;
	unsigned now[EXTRAS], candidates[EXTRAS];

	for (unsigned i = 0; i < EXTRAS; i++)
		candidates[i] = before[i] ? before[i] : kt->extras[i];
	if (!changing)
		kt->maybe_partial = 0;
	for (unsigned i = 0; i < EXTRAS; i++) {
		bool same;

		if (extra_now(kt, i, candidates, &now[i]))
			return -EIO;
		same = now[i] == before[i] || now[i] == kt->extras[i] ||
		       (now[i] == 0 && kt->maybe_partial && kt->maybe_partial == kt->extras[i]);
		if (!same) {
			fprintf(stderr, "extra%u: holds generation %u, must be %u or %u\n", i,
			        now[i], before[i], kt->extras[i]);
			return -EIO;
		}
	}
	memcpy(kt->extras, now, sizeof now);
	return 0;
}

static bool is_there(struct kill_test *kt, const char *name)
{
	char path[1024];
	struct stat st;

	snprintf(path, sizeof path, "%s/snapshots/%s", kt->mnt.live, name);
	return lstat(path, &st) == 0;
}

/* The one that was cut short. */
static int settle_subject(struct kill_test *kt)
{
	struct view *v = kt->subject;
	bool there;

	if (kt->doing != MAKING && kt->doing != DROPPING && kt->doing != RENAMING)
		return 0;
	there = is_there(kt, v->name);
	if (kt->doing == RENAMING) {
		if (there == is_there(kt, kt->new_name))
			return wrong(v->name,
			             "a rename that was cut short left both names or none");
		if (!there)
			memcpy(v->name, kt->new_name, sizeof v->name);
		there = true;
	}
	kt->finished += there == (kt->doing == MAKING);
	kt->undone += there != (kt->doing == MAKING);
	v->made = there;
	return 0;
}

int check_names(struct kill_test *kt)
{
	unsigned want = 0, got = 0;
	struct dirent *e;
	char path[1024];
	DIR *d;

	if (settle_subject(kt))
		return -EIO;
	snprintf(path, sizeof path, "%s/snapshots", kt->mnt.live);
	d = opendir(path);
	if (!d)
		return wrong(path, strerror(errno));
	while ((e = readdir(d)))
		got += e->d_name[0] != '.';
	closedir(d);
	for (unsigned i = 0; i < VIEWS; i++) {
		if (!kt->views[i].made)
			continue;
		want++;
		if (!is_there(kt, kt->views[i].name))
			return wrong(kt->views[i].name, "the snapshot is gone");
	}
	return want == got ? 0 : wrong(path, "a snapshot is there that must not be");
}

/* 3: clusters are leaked; between two system calls of a save that is all that is wrong. */
int check_images(struct kill_test *kt, bool mounted)
{
	/* A killed mkdir, rmdir or rename may leave names of backing files to the next mount. */
	const char *image =
	    mounted ? "\"$i\""
	            : "'json:{\"driver\":\"qcow2\",\"backing\":null,\"file.filename\":\"'$i'\"}'";
	char command[2048];
	int status;

	snprintf(command, sizeof command,
	         "leaks=0; for i in $(find '%s' -name '*.qcow2'); do "
	         "out=$(qemu-img check %s 2>&1); s=$?; "
	         "[ $s = 0 ] || { [ $s = 3 ] && leaks=$((leaks + 1)); } || "
	         "{ echo \"$i: $out\" >&2; exit 99; }; done; exit $leaks",
	         kt->mnt.fleece, image);
	status = system(command);
	if (status < 0 || !WIFEXITED(status) || WEXITSTATUS(status) == 99)
		return -EIO;
	kt->leaks += (unsigned)WEXITSTATUS(status);
	return 0;
}

static int left_over(const char *path, const struct stat *st, int type, struct FTW *ftw)
{
	const char *name = path + ftw->base;

	/* what a mount keeps of itself begins with a dot */
	if (type == FTW_F && (name[0] != '.' || strncmp(name, ".lost-", 6) == 0)) {
		fprintf(stderr, "%s is left over\n", path);
		return 1;
	}
	return 0;
}

int check_empty(struct kill_test *kt)
{
	char path[1024];

	snprintf(path, sizeof path, "%s/.fleecefs", kt->mnt.source);
	if (nftw(kt->mnt.fleece, left_over, 16, FTW_PHYS))
		return -EIO;
	return access(path, F_OK) == 0 && nftw(path, left_over, 16, FTW_PHYS) ? -EIO : 0;
}
