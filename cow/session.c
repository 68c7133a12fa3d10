/*
 * How the last mount ended, and whether SOURCE was left alone since.
 *
 * Three small text files in FLEECE_DIR (text_file.c):
 *
 *   .source   which directory this FLEECE_DIR belongs to: inode and birth time of SOURCE
 *   .session  while mounted and after: the boot id, and which mounts of their filesystems
 *             FLEECE_DIR and SOURCE had (superblock.c)
 *   .clean    written by a clean end, and sealed: for each disk with a chain its inode, birth time,
 *             size, mtime and ctime, and for each image of the chain "image", the disk, the image's
 *             number and a hash of its L2 entries, or "known" without the hash, where it is not to
 *             be compared. Removed when a mount begins. Until then no L2 entry may be changed.
 *
 * .clean there: the mount ended cleanly; a disk which differs from its line, or has none that can
 * be read, was changed behind the mount's back. Else, .session is what one of now would be: the
 * daemon was killed, nothing is lost. Else what had not been flushed may be anything, for power was
 * lost (or the kernel died), or, on the same boot, a filesystem has been unmounted, which it
 * perhaps had to be because it failed. An end that finds that something could not be written back
 * says so in .session.
 *
 * Order at the beginning of a mount: what the ending means is made permanent in the images first,
 * then .known (known.c) and .session are written, then .alive (pulse.c) and .clean go. Killed
 * between any two, the next mount comes to the same conclusions. On storage that is full .session
 * is written where it is: cut in between, it is none of now.
 */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cow/device.h"
#include "cow/ending.h"
#include "cow/engine.h"
#include "cow/io.h"
#include "cow/text_file.h"
#include "ff_log.h"
#include "ff_util.h"

enum { SESSION_TEXT = 1024 };

#define LOST "lost\n" /* in .session: something could not be written back */

struct ending_line {
	uint64_t ino;
	int64_t btime_sec;
	uint32_t btime_nsec;
	int64_t size, mtime_sec, ctime_sec;
	int64_t mtime_nsec, ctime_nsec;
};

struct image_line {
	uint64_t ino, seq, hash;
	int64_t btime_sec;
	uint32_t btime_nsec;
	bool hashed;
};

struct ending_record {
	size_t count, image_count;
	struct image_line *images; /* malloc'd */
	struct ending_line lines[];
};

int session_boot_id(char *out, size_t size)
{
	ff_autoclose int fd = -1;
	size_t got;
	int r = io_openat(AT_FDCWD, "/proc/sys/kernel/random/boot_id", O_RDONLY, 0, &fd);

	if (!r)
		r = io_pread(fd, out, size - 1, 0, &got);
	if (!r)
		out[got] = '\0';
	return r;
}

/* What .session says as long as nothing can be lost. */
static int session_text(struct ff_store *s, char out[SESSION_TEXT])
{
	char boot[64], fleece[SESSION_TEXT / 3], source[SESSION_TEXT / 3];
	int r = session_boot_id(boot, sizeof boot);

	if (r) {
		ff_error("cannot read the boot id: %s", strerror(-r));
		return r;
	}
	r = superblock_of(s->fleece_fd, fleece, sizeof fleece);
	if (!r)
		r = superblock_of(s->source_fd, source, sizeof source);
	if (r)
		ff_error("cannot tell which filesystems %s and %s are on: %s", s->fleece_path,
		         s->source_path, strerror(-r));
	else
		snprintf(out, SESSION_TEXT, "%s%s\n%s\n", boot, fleece, source);
	return r;
}

static int by_ino(const void *a, const void *b)
{
	uint64_t x = ((const struct ending_line *)a)->ino, y = ((const struct ending_line *)b)->ino;

	return FF_ORDER(x, y);
}

/* All of the image's name, but not of what it says. */
static int by_image(const void *a, const void *b)
{
	const struct image_line *x = a, *y = b;
	int r = FF_ORDER(x->ino, y->ino);

	if (!r)
		r = FF_ORDER(x->btime_sec, y->btime_sec);
	if (!r)
		r = FF_ORDER(x->btime_nsec, y->btime_nsec);
	return r ? r : FF_ORDER(x->seq, y->seq);
}

static bool parse_disk(const char *text, struct ending_line *l)
{
	return sscanf(text,
	              "%" SCNu64 " %" SCNd64 " %" SCNu32 " %" SCNd64 " %" SCNd64 " %" SCNd64
	              " %" SCNd64 " %" SCNd64,
	              &l->ino, &l->btime_sec, &l->btime_nsec, &l->size, &l->mtime_sec,
	              &l->mtime_nsec, &l->ctime_sec, &l->ctime_nsec) == 8;
}

static bool is_image_line(const char *text)
{
	return strncmp(text, "image ", 6) == 0 || strncmp(text, "known ", 6) == 0;
}

static bool parse_image(const char *text, struct image_line *l)
{
	int n = sscanf(text + 6, "%" SCNu64 " %" SCNd64 " %" SCNu32 " %" SCNu64, &l->ino,
	               &l->btime_sec, &l->btime_nsec, &l->seq);

	l->hashed = text[0] == 'i';
	return n == 4 &&
	       (!l->hashed || sscanf(text, "image %*u %*d %*u %*u %" SCNx64, &l->hash) == 1);
}

