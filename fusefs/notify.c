/*
 * Word to a service manager (systemd, or whoever speaks like it): one datagram to the socket that
 * $NOTIFY_SOCKET names, a path or, with a leading @, an abstract name.
 *
 * The protocol is ours to speak by sd_notify(3), which gives an implementation like this one to be
 * copied and promises that it stays as it is. libsystemd would be an optional dependency with its
 * two ways to build and to test, and would load compression and cryptography libraries into a
 * daemon that keeps CAP_SYS_ADMIN, all for the sake of one sendto().
 */
#include "fusefs/notify.h"

#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>

#include "ff_log.h"
#include "ff_util.h"

static int send_to(const char *path, const char *text, size_t len)
{
	struct sockaddr_un to = {.sun_family = AF_UNIX};
	size_t path_len = strlen(path);
	ff_autoclose int fd = -1;

	if ((*path != '/' && *path != '@') || path_len >= sizeof to.sun_path)
		return -EAFNOSUPPORT;
	memcpy(to.sun_path, path, path_len);
	if (*path == '@')
		to.sun_path[0] = '\0';
	fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	if (fd < 0)
		return -errno;
	if (sendto(fd, text, len, MSG_NOSIGNAL, (struct sockaddr *)&to,
	           (socklen_t)(offsetof(struct sockaddr_un, sun_path) + path_len)) < 0)
		return -errno;
	return 0;
}

void notify(const char *text)
{
	const char *path = getenv("NOTIFY_SOCKET");
	int r;

	if (!path || !*path)
		return;
	r = send_to(path, text, strlen(text));
	if (r < 0)
		ff_warning("NOTIFY_SOCKET=%s: %s", path, strerror(-r));
}
