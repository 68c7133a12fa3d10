/*
 * fleecefs: parse, then run.
 */
#include <fcntl.h>
#include <stdlib.h>
#include <unistd.h>

#include "ff_log.h"
#include "fusefs/fuse_api.h"
#include "fusefs/options.h"
#include "fusefs/session.h"

int main(int argc, char **argv)
{
	struct options o;
	struct fuse_args args;
	int status = EXIT_SUCCESS, fd;

	/* Were 0, 1 or 2 closed, a descriptor of ours would be taken for the terminal. */
	do
		fd = open("/dev/null", O_RDWR | O_CLOEXEC);
	while (fd >= 0 && fd <= STDERR_FILENO);
	if (fd >= 0)
		close(fd);
	ff_log_find_journal();
	if (options_parse(argc, argv, &o, &args) < 0)
		status = EXIT_USAGE;
	else if (o.help)
		options_print_help();
	else if (o.version)
		options_print_version();
	else
		status = session_run(&o, &args);
	fuse_opt_free_args(&args);
	options_free(&o);
	return status;
}
