/*
 * The model's side of a round: files and names, what a step makes of them, and the real ones that
 * it all begins with.
 */
#include "round.h"

#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "ff_log.h"
#include "ff_util.h"

const char *const round_names[ROUND_NAMES] = {"a", "sub/b", "c",   "sub/c2",
                                              "d", "e",     "new", "sub/new"};

static void die(const char *what)
{
	perror(what);
	_exit(99);
}

void round_complain(struct round *r, const char *fmt, ...)
{
	va_list ap;

	if (r->model->complaints++ > 8)
		return;
	fprintf(stderr, "%s: ", r->label ? r->label : "round");
	va_start(ap, fmt);
	vfprintf(stderr, fmt, ap);
	va_end(ap);
	fprintf(stderr, " (step %zu)\n", r->model->steps);
}

void round_fill(uint8_t *out, size_t len, uint32_t seed)
{
	uint64_t x = (uint64_t)seed * UINT64_C(0x9e3779b97f4a7c15) + 1;

	if (!seed) {
		memset(out, 0, len);
		return;
	}
	for (size_t i = 0; i < len; i++) {
		x = x * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
		out[i] = (uint8_t)(x >> 56);
	}
}

static int name_number(const char *name)
{
	for (int i = 0; i < ROUND_NAMES; i++)
		if (strcmp(round_names[i], name) == 0)
			return i;
	fprintf(stderr, "%s is none of round_names[]\n", name);
	_exit(99);
}

int round_find_name(const struct round_tree *t, const char *name)
{
	return t->names[name_number(name)];
}

void round_copy_file(struct round_tree *to, const struct round_tree *from, int file)
{
	to->files[file].used = from->files[file].used;
	to->files[file].size = from->files[file].size;
	memcpy(to->files[file].bytes, from->files[file].bytes, from->files[file].size);
}

void round_copy_tree(struct round_tree *to, const struct round_tree *from)
{
	memcpy(to->names, from->names, sizeof to->names);
	for (int i = 0; i < ROUND_FILES; i++)
		if (from->files[i].used)
			round_copy_file(to, from, i);
		else
			to->files[i].used = false;
}

struct round_snap *round_find_snap(struct round *r, const char *name)
{
	for (size_t i = 0; i < ROUND_SNAPS; i++) {
		struct round_snap *s = &r->model->snaps[i];

		if (s->state != ROUND_FREE && strcmp(s->name, name) == 0)
			return s;
	}
	return NULL;
}

/* A file that neither the live tree nor a snapshot has. */
static int free_file(struct round *r)
{
	for (int i = 0; i < ROUND_FILES; i++) {
		bool used = r->model->live.files[i].used;

		for (size_t k = 0; k < ROUND_SNAPS; k++)
			used |= r->model->snaps[k].state != ROUND_FREE &&
			        r->model->snaps[k].tree.files[i].used;
		if (!used)
			return i;
	}
	fprintf(stderr, "more files than ROUND_FILES\n");
	_exit(99);
}

static void lose_name(struct round_tree *t, int name)
{
	int file = t->names[name];

	t->names[name] = -1;
	if (file < 0)
		return;
	for (int i = 0; i < ROUND_NAMES; i++)
		if (t->names[i] == file)
			return;
	t->files[file].used = false;
}

static void resize(struct round_file *f, uint32_t size)
{
	if (size > ROUND_BYTES) {
		fprintf(stderr, "a file of %u bytes is more than ROUND_BYTES\n", size);
		_exit(99);
	}
	if (size > f->size)
		memset(f->bytes + f->size, 0, size - f->size);
	f->size = size;
}

static void put(struct round_file *f, uint32_t off, const uint8_t *bytes, uint32_t len)
{
	resize(f, FF_MAX(f->size, off + len));
	memcpy(f->bytes + off, bytes, len);
}

/* What the step writes; LEN bytes. */
void round_step_bytes(const struct round_tree *t, const struct round_step *s, uint8_t *out)
{
	int file = round_find_name(t, s->name);

	if (s->op == ROUND_COPY)
		memcpy(out, t->files[round_find_name(t, s->to)].bytes + s->seed, s->len);
	else if (s->op == ROUND_REWRITE)
		memcpy(out, t->files[file].bytes + s->off, s->len);
	else
		round_fill(out, s->len, s->seed);
}

/* Makes the step's change to bytes in T, as far as DONE bytes. */
void round_apply_bytes(struct round_tree *t, const struct round_step *s, size_t done)
{
	struct round_file *f = &t->files[round_find_name(t, s->name)];
	static uint8_t bytes[ROUND_BYTES];
	uint32_t end = FF_MIN(s->off + s->len, f->size);

	switch (s->op) {
	case ROUND_TRUNCATE:
		resize(f, s->off);
		break;
	case ROUND_PUNCH:
	case ROUND_ZERO:
		if (s->off < end)
			memset(f->bytes + s->off, 0, end - s->off);
		break;
	default:
		round_step_bytes(t, s, bytes);
		put(f, s->op == ROUND_APPEND ? f->size : s->off, bytes, (uint32_t)done);
	}
}

