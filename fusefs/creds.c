/*
 * Acting for a caller.
 *
 * The kernel checks permissions (default_permissions) before a request comes. What remains is that
 * a new file gets the caller's ids, the group rules of its directory and the caller's umask, unless
 * a default ACL stands in for the umask. The source's filesystem does all of that by itself if the
 * creating system call is made with these ids and this umask, so that is what happens here.
 *
 * The ids: setfsuid and setfsgid of the thread, through the raw system calls (libc has no other
 * form, and knows no process-wide one). Normally a file system id other than 0 drops capabilities;
 * SECBIT_NO_SETUID_FIXUP keeps them. Where it is refused, the file is made as ourselves and then
 * given away by chown: the same result, seen by others a moment too early.
 *
 * The umask: threads share one unless they ask not to; each thread that serves requests asks, when
 * it first needs it. Where that is refused, the umask is applied to the mode by hand, which is
 * wrong only below a default ACL.
 *
 * Between creds_end() and the next creds_begin() a thread has our own ids and umask 0: the
 * engine's files must not become a caller's.
 */
#include "fusefs/creds.h"

#include <fcntl.h>
#include <linux/securebits.h>
#include <sched.h>
#include <sys/fsuid.h>
#include <sys/prctl.h>
#include <sys/syscall.h>

#include "ff_log.h"
#include "ff_util.h"

void creds_setup(bool *out)
{
	int bits = prctl(PR_GET_SECUREBITS);

	umask(0);
	*out = false;
	if (geteuid() != 0)
		return;
	if (bits < 0 || prctl(PR_SET_SECUREBITS, bits | SECBIT_NO_SETUID_FIXUP) < 0) {
		ff_warning("cannot keep capabilities while acting for callers (%m): new files "
		           "change their owner just after they were made");
		return;
	}
	*out = true;
}

void creds_begin(struct fs *fs, const struct caller *who, struct creds *out)
{
	struct fs_thread *th = fs_thread(fs);

	*out = (struct creds){.fs = fs, .who = who};
	if (th && !th->own_umask)
		th->own_umask = unshare(CLONE_FS) == 0;
	if (th && th->own_umask) {
		umask(who->umask);
		out->umask = true;
	} else {
		out->mask = who->umask;
	}
	if (fs->as_caller) {
		syscall(SYS_setfsgid, who->gid);
		syscall(SYS_setfsuid, who->uid);
		out->ids = true;
	}
}

void creds_end(struct creds *c)
{
	if (c->ids) {
		syscall(SYS_setfsuid, geteuid());
		syscall(SYS_setfsgid, getegid());
	}
	if (c->umask)
		umask(0);
}

int creds_give(const struct creds *c, int dir_fd, const char *name)
{
	struct stat dir;
	gid_t gid = c->who->gid;

	if (c->ids || geteuid() != 0)
		return 0;
	if (fstat(dir_fd, &dir) < 0)
		return -errno;
	if (dir.st_mode & S_ISGID)
		gid = dir.st_gid;
	if (fchownat(dir_fd, name, c->who->uid, gid,
	             AT_SYMLINK_NOFOLLOW | (*name ? 0 : AT_EMPTY_PATH)) < 0)
		return -errno;
	return 0;
}

void creds_detach(void)
{
	if (unshare(CLONE_FS) == 0)
		umask(0);
}
