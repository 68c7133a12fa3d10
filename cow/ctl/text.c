/*
 * What may be shown on a terminal: names that come from anywhere, sizes, times, bars. No state.
 *
 * A name may hold escape sequences, newlines, bytes that are no characters of the locale, and
 * characters that hide or turn around their neighbours. All of them are shown as \xHH.
 */
#include <errno.h>
#include <limits.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>
#include <wchar.h>
#include <wctype.h>

#include "cow/ctl/ctl.h"
#include "ff_util.h"

/* Characters that print nothing and change how others look. */
static bool is_hidden(wchar_t c)
{
	return c == 0xad || c == 0x61c || (c >= 0x200b && c <= 0x200f) ||
	       (c >= 0x2028 && c <= 0x202e) || (c >= 0x2060 && c <= 0x206f) || c == 0xfeff ||
	       (c >= 0xfff0 && c <= 0xfffb) || (c >= 0xe0000 && c <= 0xe0fff);
}

/* The next character of S: how many BYTES it takes, and COLUMNS; false: to be escaped, a byte. */
static bool next_char(const char *s, size_t *bytes, unsigned *columns)
{
	mbstate_t state = {0};
	wchar_t c;
	size_t n = mbrtowc(&c, s, MB_CUR_MAX, &state);
	int width;

	*bytes = 1;
	*columns = 4;
	if (n == 0 || n > MB_CUR_MAX || !iswprint((wint_t)c) || is_hidden(c))
		return false;
	width = wcwidth(c);
	if (width < 0)
		return false;
	*bytes = n;
	*columns = (unsigned)width;
	return true;
}

/* Writes what fits COLUMNS; returns what was used, and *REST what did not fit. */
static unsigned put(FILE *out, const char *s, unsigned columns, const char **rest)
{
	unsigned used = 0, width;
	size_t n;

	for (; *s; s += n) {
		bool shown = next_char(s, &n, &width);

		if (used + width > columns)
			break;
		if (shown)
			fwrite(s, 1, n, out);
		else
			fprintf(out, "\\x%02x", (unsigned char)*s);
		used += width;
	}
	*rest = s;
	return used;
}

static unsigned width_of(const char *s)
{
	unsigned sum = 0, width;
	size_t n;

	for (; *s && sum < 10000; s += n) {
		next_char(s, &n, &width);
		sum += width;
	}
	return sum;
}

unsigned text_cut(FILE *out, const char *name, unsigned columns)
{
	const char *rest;
	unsigned used;

	if (width_of(name) <= columns)
		return put(out, name, columns, &rest);
	used = columns > 3 ? put(out, name, columns - 3, &rest) : 0;
	fprintf(out, "%.*s", (int)FF_MIN(columns, 3u), "...");
	return used + FF_MIN(columns, 3u);
}

void text_cell(FILE *out, const char *name, unsigned columns)
{
	unsigned used = text_cut(out, name, columns);

	fprintf(out, "%*s", (int)(columns - used), "");
}

static void __attribute__((format(printf, 3, 0)))
put_line(FILE *out, const char *before, const char *fmt, va_list ap)
{
	ff_autofree char *line = NULL;
	const char *rest;

	if (vasprintf(&line, fmt, ap) < 0) {
		line = NULL;
		return;
	}
	fputs(before, out);
	put(out, line, UINT_MAX / 2, &rest);
	fputc('\n', out);
}

void ctl_error(const char *fmt, ...)
{
	va_list ap;

	fflush(stdout);
	va_start(ap, fmt);
	put_line(stderr, "fleecectl: ", fmt, ap);
	va_end(ap);
}

void ctl_say(const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	put_line(stdout, "", fmt, ap);
	va_end(ap);
}

int ctl_fail(const char *what, int r)
{
	ctl_error("%s: %s", what, strerror(-r));
	switch (r) {
	case -ENOENT:
	case -ENOTDIR:
		return CTL_NO_INPUT;
	case -EACCES:
	case -EPERM:
		return CTL_NO_PERMISSION;
	case -EBUSY:
		return CTL_BUSY;
	case -ENOTCONN:
		return CTL_NOT_MOUNTED;
	case -ENOMEM:
	case -EMFILE:
		return CTL_INTERNAL;
	default:
		return CTL_IO;
	}
}

struct text text_size(double bytes)
{
	static const char unit[] = "\0KMGTPE";
	struct text t;
	int i = 0;

	if (!(bytes > 0))
		bytes = 0;
	while (bytes >= 999.5 && i < 6) {
		bytes /= 1024;
		i++;
	}
	bytes = FF_MIN(bytes, 9999.0);
	if (i && bytes < 9.95)
		snprintf(t.s, sizeof t.s, "%.1f%c", bytes, unit[i]);
	else if (i)
		snprintf(t.s, sizeof t.s, "%.0f%c", bytes, unit[i]);
	else
		snprintf(t.s, sizeof t.s, "%.0f", bytes);
	return t;
}

struct text text_span(double seconds)
{
	unsigned long s = seconds > 0 ? (unsigned long)FF_MIN(seconds, 1e15) : 0;
	struct text t;

	if (s < 60)
		snprintf(t.s, sizeof t.s, "%lus", s);
	else if (s < 3600)
		snprintf(t.s, sizeof t.s, "%lum", s / 60);
	else if (s < 86400)
		snprintf(t.s, sizeof t.s, "%luh%02lum", s / 3600, s / 60 % 60);
	else if (s < 100 * 86400)
		snprintf(t.s, sizeof t.s, "%lud%02luh", s / 86400, s / 3600 % 24);
	else
		snprintf(t.s, sizeof t.s, "%lud", FF_MIN(s / 86400, 99999ul));
	return t;
}

struct text text_wait(double us)
{
	struct text t;

	if (!(us > 0))
		us = 0;
	if (us < 999.5)
		snprintf(t.s, sizeof t.s, "%.0fus", us);
	else if (us < 9950)
		snprintf(t.s, sizeof t.s, "%.1fms", us / 1e3);
	else if (us < 9999.5e3)
		snprintf(t.s, sizeof t.s, "%.0fms", us / 1e3);
	else
		snprintf(t.s, sizeof t.s, "%.0fs", FF_MIN(us / 1e6, 99999.0));
	return t;
}

struct text text_bar(double fraction, unsigned width)
{
	struct text t;
	unsigned full;

	width = FF_MIN(width, 20u);
	fraction = !(fraction > 0) ? 0 : FF_MIN(fraction, 1.0);
	full = (unsigned)(fraction * width + 1e-9);
	t.s[0] = '[';
	memset(t.s + 1, '#', full);
	memset(t.s + 1 + full, '-', width - full);
	t.s[1 + width] = ']';
	t.s[2 + width] = '\0';
	return t;
}

unsigned text_columns(FILE *out, unsigned def)
{
	struct winsize size;

	if (!isatty(fileno(out)) || ioctl(fileno(out), TIOCGWINSZ, &size) || !size.ws_col)
		return def;
	return size.ws_col;
}
