/*
 * What the daemon wants of its own mount.
 */
#ifndef FUSEFS_OWN_MOUNT_H
#define FUSEFS_OWN_MOUNT_H

#include <stdbool.h>
#include <sys/stat.h>
#include <sys/types.h>

/* Asks the mount at PATH (absolute) for the attributes of its root, and waits for the answer. 0 or
 * -errno: -ENOTCONN where the session has ended meanwhile. */
int own_mount_stat(const char *path, struct statx *out);

/* Begins to write back what mapped memory of the mount's files holds. *OUT is to be asked with
 * own_mount_synced() until that says true; who cannot wait any longer may forget it. */
int own_mount_sync(const char *path, pid_t *out);
bool own_mount_synced(pid_t sync);

#endif
