/*
 * Writes what libqcow reads of an image to standard output: qcow_read IMAGE
 */
#include <stdio.h>
#include <stdlib.h>

#include <libqcow.h>

int main(int argc, char **argv)
{
	static char buf[1 << 16];
	libqcow_file_t *file = NULL;
	libqcow_error_t *error = NULL;
	size64_t size = 0;

	if (argc != 2 || libqcow_file_initialize(&file, &error) != 1 ||
	    libqcow_file_open(file, argv[1], LIBQCOW_OPEN_READ, &error) != 1 ||
	    libqcow_file_get_media_size(file, &size, &error) != 1) {
		libqcow_error_fprint(error, stderr);
		return 1;
	}
	for (size64_t at = 0; at < size;) {
		size_t want = size - at < sizeof buf ? (size_t)(size - at) : sizeof buf;
		ssize_t got = libqcow_file_read_buffer(file, buf, want, &error);

		if (got <= 0 || fwrite(buf, 1, (size_t)got, stdout) != (size_t)got) {
			libqcow_error_fprint(error, stderr);
			return 1;
		}
		at += (size64_t)got;
	}
	return fflush(stdout) != 0;
}
