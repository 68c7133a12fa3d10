/*
 * Starting, stopping and losing a fleecefs daemon.
 *
 * The daemon runs in the foreground (-f) as a child, so that its exit status is seen: a sanitizer's
 * complaint at its end fails the test. The mount is ready when MOUNTPOINT has another device
 * number.
 *
 * The guardian is forked first. It waits for the pipe's end (that is, for the end of the test,
 * whether by exit, by a crash or by SIGKILL), takes away the mount if there still is one, ends a
 * daemon that does not go, and removes the directories. It has a session of its own, so that what
 * kills the test's process group does not reach it.
 */
#include "mount.h"

#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

extern char **environ;

static void sleep_ms(long ms)
{
	struct timespec ts = {ms / 1000, ms % 1000 * 1000000};

	nanosleep(&ts, NULL);
}

int mnt_skip(void)
{
	int fd = open("/dev/fuse", O_RDWR | O_CLOEXEC);

	if (fd < 0) {
		printf("skipped: /dev/fuse cannot be opened: %s\n", strerror(errno));
		return 77;
	}
	close(fd);
	return 0;
}

static int run(char *const argv[])
{
	pid_t pid;
	int r, status;

	r = posix_spawnp(&pid, argv[0], NULL, NULL, argv, environ);
	if (r)
		return -r;
	while (waitpid(pid, &status, 0) < 0)
		if (errno != EINTR)
			return -errno;
	return WIFEXITED(status) && WEXITSTATUS(status) == 0 ? 0 : -EIO;
}

static int unmount(const char *path, bool by_force)
{
	if (umount2(path, by_force ? MNT_FORCE | MNT_DETACH : 0) == 0)
		return 0;
	if (errno == EPERM) {
		char *argv[] = {(char *)"fusermount3", (char *)(by_force ? "-uz" : "-u"),
		                (char *)path, NULL};

		return run(argv);
	}
	return -errno;
}

static int remove_one(const char *path, const struct stat *st, int type, struct FTW *ftw)
{
	return remove(path);
}

void mnt_remove_tree(const char *path)
{
	nftw(path, remove_one, 32, FTW_DEPTH | FTW_PHYS | FTW_MOUNT);
}

/* True if PID is our daemon and not a process that has its number now. */
static bool is_daemon(pid_t pid, const char *dir)
{
	char path[64], line[4096];
	ssize_t n;
	int fd;

	snprintf(path, sizeof path, "/proc/%d/cmdline", (int)pid);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return false;
	n = read(fd, line, sizeof line);
	close(fd);
	return n > 0 && memmem(line, (size_t)n, dir, strlen(dir)) != NULL;
}

static void guard(const struct mnt *m, int rfd, bool keep)
{
	char c;
	pid_t pid;
	int i;

	setsid();
	while (read(rfd, &c, 1) < 0 && errno == EINTR)
		;
	for (i = 0; i < 20 && unmount(m->live, true) == 0; i++)
		;
	pid = *m->shared;
	for (i = 0; pid > 0 && i < 100 && is_daemon(pid, m->dir); i++)
		sleep_ms(50);
	if (pid > 0 && is_daemon(pid, m->dir))
		kill(pid, SIGKILL);
	if (keep)
		fprintf(stderr, "kept: %s\n", m->dir);
	else
		mnt_remove_tree(m->dir);
	_exit(0);
}

static int start_guardian(struct mnt *m, bool keep)
{
	int fds[2];

	m->shared = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (m->shared == MAP_FAILED)
		return -errno;
	if (pipe2(fds, O_CLOEXEC) < 0)
		return -errno;
	m->guardian = fork();
	if (m->guardian < 0)
		return -errno;
	if (m->guardian == 0) {
		close(fds[1]);
		guard(m, fds[0], keep);
	}
	close(fds[0]);
	m->guard_fd = fds[1];
	return 0;
}

int mnt_init(struct mnt *m, const char *binary, uint32_t cluster_size, bool keep)
{
	const char *tmp = getenv("TMPDIR");
	int r;

	/* As in tests/e2e/lib.sh: other tests' namespaces are not to hold what is mounted here. */
	if (unshare(CLONE_NEWNS) == 0)
		mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL);
	memset(m, 0, sizeof *m);
	m->binary = binary;
	m->cluster_size = cluster_size;
	snprintf(m->dir, sizeof m->dir - 16, "%s/fleecefs-test-XXXXXX", tmp ? tmp : "/var/tmp");
	if (!mkdtemp(m->dir)) {
		r = -errno;
		fprintf(stderr, "%s: %s\n", m->dir, strerror(errno));
		return r;
	}
	snprintf(m->source, sizeof m->source, "%.490s/source", m->dir);
	snprintf(m->live, sizeof m->live, "%.490s/mnt", m->dir);
	snprintf(m->fleece, sizeof m->fleece, "%.490s/fleece", m->dir);
	snprintf(m->log, sizeof m->log, "%.490s/daemon.log", m->dir);
	if (mkdir(m->source, 0755) < 0 || mkdir(m->live, 0755) < 0 || mkdir(m->fleece, 0700) < 0) {
		r = -errno;
		fprintf(stderr, "%s: mkdir: %s\n", m->dir, strerror(errno));
		return r;
	}
	r = start_guardian(m, keep);
	if (r)
		fprintf(stderr, "guardian: %s\n", strerror(-r));
	return r;
}

