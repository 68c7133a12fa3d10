/*
 * MOUNTPOINT/.fleecefs, found by name and never listed: status.json and metrics.
 *
 * The content of a file is made when it is opened, and stays as it is for whoever opened it: what
 * is read in pieces fits together. Its size is not known before, so stat says 0, as in /proc, and
 * the kernel keeps none of it (FOPEN_DIRECT_IO): every read comes here, up to the end.
 *
 * The files tell of files that a user may not see, so they are for those who may do something to
 * snapshots: owner and group are those of the directory of snapshots, and nobody else may read.
 *
 * Nothing here has a state but the open files; the three nodes are pinned.
 */
#include "fusefs/control.h"

#include <fcntl.h>
#include <linux/fuse.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "ff_util.h"
#include "fusefs/fs.h"
#include "fusefs/inode.h"

struct control_file {
	struct handle h;
	char *content;
	size_t len;
};

static const struct {
	const char *name;
	int (*write)(struct fs *fs, char **out, size_t *len);
} files[FS_CONTROL_FILES] = {
    {"status.json", control_json},
    {"metrics", control_metrics},
};

/* Which of the files; FS_CONTROL_FILES: the directory. */
static size_t number_of(const struct node *n)
{
	return n->key[0];
}

int control_enter(struct fs *fs)
{
	int r = 0;

	for (size_t i = 0; i <= FS_CONTROL_FILES && !r; i++) {
		struct node n = {.ops = &control_node_ops, .key = {i}, .fd = -1, .pinned = true};

		r = node_enter(fs->nodes, &n, &fs->control[i]);
	}
	return r;
}

static int control_getattr(struct fs *fs, struct node *node, struct handle *handle,
                           struct stat *out)
{
	bool dir = number_of(node) == FS_CONTROL_FILES;

	*out = (struct stat){
	    .st_mode = dir ? S_IFDIR | 0550 : S_IFREG | 0440,
	    .st_nlink = dir ? 2 : 1,
	    .st_ino = FS_CONTROL_INO + (ino_t)number_of(node),
	    .st_blksize = 4096,
	    .st_mtim = fs->started,
	};
	if (!dir)
		clock_gettime(CLOCK_REALTIME, &out->st_mtim);
	out->st_atim = out->st_ctim = out->st_mtim;
	FF_GUARD(&fs->snapdir_lock);
	out->st_uid = fs->snapdir_attr.st_uid;
	out->st_gid = fs->snapdir_attr.st_gid;
	return 0;
}

static int control_lookup(struct fs *fs, struct node *dir, const char *name, struct entry *out)
{
	if (number_of(dir) != FS_CONTROL_FILES)
		return -ENOTDIR;
	for (size_t i = 0; i < FS_CONTROL_FILES; i++)
		if (strcmp(name, files[i].name) == 0) {
			out->node = fs->control[i];
			out->timeout = FS_LIVE_TIMEOUT;
			return control_getattr(fs, out->node, NULL, &out->st);
		}
	return -ENOENT;
}

static struct control_file *file_of(struct handle *h)
{
	return FF_CONTAINER(h, struct control_file, h);
}

static int control_read(struct handle *h, void *buf, size_t size, off_t off, size_t *got)
{
	const struct control_file *f = file_of(h);
	size_t at = FF_MIN((uint64_t)off, f->len);

	*got = FF_MIN(size, f->len - at);
	memcpy(buf, f->content + at, *got);
	return 0;
}

static int control_seek(struct handle *h, off_t off, int whence, off_t *out)
{
	size_t len = file_of(h)->len;

	if (off < 0 || (uint64_t)off >= len)
		return -ENXIO;
	*out = whence == SEEK_HOLE ? (off_t)len : off;
	return 0;
}

static int nothing_to_sync(struct handle *h, bool data_only)
{
	return 0;
}

static void control_free(struct handle *h)
{
	free(file_of(h)->content);
	free(file_of(h));
}

static const struct handle_ops control_file_ops = {
    .read = control_read,
    .seek = control_seek,
    .sync = nothing_to_sync,
    .free = control_free,
};

