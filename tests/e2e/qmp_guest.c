/*
 * /init of the guest in qmp.sh. A writer for each of the disks vda and vdb writes records, one at a
 * time: record N lies at a place and has a content which both follow from N, is on the disk when
 * its "A DISK N" appears on the console, and before that what the place held, and some other one,
 * is read back and compared. A third process appends to a file on the ext4 of vdc. The guest agent
 * runs beside them. "stop" on the console ends it all in good order.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <glob.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

enum { BLOCK = 4096, WORDS = BLOCK / 8 };

static volatile sig_atomic_t stopping;

static void on_term(int number)
{
	stopping = 1;
}

/* One line at once, so that lines of several processes do not mix. */
static void say(const char *what, unsigned disk, uint64_t a, uint64_t b)
{
	char line[100];
	int n = snprintf(line, sizeof line, "%s %u %llu %llu\n", what, disk, (unsigned long long)a,
	                 (unsigned long long)b);

	if (write(1, line, n) != n)
		_exit(1);
}

static uint64_t mix(uint64_t x)
{
	x = (x ^ x >> 31) * UINT64_C(0x9e3779b97f4a7c15);
	x = (x ^ x >> 29) * UINT64_C(0xbf58476d1ce4e5b9);
	return x ^ x >> 32;
}

static void record(uint64_t *block, unsigned disk, uint64_t n)
{
	for (unsigned i = 0; i < WORDS; i++)
		block[i] = n ? mix(n << 8 | disk) + i : 0;
}

static void compare(int fd, uint64_t *have, uint64_t *want, unsigned disk, uint64_t place,
                    uint64_t n)
{
	record(want, disk, n);
	if (pread(fd, have, BLOCK, (off_t)(place * BLOCK)) != BLOCK)
		say("FAIL read", disk, n, errno);
	else if (memcmp(have, want, BLOCK) != 0)
		say("FAIL lost", disk, n, place);
}

static void writer(unsigned disk, const char *path)
{
	int fd = open(path, O_RDWR | O_DIRECT);
	uint64_t *have, *want, *last, places;
	off_t size = lseek(fd, 0, SEEK_END);

	places = size / BLOCK;
	last = calloc(places ? places : 1, sizeof *last);
	if (fd < 0 || size <= 0 || !last || posix_memalign((void **)&have, BLOCK, BLOCK) ||
	    posix_memalign((void **)&want, BLOCK, BLOCK)) {
		say("FAIL open", disk, errno, 0);
		_exit(1);
	}
	for (uint64_t n = 1; !stopping; n++) {
		uint64_t place = mix(n << 8 | disk) % places;

		if (n > 1) {
			uint64_t other = mix((1 + mix(n) % (n - 1)) << 8 | disk) % places;

			compare(fd, have, want, disk, other, last[other]);
		}
		compare(fd, have, want, disk, place, last[place]);
		record(have, disk, n);
		if (pwrite(fd, have, BLOCK, (off_t)(place * BLOCK)) != BLOCK || fdatasync(fd) < 0) {
			say("FAIL write", disk, n, errno);
			n--;
			usleep(100000);
			continue;
		}
		last[place] = n;
		say("A", disk, n, place);
	}
	_exit(0);
}

static void appender(void)
{
	int fd = open("/mnt/file", O_RDWR | O_CREAT | O_APPEND, 0600);
	char line[32];

	for (uint64_t n = 1; !stopping; n++) {
		int len = snprintf(line, sizeof line, "%08llu\n", (unsigned long long)n);

		if (write(fd, line, len) != len || fsync(fd) < 0)
			say("FAIL append", 2, n, errno);
		say("A", 2, n, 0);
		usleep(5000);
	}
	_exit(0);
}

static void load_modules(void)
{
	FILE *order = fopen("/modules/order", "r");
	char name[100], path[200];

	while (order && fscanf(order, "%99s", name) == 1) {
		int fd;

		snprintf(path, sizeof path, "/modules/%s", name);
		fd = open(path, O_RDONLY);
		if (fd < 0 || syscall(SYS_finit_module, fd, "", 0) < 0)
			say("FAIL module", 0, errno, 0);
		close(fd);
	}
}

static void wait_for(const char *path)
{
	for (int i = 0; i < 1000 && access(path, F_OK) < 0; i++)
		usleep(10000);
}

static pid_t start(void (*run)(unsigned, const char *), unsigned disk, const char *path)
{
	pid_t pid = fork();

	if (pid == 0) {
		signal(SIGTERM, on_term);
		if (run)
			run(disk, path);
		appender();
	}
	return pid;
}

static void start_agent(void)
{
	glob_t found = {0};

	for (int i = 0; i < 500 && glob("/dev/vport*p1", 0, NULL, &found) != 0; i++)
		usleep(10000);
	if (found.gl_pathc == 0) {
		say("FAIL port", 0, 0, 0);
	} else if (fork() == 0) {
		int null = open("/dev/null", O_RDWR);

		dup2(null, 0);
		dup2(null, 1);
		dup2(null, 2);
		execl("/agent/qemu-ga", "qemu-ga", "-m", "virtio-serial", "-p", found.gl_pathv[0],
		      "-t", "/agent", (char *)NULL);
		_exit(1);
	}
}

int main(void)
{
	struct termios raw;
	pid_t pids[3];
	char line[100];
	int tty;

	mount("proc", "/proc", "proc", 0, NULL);
	mount("sysfs", "/sys", "sysfs", 0, NULL);
	mount("dev", "/dev", "devtmpfs", 0, NULL);
	tty = open("/dev/ttyS0", O_RDWR);
	for (int i = 0; i < 3; i++)
		dup2(tty, i);
	tcgetattr(0, &raw);
	cfmakeraw(&raw);
	raw.c_lflag |= ICANON;
	tcsetattr(0, TCSANOW, &raw);
	load_modules();
	wait_for("/dev/vdc");
	if (mount("/dev/vdc", "/mnt", "ext4", 0, NULL) < 0)
		say("FAIL mount", 2, errno, 0);
	pids[0] = start(writer, 0, "/dev/vda");
	pids[1] = start(writer, 1, "/dev/vdb");
	pids[2] = start(NULL, 2, NULL);
	if (access("/agent/qemu-ga", X_OK) == 0)
		start_agent();
	say("READY", 0, 0, 0);
	while (fgets(line, sizeof line, stdin) && strcmp(line, "stop\n") != 0)
		;
	for (int i = 0; i < 3; i++)
		kill(pids[i], SIGTERM);
	for (int i = 0; i < 3; i++)
		waitpid(pids[i], NULL, 0);
	if (umount("/mnt") < 0)
		say("FAIL umount", 2, errno, 0);
	sync();
	say("END", 0, 0, 0);
	tcdrain(1);
	reboot(RB_POWER_OFF);
	return 0;
}
