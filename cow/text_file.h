/*
 * Small text files in FLEECE_DIR, each written as a whole. A file may be sealed: then its last line
 * is a hash of all before, and one that was cut or changed is told from one that is whole.
 */
#ifndef FF_COW_TEXT_FILE_H
#define FF_COW_TEXT_FILE_H

#include <stdbool.h>
#include <stddef.h>

struct ff_store;

enum { TEXT_SEAL = 32 };

/* The file's text, NUL-terminated, malloc'd. -ENOENT; -EINVAL, -ELOOP: not a file of ours. */
int text_read(int dirfd, const char *name, char **out);
/* Is the text none of ours, for that error of text_read(), rather than one that may be right? */
bool text_is_foreign(int error);
/* Puts it in the place of the old one, or of whatever lies there, which is not opened. DURABLE: for
 * good. *OUT: its descriptor, for writing. */
int text_replace(int dirfd, const char *name, const char *text, size_t len, bool durable, int *out);
/* The same, for good. Errors are logged. */
int text_write(struct ff_store *s, const char *name, const char *text, size_t len);
/* The same; where there is no space for another, over the old one: cut in between, it is both. */
int text_write_over(struct ff_store *s, const char *name, const char *text, size_t len);
/* The line that seals LEN bytes of TEXT. */
void text_seal(const char *text, size_t len, char out[TEXT_SEAL]);
/* Is the text whole? Then *END is where its seal begins. */
bool text_is_sealed(const char *text, const char **end);

#endif
