/*
 * An image is called as its disk is, below its snapshot's directory, so that a person finds it.
 * Two things stand in the way: names of up to 255 bytes to which "-fleece-N.qcow2" is added, and
 * directories of SOURCE called like a file of ours. Both get a hash of the whole name instead, so
 * that the result is a function of the path and different paths stay different. For that, a name
 * that already looks like one with a hash gets another; and a path that comes out too long is a
 * hash altogether.
 */
#include "cow/names.h"

#include <ctype.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

#include "cow/ledger_format.h"
#include "cow/manifest.h"
#include "ff_util.h"

enum { LONGEST_PATH = 3500, LONGEST_NAME = 255, HASH_CHARS = 17 };

static bool ends_with(const char *name, size_t len, const char *suffix)
{
	size_t n = strlen(suffix);

	return len >= n && memcmp(name + len - n, suffix, n) == 0;
}

static bool is_name(const char *name, size_t len, const char *other)
{
	return len == strlen(other) && memcmp(name, other, len) == 0;
}

const char *const names_suffixes[] = {NAMES_SUMS, LEDGER_SUFFIX, FF_SAID_SUFFIX, FF_SAID_NEW_SUFFIX,
                                      NULL};

/* Does NAME, of LEN bytes, end with a dot and one of them? */
static bool is_beside(const char *name, size_t len)
{
	const char *dot = memrchr(name, '.', len);
	size_t n = dot ? (size_t)(name + len - dot) - 1 : 0;

	for (size_t i = 0; dot && names_suffixes[i]; i++)
		if (is_name(dot + 1, n, names_suffixes[i]))
			return true;
	return false;
}

/* As hashed() makes names end. */
bool names_looks_hashed(const char *name, size_t len)
{
	return len >= HASH_CHARS && name[len - HASH_CHARS] == '~' &&
	       strspn(name + len - HASH_CHARS + 1, "0123456789abcdef") >= HASH_CHARS - 1;
}

/* Could a directory of this name stand where a file of ours is to be? */
static bool reserved(const char *name, size_t len)
{
	return names_looks_hashed(name, len) || is_beside(name, len) ||
	       is_name(name, len, MANIFEST_NAME) || is_name(name, len, NAMES_UNFINISHED) ||
	       is_name(name, len, NAMES_MAKING) || is_name(name, len, NAMES_CHECKPOINT) ||
	       ends_with(name, len, ".qcow2") || ends_with(name, len, ".backing") ||
	       ends_with(name, len, ".tmp");
}

/* NAME, cut so that EXTRA more bytes fit, with a hash; to OUT, which has room for 256 bytes. */
static void hashed(const char *name, size_t len, size_t extra, char *out)
{
	size_t keep = FF_MIN(len, LONGEST_NAME - extra - HASH_CHARS);

	snprintf(out, LONGEST_NAME + 1, "%.*s~%016llx", (int)keep, name,
	         (unsigned long long)XXH3_64bits(name, len));
}

static char *whole_hashed(const char *rel, const char *suffix)
{
	char *out;

	return asprintf(&out, "~%016llx%s", (unsigned long long)XXH3_64bits(rel, strlen(rel)),
	                suffix) < 0
	           ? NULL
	           : out;
}

char *names_image(const char *rel, uint64_t seq)
{
	char suffix[40], part[LONGEST_NAME + 1];
	int suffix_len =
	    snprintf(suffix, sizeof suffix, "-fleece-%llu.qcow2", (unsigned long long)seq);
	size_t rel_len = strlen(rel), used = 0, room;
	char *out;

	if (rel_len > LONGEST_PATH)
		return whole_hashed(rel, suffix);
	/* Each part grows by a hash at the most. */
	room = rel_len * (HASH_CHARS + 2) + sizeof suffix + HASH_CHARS + 1;
	out = malloc(room);
	if (!out)
		return NULL;
	for (const char *p = rel;;) {
		size_t len = strcspn(p, "/");
		bool last = p[len] == '\0';

		if (last ? len + (size_t)suffix_len > LONGEST_NAME || names_looks_hashed(p, len)
		         : reserved(p, len))
			hashed(p, len, last ? (size_t)suffix_len : 0, part);
		else
			snprintf(part, sizeof part, "%.*s", (int)len, p);
		used +=
		    (size_t)snprintf(out + used, room - used, "%s%s", part, last ? suffix : "/");
		if (last && used > LONGEST_PATH) {
			free(out);
			return whole_hashed(rel, suffix);
		}
		if (last)
			return out;
		p += len + 1;
	}
}

char *names_beside(const char *path, const char *suffix)
{
	size_t len = strlen(path);
	char *out;

	if (ends_with(path, len, ".qcow2") && len > strlen(".qcow2"))
		len -= strlen(".qcow2");
	return asprintf(&out, "%.*s.%s", (int)len, path, suffix) < 0 ? NULL : out;
}

char *names_backing_image(const char *from, const char *dir, const char *image)
{
	size_t up = 1, n = 0, room;
	char *out;

	for (const char *p = from; *p; p++)
		up += *p == '/';
	room = up * strlen("../") + strlen(dir) + 1 + strlen(image) + 1;
	out = malloc(room);
	if (!out)
		return NULL;
	for (; up; up--)
		n += (size_t)snprintf(out + n, room - n, "../");
	snprintf(out + n, room - n, "%s/%s", dir, image);
	return out;
}

/* What follows "-fleece-N" at the end of NAME, or NULL. */
static const char *after_number(const char *name)
{
	const char *at = NULL;

	for (const char *p = name; (p = strstr(p, "-fleece-")); p++)
		at = p + strlen("-fleece-");
	return at && isdigit((unsigned char)*at) ? at + strspn(at, "0123456789") : NULL;
}

bool names_is_image(const char *name)
{
	const char *end = after_number(name);

	return end && strcmp(end, ".qcow2") == 0;
}

bool names_ours(const char *name)
{
	const char *end;

	if (strcmp(name, MANIFEST_NAME ".tmp") == 0 || strcmp(name, NAMES_UNFINISHED) == 0 ||
	    strcmp(name, NAMES_MAKING) == 0 || strcmp(name, NAMES_CHECKPOINT) == 0)
		return true;
	if (name[0] == '~' && strspn(name + 1, "0123456789abcdef") == 16 &&
	    strcmp(name + 17, ".backing") == 0)
		return true;
	end = after_number(name);
	return end && (strcmp(end, ".qcow2") == 0 ||
	               (end[0] == '.' && !strchr(end + 1, '.') && is_beside(end, strlen(end))));
}

bool names_is_systems(const char *name)
{
	return strcmp(name, "lost+found") == 0;
}

bool names_is_nfs_unlinked(const char *name)
{
	/* .nfs, the number of the inode, and one that counts */
	return strlen(name) == 28 && strncmp(name, ".nfs", 4) == 0 &&
	       strspn(name + 4, "0123456789abcdef") == 24;
}

bool names_safe_path(const char *path)
{
	size_t total = strlen(path);

	if (total == 0 || total >= PATH_MAX)
		return false;
	for (const char *p = path;;) {
		size_t len = strcspn(p, "/");

		if (len == 0 || len > LONGEST_NAME || (len == 1 && p[0] == '.') ||
		    (len == 2 && p[0] == '.' && p[1] == '.'))
			return false;
		if (!p[len])
			return true;
		p += len + 1;
	}
}
