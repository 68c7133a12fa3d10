/*
 * A fleecefs mount for a test: temporary directories, the daemon, and a guardian process that
 * unmounts and removes them however the test ends.
 *
 * Functions return 0 or -errno after a line on stderr. Not thread-safe.
 */
#ifndef TESTS_MODEL_MOUNT_H
#define TESTS_MODEL_MOUNT_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#define MNT_PATH_MAX 512

struct mnt {
	char dir[MNT_PATH_MAX];    /* the temporary directory that holds all below */
	char source[MNT_PATH_MAX]; /* SOURCE */
	char live[MNT_PATH_MAX];   /* MOUNTPOINT */
	char fleece[MNT_PATH_MAX]; /* FLEECE_DIR */
	char log[MNT_PATH_MAX];    /* what the daemon says */
	const char *binary;
	uint32_t cluster_size;
	pid_t daemon;          /* 0: not mounted */
	pid_t guardian;        /* 0: none */
	int guard_fd;          /* the guardian cleans up when this is closed */
	_Atomic pid_t *shared; /* the daemon's pid, for the guardian */
};

/* What a test ends with where the machine cannot run it (the exit status that meson counts as
 * skipped), after saying why; 0 where it can. */
int mnt_skip(void);

/* Makes the directories below $TMPDIR or /var/tmp, and the guardian. KEEP: it leaves them. Must be
 * called before the process has threads. */
int mnt_init(struct mnt *m, const char *binary, uint32_t cluster_size, bool keep);

/* Mounts, returning when the mount is ready. A dead mount may be in the way. */
int mnt_start(struct mnt *m);
/* The same, but the daemon is sent SIGKILL after AFTER_US, whatever it is doing then. */
int mnt_start_and_kill(struct mnt *m, unsigned after_us);

/* Unmounts and waits for the daemon: any exit status but 0 is an error. */
int mnt_stop(struct mnt *m);

/* After the daemon was sent SIGKILL: collects it; the first leaves a dead mount, the second takes
 * it away. */
int mnt_collect_killed(struct mnt *m);
int mnt_reap_killed(struct mnt *m);

/* Shows the last lines of the daemon's log on stderr. */
void mnt_show_log(const struct mnt *m);

/* Removes PATH and all below it, on its filesystem. */
void mnt_remove_tree(const char *path);

/* Ends the guardian, and with it the directories. */
void mnt_done(struct mnt *m);

#endif
