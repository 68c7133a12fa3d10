/*
 * Logging to stderr or syslog. The two static flags are atomic: a background mount goes over to
 * syslog when it is ready, with threads running. A line written meanwhile goes to either.
 */
#include "ff_log.h"

#include <errno.h>
#include <limits.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <syslog.h>

static atomic_bool use_syslog;
static atomic_int threshold = FF_LOG_INFO;

void ff_log_to_syslog(void)
{
	openlog("fleecefs", LOG_PID, LOG_DAEMON);
	atomic_store(&use_syslog, true);
}

void ff_log_threshold(enum ff_log_level level)
{
	atomic_store(&threshold, level);
}

void ff_log(enum ff_log_level level, const char *fmt, ...)
{
	static const int priority[] = {LOG_ERR, LOG_WARNING, LOG_INFO, LOG_DEBUG};
	static const char *const word[] = {"error: ", "warning: ", "", "debug: "};
	int saved = errno;
	char line[PATH_MAX + 512];
	va_list ap;

	if ((int)level > threshold)
		return;
	va_start(ap, fmt);
	vsnprintf(line, sizeof line, fmt, ap);
	va_end(ap);
	/* Names of files may hold anything; a newline would begin a line that we did not write. */
	for (char *p = line; *p; p++)
		if ((unsigned char)*p < ' ' || *p == 0x7f)
			*p = '?';
	if (atomic_load(&use_syslog))
		syslog(priority[level], "%s%s", word[level], line);
	else
		fprintf(stderr, "fleecefs: %s%s\n", word[level], line);
	errno = saved;
}
