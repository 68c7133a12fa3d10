/*
 * The second opinion on an image's structure: libqcow, which shares no code with QEMU or with us.
 *
 * It is asked whether it can open the image, with its header and L1 table, and for the size. It is
 * asked for no data: a read fails wherever a backing file that is no qcow2 is named, and of zero
 * clusters it returns something else. That is no damage, and the checksums tell better.
 */
#include <errno.h>
#include <stdio.h>
#include <libqcow.h>

#include "cow/ctl/audit.h"
#include "ff_util.h"

int second_opinion(int fd, uint64_t size, enum finding_kind *kind)
{
	libqcow_file_t *file = NULL;
	size64_t seen = 0;
	char path[40];
	int r = 0;

	snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
	if (libqcow_file_initialize(&file, NULL) != 1)
		return -ENOMEM;
	if (libqcow_file_open(file, path, LIBQCOW_OPEN_READ, NULL) != 1) {
		*kind = FINDING_LIBQCOW;
		r = 1;
	} else {
		if (libqcow_file_get_media_size(file, &seen, NULL) != 1 || seen != size) {
			*kind = FINDING_SIZE;
			r = 1;
		}
		libqcow_file_close(file, NULL);
	}
	libqcow_file_free(&file, NULL);
	return r;
}
