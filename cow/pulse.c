/*
 * Until when the last daemon lived, so that a later change of SOURCE is noticed.
 *
 * A killed daemon leaves no record of what the sources looked like, and whoever starts a virtual
 * machine on SOURCE itself after that spoils every frozen view. So while there are snapshots the
 * time is written to FLEECE_DIR/.alive once a second, and at the next open a disk whose ctime
 * (which no program can set) is later than that is one that was changed behind the mount's back.
 *
 * A system under load may write it late, so SLACK_S seconds are allowed for. The time never goes
 * back: a clock that is set back makes the test miss, not accuse. Where views are to survive power
 * loss the time must, too, and the name of the file: each daemon makes one of its own, in the place
 * of its predecessor's or of whatever lies there.
 *
 * The write runs as a job that nobody waits for: storage that hangs delays neither the caller nor
 * the end. `pulsing` is set while one is under way, and its holder owns the other fields.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "cow/device.h"
#include "cow/ending.h"
#include "cow/engine.h"
#include "cow/io.h"
#include "cow/late.h"
#include "cow/open_regular.h"
#include "cow/text_file.h"
#include "ff_log.h"
#include "ff_util.h"

#define ALIVE ".alive"

enum { SLACK_S = 10, LENGTH = 21 /* of the text */ };

static int is_durable(struct ff_disk *d, void *ctx)
{
	return atomic_load(&d->durable);
}

static int write_time(struct ff_store *s)
{
	struct timespec now;
	char text[24];
	int r;

	clock_gettime(CLOCK_REALTIME, &now);
	s->pulse_time = FF_MAX(s->pulse_time, (int64_t)now.tv_sec);
	snprintf(text, sizeof text, "%020lld\n", (long long)s->pulse_time);
	r = s->pulse_fd < 0
	        ? text_replace(s->fleece_fd, ALIVE, text, strlen(text), false, &s->pulse_fd)
	        : io_pwrite(s->pulse_fd, text, strlen(text), 0);
	if (r || !disk_each(s, is_durable, NULL))
		return r;
	r = io_fdatasync(s->pulse_fd);
	if (!r && !s->pulse_named)
		r = io_fsync(s->fleece_fd);
	s->pulse_named |= !r;
	return r;
}

static int pulse_job(void *ctx)
{
	struct ff_store *s = ctx;
	int r = write_time(s);

	if (r && !s->pulse_failed)
		ff_warning("%s/" ALIVE
		           ": cannot be written (%s): should fleecefs be killed, frozen "
		           "views are given up",
		           s->fleece_path, strerror(-r));
	s->pulse_failed = r != 0;
	space_pulse(s);
	disk_each(s, disk_check_device, NULL);
	atomic_store(&s->pulsing, false);
	return r;
}

static bool has_snapshots(struct ff_store *s)
{
	FF_GUARD(&s->snaps_lock);
	return s->snaps != NULL;
}

void ff_store_pulse(struct ff_store *s)
{
	if (!has_snapshots(s) || atomic_exchange(&s->pulsing, true))
		return;
	if (late_run(pulse_job, s, 0, &s->asking) == -EAGAIN)
		atomic_store(&s->pulsing, false);
}

/* Then what is frozen is given up. */
static int damaged(const struct ff_store *s, int64_t *until)
{
	ff_error("%s/" ALIVE " is damaged: whether SOURCE was left alone since cannot be told",
	         s->fleece_path);
	*until = INT64_MIN;
	return 0;
}

int pulse_last(struct ff_store *s, int64_t *until)
{
	ff_autoclose int fd = -1;
	char text[24], *end;
	long long then;
	size_t got = 0;
	int r = open_regular(s->fleece_fd, ALIVE, O_RDONLY, &fd);

	*until = INT64_MAX;
	if (r == -ENOENT)
		return 0;
	if (!r)
		r = io_pread(fd, text, sizeof text - 1, 0, &got);
	if (text_is_foreign(r))
		return damaged(s, until);
	if (r) {
		ff_error("%s/" ALIVE ": cannot be read: %s", s->fleece_path, strerror(-r));
		return r;
	}
	text[got] = '\0';
	if (got < LENGTH || text[0] == '\0') /* the power failed while it was made */
		return 0;
	then = strtoll(text, &end, 10);
	if (end == text + LENGTH - 1 && *end == '\n') {
		*until = then < INT64_MAX - SLACK_S ? then + SLACK_S : INT64_MAX;
		return 0;
	}
	return damaged(s, until);
}

int pulse_forget(struct ff_store *s)
{
	int r = io_unlinkat(s->fleece_fd, ALIVE, 0);

	return r == -ENOENT ? 0 : r;
}
