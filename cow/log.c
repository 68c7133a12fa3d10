/*
 * Logging to stderr or syslog. The static flags are atomic: a background mount goes over to syslog
 * when it is ready, with threads running. A line written meanwhile goes to either. A stderr that is
 * the journal's gets each line's level in front, as sd-daemon(3) has it, and no name, which the
 * journal adds.
 *
 * Against floods: of lines made from one format, which differ in names alone, as many as BURST are
 * written in a window of WINDOW_S seconds, from the first of them on. The rest is counted, and the
 * number is said when the window is over: by the next line of that format, or by ff_log_pulse(). A
 * few formats are kept in mind at a time; one that is not (its place was taken) begins anew. Who
 * asks for lines for debugging wants all: then none is held back.
 */
#include "ff_log.h"

#include <errno.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <syslog.h>
#include <time.h>
#include <unistd.h>

#include "ff_util.h"

enum { BURST = 50, WINDOW_S = 10, FORMATS = 32 };

static atomic_bool use_syslog, stderr_is_journal;
static atomic_int threshold = FF_LOG_INFO;

/* A format, and what became of its lines since the window began. */
static struct format {
	const char *fmt; /* lock: formats_lock, as all here; NULL: free */
	enum ff_log_level level;
	time_t began;
	unsigned lines, held_back;
	char first[100]; /* of the lines, or its beginning */
} formats[FORMATS];
static pthread_mutex_t formats_lock = PTHREAD_MUTEX_INITIALIZER;

void ff_log_to_syslog(void)
{
	openlog("fleecefs", LOG_PID, LOG_DAEMON);
	atomic_store(&use_syslog, true);
}

void ff_log_find_journal(void)
{
	const char *stream = getenv("JOURNAL_STREAM");
	char own[64];
	struct stat st;

	if (!stream || fstat(STDERR_FILENO, &st) < 0)
		return;
	snprintf(own, sizeof own, "%ju:%ju", (uintmax_t)st.st_dev, (uintmax_t)st.st_ino);
	atomic_store(&stderr_is_journal, strcmp(stream, own) == 0);
}

void ff_log_threshold(enum ff_log_level level)
{
	atomic_store(&threshold, level);
}

static void write_line(enum ff_log_level level, const char *line)
{
	static const int priority[] = {LOG_ERR, LOG_WARNING, LOG_INFO, LOG_DEBUG};
	static const char *const word[] = {"error: ", "warning: ", "", "debug: "};

	if (atomic_load(&use_syslog))
		syslog(priority[level], "%s%s", word[level], line);
	else if (atomic_load(&stderr_is_journal))
		fprintf(stderr, "<%d>%s%s\n", priority[level], word[level], line);
	else
		fprintf(stderr, "fleecefs: %s%s\n", word[level], line);
}

static time_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC_COARSE, &t);
	return t.tv_sec;
}

/* Frees the place of a format. Lock: formats_lock. */
static void end_window(struct format *f)
{
	char line[200];

	if (f->fmt && f->held_back) {
		snprintf(line, sizeof line, "%u more lines like this one were left out: %s",
		         f->held_back, f->first);
		write_line(f->level, line);
	}
	f->fmt = NULL;
}

/* Is a line of this format to be written? */
static bool admit(enum ff_log_level level, const char *fmt, const char *line)
{
	struct format *f = &formats[((uintptr_t)fmt >> 3) % FORMATS];

	FF_GUARD(&formats_lock);
	if (f->fmt != fmt || now() - f->began >= WINDOW_S) {
		end_window(f);
		*f = (struct format){.fmt = fmt, .level = level, .began = now()};
		snprintf(f->first, sizeof f->first, "%.99s", line);
	}
	if (f->lines < BURST) {
		f->lines++;
		return true;
	}
	f->held_back++;
	return false;
}

void ff_log_pulse(void)
{
	FF_GUARD(&formats_lock);
	for (size_t i = 0; i < FORMATS; i++)
		if (formats[i].fmt && now() - formats[i].began >= WINDOW_S)
			end_window(&formats[i]);
}

void ff_log(enum ff_log_level level, const char *fmt, ...)
{
	int saved = errno;
	char line[PATH_MAX + 512];
	va_list ap;

	if ((int)level > threshold)
		return;
	va_start(ap, fmt);
	errno = saved; /* for %m */
	vsnprintf(line, sizeof line, fmt, ap);
	va_end(ap);
	/* Names of files may hold anything; a newline would begin a line that we did not write. */
	for (char *p = line; *p; p++)
		if ((unsigned char)*p < ' ' || *p == 0x7f)
			*p = '?';
	if (threshold == FF_LOG_DEBUG || admit(level, fmt, line))
		write_line(level, line);
	errno = saved;
}
