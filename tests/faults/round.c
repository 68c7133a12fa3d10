/*
 * The steps of a round, run on the store.
 */
#include "round.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "cow/engine.h"
#include "ff_util.h"

_Thread_local volatile bool round_in_engine;

int round_open(struct round *r)
{
	struct ff_store_config c = {
	    .source_fd = r->source_fd,
	    .source_path = r->source,
	    .fleece_path = r->config.inside ? NULL : r->fleece,
	    .cluster_size = r->config.cluster_size ? r->config.cluster_size : 4096,
	    .policy = r->config.policy,
	    .durable = r->config.durable,
	    .source_lock = true,
	};
	struct ff_store *store = NULL;
	int e;

	if (r->store)
		return 0;
	e = ROUND_ENGINE(ff_store_open(&c, &store));
	if (!e)
		r->store = store;
	for (size_t i = 0; i < ROUND_SNAPS; i++)
		r->model->snaps[i].settling |= !e && (r->model->snaps[i].state == ROUND_GOING ||
		                                      r->model->snaps[i].state == ROUND_COMING);
	return e;
}

int round_close(struct round *r)
{
	int e = r->store ? ROUND_ENGINE(ff_store_close(r->store)) : 0;

	r->store = NULL;
	return e;
}

static int change_disk(struct round *r, const struct round_step *s, struct ff_disk *d, int fd,
                       const uint8_t *bytes, size_t *done)
{
	const int keep = FALLOC_FL_KEEP_SIZE;
	struct ff_change c = {
	    .kind = FF_WRITE, .fd = fd, .off = s->off, .len = s->len, .in_fd = -1};
	int e;

	c.buf = bytes;
	c.append = s->op == ROUND_APPEND;
	if (s->op == ROUND_TRUNCATE) {
		c.kind = FF_TRUNCATE;
	} else if (s->op == ROUND_PUNCH || s->op == ROUND_ZERO) {
		c.kind = FF_FALLOCATE;
		c.mode = keep | (s->op == ROUND_ZERO ? FALLOC_FL_ZERO_RANGE : FALLOC_FL_PUNCH_HOLE);
	} else if (s->op == ROUND_COPY) {
		c.kind = FF_COPY;
		c.in_off = s->seed;
		c.in_fd = openat(r->source_fd, s->to, O_RDONLY | O_CLOEXEC);
	}
	e = ROUND_ENGINE(ff_disk_change(d, &c, done));
	if (c.in_fd >= 0)
		close(c.in_fd);
	return e;
}

/* A change of bytes, or a sync, through a handle of its own. */
static int run_on_disk(struct round *r, const struct round_step *s)
{
	struct round_model *m = r->model;
	int fd = openat(r->source_fd, s->name, O_RDWR | O_CLOEXEC), e;
	int file = round_find_name(&m->live, s->name);
	static uint8_t bytes[ROUND_BYTES];
	struct ff_disk *d = NULL;
	size_t done = s->len;

	if (fd < 0)
		return -errno;
	e = ROUND_ENGINE(ff_disk_get(r->store, fd, &d));
	if (!e && s->op == ROUND_SYNC) {
		e = ROUND_ENGINE(ff_disk_sync(d, fd, false));
	} else if (!e) {
		round_step_bytes(&m->live, s, bytes);
		e = change_disk(r, s, d, fd, bytes, &done);
		if (!e)
			round_apply_bytes(&m->live, s, done);
	}
	round_copy_file(&m->next, &m->live, file);
	if (d)
		ff_disk_put(d);
	close(fd);
	return e;
}

