/*
 * No state. A text is written to NAME.tmp and renamed; with the file and the directory flushed, it
 * is the old one or the new one, whatever happens.
 */
#include "cow/text_file.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

#include "cow/engine.h"
#include "cow/io.h"
#include "cow/open_regular.h"
#include "ff_log.h"
#include "ff_util.h"

enum { MAX_FILE = 64 << 20 };

int text_read(int dirfd, const char *name, char **out)
{
	ff_autofree char *buf = NULL;
	ff_autoclose int fd = -1;
	size_t got = 0, size = 64;
	struct stat st;
	int r = open_regular(dirfd, name, O_RDONLY, &fd);

	if (!r)
		r = io_fstat(fd, &st);
	if (!r && st.st_size > MAX_FILE)
		r = -EINVAL;
	if (r)
		return r;
	size += (size_t)st.st_size;
	buf = malloc(size);
	r = buf ? io_pread(fd, buf, size - 1, 0, &got) : -ENOMEM;
	if (r)
		return r;
	buf[got] = '\0';
	*out = ff_take_ptr(&buf);
	return 0;
}

bool text_is_foreign(int error)
{
	return error == -EINVAL || error == -ELOOP;
}

int text_replace(int dirfd, const char *name, const char *text, size_t len, bool durable, int *out)
{
	ff_autoclose int fd = -1;
	char tmp[32];
	int r;

	snprintf(tmp, sizeof tmp, "%s.tmp", name);
	r = io_unlinkat(dirfd, tmp, 0); /* of a daemon that was killed, or not ours at all */
	if (!r || r == -ENOENT)
		r = io_openat(dirfd, tmp, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW, 0600, &fd);
	if (!r)
		r = io_pwrite(fd, text, len, 0);
	if (!r && durable)
		r = io_fsync(fd);
	if (!r)
		r = io_renameat(dirfd, tmp, dirfd, name, 0);
	if (!r && durable)
		r = io_fsync(dirfd);
	if (!r)
		*out = ff_take_fd(&fd);
	return r;
}

int text_write(struct ff_store *s, const char *name, const char *text, size_t len)
{
	ff_autoclose int fd = -1;
	int r = text_replace(s->fleece_fd, name, text, len, true, &fd);

	if (r)
		ff_error("%s/%s: cannot write: %s", s->fleece_path, name, strerror(-r));
	return r;
}

int text_write_over(struct ff_store *s, const char *name, const char *text, size_t len)
{
	ff_autoclose int fd = -1;
	struct stat st;
	int full = text_write(s, name, text, len), r;

	if (full != -ENOSPC && full != -EDQUOT)
		return full;
	r = open_regular(s->fleece_fd, name, O_WRONLY, &fd);
	if (!r)
		r = io_fstat(fd, &st);
	if (!r && st.st_nlink != 1)
		r = full; /* not ours alone */
	if (!r)
		r = io_pwrite(fd, text, len, 0);
	if (!r)
		r = io_truncate(fd, len);
	if (!r)
		r = io_fsync(fd);
	if (!r)
		ff_info("%s/%s: written over", s->fleece_path, name);
	return r ? full : 0;
}

void text_seal(const char *text, size_t len, char out[TEXT_SEAL])
{
	snprintf(out, TEXT_SEAL, "xxh3 %016llx\n", (unsigned long long)XXH3_64bits(text, len));
}

bool text_is_sealed(const char *text, const char **end)
{
	const char *last = strstr(text, "xxh3 ");
	char seal[TEXT_SEAL];

	if (!last || (last != text && last[-1] != '\n'))
		return false;
	text_seal(text, (size_t)(last - text), seal);
	*end = last;
	return strcmp(seal, last) == 0;
}