static int control_open(struct fs *fs, struct node *node, int flags, struct handle **out)
{
	struct control_file *f;
	int r;

	if (number_of(node) == FS_CONTROL_FILES)
		return -EISDIR;
	if ((flags & O_ACCMODE) != O_RDONLY || flags & O_TRUNC)
		return -EROFS;
	f = calloc(1, sizeof *f);
	if (!f)
		return -ENOMEM;
	r = files[number_of(node)].write(fs, &f->content, &f->len);
	if (r) {
		free(f);
		return r;
	}
	handle_init(&f->h, &control_file_ops, fs, node);
	f->h.open_flags = FOPEN_DIRECT_IO;
	*out = &f->h;
	return 0;
}

static int dir_item(struct handle *h, off_t off, struct dir_item *out)
{
	struct stat st;

	out->next = off + 1;
	out->type = off < 2 ? S_IFDIR : S_IFREG;
	if (off == 0) {
		out->name = ".";
		out->ino = FS_CONTROL_INO + FS_CONTROL_FILES;
	} else if (off == 1) {
		out->name = "..";
		out->ino = fstat(h->fs->source_fd, &st) == 0 ? st.st_ino : 1;
	} else if (off < 2 + FS_CONTROL_FILES) {
		out->name = files[off - 2].name;
		out->ino = FS_CONTROL_INO + (ino_t)(off - 2);
	} else {
		return -ENOENT;
	}
	return 0;
}

static void dir_free(struct handle *h)
{
	free(h);
}

static const struct handle_ops control_dir_ops = {
    .item = dir_item,
    .sync = nothing_to_sync,
    .free = dir_free,
};

static int control_opendir(struct fs *fs, struct node *node, struct handle **out)
{
	struct handle *h;

	if (number_of(node) != FS_CONTROL_FILES)
		return -ENOTDIR;
	h = calloc(1, sizeof *h);
	if (!h)
		return -ENOMEM;
	handle_init(h, &control_dir_ops, fs, node);
	*out = h;
	return 0;
}

const struct node_ops control_node_ops = {
    .denied = -EROFS,
    .lookup = control_lookup,
    .getattr = control_getattr,
    .open = control_open,
    .opendir = control_opendir,
};

/* --- for both writers --- */

/* Length of the UTF-8 character that S begins with, 0: it begins with none. */
static size_t character(const unsigned char *s)
{
	size_t len = s[0] < 0x80 ? 1 : s[0] < 0xc2 ? 0 : s[0] < 0xe0 ? 2 : s[0] < 0xf0 ? 3 : 4;

	if (s[0] > 0xf4)
		return 0;
	for (size_t i = 1; i < len; i++)
		if ((s[i] & 0xc0) != 0x80)
			return 0;
	/* too long a form, a surrogate, beyond the last */
	if ((s[0] == 0xe0 && s[1] < 0xa0) || (s[0] == 0xed && s[1] > 0x9f) ||
	    (s[0] == 0xf0 && s[1] < 0x90) || (s[0] == 0xf4 && s[1] > 0x8f))
		return 0;
	return len;
}

char *control_utf8(const char *name, bool *exact)
{
	static const char replacement[] = "\xef\xbf\xbd";
	char *out = malloc(strlen(name) * 3 + 1), *to = out;

	*exact = true;
	if (!out)
		return NULL;
	for (const char *p = name; *p;) {
		size_t len = character((const unsigned char *)p);

		if (len) {
			to = mempcpy(to, p, len);
		} else {
			to = mempcpy(to, replacement, 3);
			*exact = false;
		}
		p += len ? len : 1;
	}
	*to = '\0';
	return out;
}

char *control_hex(const char *name)
{
	size_t len = strlen(name);
	char *out = malloc(len * 2 + 1);

	if (!out)
		return NULL;
	out[0] = '\0';
	for (size_t i = 0; i < len; i++)
		snprintf(out + i * 2, 3, "%02x", (unsigned char)name[i]);
	return out;
}

double control_uptime(const struct fs *fs)
{
	struct timespec now;

	clock_gettime(CLOCK_BOOTTIME, &now);
	return (double)(now.tv_sec - fs->started_boot.tv_sec) +
	       (double)(now.tv_nsec - fs->started_boot.tv_nsec) / 1e9;
}

double control_seconds_to_full(double growth, double free_bytes)
{
	return growth < 1 ? -1 : free_bytes / growth;
}
