/*
 * The command line. Every option of ours works as --name=V, --name V and -o name=V; one table says
 * which there are, and one function sets them. First pass: the --name forms are taken out of argv.
 * Second pass: libfuse's parser splits -o lists and hands us ours; what it does not know here is
 * left to libfuse, which refuses what it does not know either.
 */
#include "fusefs/options.h"

#include <ctype.h>
#include <linux/fuse.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "ff_log.h"
#include "ff_util.h"
#include "fusefs/fuse_api.h"

enum key {
	KEY_FLEECE_DIR,
	KEY_SNAPDIR,
	KEY_SNAPSHOT,
	KEY_CLUSTER_SIZE,
	KEY_ON_CBW_ERROR,
	KEY_CBW_TIMEOUT,
	KEY_FLEECE_LIMIT,
	KEY_FLEECE_RESERVE,
	KEY_EXCLUDE,
	KEY_DEVICE,
	KEY_BACKING,
	KEY_SOURCE_LOCK,
	KEY_LOG_LEVEL,
	KEY_MAX_THREADS,
	KEY_MAX_IDLE,
	KEY_MAX_READ, /* libfuse's, too */
	KEY_DURABLE,  /* from here on: without a value */
	KEY_CLONE_FD,
	KEY_FOREGROUND,
	KEY_DEBUG,
	KEY_SINGLE,
	KEY_HELP,
	KEY_VERSION,
	KEY_IGNORE,
};

struct option_name {
	const char *name;
	enum key key;
};

static const struct option_name names[] = {
    {"fleece-dir", KEY_FLEECE_DIR},     {"snapdir", KEY_SNAPDIR},
    {"snapshot", KEY_SNAPSHOT},         {"cluster-size", KEY_CLUSTER_SIZE},
    {"on-cbw-error", KEY_ON_CBW_ERROR}, {"cbw-timeout", KEY_CBW_TIMEOUT},
    {"fleece-limit", KEY_FLEECE_LIMIT}, {"fleece-reserve", KEY_FLEECE_RESERVE},
    {"exclude", KEY_EXCLUDE},           {"device", KEY_DEVICE},
    {"source-lock", KEY_SOURCE_LOCK},   {"log-level", KEY_LOG_LEVEL},
    {"durable", KEY_DURABLE},           {"help", KEY_HELP},
    {"version", KEY_VERSION},           {"backing", KEY_BACKING},
};

static const struct fuse_opt fuse_names[] = {
    FUSE_OPT_KEY("fleece-dir=", KEY_FLEECE_DIR),
    FUSE_OPT_KEY("snapdir=", KEY_SNAPDIR),
    FUSE_OPT_KEY("snapshot=", KEY_SNAPSHOT),
    FUSE_OPT_KEY("cluster-size=", KEY_CLUSTER_SIZE),
    FUSE_OPT_KEY("on-cbw-error=", KEY_ON_CBW_ERROR),
    FUSE_OPT_KEY("cbw-timeout=", KEY_CBW_TIMEOUT),
    FUSE_OPT_KEY("fleece-limit=", KEY_FLEECE_LIMIT),
    FUSE_OPT_KEY("fleece-reserve=", KEY_FLEECE_RESERVE),
    FUSE_OPT_KEY("exclude=", KEY_EXCLUDE),
    FUSE_OPT_KEY("device=", KEY_DEVICE),
    FUSE_OPT_KEY("backing=", KEY_BACKING),
    FUSE_OPT_KEY("source-lock=", KEY_SOURCE_LOCK),
    FUSE_OPT_KEY("log-level=", KEY_LOG_LEVEL),
    FUSE_OPT_KEY("max_threads=", KEY_MAX_THREADS),
    FUSE_OPT_KEY("max_idle_threads=", KEY_MAX_IDLE),
    FUSE_OPT_KEY("max_read=", KEY_MAX_READ),
    FUSE_OPT_KEY("durable", KEY_DURABLE),
    FUSE_OPT_KEY("clone_fd", KEY_CLONE_FD),
    FUSE_OPT_KEY("-f", KEY_FOREGROUND),
    FUSE_OPT_KEY("-d", KEY_DEBUG),
    FUSE_OPT_KEY("debug", KEY_DEBUG),
    FUSE_OPT_KEY("-s", KEY_SINGLE),
    FUSE_OPT_KEY("-h", KEY_HELP),
    FUSE_OPT_KEY("-V", KEY_VERSION),
    /* words of fstab, which mean nothing here or must not be undone (nosuid, nodev) */
    FUSE_OPT_KEY("auto", KEY_IGNORE),
    FUSE_OPT_KEY("noauto", KEY_IGNORE),
    FUSE_OPT_KEY("user", KEY_IGNORE),
    FUSE_OPT_KEY("user=", KEY_IGNORE),
    FUSE_OPT_KEY("users", KEY_IGNORE),
    FUSE_OPT_KEY("nouser", KEY_IGNORE),
    FUSE_OPT_KEY("owner", KEY_IGNORE),
    FUSE_OPT_KEY("group", KEY_IGNORE),
    FUSE_OPT_KEY("_netdev", KEY_IGNORE),
    FUSE_OPT_KEY("nofail", KEY_IGNORE),
    FUSE_OPT_KEY("defaults", KEY_IGNORE),
    FUSE_OPT_KEY("dev", KEY_IGNORE),
    FUSE_OPT_KEY("suid", KEY_IGNORE),
    FUSE_OPT_KEY("nodev", KEY_IGNORE),
    FUSE_OPT_KEY("nosuid", KEY_IGNORE),
    FUSE_OPT_KEY("default_permissions", KEY_IGNORE),
    FUSE_OPT_KEY("relatime", KEY_IGNORE),
    FUSE_OPT_KEY("strictatime", KEY_IGNORE),
    FUSE_OPT_KEY("nodiratime", KEY_IGNORE),
    FUSE_OPT_KEY("lazytime", KEY_IGNORE),
    FUSE_OPT_KEY("nousers", KEY_IGNORE),
    FUSE_OPT_KEY("noowner", KEY_IGNORE),
    FUSE_OPT_KEY("nogroup", KEY_IGNORE),
    FUSE_OPT_KEY("norelatime", KEY_IGNORE),
    FUSE_OPT_KEY("nostrictatime", KEY_IGNORE),
    FUSE_OPT_KEY("diratime", KEY_IGNORE),
    FUSE_OPT_KEY("nolazytime", KEY_IGNORE),
    FUSE_OPT_KEY("loud", KEY_IGNORE),
    FUSE_OPT_KEY("silent", KEY_IGNORE),
    FUSE_OPT_KEY("comment=", KEY_IGNORE),
    FUSE_OPT_END,
};

