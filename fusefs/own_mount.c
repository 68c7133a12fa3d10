/*
 * The daemon never enters its own mount. A thread that waits there for an answer cannot be killed,
 * and while it lives the session's descriptor stays open, so a daemon killed at that moment would
 * never be gone, nor its mount dead: programs would hang in it for ever. What must be asked is
 * asked by a child process that has no descriptor of ours: it gets ENOTCONN when the daemon ends.
 *
 * The child is forked beside other threads, so it makes system calls and nothing else.
 */
#include "fusefs/own_mount.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#include "ff_util.h"

/* Forks, and closes all in the child but OUT, which becomes its descriptor 0; -1: none. */
static pid_t fork_apart(int out)
{
	pid_t pid = fork();

	if (pid != 0)
		return pid < 0 ? -errno : pid;
	if (out >= 0 && dup2(out, 0) < 0)
		_exit(EXIT_FAILURE);
	if (close_range(out >= 0, ~0U, 0) < 0)
		_exit(EXIT_FAILURE);
	return 0;
}

struct answer {
	int error;
	struct statx stx;
};

int own_mount_stat(const char *path, struct statx *out)
{
	struct answer a = {.error = EIO};
	ssize_t n;
	int fds[2];
	pid_t pid;

	if (pipe2(fds, O_CLOEXEC) < 0)
		return -errno;
	pid = fork_apart(fds[1]);
	if (pid == 0) {
		a.error = statx(AT_FDCWD, path, AT_STATX_FORCE_SYNC, STATX_BASIC_STATS, &a.stx) < 0
		              ? errno
		              : 0;
		n = write(0, &a, sizeof a);
		_exit(n == sizeof a ? EXIT_SUCCESS : EXIT_FAILURE);
	}
	close(fds[1]);
	if (pid > 0) {
		do
			n = read(fds[0], &a, sizeof a);
		while (n < 0 && errno == EINTR);
		if (n != sizeof a)
			a.error = EIO;
		while (waitpid(pid, NULL, 0) < 0 && errno == EINTR)
			;
	}
	close(fds[0]);
	if (pid < 0)
		return pid;
	*out = a.stx;
	return -a.error;
}

int own_mount_sync(const char *path, pid_t *out)
{
	pid_t pid = fork_apart(-1);

	if (pid == 0) {
		int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);

		_exit(fd >= 0 && syncfs(fd) == 0 ? EXIT_SUCCESS : EXIT_FAILURE);
	}
	if (pid < 0)
		return pid;
	*out = pid;
	return 0;
}

bool own_mount_synced(pid_t sync)
{
	return waitpid(sync, NULL, WNOHANG) != 0;
}