static int spawn_daemon(struct mnt *m)
{
	posix_spawn_file_actions_t fa;
	char fleece[MNT_PATH_MAX + 16], cluster[40];
	char *argv[] = {(char *)m->binary, m->source, m->live, fleece, cluster, (char *)"-f", NULL};
	pid_t pid;
	int r;

	snprintf(fleece, sizeof fleece, "--fleece-dir=%s", m->fleece);
	snprintf(cluster, sizeof cluster, "--cluster-size=%u", m->cluster_size);
	posix_spawn_file_actions_init(&fa);
	posix_spawn_file_actions_addopen(&fa, 1, m->log, O_WRONLY | O_CREAT | O_APPEND, 0600);
	posix_spawn_file_actions_adddup2(&fa, 1, 2);
	r = posix_spawn(&pid, m->binary, &fa, NULL, argv, environ);
	posix_spawn_file_actions_destroy(&fa);
	if (r) {
		fprintf(stderr, "%s: %s\n", m->binary, strerror(r));
		return -r;
	}
	m->daemon = pid;
	*m->shared = pid;
	return 0;
}

/* A dead mount's attributes may be cached, but it cannot be opened. */
static bool answers(const char *path, struct stat *st)
{
	int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	bool ok = fd >= 0 && fstat(fd, st) == 0;

	if (fd >= 0)
		close(fd);
	return ok;
}

int mnt_start(struct mnt *m)
{
	struct stat before, now;
	int r, i, status;

	if (stat(m->dir, &before) < 0)
		return -errno;
	r = spawn_daemon(m);
	if (r)
		return r;
	for (i = 0; i < 12000; i++) {
		if (answers(m->live, &now) && now.st_dev != before.st_dev)
			return 0;
		if (waitpid(m->daemon, &status, WNOHANG) == m->daemon) {
			fprintf(stderr, "%s ended before the mount was ready, wait status %#x\n",
			        m->binary, (unsigned)status);
			m->daemon = 0;
			*m->shared = 0;
			return -ECHILD;
		}
		sleep_ms(5);
	}
	fprintf(stderr, "%s: not ready after 60 s\n", m->binary);
	return -ETIMEDOUT;
}

int mnt_start_and_kill(struct mnt *m, unsigned after_us)
{
	struct timespec ts = {after_us / 1000000, after_us % 1000000 * 1000};
	int r = spawn_daemon(m);

	if (r)
		return r;
	nanosleep(&ts, NULL);
	kill(m->daemon, SIGKILL);
	return mnt_collect_killed(m);
}

/* Where each thread of the daemon is, in the kernel: who waits for what, for whoever reads the log.
 */
static void print_stacks(pid_t daemon)
{
	char command[160];

	snprintf(command, sizeof command,
	         "for t in /proc/%d/task/*; do echo \"$t $(cat $t/comm $t/wchan)\"; cat $t/stack; "
	         "done >&2",
	         (int)daemon);
	if (system(command) != 0)
		fprintf(stderr, "its stacks cannot be read\n");
}

int mnt_stop(struct mnt *m)
{
	int r = -EBUSY, i, status = 0;
	pid_t got = 0;

	/* The kernel closes files some time after close() returns. */
	for (i = 0; i < 100 && r == -EBUSY; i++) {
		r = unmount(m->live, false);
		if (r == -EBUSY)
			sleep_ms(20);
	}
	if (r) {
		fprintf(stderr, "umount %s: %s\n", m->live, strerror(-r));
		return r;
	}
	for (i = 0; i < 6000 && got == 0; i++) {
		got = waitpid(m->daemon, &status, WNOHANG);
		if (got == 0)
			sleep_ms(10);
	}
	if (got != m->daemon) {
		fprintf(stderr, "the daemon did not end within 60 s of the unmount\n");
		print_stacks(m->daemon);
		return -ETIMEDOUT;
	}
	m->daemon = 0;
	*m->shared = 0;
	if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) {
		fprintf(stderr, "the daemon ended with wait status %#x\n", (unsigned)status);
		return -EIO;
	}
	return 0;
}

int mnt_collect_killed(struct mnt *m)
{
	int status;

	while (waitpid(m->daemon, &status, 0) < 0)
		if (errno != EINTR)
			return -errno;
	m->daemon = 0;
	*m->shared = 0;
	if (!WIFSIGNALED(status) || WTERMSIG(status) != SIGKILL) {
		fprintf(stderr, "the daemon was to be killed but ended with wait status %#x\n",
		        (unsigned)status);
		return -EIO;
	}
	return 0;
}

int mnt_reap_killed(struct mnt *m)
{
	int r = mnt_collect_killed(m);

	if (r)
		return r;
	r = unmount(m->live, true);
	if (r)
		fprintf(stderr, "umount of the dead mount %s: %s\n", m->live, strerror(-r));
	return r;
}

void mnt_show_log(const struct mnt *m)
{
	char buf[6001];
	ssize_t n;
	off_t size;
	int fd = open(m->log, O_RDONLY | O_CLOEXEC);

	if (fd < 0)
		return;
	size = lseek(fd, 0, SEEK_END);
	n = pread(fd, buf, sizeof buf - 1, size > 6000 ? size - 6000 : 0);
	close(fd);
	if (n > 0) {
		buf[n] = 0;
		fprintf(stderr, "--- the daemon's last words:\n%s---\n", buf);
	}
}

void mnt_done(struct mnt *m)
{
	int status;

	if (!m->guardian)
		return;
	close(m->guard_fd);
	while (waitpid(m->guardian, &status, 0) < 0 && errno == EINTR)
		;
	munmap((void *)m->shared, 4096);
	m->guardian = 0;
}
