/*
 * Capabilities.
 *
 * A daemon that root starts has all of them. The mount is the last thing that needs most; what a
 * request or the end of the mount can need is kept:
 *
 *   CHOWN                chown(2) by root, and giving new files to who made them (creds.c)
 *   DAC_OVERRIDE         files and directories of everybody: the kernel has checked, before a
 * request comes to us, that its caller may FOWNER               chmod, times, xattrs, O_NOATIME;
 * links, and removal from sticky directories FSETID               set-id bits stay when they are
 * meant to stay SETUID, SETGID       file system ids of the callers MKNOD                device
 * nodes that root makes (and nobody opens: nodev, and we never do) SETFCAP security.capability, set
 * by root SYS_ADMIN            trusted.* and security.* xattrs, which only root's requests bring;
 * and umount(2) at the end
 *
 * Not kept, although a filesystem might want them: DAC_READ_SEARCH, whose one right beyond
 * DAC_OVERRIDE is to open any inode by a handle, past all directories; SYS_RESOURCE, with which a
 * user's writes through the mount would ignore his quota (ext4's reserved blocks go by the user id,
 * and the limit of descriptors was raised before); SYS_PTRACE, which /proc needs to tell groups of
 * processes when it is mounted with hidepid (a set-group-id bit is taken then, to be safe);
 * LINUX_IMMUTABLE, since ioctls do not come through; and SETPCAP, the last one to go.
 *
 * They leave the bounding set as well, so that a program we start (umount, at most) cannot get them
 * back, and root has no_new_privs set. A daemon of an ordinary user does not: it has no capability
 * to lose, and needs fusermount3, which is set-user-id, to unmount. Capabilities that somebody gave
 * to such a daemon on purpose are treated alike: what serving can use is kept.
 *
 * Core dumps are left to the system: the kernel itself marks a process as not to be dumped, nor
 * traced by its user, once that has worked with another user's ids.
 */
#include "fusefs/privileges.h"

#include <linux/capability.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>

#include "ff_log.h"
#include "ff_util.h"

static const uint64_t kept =
    UINT64_C(1) << CAP_CHOWN | UINT64_C(1) << CAP_DAC_OVERRIDE | UINT64_C(1) << CAP_FOWNER |
    UINT64_C(1) << CAP_FSETID | UINT64_C(1) << CAP_SETUID | UINT64_C(1) << CAP_SETGID |
    UINT64_C(1) << CAP_MKNOD | UINT64_C(1) << CAP_SETFCAP | UINT64_C(1) << CAP_SYS_ADMIN;

/* Needs SETPCAP, and is of no use without: who lacks that gained nothing by starting programs. */
static void drop_bounding(void)
{
	for (int cap = 0; cap < 64 && prctl(PR_CAPBSET_READ, cap) >= 0; cap++)
		if (!(kept >> cap & 1))
			prctl(PR_CAPBSET_DROP, cap);
}

int privileges_drop(void)
{
	struct __user_cap_header_struct head = {.version = _LINUX_CAPABILITY_VERSION_3};
	struct __user_cap_data_struct data[2];
	int r = 0;

	if (syscall(SYS_capget, &head, data) < 0)
		r = -errno;
	if (r == 0) {
		drop_bounding();
		prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0);
		for (unsigned i = 0; i < 2; i++) {
			data[i].permitted &= (uint32_t)(kept >> (32 * i));
			data[i].effective &= data[i].permitted;
			data[i].inheritable = 0;
		}
		if (syscall(SYS_capset, &head, data) < 0)
			r = -errno;
	}
	if (r == 0 && geteuid() == 0 && prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0)
		r = -errno;
	if (r < 0)
		ff_error("privileges that are not needed any more cannot be given up: %s",
		         strerror(-r));
	return r;
}
