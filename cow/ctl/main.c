/*
 * fleecectl: the commands and their usage.
 */
#include <locale.h>
#include <string.h>

#include "cow/ctl/ctl.h"
#include "ff_util.h"

struct command {
	const char *name;
	int (*run)(int argc, char **argv);
	const char *usage, *what;
};

static const struct command commands[] = {
    {"status", cmd_status, "[--json] [--watch[=SECONDS]] [MOUNTPOINT]",
     "use of the fleece storage, snapshots, progress of backups"},
    {"list", cmd_list, "[--json] [MOUNTPOINT|FLEECE_DIR]", "a line for each snapshot"},
    {"create", cmd_create, "[--on MOUNTPOINT] NAME", "make a snapshot"},
    {"drop", cmd_drop, "[--on MOUNTPOINT] NAME", "drop a snapshot"},
    {"check", cmd_check, "[--quick] [--quiet] [MOUNTPOINT|FLEECE_DIR] [NAME]",
     "verify manifests, fleecing images and checksums"},
    {"gc", cmd_gc, "[--dry-run] [--source SOURCE] FLEECE_DIR", "remove what a hard failure left"},
    {"map", cmd_map, "[--on MOUNTPOINT | --fleece-dir DIR] [--svg] [--width N] NAME/DISK",
     "a picture of a frozen disk"},
};

static void usage(FILE *out)
{
	fputs("usage: fleecectl COMMAND [options]\n\n", out);
	for (size_t i = 0; i < FF_ARRAY_SIZE(commands); i++)
		fprintf(out, "  %-7s %s\n          %s\n", commands[i].name, commands[i].usage,
		        commands[i].what);
	fputs("\n  -h, --help; -V, --version\n"
	      "Without MOUNTPOINT: the only fleecefs that is mounted. See fleecectl(8).\n",
	      out);
}

int ctl_usage(const char *command)
{
	fflush(stdout);
	for (size_t i = 0; i < FF_ARRAY_SIZE(commands); i++)
		if (command && strcmp(commands[i].name, command) == 0) {
			fprintf(stderr, "usage: fleecectl %s %s\n", command, commands[i].usage);
			return CTL_USAGE;
		}
	usage(stderr);
	return CTL_USAGE;
}

static bool asks(const char *arg, char letter, const char *word)
{
	return (arg[0] == '-' && arg[1] == letter && !arg[2]) || strcmp(arg, word) == 0;
}

/* Help for one command, wherever it is asked for. */
static bool wants_help(int argc, char **argv)
{
	for (int i = 1; i < argc && strcmp(argv[i], "--") != 0; i++)
		if (asks(argv[i], 'h', "--help"))
			return true;
	return false;
}

static int finish(int status)
{
	if (fflush(stdout) || ferror(stdout)) {
		ctl_error("standard output cannot be written");
		return status ? status : CTL_IO;
	}
	return status;
}

int main(int argc, char **argv)
{
	setlocale(LC_CTYPE, "");
	if (argc < 2)
		return ctl_usage(NULL);
	if (asks(argv[1], 'h', "--help") || strcmp(argv[1], "help") == 0) {
		usage(stdout);
		return finish(CTL_OK);
	}
	if (asks(argv[1], 'V', "--version")) {
		ctl_say("fleecectl %s", FF_VERSION);
		return finish(CTL_OK);
	}
	for (size_t i = 0; i < FF_ARRAY_SIZE(commands); i++) {
		const struct command *c = &commands[i];

		if (strcmp(argv[1], c->name) != 0)
			continue;
		if (wants_help(argc - 1, argv + 1)) {
			ctl_say("usage: fleecectl %s %s", c->name, c->usage);
			return finish(CTL_OK);
		}
		return finish(c->run(argc - 1, argv + 1));
	}
	ctl_error("%s: no such command", argv[1]);
	return ctl_usage(NULL);
}