/* The same for names. */
void round_apply_names(struct round *r, struct round_tree *t, const struct round_step *s)
{
	int from = name_number(s->name), to = s->to ? name_number(s->to) : -1;

	switch (s->op) {
	case ROUND_CREATE:
		t->names[from] = (int8_t)free_file(r);
		t->files[t->names[from]].used = true;
		t->files[t->names[from]].size = 0;
		break;
	case ROUND_UNLINK:
		lose_name(t, from);
		break;
	default:
		if (t->names[from] == t->names[to])
			break;
		lose_name(t, to);
		t->names[to] = t->names[from];
		t->names[from] = -1;
	}
}

/* --- preparation ------------------------------------------------------------------------------ */

/* A file of the model with data where PATTERN has a letter: one for every 4 KiB. */
static void plan_file(struct round_tree *t, int file, uint32_t size, const char *pattern)
{
	struct round_file *f = &t->files[file];

	f->used = true;
	f->size = size;
	memset(f->bytes, 0, size);
	for (uint32_t at = 0; at < size && *pattern; at += 4096, pattern += pattern[1] != '\0')
		if (*pattern != ' ' && *pattern != '0')
			round_fill(f->bytes + at, FF_MIN(4096, size - at),
			           (uint32_t)file * 1000 + at / 4096 + 1);
}

/* Written so that what is a blank in the pattern is a hole, and a '0' zeros that take space. */
static void write_file(struct round *r, const char *name, const struct round_file *f,
                       const char *pattern)
{
	int fd = openat(r->source_fd, name, O_CREAT | O_EXCL | O_WRONLY | O_CLOEXEC, 0640);

	if (fd < 0 || ftruncate(fd, f->size))
		die(name);
	for (uint32_t at = 0; at < f->size; at += 4096, pattern += pattern[1] != '\0') {
		size_t n = FF_MIN(4096, f->size - at);

		if (*pattern != ' ' && pwrite(fd, f->bytes + at, n, at) != (ssize_t)n)
			die(name);
	}
	close(fd);
}

static void make_source(struct round *r)
{
	static const struct {
		const char *pattern;
		uint32_t size;
	} plan[] = {
	    {"x", 80 << 10}, {"x xx   x x", 40001}, {"xx  ", 16384}, {"00xxx", 20480}, {"x", 700}};
	static const uint8_t first_names[] = {0, 1, 2, 4, 5};
	struct round_tree *t = &r->model->live;

	memset(t->names, -1, sizeof t->names);
	for (int i = 0; i < ROUND_FILES; i++)
		t->files[i].used = false;
	if (mkdir(r->source, 0755))
		die(r->source);
	r->source_fd = open(r->source, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (r->source_fd < 0 || mkdirat(r->source_fd, "sub", 0755))
		die(r->source);
	for (int i = 0; i < (int)FF_ARRAY_SIZE(plan); i++) {
		t->names[first_names[i]] = (int8_t)i;
		plan_file(t, i, plan[i].size, plan[i].pattern);
		write_file(r, round_names[first_names[i]], &t->files[i], plan[i].pattern);
	}
	t->names[3] = 2;
	if (linkat(r->source_fd, "c", r->source_fd, "sub/c2", 0))
		die("sub/c2");
	round_copy_tree(&r->model->next, t);
}

static int remove_one(const char *path, const struct stat *st, int type, struct FTW *ftw)
{
	return remove(path);
}

static void clear(struct round *r)
{
	close(r->source_fd);
	nftw(r->source, remove_one, 16, FTW_DEPTH | FTW_PHYS);
	nftw(r->fleece, remove_one, 16, FTW_DEPTH | FTW_PHYS);
}

static void forget(struct round *r)
{
	struct round_model *m = r->model;

	m->steps = 0;
	m->in_step = false;
	m->step_file = ROUND_NO_FILE;
	m->complaints = 0;
	for (size_t i = 0; i < ROUND_SNAPS; i++)
		m->snaps[i].state = ROUND_FREE;
	make_source(r);
}

void round_init(struct round *r, const struct round_config *config)
{
	const char *dir = config->dir;

	memset(r, 0, sizeof *r);
	r->config = *config;
	if (!dir)
		dir = access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp";
	snprintf(r->root, sizeof r->root, "%s/fleecefs-round-XXXXXX", dir);
	if (!mkdtemp(r->root))
		die(r->root);
	snprintf(r->source, sizeof r->source, "%s/source", r->root);
	if (config->inside)
		snprintf(r->fleece, sizeof r->fleece, "%s/" FF_HIDDEN_NAME, r->source);
	else
		snprintf(r->fleece, sizeof r->fleece, "%s/fleece", r->root);
	r->model =
	    mmap(NULL, sizeof *r->model, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (r->model == MAP_FAILED)
		die("mmap");
	/* Faults make many lines; a complaint says what matters. */
	if (!getenv("ROUND_LOG"))
		ff_log_threshold((enum ff_log_level) - 1);
	forget(r);
}

void round_reset(struct round *r)
{
	clear(r);
	forget(r);
}

void round_done(struct round *r)
{
	clear(r);
	rmdir(r->root);
	munmap(r->model, sizeof *r->model);
}
