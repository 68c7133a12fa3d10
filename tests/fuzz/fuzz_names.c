/*
 * Names: of snapshots, of images for any path in SOURCE, of backing files, as they are made and as
 * recovery reads them again. An input is a number and up to three names, separated by NUL.
 */
#include "cow/recover.c"

#include <stdio.h>

#include "cow/names.h"
#include "cow/qcow2_private.h"
#include "fuzz.h"

/* What a name below a directory must be, told another way. */
static bool inside(const char *path)
{
	char copy[PATH_MAX], *part, *rest = copy;

	if (strlen(path) >= sizeof copy || !*path)
		return false;
	strcpy(copy, path);
	while ((part = strsep(&rest, "/")))
		if (!*part || strlen(part) > 255 || !strcmp(part, ".") || !strcmp(part, ".."))
			return false;
	return true;
}

static uint64_t named(const char *backing, const char *format)
{
	struct fleece_dir dir = {.fd = fuzz_dir()};
	struct qcow2_head head = {0};
	struct ff_image img = {.backing = head.backing};
	struct found f = {.img = &img, .dir = &dir};

	if (qcow2_head_set_backing(&head, backing, format))
		return UINT64_MAX;
	strcpy(img.format, head.format);
	return next_named(&f);
}

static void check_image(const char *rel, uint64_t seq)
{
	ff_autofree char *image = names_image(rel, seq), *backing = NULL;
	char suffix[64];
	size_t ups = 0;

	FUZZ_CHECK(image != NULL);
	FUZZ_CHECK(names_safe_path(image));
	snprintf(suffix, sizeof suffix, "-fleece-%llu.qcow2", (unsigned long long)seq);
	FUZZ_CHECK(strlen(image) > strlen(suffix));
	FUZZ_CHECK(strcmp(image + strlen(image) - strlen(suffix), suffix) == 0);

	backing = names_backing_image(rel, "dir", image);
	FUZZ_CHECK(backing != NULL);
	for (const char *p = backing; strncmp(p, "../", 3) == 0; p += 3)
		ups++;
	for (const char *p = rel; *p; p++)
		ups -= *p == '/';
	FUZZ_CHECK(ups == 1 &&
	           strncmp(backing + strlen(backing) - strlen(image), image, strlen(image)) == 0);
	if (strlen(backing) <= QCOW2_BACKING_MAX)
		FUZZ_CHECK(named(backing, "qcow2") == seq);
	FUZZ_CHECK(named(backing, "raw") == 0 || strlen(backing) > QCOW2_BACKING_MAX);
}

/* A path called as the image of another: theirs must differ. */
static void check_alike(const char *rel, uint64_t seq)
{
	ff_autofree char *image = names_image(rel, seq), *like = strdup(image), *other = NULL;
	char suffix[64];
	int n = snprintf(suffix, sizeof suffix, "-fleece-%llu.qcow2", (unsigned long long)seq);

	FUZZ_CHECK(image && like);
	like[strlen(like) - (size_t)n] = '\0';
	if (strcmp(like, rel) == 0)
		return;
	other = names_image(like, seq);
	FUZZ_CHECK(other && strcmp(image, other) != 0);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct input in = {data, data + size};
	uint64_t seq = input_take(&in, 4);
	ff_autofree char *text = calloc(1, (size_t)(in.end - in.p) + 3);
	char *a = text, *b;

	FUZZ_CHECK(text != NULL);
	memcpy(text, in.p, (size_t)(in.end - in.p));
	b = a + strlen(a) + 1;
	FUZZ_CHECK(names_safe_path(a) == inside(a));
	FUZZ_CHECK(snap_name_valid(a) ==
	           (*a && *a != '.' && !strchr(a, '/') && strlen(a) <= FF_SNAP_NAME_MAX));
	named(a, "qcow2");
	if (names_safe_path(a)) {
		check_image(a, seq);
		check_alike(a, seq);
	}
	if (names_safe_path(a) && names_safe_path(b)) {
		ff_autofree char *one = names_image(a, seq), *other = names_image(b, seq);

		FUZZ_CHECK(one && other && (strcmp(a, b) == 0) == (strcmp(one, other) == 0));
	}
	return 0;
}
