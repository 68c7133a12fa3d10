/*
 * The command line.
 */
#ifndef FF_OPTIONS_H
#define FF_OPTIONS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "ff_log.h"
#include "ff_store.h"

struct fuse_args;

#define EXIT_USAGE 2

/* Everything is owned by the struct; see options_free(). */
struct options {
	char *source;     /* as given */
	char *mountpoint; /* as given */
	char *fleece_dir; /* NULL: the default, inside SOURCE */
	char *snapdir;
	char *snapshot; /* NULL: none */
	uint32_t cluster_size;
	enum ff_cbw_policy policy;
	unsigned cbw_timeout;
	uint64_t fleece_limit, fleece_reserve;
	char **exclude;
	size_t exclude_count;
	char **device; /* globs of block devices to serve, each beginning with /dev/ */
	size_t device_count;
	char *backing; /* NULL: the default of incremental images' backing names */
	bool durable;
	bool source_lock;
	enum ff_log_level log_level;

	bool foreground, debug, single_thread, help, version;
	bool clone_fd;
	unsigned max_threads, max_idle_threads; /* 0: our choice */
	unsigned max_read;                      /* bytes of a request; 0: no limit */
};

/* Parses argv. Options of libfuse remain in *ARGS, which is the caller's to free. -EINVAL: said on
 * stderr what is wrong. */
int options_parse(int argc, char **argv, struct options *out, struct fuse_args *args);
void options_free(struct options *o);

void options_print_help(void);
void options_print_version(void);

#endif
