/*
 * Logging. Lines go to stderr (in the foreground, and until a background mount is ready) or to
 * syslog(3), facility daemon. Thread-safe; a line is written whole. errno is preserved. Of many
 * lines with the same FMT within seconds the first are written, and then how many were left out;
 * all, if those for debugging are shown.
 */
#ifndef FF_LOG_H
#define FF_LOG_H

enum ff_log_level { FF_LOG_ERROR, FF_LOG_WARNING, FF_LOG_INFO, FF_LOG_DEBUG };

/* Sends later lines to syslog instead of stderr. Call once. */
void ff_log_to_syslog(void);

/* If stderr is a stream of systemd's journal ($JOURNAL_STREAM), later lines there carry their
 * level. Call once. */
void ff_log_find_journal(void);

/* Shows lines up to LEVEL; FF_LOG_INFO unless called. */
void ff_log_threshold(enum ff_log_level level);

/* Call it once a second or so: says what was left out. */
void ff_log_pulse(void);

/* FMT lives as long as the program. */
void ff_log(enum ff_log_level level, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

#define ff_error(...)   ff_log(FF_LOG_ERROR, __VA_ARGS__)
#define ff_warning(...) ff_log(FF_LOG_WARNING, __VA_ARGS__)
#define ff_info(...)    ff_log(FF_LOG_INFO, __VA_ARGS__)
#define ff_debug(...)   ff_log(FF_LOG_DEBUG, __VA_ARGS__)

#endif
