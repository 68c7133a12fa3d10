/*
 * The file of what was said of a view's zeros, beside an image that is whole. An input is that
 * file; its first byte says what is put right: its head, and the checksums of the records that the
 * rest makes up. What is told of it is within bounds, and is told again after more was added.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

#include "cow/qcow2_image.h"
#include "ff_util.h"
#include "fuzz.h"

#define IMAGE "i.qcow2"
#define SAID  "i.zeros"

enum { CS = 4096, CHUNKS = 3, FIX_HEAD = 1, FIX_SUMS = 2, HEAD = 32, RECORD = 24, MOST = 4096 };
enum { FREEZE = 9 };
enum { CLUSTERS = (CHUNKS - 1) * FF_SAID_WORDS * 64 + 5 };

static const struct ff_image_desc desc = {
    .seq = 3, .size = (uint64_t)CLUSTERS * CS, .disk_ino = 77, .cluster_size = CS};
static uint8_t head[HEAD], *image;
static size_t image_size;
static const uint64_t some[FF_SAID_WORDS] = {5, 6, 7};
static const struct ff_said more = {1, FF_SAID_SOME, some, some};

/* What was told, by hash. */
struct told {
	size_t count;
	uint64_t hash[MOST];
};

static uint8_t *file_of(const char *name, size_t *size)
{
	int fd = openat(fuzz_dir(), name, O_RDONLY | O_CLOEXEC);
	struct stat st;
	uint8_t *out;

	FUZZ_CHECK(fd >= 0 && fstat(fd, &st) == 0);
	*size = (size_t)st.st_size;
	out = malloc(*size);
	FUZZ_CHECK(out && read(fd, out, *size) == (ssize_t)*size);
	close(fd);
	return out;
}

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
	struct ff_image *img;
	uint64_t end = 0;
	uint8_t *said;
	size_t size;

	FUZZ_CHECK(ff_image_create(fuzz_dir(), IMAGE, 0600, &desc, "/s/d", "raw", &img) == 0);
	FUZZ_CHECK(ff_image_said_add(img, FREEZE, &end, &more, 1, true) == 0);
	ff_image_free(img);
	image = file_of(IMAGE, &image_size);
	said = file_of(SAID, &size);
	memcpy(head, said, HEAD);
	free(said);
	return 0;
}

static int tell(void *ctx, const struct ff_said *said)
{
	struct told *t = ctx;
	uint64_t h = said->chunk * FF_SAID_KINDS + said->kind;

	FUZZ_CHECK(said->chunk < CHUNKS && said->kind < FF_SAID_KINDS);
	if (said->kind == FF_SAID_SOME)
		h = XXH3_64bits_withSeed(said->known, FF_SAID_WORDS * 8, h);
	if (said->kind == FF_SAID_SOME || said->kind == FF_SAID_BITS)
		h = XXH3_64bits_withSeed(said->zero, FF_SAID_WORDS * 8, h);
	FUZZ_CHECK(t->count < MOST);
	t->hash[t->count++] = h;
	return 0;
}

/* Gives each record the checksum that it must have where it is. */
static void fix_sums(uint8_t *said, size_t size)
{
	for (size_t at = HEAD, n; at + RECORD <= size; at += n) {
		uint64_t seed[] = {at, ff_be64(head + 16)};
		uint32_t kind = ff_be32(said + at + 16);

		n = RECORD + (kind == FF_SAID_SOME   ? 2
		              : kind == FF_SAID_BITS ? 1
		                                     : 0) *
		                 FF_SAID_WORDS * 8;
		if (at + n > size)
			return;
		ff_put_be64(said + at, XXH3_64bits_withSeed(said + at + 8, n - 8,
		                                            XXH3_64bits(seed, sizeof seed)));
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static struct told first, again;
	ff_autofree uint8_t *said = NULL;
	struct ff_image *img;
	uint64_t end;

	if (size < 1 || size > MOST * RECORD)
		return 0;
	said = malloc(size);
	FUZZ_CHECK(said != NULL);
	memcpy(said, data + 1, --size);
	if (data[0] & FIX_HEAD && size >= HEAD)
		memcpy(said, head, HEAD);
	if (data[0] & FIX_SUMS)
		fix_sums(said, size);
	fuzz_put(IMAGE, image, image_size);
	fuzz_put(SAID, said, size);
	FUZZ_CHECK(ff_image_load(fuzz_dir(), IMAGE, &img) == 0);
	first.count = again.count = 0;
	FUZZ_CHECK(ff_image_said_load(img, FREEZE, tell, &first, &end) == 0);
	FUZZ_CHECK(end <= size);
	if (first.count < MOST) {
		FUZZ_CHECK(ff_image_said_add(img, FREEZE, &end, &more, 1, false) == 0);
		FUZZ_CHECK(ff_image_said_load(img, FREEZE, tell, &again, &end) == 0);
		FUZZ_CHECK(again.count == first.count + 1);
		FUZZ_CHECK(memcmp(first.hash, again.hash, first.count * 8) == 0);
		again.count = 0;
		FUZZ_CHECK(ff_image_said_replace(img, FREEZE, &end, &more, 1, false) == 0);
		FUZZ_CHECK(end == ff_image_said_size(0, &more, 1));
		FUZZ_CHECK(ff_image_said_load(img, FREEZE, tell, &again, &end) == 0);
		FUZZ_CHECK(again.count == 1 && end == ff_image_said_size(0, &more, 1));
	}
	ff_image_said_forget(img);
	FUZZ_CHECK(faccessat(fuzz_dir(), SAID, F_OK, 0) != 0 && errno == ENOENT);
	ff_image_free(img);
	return 0;
}
