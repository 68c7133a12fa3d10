/*
 * Renaming to a name that nothing has yet.
 */
#ifndef FF_RENAME_NEW_H
#define FF_RENAME_NEW_H

/* As io_renameat() with RENAME_NOREPLACE, so -EEXIST where NEW is there; also where the filesystem
 * cannot promise that (NFS, ZFS before 2.2, most of FUSE): then NEW is looked for first, which is
 * as good in FLEECE_DIR, where nobody else gives names. Thread-safe as long as no two threads want
 * one name. */
int rename_new(int olddir, const char *old, int newdir, const char *new);

#endif