/* [FROM, TO] bytes with a suffix K, M, G or T. */
static int parse_size(const char *name, const char *s, uint64_t from, uint64_t to, uint64_t *out)
{
	static const char suffixes[] = "KMGT";
	const char *suffix;
	char *end;
	uint64_t v;
	int shift = 0;

	errno = 0;
	v = strtoull(s, &end, 10);
	if (!isdigit((unsigned char)*s) || errno)
		goto bad;
	if (*end) {
		suffix = strchr(suffixes, toupper((unsigned char)*end));
		if (!suffix || end[1])
			goto bad;
		shift = 10 * (int)(suffix - suffixes + 1);
	}
	if (ff_mul_u64(v, UINT64_C(1) << shift, &v) < 0 || v < from || v > to)
		goto bad;
	*out = v;
	return 0;
bad:
	ff_error("--%s=%s: not a size from %llu to %llu bytes (K, M, G, T may follow the number)",
	         name, s, (unsigned long long)from, (unsigned long long)to);
	return -EINVAL;
}

static int parse_number(const char *name, const char *s, unsigned from, unsigned to, unsigned *out)
{
	char *end;
	unsigned long v;

	errno = 0;
	v = strtoul(s, &end, 10);
	if (!isdigit((unsigned char)*s) || *end || errno || v < from || v > to) {
		ff_error("--%s=%s: not a number from %u to %u", name, s, from, to);
		return -EINVAL;
	}
	*out = (unsigned)v;
	return 0;
}

static int set_string(char **at, const char *value)
{
	char *copy = strdup(value);

	if (!copy)
		return -ENOMEM;
	free(*at);
	*at = copy;
	return 0;
}

/* A single path component that may be shown to users. */
static int set_component(const char *name, const char *value, size_t max, bool dot, char **at)
{
	size_t len = strlen(value);

	if (len == 0 || len > max || strchr(value, '/') || !strcmp(value, ".") ||
	    !strcmp(value, "..") || !strcmp(value, FF_HIDDEN_NAME) || (!dot && *value == '.')) {
		ff_error("--%s=%s: not a name of 1 to %zu bytes without slash%s", name, value, max,
		         dot ? " (and not one that is in use)" : " or leading dot");
		return -EINVAL;
	}
	return set_string(at, value);
}

static int set_on_off(const char *name, const char *s, bool *out)
{
	if (strcmp(s, "on") != 0 && strcmp(s, "off") != 0) {
		ff_error("--%s=%s: 'on' or 'off' is expected", name, s);
		return -EINVAL;
	}
	*out = strcmp(s, "on") == 0;
	return 0;
}

