/*
 * The checksum file of an image that is whole. An input is that file; its first byte says what is
 * put right: the checksum of its head, or all of its head. Every read gives what was saved, or EIO,
 * and an image whose checksum file is of no use takes new saves.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

#include "cow/qcow2_format.h"
#include "ff_util.h"
#include "fuzz.h"

#define IMAGE "i.qcow2"
#define SUMS  "i.xxh3"

enum { CS = 4096, CLUSTERS = 24, SAVED = 12, FIX_SUM = 1, FIX_HEAD = 2 };

static const struct ff_image_desc desc = {
    .seq = 3, .size = CLUSTERS * CS, .disk_ino = 77, .cluster_size = CS};
static uint8_t saved[SAVED * CS], *image;
static size_t image_size;

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
	struct ff_image *img;
	struct stat st;
	int fd;

	for (size_t i = 0; i < sizeof saved; i++)
		saved[i] = (uint8_t)(i / CS == 5 ? 0 : i * 7 + i / CS);
	FUZZ_CHECK(ff_image_create(fuzz_dir(), IMAGE, 0600, &desc, "/s/d", "raw", &img) == 0);
	FUZZ_CHECK(ff_image_save(img, 2, SAVED, saved, NULL, false) == 0);
	ff_image_free(img);
	fd = openat(fuzz_dir(), IMAGE, O_RDONLY | O_CLOEXEC);
	FUZZ_CHECK(fd >= 0 && fstat(fd, &st) == 0);
	image_size = (size_t)st.st_size;
	image = malloc(image_size);
	FUZZ_CHECK(image && read(fd, image, image_size) == (ssize_t)image_size);
	close(fd);
	return 0;
}

static void check_read(struct ff_image *img, uint64_t first, uint64_t n)
{
	uint8_t buf[SAVED * CS];
	int r = ff_image_read(img, 2 + first, n, buf);

	FUZZ_CHECK(r == 0 || r == -EIO);
	FUZZ_CHECK(r || memcmp(buf, saved + first * CS, n * CS) == 0);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	uint8_t more[CS], got[CS];
	ff_autofree uint8_t *sums = NULL;
	struct ff_image *img;

	if (size < 1)
		return 0;
	sums = malloc(size);
	FUZZ_CHECK(sums != NULL);
	memcpy(sums, data + 1, --size);
	if (data[0] & FIX_HEAD && size >= QCOW2_SUMS_HEAD_SIZE)
		qcow2_sums_head_encode(&desc, sums);
	else if (data[0] & FIX_SUM && size >= QCOW2_SUMS_HEAD_SIZE)
		ff_put_be64(sums + QCOW2_SUMS_HEAD_SIZE - 8,
		            XXH3_64bits(sums, QCOW2_SUMS_HEAD_SIZE - 8));
	fuzz_put(IMAGE, image, image_size);
	fuzz_put(SUMS, sums, size);
	FUZZ_CHECK(ff_image_load(fuzz_dir(), IMAGE, &img) == 0);
	check_read(img, 0, SAVED);
	for (uint64_t i = 0; i < SAVED; i++)
		check_read(img, i, 1);
	memset(more, data[0] | 1, sizeof more);
	FUZZ_CHECK(ff_image_save(img, CLUSTERS - 1, 1, more, NULL, false) == 0);
	FUZZ_CHECK(ff_image_read(img, CLUSTERS - 1, 1, got) == 0);
	FUZZ_CHECK(memcmp(got, more, CS) == 0);
	check_read(img, 0, SAVED);
	ff_image_free(img);
	return 0;
}
