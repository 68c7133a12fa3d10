#include "cow/rename_new.h"

#include <errno.h>
#include <stdio.h>

#include "cow/io.h"

int rename_new(int olddir, const char *old, int newdir, const char *new)
{
	int r = io_renameat(olddir, old, newdir, new, RENAME_NOREPLACE);
	struct statx sx;

	if (r != -EINVAL)
		return r;
	r = io_statx(newdir, new, &sx);
	if (r == 0)
		return -EEXIST;
	return r == -ENOENT ? io_renameat(olddir, old, newdir, new, 0) : r;
}
