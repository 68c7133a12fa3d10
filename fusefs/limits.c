/*
 * Limits of resources, inherited from a shell or a service manager which meant them for something
 * else.
 *
 * Descriptors: each node that the kernel knows takes one, so as many are allowed as we may have.
 *
 * Sizes of files: a guest that writes beyond the limit would not get an error, we would get a
 * signal that ends the process, and with it every disk of the mount. So the signal is ignored, the
 * write fails with EFBIG as it should, and the limit is taken away where we may. (That of a program
 * which writes to the mount is its own, and the kernel heeds it before a request comes here.)
 */
#include "fusefs/limits.h"

#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <sys/resource.h>

#include "ff_util.h"

#define NODE_FD_RESERVE 4096

/* To MOST, which may need a privilege, or else as far as the hard limit. */
static void raise_limit(int resource, rlim_t most)
{
	struct rlimit rl;

	if (getrlimit(resource, &rl) < 0)
		return;
	if (most > rl.rlim_max && setrlimit(resource, &(struct rlimit){most, most}) == 0)
		return;
	rl.rlim_cur = rl.rlim_max;
	setrlimit(resource, &rl);
}

void limits_raise(void)
{
	FILE *f = fopen("/proc/sys/fs/nr_open", "re");
	unsigned long most = 0;

	if (f) {
		if (fscanf(f, "%lu", &most) != 1)
			most = 0;
		fclose(f);
	}
	raise_limit(RLIMIT_NOFILE, most);
	signal(SIGXFSZ, SIG_IGN);
	raise_limit(RLIMIT_FSIZE, RLIM_INFINITY);
}

int limits_highest_node_fd(void)
{
	struct rlimit rl;

	if (getrlimit(RLIMIT_NOFILE, &rl) < 0 || rl.rlim_cur > INT_MAX)
		return INT_MAX;
	return (int)(rl.rlim_cur - FF_MIN(rl.rlim_cur / 4, NODE_FD_RESERVE));
}