static int parse_record(const char *text, struct ending_record **out)
{
	size_t room = 0;
	struct ending_record *rec;
	const char *last, *p;

	if (!text_is_sealed(text, &last))
		return -EINVAL;
	for (p = text; p < last; p++)
		room += *p == '\n';
	rec = calloc(1, sizeof *rec + room * sizeof rec->lines[0]);
	if (!rec || !(rec->images = calloc(room + 1, sizeof rec->images[0]))) {
		free(rec);
		return -ENOMEM;
	}
	for (p = text; p < last; p = strchr(p, '\n') + 1)
		if (is_image_line(p) ? !parse_image(p, &rec->images[rec->image_count++])
		                     : !parse_disk(p, &rec->lines[rec->count++])) {
			session_record_free(rec);
			return -EINVAL;
		}
	qsort(rec->lines, rec->count, sizeof rec->lines[0], by_ino);
	qsort(rec->images, rec->image_count, sizeof rec->images[0], by_image);
	*out = rec;
	return 0;
}

int session_ending(struct ff_store *s, enum ending *how, struct ending_record **record)
{
	ff_autofree char *clean = NULL, *session = NULL;
	size_t boot;
	char now[SESSION_TEXT];
	int r = text_read(s->fleece_fd, ".clean", &clean);

	*record = NULL;
	if (!r || r == -EINVAL || r == -ELOOP) {
		*how = ENDED_CLEAN;
		r = r ? r : parse_record(clean, record);
		if (!r || r == -ENOMEM)
			return r;
		ff_error("%s/.clean is damaged: whether SOURCE was left alone since cannot be told",
		         s->fleece_path);
		*record = calloc(1, sizeof **record);
		return *record ? 0 : -ENOMEM;
	}
	if (r != -ENOENT) {
		ff_error("%s/.clean cannot be read: %s", s->fleece_path, strerror(-r));
		return r;
	}
	r = session_text(s, now);
	if (r)
		return r;
	r = text_read(s->fleece_fd, ".session", &session);
	if (r && r != -ENOENT)
		ff_error("%s/.session cannot be read: %s", s->fleece_path, strerror(-r));
	boot = strcspn(now, "\n") + 1;
	*how = r == -ENOENT                       ? ENDED_NEVER
	       : r                                ? ENDED_TORN
	       : strcmp(session, now) == 0        ? ENDED_KILLED
	       : strncmp(session, now, boot) == 0 ? ENDED_FAILED
	       : strcmp(session, LOST) == 0       ? ENDED_FAILED
	                                          : ENDED_TORN;
	return 0;
}

bool session_unchanged(const struct ending_record *record, const struct identity *id,
                       const struct stat *st)
{
	struct ending_line key = {.ino = id->ino};
	const struct ending_line *l;

	l = bsearch(&key, record->lines, record->count, sizeof key, by_ino);
	if (!l || l->btime_sec != id->btime_sec || l->btime_nsec != id->btime_nsec ||
	    l->size != st->st_size || l->mtime_sec != st->st_mtim.tv_sec ||
	    l->mtime_nsec != st->st_mtim.tv_nsec)
		return false;
	/* A device's node has its times changed by whoever looks after /dev; see
	 * device_evidence(). */
	if (identity_is_device(id))
		return st->st_mtim.tv_sec >= 0;
	return l->ctime_sec == st->st_ctim.tv_sec && l->ctime_nsec == st->st_ctim.tv_nsec;
}

static const struct image_line *find_image(const struct ending_record *record,
                                           const struct identity *id, uint64_t seq)
{
	struct image_line key = {id->ino, seq, 0, id->btime_sec, id->btime_nsec, false};

	if (!record->image_count)
		return NULL;
	return bsearch(&key, record->images, record->image_count, sizeof key, by_image);
}

bool session_entries_changed(const struct ending_record *record, const struct identity *id,
                             uint64_t seq, uint64_t hash)
{
	const struct image_line *l = find_image(record, id, seq);

	return l && l->hashed && l->hash != hash;
}

bool session_image_known(const struct ending_record *record, const struct identity *id,
                         uint64_t seq)
{
	return find_image(record, id, seq) != NULL;
}

void session_record_free(struct ending_record *record)
{
	if (record)
		free(record->images);
	free(record);
}

int session_begin(struct ff_store *s)
{
	ff_autofree char *before = NULL;
	char now[SESSION_TEXT];
	int r = session_text(s, now);

	if (!r && (text_read(s->fleece_fd, ".session", &before) || strcmp(before, now) != 0))
		r = text_write_over(s, ".session", now, strlen(now));
	if (r)
		return r;
	r = pulse_forget(s);
	if (r)
		return r;
	r = io_unlinkat(s->fleece_fd, ".clean", 0);
	return r && r != -ENOENT ? r : io_fsync(s->fleece_fd);
}

