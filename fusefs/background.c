/*
 * Going to the background.
 *
 * The parent waits on a pipe. One byte means that the mount is ready. End of file instead means
 * that the child ended: its status becomes the parent's, and if it left a dead mount that is taken
 * away. (fuse_daemonize() would report success before the mount works.)
 *
 * The pipe and SOURCE's descriptor are the only things that cross the fork.
 */
#include "fusefs/background.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "ff_log.h"
#include "fusefs/mountpoint.h"

/* The parent: waits until the child says that the mount is ready, or ends. */
static int wait_ready(const char *mountpoint, pid_t child, int fd)
{
	int status;
	ssize_t n;
	char c;

	do
		n = read(fd, &c, 1);
	while (n < 0 && errno == EINTR);
	close(fd);
	if (n == 1)
		return EXIT_SUCCESS;
	while (waitpid(child, &status, 0) < 0 && errno == EINTR)
		;
	mountpoint_recover(mountpoint);
	if (WIFEXITED(status)) {
		if (WEXITSTATUS(status) == 0)
			ff_error("%s: unmounted before it was ready", mountpoint);
		return WEXITSTATUS(status) ? WEXITSTATUS(status) : EXIT_FAILURE;
	}
	ff_error("the process that serves the mount died of signal %d", WTERMSIG(status));
	return EXIT_FAILURE;
}

bool background(const char *mountpoint, int *ready_fd, int *status)
{
	int fds[2];
	pid_t child;

	*status = EXIT_FAILURE;
	if (pipe2(fds, O_CLOEXEC) < 0) {
		ff_error("pipe: %m");
		return false;
	}
	fflush(NULL);
	child = fork();
	if (child < 0) {
		ff_error("fork: %m");
		return false;
	}
	if (child > 0) {
		close(fds[1]);
		*status = wait_ready(mountpoint, child, fds[0]);
		return false;
	}
	close(fds[0]);
	*ready_fd = fds[1];
	setsid();
	return true;
}

bool background_ready(int ready_fd)
{
	int fd = open("/dev/null", O_RDWR | O_CLOEXEC);
	bool told = write(ready_fd, "1", 1) == 1;

	ff_log_to_syslog();
	if (fd >= 0) {
		for (int i = 0; i < 3; i++)
			dup2(fd, i);
		if (fd > 2)
			close(fd);
	}
	close(ready_fd);
	return told;
}
