/*
 * Names of backing files. No state and no I/O.
 *
 * QEMU takes four kinds of name: a path; "file:" and a path; another protocol and a colon before
 * the first slash; "json:" and an object of options. Here the first two are a file, and of the
 * last the plain form that says no more than which file it is and in what format:
 *
 *   json:{"driver":"qcow2","file":{"driver":"file","filename":"/srv/images/base.qcow2"}}
 *
 * with nested or dotted keys. QEMU opens a relative path behind "file:", or in an object, in the
 * directory it was started in, which nobody here knows: such a one is refused.
 */
#include "cow/qsource/names.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

#include <jansson.h>

#include "ff_util.h"

static int refuse(char *why, const char *what)
{
	snprintf(why, QS_WHY, "%s", what);
	return -ENOTSUP;
}

static int take_path(const char *path, struct qs_name *out, char *why)
{
	if (!*path)
		return refuse(why, "the name is empty");
	if (strlen(path) > QS_NAME_MAX)
		return refuse(why, "the name is too long");
	strcpy(out->path, path);
	out->absolute = *path == '/';
	return 0;
}

/* The options that are understood. */
struct options {
	const char *driver, *protocol, *filename;
};

/* Takes the options of OBJECT, whose keys have INSIDE before them; false: there is another one. */
static bool take_options(json_t *object, bool inside, struct options *o)
{
	const char *key;
	json_t *value;

	json_object_foreach(object, key, value)
	{
		bool dotted = strncmp(key, "file.", 5) == 0;
		const char *last = dotted && !inside ? key + 5 : key;

		if (!inside && strcmp(key, "file") == 0) {
			if (!json_is_object(value) || !take_options(value, true, o))
				return false;
		} else if (!json_is_string(value)) {
			return false;
		} else if (strcmp(last, "driver") == 0) {
			*(inside || dotted ? &o->protocol : &o->driver) = json_string_value(value);
		} else if (strcmp(last, "filename") == 0 && (inside || dotted)) {
			o->filename = json_string_value(value);
		} else {
			return false;
		}
	}
	return true;
}

static int take_object(json_t *object, struct qs_name *out, char *why)
{
	struct options o = {0};

	if (!json_is_object(object) || !take_options(object, false, &o) || !o.filename ||
	    (o.protocol && strcmp(o.protocol, "file") != 0))
		return refuse(why, "the name is of an object that is more than a plain file");
	if (*o.filename != '/')
		return refuse(why, "the name is of an object with a relative path");
	if (o.driver && strlen(o.driver) > QS_FORMAT_MAX)
		return refuse(why, "the name is of an object with an unknown format");
	strcpy(out->format, o.driver ? o.driver : "");
	return take_path(o.filename, out, why);
}

int qs_name_decode(const char *name, struct qs_name *out, char *why)
{
	json_t *object;
	int r;

	*out = (struct qs_name){0};
	if (strncmp(name, "json:", 5) == 0) {
		object = json_loads(name + 5, JSON_REJECT_DUPLICATES, NULL);
		r = take_object(object, out, why);
		json_decref(object);
		return r;
	}
	if (strncmp(name, "file:", 5) == 0) {
		if (name[5] != '/')
			return refuse(why, "the name is a relative path behind \"file:\"");
		return take_path(name + 5, out, why);
	}
	if (name[strcspn(name, ":/")] == ':')
		return refuse(why, "the name is of no file, but has a protocol");
	return take_path(name, out, why);
}

const char *qs_foreign_format(const uint8_t *buf, size_t len)
{
	static const struct {
		const char *format, *magic;
		size_t at, len;
	} formats[] = {
	    {"qcow", "QFI\xfb\0\0\0\1", 0, 8},
	    {"QED", "QED", 0, 4},
	    {"VMDK", "KDMV", 0, 4},
	    {"VMDK", "COWD", 0, 4},
	    {"VMDK", "# Disk DescriptorFile", 0, 21},
	    {"VDI", "\x7f\x10\xda\xbe", 64, 4},
	    {"VHDX", "vhdxfile", 0, 8},
	    {"VPC", "conectix", 0, 8},
	    {"LUKS", "LUKS\xba\xbe", 0, 6},
	    {"Parallels", "WithoutFreeSpace", 0, 16},
	    {"Parallels", "WithouFreSpacExt", 0, 16},
	    {"Bochs", "Bochs Virtual HD Image", 0, 22},
	    {"cloop", "#!/bin/sh\n#V2.0 Format\n", 0, 23},
	};

	for (size_t i = 0; i < FF_ARRAY_SIZE(formats); i++)
		if (len >= formats[i].at + formats[i].len &&
		    memcmp(buf + formats[i].at, formats[i].magic, formats[i].len) == 0)
			return formats[i].format;
	return NULL;
}
