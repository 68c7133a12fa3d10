/*
 * In two steps: a descriptor that only names the inode, and when that is known to be a regular file
 * the inode behind it opened anew. What becomes of the name in between makes no difference.
 */
#include "cow/open_regular.h"

#include <errno.h>
#include <fcntl.h>

#include "cow/io.h"
#include "ff_util.h"

int open_regular(int dirfd, const char *path, int flags, int *out)
{
	ff_autoclose int probe = -1;
	struct stat st;
	int r = io_open_beneath(dirfd, path, O_PATH | O_NOFOLLOW, 0, &probe);

	if (!r)
		r = io_fstat(probe, &st);
	if (!r && !S_ISREG(st.st_mode))
		r = -EINVAL;
	return r ? r : io_reopen(probe, flags, out);
}