static int add_to(char ***list, size_t *count, const char *value)
{
	char **longer = reallocarray(*list, *count + 1, sizeof *longer);

	if (!longer)
		return -ENOMEM;
	*list = longer;
	longer[*count] = NULL;
	if (set_string(&longer[*count], value) < 0)
		return -ENOMEM;
	(*count)++;
	return 0;
}

static int add_exclude(struct options *o, const char *glob)
{
	if (*glob)
		return add_to(&o->exclude, &o->exclude_count, glob);
	ff_error("--exclude needs a pattern, such as '*.iso'");
	return -EINVAL;
}

static int add_device(struct options *o, const char *glob)
{
	if (strncmp(glob, "/dev/", 5) == 0 && glob[5])
		return add_to(&o->device, &o->device_count, glob);
	ff_error("--device=%s: a pattern of paths in /dev is expected, such as '/dev/vg0/vm-*'",
	         glob);
	return -EINVAL;
}

static int set_policy(struct options *o, const char *v)
{
	if (!strcmp(v, "break-snapshot"))
		o->policy = FF_BREAK_SNAPSHOT;
	else if (!strcmp(v, "break-guest-write"))
		o->policy = FF_BREAK_GUEST_WRITE;
	else {
		ff_error("--on-cbw-error=%s: must be break-snapshot or break-guest-write", v);
		return -EINVAL;
	}
	return 0;
}

static int set_log_level(struct options *o, const char *v)
{
	static const char *const words[] = {"error", "warning", "info", "debug"};

	for (size_t i = 0; i < FF_ARRAY_SIZE(words); i++)
		if (!strcmp(v, words[i])) {
			o->log_level = (enum ff_log_level)i;
			return 0;
		}
	ff_error("--log-level=%s: must be error, warning, info or debug", v);
	return -EINVAL;
}

static int set_cluster_size(struct options *o, const char *v)
{
	uint64_t size;
	int r = parse_size("cluster-size", v, 4096, 2 << 20, &size);

	if (r == 0 && (size & (size - 1))) {
		ff_error("--cluster-size=%s: not a power of two", v);
		r = -EINVAL;
	}
	if (r == 0)
		o->cluster_size = (uint32_t)size;
	return r;
}

static int set_value(struct options *o, enum key key, const char *v)
{
	switch (key) {
	case KEY_FLEECE_DIR:
		if (*v)
			return set_string(&o->fleece_dir, v);
		ff_error("--fleece-dir needs a directory");
		return -EINVAL;
	case KEY_SNAPDIR:
		return set_component("snapdir", v, 255, true, &o->snapdir);
	case KEY_SNAPSHOT:
		return set_component("snapshot", v, FF_SNAP_NAME_MAX, false, &o->snapshot);
	case KEY_CLUSTER_SIZE:
		return set_cluster_size(o, v);
	case KEY_ON_CBW_ERROR:
		return set_policy(o, v);
	case KEY_CBW_TIMEOUT:
		return parse_number("cbw-timeout", v, 0, 86400, &o->cbw_timeout);
	case KEY_FLEECE_LIMIT:
		return parse_size("fleece-limit", v, 0, INT64_MAX, &o->fleece_limit);
	case KEY_FLEECE_RESERVE:
		return parse_size("fleece-reserve", v, 0, INT64_MAX, &o->fleece_reserve);
	case KEY_EXCLUDE:
		return add_exclude(o, v);
	case KEY_DEVICE:
		return add_device(o, v);
	case KEY_BACKING:
		if (ff_since_backing_valid(v))
			return set_string(&o->backing, v);
		ff_error("--backing=%s: not a pattern (of %%u, %%o, %%p and %%%%)", v);
		return -EINVAL;
	case KEY_SOURCE_LOCK:
		return set_on_off("source-lock", v, &o->source_lock);
	case KEY_LOG_LEVEL:
		return set_log_level(o, v);
	case KEY_MAX_THREADS:
		return parse_number("max_threads", v, 1, 10000, &o->max_threads);
	case KEY_MAX_IDLE:
		return parse_number("max_idle_threads", v, 1, 10000, &o->max_idle_threads);
	case KEY_MAX_READ:
		return parse_number("max_read", v, 4096, 1 << 30, &o->max_read);
	default:
		return -EINVAL;
	}
}

static void set_flag(struct options *o, enum key key)
{
	switch (key) {
	case KEY_DURABLE:
		o->durable = true;
		break;
	case KEY_CLONE_FD:
		o->clone_fd = true;
		break;
	case KEY_DEBUG:
		o->debug = true;
		o->log_level = FF_LOG_DEBUG;
		__attribute__((fallthrough));
	case KEY_FOREGROUND:
		o->foreground = true;
		break;
	case KEY_SINGLE:
		o->single_thread = true;
		break;
	case KEY_HELP:
		o->help = true;
		break;
	case KEY_VERSION:
		o->version = true;
		break;
	default:
		break;
	}
}

