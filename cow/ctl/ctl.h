/*
 * fleecectl: what its commands share. A function of this program that talks to the user returns an
 * exit status, having said why if that is not 0; all others return 0 or -errno as everywhere.
 */
#ifndef FF_CTL_H
#define FF_CTL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <time.h>
#include <jansson.h>

enum {
	CTL_OK = 0,
	CTL_DAMAGE = 1,
	CTL_USAGE = 64,
	CTL_NO_INPUT = 66,
	CTL_NOT_MOUNTED = 69,
	CTL_INTERNAL = 70,
	CTL_CANNOT_CREATE = 73,
	CTL_IO = 74,
	CTL_BUSY = 75,
	CTL_NO_PERMISSION = 77,
};

/* --- main.c --- */
/* Prints the usage of COMMAND on stderr: 64. */
int ctl_usage(const char *command);

/* --- the commands, one in each file --- */
int cmd_status(int argc, char **argv);
int cmd_list(int argc, char **argv);
int cmd_create(int argc, char **argv);
int cmd_drop(int argc, char **argv);
int cmd_check(int argc, char **argv);
int cmd_gc(int argc, char **argv);
int cmd_map(int argc, char **argv);

/* --- text.c: what may be shown on a terminal --- */
/* A line on stderr after "fleecectl: ", and one on stdout. Whatever a terminal could take for a
 * command is escaped; so is the whole line, names and all. */
void ctl_error(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
void ctl_say(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
/* Says "WHAT: error R" and returns the exit status that goes with it. */
int ctl_fail(const char *what, int r);

/* Writes NAME to OUT, escaped, in exactly COLUMNS columns: cut with "..." or padded. */
void text_cell(FILE *out, const char *name, unsigned columns);
/* The same, not padded. Returns the columns that were used. */
unsigned text_cut(FILE *out, const char *name, unsigned columns);
/* At most five columns: "0", "4.0K", "123M". */
struct text {
	char s[24];
};
struct text text_size(double bytes);
/* At most six: "42s", "3m", "2h10m", "5d3h". */
struct text text_span(double seconds);
/* At most six: "850us", "12ms", "3.4s". */
struct text text_wait(double us);
/* "[####----]" with WIDTH characters between the brackets (at most 20). */
struct text text_bar(double fraction, unsigned width);
/* Columns of the terminal that OUT is, else DEF. */
unsigned text_columns(FILE *out, unsigned def);

/* --- place.c: mounts and fleece directories --- */
struct place {
	char *mountpoint;      /* NULL: found by its fleece directory */
	json_t *status;        /* of a mount */
	char *status_text;     /* the same, as it was read */
	char *snapdir;         /* its snapshots, below the mountpoint */
	char *fleece_path;     /* as it is called */
	int fleece_fd;         /* -1 until place_open_fleece() */
	char *source_path;     /* NULL: not known */
	bool live;             /* a fleecefs has it */
	struct timespec since; /* when a fleecefs last took or gave back its lock */
};
/* The mount at PATH; NULL: the only one. */
int place_mount(const char *path, struct place *p);
/* That, or the fleece directory at PATH. */
int place_any(const char *path, struct place *p);
/* Is there a mount or a fleece directory at PATH? */
bool place_is_one(const char *path);
/* Makes p->fleece_fd, and p->live say whether a fleecefs has it. */
int place_open_fleece(struct place *p);
/* Has a fleecefs had it since it was found to be nobody's? */
bool place_was_mounted(const struct place *p);
void place_free(struct place *p);
/* status.json anew. */
int place_reload(struct place *p);

/* Fields of JSON objects; 0, "" and null where they are missing or of another type. */
double json_num(const json_t *o, const char *name);
const char *json_text(const json_t *o, const char *name);
bool json_has(const json_t *o, const char *name);
/* Sets NAME to VALUE, with each byte that is no UTF-8 as U+FFFD, and then NAME_hex to all bytes. */
int json_set_name(json_t *o, const char *name, const char *value);

/* --- progress.c --- */
struct progress {
	bool shown; /* stderr is a terminal */
	double total, done, drawn;
};
void progress_begin(struct progress *p, double total);
void progress_add(struct progress *p, double amount);
/* Takes the bar away, so that a line can be written. */
void progress_clear(struct progress *p);

#endif
