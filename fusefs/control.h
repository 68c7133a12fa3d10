/*
 * What control.c and the writers of its two files share.
 */
#ifndef FF_CONTROL_H
#define FF_CONTROL_H

#include <stdbool.h>
#include <stddef.h>

struct fs;
struct json_t;

/* The content of status.json and of metrics as of now: *OUT is malloc'd, *LEN bytes. -ENOMEM. */
int control_json(struct fs *fs, char **out, size_t *len);
int control_metrics(struct fs *fs, char **out, size_t *len);

/* Sets KEY of the JSON object TO to NAME, and KEY_HEX to its bytes if it is not UTF-8. -ENOMEM. */
int control_json_name(struct json_t *to, const char *key, const char *key_hex, const char *name);
/* NAME as UTF-8, malloc'd, or NULL without memory: each byte that belongs to no character becomes
 * U+FFFD. *EXACT: there was none. */
char *control_utf8(const char *name, bool *exact);
/* The bytes of NAME as lower case hexadecimal digits; malloc'd, or NULL. */
char *control_hex(const char *name);

/* Since FS was started, seconds. */
double control_uptime(const struct fs *fs);
/* At the present rate, FREE bytes are used up in that many seconds; negative: never. */
double control_seconds_to_full(double growth, double free_bytes);

#endif
