/*
 * The second opinion: qemu-img checks every fleecing image, and what it reads from the chain is the
 * frozen file. Only called while nothing is being written.
 */
#include "model.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

extern char **environ;

static int run_qemu_img(struct model *m, char *const argv[])
{
	posix_spawn_file_actions_t fa;
	pid_t pid;
	int r, status;

	posix_spawn_file_actions_init(&fa);
	posix_spawn_file_actions_addopen(&fa, 1, m->mnt.log, O_WRONLY | O_CREAT | O_APPEND, 0600);
	posix_spawn_file_actions_adddup2(&fa, 1, 2);
	r = posix_spawnp(&pid, argv[0], &fa, NULL, argv, environ);
	posix_spawn_file_actions_destroy(&fa);
	if (r)
		fail(m, "%s: %s", argv[0], strerror(r));
	while (waitpid(pid, &status, 0) < 0)
		if (errno != EINTR)
			fail(m, "waitpid: %s", strerror(errno));
	return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

/* What the image at PATH reads as is C, and zeros up to a multiple of 512. Converting takes a
 * while, so only some are. GIVEN_UP: it is a checkpoint's, and has no data. */
static void compare_image(struct model *m, const char *path, const struct content *c, bool given_up)
{
	char raw[PATH_LEN];
	struct stat st;
	int fd;
	char *check[] = {(char *)"qemu-img", (char *)"check", (char *)"-q", (char *)"-f",
	                 (char *)"qcow2",    (char *)path,    NULL};
	char *convert[] = {(char *)"qemu-img",
	                   (char *)"convert",
	                   (char *)"-f",
	                   (char *)"qcow2",
	                   (char *)"-O",
	                   (char *)"raw",
	                   (char *)path,
	                   raw,
	                   NULL};
	struct content padded;

	snprintf(raw, sizeof raw, "%s/raw", m->mnt.dir);
	if (run_qemu_img(m, check))
		fail(m, "qemu-img check finds errors in %s", path);
	m->images_checked++;
	if (given_up || !rng_one_in(&m->rng, 3))
		return;
	if (run_qemu_img(m, convert))
		fail(m, "qemu-img convert of %s fails", path);
	if (stat(raw, &st) < 0 || (uint64_t)st.st_size != (c->size + 511) / 512 * 512)
		fail(m, "%s: converted to %lld bytes, the frozen file has %llu", path,
		     (long long)st.st_size, (unsigned long long)c->size);
	fd = open(raw, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		fail(m, "%s: %s", raw, strerror(errno));
	close(fd);
	content_copy(&padded, c);
	content_resize(&padded, (uint64_t)st.st_size);
	check_file(m, raw, &padded, path);
	content_free(&padded);
	unlink(raw);
	m->images++;
}

/* The inode whose name the path REL below ROOT is, or NULL. */
static struct inode *find_path(struct inode *root, const char *rel)
{
	char part[256];
	const char *slash;
	struct ent *e;

	for (;;) {
		slash = strchr(rel, '/');
		snprintf(part, sizeof part, "%.*s", slash ? (int)(slash - rel) : 255, rel);
		e = dir_find(root, part);
		if (!e || !slash)
			return e ? e->ino : NULL;
		root = e->ino;
		rel = slash + 1;
	}
}

/* A directory whose name could be taken for an image's has a mark added to it: ~ and 16 digits. */
static void strip_marks(char *path)
{
	for (char *p = strchr(path, '~'); p; p = strchr(p, '~')) {
		size_t n = strspn(p + 1, "0123456789abcdef");

		if (n == 16 && (p[17] == '/' || !p[17]))
			memmove(p, p + 17, strlen(p + 17) + 1);
		else
			p++;
	}
}

struct found {
	uint64_t ids[64];
	unsigned n;
};

static void check_image(struct model *m, struct snap *s, const char *path, const char *rel,
                        struct found *found)
{
	char name[PATH_LEN], *end = NULL;
	struct inode *ino;

	snprintf(name, sizeof name, "%s", rel);
	for (char *p = name; (p = strstr(p, "-fleece-")); p++)
		end = p;
	if (!end)
		fail(m, "%s: not the name of a fleecing image", path);
	*end = 0;
	strip_marks(name);
	ino = find_path(s->root, name);
	if (!ino || ino->type != I_REG)
		fail(m, "%s: the snapshot has no file %s", path, name);
	if (found->n < 64)
		found->ids[found->n++] = ino->id;
	compare_image(m, path, &ino->data, s->given_up || s->consumed);
}

/* Every .qcow2 below PATH; REL: the path below the snapshot's directory. S NULL: there must be
 * none. */
static void walk_images(struct model *m, struct snap *s, const char *path, const char *rel,
                        struct found *found)
{
	char sub[PATH_LEN], subrel[PATH_LEN];
	struct dirent *e;
	size_t len;
	DIR *d = opendir(path);

	if (!d && errno == ENOENT)
		return;
	if (!d)
		fail(m, "%s: opendir: %s", path, strerror(errno));
	while ((e = readdir(d))) {
		if (strcmp(e->d_name, ".") == 0 || strcmp(e->d_name, "..") == 0)
			continue;
		snprintf(sub, sizeof sub, "%.700s/%s", path, e->d_name);
		snprintf(subrel, sizeof subrel, "%.700s%s%s", rel, *rel ? "/" : "", e->d_name);
		len = strlen(e->d_name);
		if (e->d_type == DT_DIR)
			walk_images(m, s, sub, subrel, found);
		else if (len > 6 && strcmp(e->d_name + len - 6, ".qcow2") == 0 && !s)
			fail(m, "%s was left behind", sub);
		else if (len > 6 && strcmp(e->d_name + len - 6, ".qcow2") == 0)
			check_image(m, s, sub, subrel, found);
	}
	closedir(d);
}

static void want_images(struct model *m, struct snap *s, struct inode *dir,
                        const struct found *found)
{
	unsigned i, j;

	for (i = 0; i < dir->nents; i++) {
		struct inode *ino = dir->ents[i].ino;

		if (ino->type == I_DIR)
			want_images(m, s, ino, found);
		if (ino->type != I_REG || !ino->data.size)
			continue;
		for (j = 0; j < found->n && found->ids[j] != ino->id; j++)
			;
		if (j == found->n)
			fail(m, "snapshot %s has no fleecing image of %s", s->name,
			     dir->ents[i].name);
	}
}

void check_images(struct model *m)
{
	char path[PATH_LEN];

	if (!m->nsnaps) {
		walk_images(m, NULL, m->mnt.fleece, "", NULL);
		return;
	}
	for (unsigned i = 0; i < m->nsnaps; i++) {
		struct found found = {.n = 0};

		snprintf(path, sizeof path, "%.500s/%s", m->mnt.fleece, m->snaps[i]->name);
		walk_images(m, m->snaps[i], path, "", &found);
		want_images(m, m->snaps[i], m->snaps[i]->root, &found);
	}
}
