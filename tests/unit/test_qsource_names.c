/*
 * The names that images give their backing files: which are a path, and which are refused.
 */
#include <errno.h>

#include <criterion/criterion.h>

#include "cow/qsource/names.h"
#include "ff_util.h"

Test(qsource_names, decoded)
{
	static const struct {
		const char *name, *path, *format;
		bool absolute;
	} good[] = {
	    {"base.img", "base.img", "", false},
	    {"../x/base:1", "../x/base:1", "", false},
	    {"/srv/base.img", "/srv/base.img", "", true},
	    {"file:/srv/base.img", "/srv/base.img", "", true},
	    {"json:{\"driver\":\"qcow2\",\"file\":{\"driver\":\"file\",\"filename\":\"/a\"}}", "/a",
	     "qcow2", true},
	    {"json:{\"file.filename\":\"/a\",\"driver\":\"raw\"}", "/a", "raw", true},
	    {"json:{\"file\":{\"filename\":\"/a\"}}", "/a", "", true},
	};
	static const char *const bad[] = {
	    "",
	    "base:1",
	    "file:base.img",
	    "nbd:localhost:10809",
	    "https://example.org/x",
	    "json:",
	    "json:[]",
	    "json:{}",
	    "json:{\"file.filename\":\"a\"}",
	    "json:{\"file\":{\"file\":{\"filename\":\"/a\"}}}",
	    "json:{\"filename\":\"/a\"}",
	    "json:{\"file.filename\":\"/a\",\"offset\":512}",
	    "json:{\"file.filename\":\"/a\",\"driver\":\"0123456789abcdef\"}",
	    "json:{\"file.filename\":\"/a\",\"file.driver\":\"host_device\"}",
	    "json:{\"file.filename\":\"/a\"} x",
	};
	struct qs_name n;
	char why[QS_WHY];

	for (size_t i = 0; i < FF_ARRAY_SIZE(good); i++) {
		cr_assert_eq(qs_name_decode(good[i].name, &n, why), 0, "%s: %s", good[i].name, why);
		cr_assert_str_eq(n.path, good[i].path);
		cr_assert_str_eq(n.format, good[i].format);
		cr_assert_eq(n.absolute, good[i].absolute);
	}
	for (size_t i = 0; i < FF_ARRAY_SIZE(bad); i++) {
		*why = 0;
		cr_assert_eq(qs_name_decode(bad[i], &n, why), -ENOTSUP, "%s", bad[i]);
		cr_assert(*why, "%s", bad[i]);
	}
}