/* libfuse's parser calls this. 0: ours, done; 1: leave it; -1: error. */
static int on_option(void *data, const char *arg, int key, struct fuse_args *left)
{
	struct options *o = data;
	char **at = !o->source ? &o->source : !o->mountpoint ? &o->mountpoint : NULL;

	if (key == FUSE_OPT_KEY_NONOPT) {
		if (!at)
			ff_error("'%s': only SOURCE and MOUNTPOINT are expected", arg);
		return !at || set_string(at, arg) < 0 ? -1 : 0;
	}
	if (key == FUSE_OPT_KEY_OPT && !strcmp(arg, "remount")) {
		ff_error("options cannot be changed while it is mounted; unmount it first");
		return -1;
	}
	if (key == FUSE_OPT_KEY_OPT) {
		if (strncmp(arg, "--", 2))
			return strncasecmp(arg, "x-", 2) ? 1 : 0; /* other programs' words */
		ff_error("unknown option %s (fleecefs -h lists all)", arg);
		return -1;
	}
	if (key >= KEY_DURABLE) {
		set_flag(o, key);
		return 0;
	}
	if (set_value(o, key, strchr(arg, '=') + 1) < 0)
		return -1;
	return key == KEY_MAX_READ; /* the kernel is to hear of it, by way of libfuse */
}

/* Takes one --name out of argv; *I is moved past what was used. 1: it is not one of ours. */
static int take_long(struct options *o, int argc, char **argv, int *i)
{
	const char *arg = argv[*i] + 2;
	size_t len = strcspn(arg, "=");

	for (size_t k = 0; k < FF_ARRAY_SIZE(names); k++) {
		const struct option_name *n = &names[k];

		if (strlen(n->name) != len || strncmp(n->name, arg, len))
			continue;
		if (n->key >= KEY_DURABLE) {
			if (arg[len]) {
				ff_error("--%s takes no value", n->name);
				return -EINVAL;
			}
			set_flag(o, n->key);
			return 0;
		}
		if (arg[len])
			return set_value(o, n->key, arg + len + 1);
		if (*i + 1 >= argc) {
			ff_error("--%s needs a value", n->name);
			return -EINVAL;
		}
		return set_value(o, n->key, argv[++*i]);
	}
	return 1;
}

int options_parse(int argc, char **argv, struct options *out, struct fuse_args *args)
{
	int r = 0;

	*out = (struct options){.cluster_size = 4096,
	                        .fleece_reserve = 64 << 20,
	                        .source_lock = true,
	                        .log_level = FF_LOG_INFO};
	*args = (struct fuse_args)FUSE_ARGS_INIT(0, NULL);
	if (set_string(&out->snapdir, "snapshots") < 0 || fuse_opt_add_arg(args, "fleecefs") < 0)
		return -ENOMEM;
	for (int i = 1; i < argc && r >= 0; i++) {
		r = 1;
		if (!strcmp(argv[i], "--")) {
			while (i < argc && r >= 0)
				r = fuse_opt_add_arg(args, argv[i++]);
			break;
		}
		if (!strncmp(argv[i], "--", 2))
			r = take_long(out, argc, argv, &i);
		else if (!strcmp(argv[i], "-o") && i + 1 < argc)
			r = fuse_opt_add_arg(args, argv[i++]) < 0 ? -ENOMEM : 1;
		if (r == 1)
			r = fuse_opt_add_arg(args, argv[i]) < 0 ? -ENOMEM : 0;
	}
	if (r >= 0 && fuse_opt_parse(args, out, fuse_names, on_option) < 0)
		r = -EINVAL;
	if (r < 0 || out->help || out->version)
		return r < 0 ? r : 0;
	if (!out->mountpoint) {
		ff_error("%s is missing: fleecefs SOURCE MOUNTPOINT [options] (fleecefs -h)",
		         out->source ? "MOUNTPOINT" : "SOURCE");
		return -EINVAL;
	}
	return 0;
}

void options_free(struct options *o)
{
	free(o->source);
	free(o->mountpoint);
	free(o->fleece_dir);
	free(o->snapdir);
	free(o->backing);
	free(o->snapshot);
	for (size_t i = 0; i < o->exclude_count; i++)
		free(o->exclude[i]);
	free(o->exclude);
	for (size_t i = 0; i < o->device_count; i++)
		free(o->device[i]);
	free(o->device);
}