static int parent_of(struct round *r, const char *name, const char **last)
{
	const char *slash = strchr(name, '/');

	*last = slash ? slash + 1 : name;
	return openat(r->source_fd, slash ? "sub" : ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
}

static int create(struct round *r, int dir, const char *name)
{
	int fd, e;

	ff_store_change_begin(r->store);
	fd = openat(dir, name, O_CREAT | O_EXCL | O_WRONLY | O_CLOEXEC, 0640);
	e = fd < 0 ? -errno : 0;
	ff_store_change_end(r->store);
	if (fd >= 0)
		close(fd);
	return e;
}

static int run_on_names(struct round *r, const struct round_step *s)
{
	const char *last, *to_last = NULL;
	int dir = parent_of(r, s->name, &last), to = -1, e;

	if (s->to)
		to = parent_of(r, s->to, &to_last);
	if (s->op == ROUND_CREATE)
		e = create(r, dir, last);
	else if (s->op == ROUND_UNLINK)
		e = ROUND_ENGINE(ff_store_unlink(r->store, dir, last));
	else
		e = ROUND_ENGINE(ff_store_rename(r->store, dir, last, to, to_last, 0));
	close(dir);
	if (to >= 0)
		close(to);
	if (e)
		round_copy_tree(&r->model->next, &r->model->live);
	else
		round_copy_tree(&r->model->live, &r->model->next);
	return e;
}

/* Where the model keeps the snapshot that the step is about. */
static struct round_snap *new_snap(struct round *r, const char *name)
{
	for (size_t i = 0; i < ROUND_SNAPS; i++) {
		struct round_snap *s = &r->model->snaps[i];

		if (s->state != ROUND_FREE)
			continue;
		snprintf(s->name, sizeof s->name, "%s", name);
		memset(s->may_break, 0, sizeof s->may_break);
		memset(s->broken, 0, sizeof s->broken);
		s->durable = r->config.durable;
		s->data = ROUND_WHOLE;
		memset(s->released, 0, sizeof s->released);
		memset(s->made, 0, sizeof s->made);
		s->settling = s->refused = false;
		round_copy_tree(&s->tree, &r->model->live);
		s->state = ROUND_COMING;
		return s;
	}
	fprintf(stderr, "more snapshots than ROUND_SNAPS\n");
	_exit(99);
}

static int run_freeze(struct round *r, const struct round_step *s)
{
	struct round_snap *old = round_find_snap(r, s->name), *snap = NULL;
	int e;

	if (!old)
		snap = new_snap(r, s->name);
	e = ROUND_ENGINE(ff_store_freeze(r->store, s->name, 0));
	if (old && !e) {
		if (old->state == ROUND_THERE)
			round_complain(r, "%s: a second snapshot of the name was made", s->name);
		old->state = ROUND_FREE; /* it had gone, then */
		snap = new_snap(r, s->name);
	}
	if (snap)
		snap->state = !e ? ROUND_THERE : r->may_come ? ROUND_COMING : ROUND_FREE;
	if (snap)
		snap->refused = e != 0;
	return e;
}

static int run_checkpoint(struct round *r, const struct round_step *s)
{
	struct round_snap *model = round_find_snap(r, s->name);
	struct ff_snap *snap;
	int e = ff_snap_get(r->store, s->name, &snap);

	if (e)
		return e;
	if (model && model->data == ROUND_WHOLE)
		model->data = ROUND_GIVING;
	e = ROUND_ENGINE(ff_snap_checkpoint(snap));
	if (model && !e)
		model->data = ROUND_GIVEN;
	round_in_engine = true;
	ff_snap_put(snap);
	round_in_engine = false;
	return e;
}

/* What the step gives up, whole clusters, is now TO. */
static void set_released(struct round_snap *model, const struct round_step *s, int file,
                         uint32_t cluster, enum round_data to)
{
	uint32_t size = model->tree.files[file].size, end = s->off + s->len;

	for (uint32_t u = 0; u < ROUND_UNITS && u * 4096 < size; u++) {
		uint32_t at = u * 4096 / cluster * cluster;

		if (at >= s->off && (at + cluster <= end || end >= size) &&
		    model->released[file][u] < to)
			model->released[file][u] = to;
	}
}

static int release(struct round *r, const struct round_step *s, struct ff_snap *snap,
                   struct round_snap *model)
{
	int file = model ? round_find_name(&model->tree, s->to) : -1;
	const struct ff_frozen *f;
	struct ff_reader *rd;
	uint32_t cluster;
	int e = round_lookup(snap, s->to, &f);

	if (!e)
		e = ROUND_ENGINE(ff_reader_open(snap, f, &rd));
	if (e)
		return e;
	cluster = ff_image_desc(snap->links[f->disk]->img)->cluster_size;
	if (file >= 0)
		set_released(model, s, file, cluster, ROUND_GIVING);
	e = ROUND_ENGINE(ff_reader_release(rd, s->off, s->len));
	if (file >= 0 && !e)
		set_released(model, s, file, cluster, ROUND_GIVEN);
	round_in_engine = true;
	ff_reader_close(rd);
	round_in_engine = false;
	return e;
}

static int run_release(struct round *r, const struct round_step *s)
{
	struct ff_snap *snap;
	int e = ff_snap_get(r->store, s->name, &snap);

	if (e)
		return e;
	e = release(r, s, snap, round_find_snap(r, s->name));
	round_in_engine = true;
	ff_snap_put(snap);
	round_in_engine = false;
	return e;
}

static int run_on_snap(struct round *r, const struct round_step *s)
{
	struct round_snap *snap = round_find_snap(r, s->name);
	enum round_state before = snap ? snap->state : ROUND_FREE;
	int e;

	if (s->op == ROUND_READ || s->op == ROUND_SINCE)
		return snap ? round_read_snap(r, snap, s->name, false, true, s->op == ROUND_SINCE)
		            : -ENOENT;
	if (s->op == ROUND_DROP) {
		if (snap)
			snap->state = ROUND_GOING;
		e = ROUND_ENGINE(ff_store_drop(r->store, s->name));
		if (snap && !e)
			snap->state = ROUND_FREE;
		else if (snap && e == -ENOENT)
			snap->state = before;
		return e;
	}
	if (snap) {
		snprintf(snap->to, sizeof snap->to, "%s", s->to);
		snap->state = ROUND_MOVING;
	}
	e = ROUND_ENGINE(ff_store_rename_snap(r->store, s->name, s->to));
	if (snap) {
		if (!e)
			snap->state = ROUND_THERE;
		else if (!r->may_come || before != ROUND_THERE)
			snap->state = before;
		if (!e)
			memcpy(snap->name, snap->to, sizeof snap->name);
	}
	return e;
}

static int run(struct round *r, const struct round_step *s)
{
	if (s->op == ROUND_OPEN)
		return round_open(r);
	if (s->op == ROUND_CLOSE)
		return round_close(r);
	if (!r->store)
		return -EBADF;
	switch (s->op) {
	case ROUND_PULSE:
		round_in_engine = true;
		ff_store_pulse(r->store);
		round_in_engine = false;
		return 0;
	case ROUND_FREEZE:
		return run_freeze(r, s);
	case ROUND_CHECKPOINT:
		return run_checkpoint(r, s);
	case ROUND_RELEASE:
		return run_release(r, s);
	case ROUND_DROP:
	case ROUND_RENAME_SNAP:
	case ROUND_READ:
	case ROUND_SINCE:
		return run_on_snap(r, s);
	case ROUND_CREATE:
	case ROUND_RENAME:
	case ROUND_UNLINK:
		return run_on_names(r, s);
	default:
		return run_on_disk(r, s);
	}
}

/* What the step is to do to names and bytes, done to `next`; whose views it may break. */
static void foresee(struct round *r, const struct round_step *s)
{
	struct round_model *m = r->model;

	m->step_file = s->op == ROUND_OPEN ? ROUND_ALL_FILES : ROUND_NO_FILE;
	if (!r->store)
		return;
	switch (s->op) {
	case ROUND_WRITE:
	case ROUND_REWRITE:
	case ROUND_APPEND:
	case ROUND_TRUNCATE:
	case ROUND_PUNCH:
	case ROUND_ZERO:
	case ROUND_COPY:
		m->step_file = round_find_name(&m->live, s->name);
		if (m->step_file >= 0)
			round_apply_bytes(&m->next, s, s->len);
		break;
	case ROUND_SYNC:
		m->step_file = round_find_name(&m->live, s->name);
		break;
	case ROUND_RELEASE:
	case ROUND_CHECKPOINT:
	case ROUND_DROP:
		/* a flush that fails here is not tried again: later saves fail */
		if (r->config.durable)
			m->step_file = s->op == ROUND_RELEASE ? round_find_name(&m->live, s->to)
			                                      : ROUND_ALL_FILES;
		break;
	case ROUND_CREATE:
	case ROUND_UNLINK:
	case ROUND_RENAME:
		m->step_file = round_find_name(&m->live, s->to ? s->to : s->name);
		if ((round_find_name(&m->live, s->name) < 0) == (s->op == ROUND_CREATE))
			round_apply_names(r, &m->next, s);
		break;
	default:
		break;
	}
}

int round_step(struct round *r, const struct round_step *s)
{
	struct round_model *m = r->model;
	int e;

	m->steps++;
	foresee(r, s);
	m->in_step = true;
	e = run(r, s);
	m->in_step = false;
	return e;
}

size_t round_run(struct round *r, const struct round_step *steps, size_t count)
{
	size_t failed = 0;

	for (size_t i = 0; i < count; i++)
		failed += round_step(r, &steps[i]) != 0;
	return failed;
}

void round_may_break(struct round *r, int file)
{
	for (size_t i = 0; i < ROUND_SNAPS; i++)
		for (int f = 0; f < ROUND_FILES; f++)
			if (r->model->snaps[i].state != ROUND_FREE &&
			    (f == file || file == ROUND_ALL_FILES))
				r->model->snaps[i].may_break[f] = true;
}

void round_may_break_by_step(struct round *r)
{
	round_may_break(r, r->model->step_file);
}

void round_end(struct round *r)
{
	int e;

	round_drop_all(r);
	if (r->store->space_used)
		round_complain(r, "%llu bytes are still counted",
		               (unsigned long long)r->store->space_used);
	e = round_close(r);
	if (e)
		round_complain(r, "it cannot be closed: %s", strerror(-e));
	round_verify(r, 0);
}
