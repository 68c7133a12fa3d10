/*
 * The small text files of FLEECE_DIR and the names of notes. The first byte of an input chooses:
 * the record of a clean end or the list of snapshots (with and without its hash put right), or one
 * of the files, which is then put in place and read as at a mount.
 */
#include "cow/session.c"

#include <xxhash.h>

#include "fuzz.h"

enum { ENDING, SOURCE_NAME, ALIVE, KNOWN, KINDS };

static struct ff_store store;

static void open_store(void)
{
	if (store.fleece_path)
		return;
	store.fleece_fd = fuzz_dir();
	store.source_fd = fuzz_dir();
	store.fleece_path = "/fleece";
	store.source_path = "/source";
}

static size_t count_lines(const char *text, const char *end)
{
	size_t n = 0;

	for (; text < end; text++)
		n += *text == '\n';
	return n;
}

static void check_images(const struct ending_record *rec)
{
	for (size_t i = 0; i < rec->image_count; i++) {
		const struct image_line *l = &rec->images[i];
		struct identity id = {0, l->ino, l->btime_sec, l->btime_nsec};
		bool alone = (i == 0 || by_image(l - 1, l)) &&
		             (i + 1 == rec->image_count || by_image(l, l + 1));

		FUZZ_CHECK(i == 0 || by_image(l - 1, l) <= 0);
		FUZZ_CHECK(!alone || !session_entries_changed(rec, &id, l->seq, l->hash));
		FUZZ_CHECK(!alone ||
		           session_entries_changed(rec, &id, l->seq, ~l->hash) == l->hashed);
	}
}

static void check_record(const char *text)
{
	struct ending_record *rec = NULL;
	const char *last = strstr(text, "xxh3 ");
	int r = parse_record(text, &rec);

	FUZZ_CHECK(r == 0 || (r == -EINVAL && !rec));
	if (r)
		return;
	FUZZ_CHECK(rec->count + rec->image_count == count_lines(text, last));
	for (size_t i = 0; i < rec->count; i++) {
		const struct ending_line *l = &rec->lines[i];
		struct identity id = {0, l->ino, l->btime_sec, l->btime_nsec};
		struct stat st = {.st_size = l->size,
		                  .st_mtim = {l->mtime_sec, l->mtime_nsec},
		                  .st_ctim = {l->ctime_sec, l->ctime_nsec}};
		bool alone =
		    (i == 0 || l[-1].ino != l->ino) && (i + 1 == rec->count || l[1].ino != l->ino);

		FUZZ_CHECK(i == 0 || l[-1].ino <= l->ino);
		FUZZ_CHECK(!alone || session_unchanged(rec, &id, &st) ||
		           (identity_is_device(&id) && l->mtime_sec < 0));
		st.st_size ^= 1;
		FUZZ_CHECK(!alone || !session_unchanged(rec, &id, &st));
	}
	check_images(rec);
	session_record_free(rec);
}

static void check_known(const char *text)
{
	struct known *k = NULL;
	int r = known_parse(text, &k);

	FUZZ_CHECK(r == 0 || (r == -EINVAL && !k));
	if (r == 0) {
		FUZZ_CHECK(!known_has(k, 0, 1, fuzz_dir()) || strstr(text, "known 0") ||
		           strstr(text, "dir "));
		known_free(k);
	}
}

/* The text as it is, and with the line that makes it whole. */
static void check_sealed(const uint8_t *data, size_t size, void (*check)(const char *text))
{
	ff_autofree char *text = malloc(size + 40);
	size_t len;

	FUZZ_CHECK(text != NULL);
	memcpy(text, data, size);
	text[size] = '\0';
	check(text);
	len = strlen(text);
	snprintf(text + len, 40, "xxh3 %016llx\n", (unsigned long long)XXH3_64bits(text, len));
	check(text);
}

static void check_ending(bool clean)
{
	struct ending_record *rec = NULL;
	enum ending how;
	int r = session_ending(&store, &how, &rec);

	FUZZ_CHECK(r == 0);
	FUZZ_CHECK(!clean || (how == ENDED_CLEAN && rec));
	FUZZ_CHECK(clean || how == ENDED_TORN || how == ENDED_KILLED || how == ENDED_FAILED);
	session_record_free(rec);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct known *known;
	int64_t until;
	int r;

	open_store();
	if (size < 1)
		return 0;
	switch (data[0] % KINDS) {
	case ENDING:
		check_sealed(data + 1, size - 1, check_record);
		fuzz_put(".clean", data + 1, size - 1);
		check_ending(true);
		unlinkat(fuzz_dir(), ".clean", 0);
		fuzz_put(".session", data + 1, size - 1);
		check_ending(false);
		unlinkat(fuzz_dir(), ".session", 0);
		break;
	case SOURCE_NAME:
		fuzz_put(".source", data + 1, size - 1);
		r = session_check_source(&store, true);
		FUZZ_CHECK(r == 0 || r == -EINVAL);
		FUZZ_CHECK(session_check_source(&store, false) == 0);
		FUZZ_CHECK(session_check_source(&store, true) == 0);
		break;
	case KNOWN:
		check_sealed(data + 1, size - 1, check_known);
		fuzz_put(".known", data + 1, size - 1);
		FUZZ_CHECK(known_load(&store, &known) == 0);
		known_free(known);
		FUZZ_CHECK(known_begin(&store) == 0 && known_load(&store, &known) == 0);
		FUZZ_CHECK(known_has(known, store.mount, 5, -1));
		known_free(known);
		break;
	default:
		fuzz_put(".alive", data + 1, size - 1);
		FUZZ_CHECK(pulse_last(&store, &until) == 0);
	}
	return 0;
}