/* One that cannot be read is not compared. */
static void add_images(struct ff_disk *d, FILE *f)
{
	for (struct link *l = atomic_load(&d->top); l; l = l->older) {
		bool broken = ff_image_is_broken(l->img);
		uint64_t hash;
		bool hashed = !broken && !ff_image_entries_hash(l->img, &hash);

		fprintf(f, "%s %llu %lld %u %llu", hashed ? "image" : "known",
		        (unsigned long long)d->id.ino, (long long)d->id.btime_sec, d->id.btime_nsec,
		        (unsigned long long)ff_image_desc(l->img)->seq);
		if (hashed)
			fprintf(f, " %016llx", (unsigned long long)hash);
		fputc('\n', f);
		if (!broken)
			ff_image_park(l->img);
	}
}

static int add_line(struct ff_disk *d, void *ctx)
{
	FILE *f = ctx;
	struct stat st;
	int r;

	disk_check_device(d, NULL);
	if (!chain_wanted(d)) /* it may even be gone */
		return 0;
	disk_use(d);
	r = disk_evidence(d, &st);
	disk_unuse(d);
	if (r) {
		ff_error("inode %llu: cannot look at the source: %s", (unsigned long long)d->id.ino,
		         strerror(-r));
		return r; /* without a line it would be taken for changed */
	}
	fprintf(f, "%llu %lld %u %lld %lld %ld %lld %ld\n", (unsigned long long)d->id.ino,
	        (long long)d->id.btime_sec, d->id.btime_nsec, (long long)st.st_size,
	        (long long)st.st_mtim.tv_sec, st.st_mtim.tv_nsec, (long long)st.st_ctim.tv_sec,
	        st.st_ctim.tv_nsec);
	add_images(d, f);
	return 0;
}

static int has_chain(struct ff_disk *d, void *ctx)
{
	*(bool *)ctx = true;
	return 1;
}

/* Could some of the disk's bytes, or of what was saved of it, not be written back? An error of
 * syncfs alone may be another file's, or pass. */
static int lost_pages(struct ff_disk *d, void *ctx)
{
	int fd, r;

	disk_use(d);
	/* one that is open: what fails as a whole cannot be opened */
	fd = atomic_load(&d->old_fd);
	r = fd >= 0 ? 0 : disk_source(d, &fd);
	if (!r)
		r = io_writeback_error(fd);
	for (struct link *l = atomic_load(&d->top); l && !r; l = l->older)
		r = ff_image_written_back(l->img);
	disk_unuse(d);
	return r;
}

int session_end(struct ff_store *s)
{
	char *text = NULL, seal[TEXT_SEAL];
	size_t len = 0;
	FILE *f = open_memstream(&text, &len);
	bool chains = false;
	int r = 0;

	if (!f)
		return -ENOMEM;
	/* The record must not be there before what it vouches for. Where no disk has a view it
	 * vouches for nothing, and a busy filesystem is not made to wait. */
	disk_each(s, has_chain, &chains);
	if (chains) {
		r = io_syncfs(s->fleece_fd);
		if (!r)
			r = io_syncfs(s->source_fd);
		if (!r)
			r = disk_each(s, disk_sync_device, NULL);
		if (r && disk_each(s, lost_pages, NULL))
			text_write_over(s, ".session", LOST, strlen(LOST));
	}
	if (!r)
		r = disk_each(s, add_line, f);
	if (fflush(f) || ferror(f)) { /* there is no text, or only a part */
		fclose(f);
		free(text);
		return r ? r : -ENOMEM;
	}
	text_seal(text, len, seal);
	fputs(seal, f);
	if ((fclose(f) || !text) && !r) /* the text is copied once more */
		r = -ENOMEM;
	if (!r)
		r = text_write(s, ".clean", text, len);
	free(text);
	return r;
}

int session_check_source(struct ff_store *s, bool has_snapshots)
{
	ff_autofree char *text = NULL;
	struct identity id;
	char mine[96];
	int r = identity_of(s->source_fd, "", &id, NULL);

	if (r)
		return r;
	snprintf(mine, sizeof mine, "%llu %lld %u\n", (unsigned long long)id.ino,
	         (long long)id.btime_sec, id.btime_nsec);
	r = text_read(s->fleece_fd, ".source", &text);
	if (!r && strcmp(text, mine) == 0)
		return 0;
	if (r && r != -ENOENT && r != -EINVAL &&
	    r != -ELOOP) { /* it may be right, for all we know */
		ff_error("%s/.source cannot be read: %s", s->fleece_path, strerror(-r));
		return r;
	}
	if (has_snapshots && r) {
		ff_error("%s: has snapshots, but no file .source%s: it says which SOURCE they are "
		         "of; put it back from a copy, or move the directories of the snapshots "
		         "away, or give another --fleece-dir",
		         s->fleece_path, r == -ENOENT ? "" : " that can be used");
		return -EINVAL;
	}
	if (has_snapshots) {
		ff_error("%s: by its file .source it does not hold snapshots of %s: mount the "
		         "SOURCE that it belongs to (is its filesystem mounted?), or give another "
		         "--fleece-dir",
		         s->fleece_path, s->source_path);
		return -EINVAL;
	}
	return text_write(s, ".source", mine, strlen(mine));
}
