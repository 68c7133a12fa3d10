/*
 * Which snapshots were there when a mount began, so that one which was not is known by it.
 *
 * A snapshot whose directory is away while there is a mount knows nothing of what is changed then:
 * put back, it would show new data as old. A clean end leaves a record of each disk; but not even a
 * killed daemon may be taken for one that had this snapshot. So each mount has a number, at random,
 * each manifest tells in which mount it was made, and FLEECE_DIR/.known, sealed, tells
 *
 *   mount NUMBER       of the last mount that began
 *   known NUMBER SEQ   for each snapshot that this mount began with: in which it was made, and its
 *                      own number there
 *   dir INO BTIME NSEC the same for one whose manifest could not be read: its directory
 *
 * A snapshot is known if the last mount made it or began with it; one with a damaged manifest is
 * not asked, for nothing of it is shown, and what older ones need of it is. Any other was absent:
 * none of its views is believed again, and none of its images joins a chain, for what the images of
 * the others say is right without. Nor does a later mount begin with it. Numbers of snapshots come
 * back, when all that are higher have gone; the pair does not.
 *
 * .known is replaced when recovery has judged all that it found, before anything is changed: if the
 * mount is cut short then, what is not in it was away for nothing, which costs views but no truth.
 * One that is gone or damaged knows no snapshot. Only those of manifests that tell of no mount, as
 * they were made by a fleecefs that wrote no .known, are believed as long as there is none.
 *
 * A part of FLEECE_DIR that is put back from a copy of the same mount is not told from what it
 * replaces.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

#include "cow/ending.h"
#include "cow/engine.h"
#include "cow/text_file.h"
#include "ff_log.h"
#include "ff_util.h"

#define KNOWN ".known"

enum { LINE = 80 };

struct one {
	bool dir;
	uint64_t made, seq; /* of a directory: its inode, and birth time */
	uint32_t nsec;
};

struct known {
	bool told; /* there is such a file, whatever it says */
	uint64_t mount;
	size_t count;
	struct one list[];
};

static int by_number(const void *a, const void *b)
{
	const struct one *x = a, *y = b;
	int r = FF_ORDER(y->dir, x->dir);

	if (!r)
		r = FF_ORDER(x->made, y->made);
	if (!r)
		r = FF_ORDER(x->seq, y->seq);
	return r ? r : FF_ORDER(x->nsec, y->nsec);
}

/* The line of ONE, without its end. */
static void format_one(const struct one *one, char line[LINE])
{
	if (one->dir)
		snprintf(line, LINE, "dir %" PRIu64 " %" PRIu64 " %" PRIu32, one->made, one->seq,
		         one->nsec);
	else
		snprintf(line, LINE, "known %016" PRIx64 " %" PRIu64, one->made, one->seq);
}

/* Nothing counts but what we write: scanf takes signs, blanks and what follows as well. */
static bool parse_one(const char *line, struct one *one)
{
	char mine[LINE];

	*one = (struct one){.dir = line[0] == 'd'};
	if (one->dir ? sscanf(line, "dir %" SCNu64 " %" SCNu64 " %" SCNu32, &one->made, &one->seq,
	                      &one->nsec) != 3
	             : sscanf(line, "known %" SCNx64 " %" SCNu64, &one->made, &one->seq) != 2)
		return false;
	format_one(one, mine);
	return strncmp(line, mine, strlen(mine)) == 0 && line[strlen(mine)] == '\n';
}

int known_parse(const char *text, struct known **out)
{
	ff_autofree struct known *k = NULL;
	const char *end, *p;
	size_t lines = 0;

	if (!text_is_sealed(text, &end))
		return -EINVAL;
	for (p = text; p < end; p++)
		lines += *p == '\n';
	k = calloc(1, sizeof *k + lines * sizeof k->list[0]);
	if (!k)
		return -ENOMEM;
	k->told = true;
	if (sscanf(text, "mount %" SCNx64, &k->mount) != 1 || k->mount == 0)
		return -EINVAL;
	for (p = strchr(text, '\n') + 1; p < end; p = strchr(p, '\n') + 1)
		if (!parse_one(p, &k->list[k->count++]))
			return -EINVAL;
	qsort(k->list, k->count, sizeof k->list[0], by_number);
	*out = ff_take_ptr(&k);
	return 0;
}

int known_load(struct ff_store *s, struct known **out)
{
	ff_autofree char *text = NULL;
	int r = text_read(s->fleece_fd, KNOWN, &text);

	if (r && r != -ENOENT && !text_is_foreign(r)) {
		ff_error("%s/" KNOWN " cannot be read: %s", s->fleece_path, strerror(-r));
		return r;
	}
	if (!r)
		r = known_parse(text, out);
	if (r != -ENOENT && !text_is_foreign(r))
		return r;
	if (r != -ENOENT)
		ff_error("%s/" KNOWN " is damaged: which snapshots the last mount had cannot be "
		         "told",
		         s->fleece_path);
	*out = calloc(1, sizeof **out);
	if (!*out)
		return -ENOMEM;
	(*out)->told = r != -ENOENT;
	return 0;
}

static bool is_listed(const struct known *k, const struct one *key)
{
	return k->count && bsearch(key, k->list, k->count, sizeof *key, by_number);
}

bool known_has(const struct known *k, uint64_t made, uint64_t seq, int dirfd)
{
	struct one key = {false, made, seq, 0};
	struct identity id;

	if (!k->told)
		return made == 0;
	if ((made && made == k->mount) || is_listed(k, &key))
		return true;
	if (identity_of(dirfd, "", &id, NULL))
		return false;
	key = (struct one){true, id.ino, (uint64_t)id.btime_sec, id.btime_nsec};
	return is_listed(k, &key);
}

void known_free(struct known *k)
{
	free(k);
}

static int new_number(uint64_t *out)
{
	do {
		if (getrandom(out, sizeof *out, 0) != sizeof *out)
			return errno ? -errno : -EIO;
	} while (*out == 0);
	return 0;
}

static int tell_one(const struct ff_snap *snap, FILE *f)
{
	struct one one = {.made = snap->made, .seq = snap->seq};
	struct identity id;
	char line[LINE];
	int r;

	if (snap->absent)
		return 0;
	if (snap->damaged) {
		r = identity_of(snap->dir->fd, "", &id, NULL);
		if (r)
			return r;
		one = (struct one){true, id.ino, (uint64_t)id.btime_sec, id.btime_nsec};
	}
	format_one(&one, line);
	fprintf(f, "%s\n", line);
	return 0;
}

int known_begin(struct ff_store *s)
{
	char *text = NULL, seal[TEXT_SEAL];
	size_t len = 0;
	FILE *f;
	int r = new_number(&s->mount), bad;

	if (r)
		return r;
	f = open_memstream(&text, &len);
	if (!f)
		return -ENOMEM;
	fprintf(f, "mount %016llx\n", (unsigned long long)s->mount);
	for (const struct ff_snap *snap = s->snaps; snap && !r; snap = snap->next)
		r = tell_one(snap, f);
	bad = fflush(f) || ferror(f); /* then there is no text, or only a part */
	if (!bad) {
		text_seal(text, len, seal);
		fputs(seal, f);
	}
	bad |= fclose(f) || !text; /* the text is copied once more */
	if (!r)
		r = bad ? -ENOMEM : text_write_over(s, KNOWN, text, len);
	free(text);
	return r;
}
