/*
 * Open directories of the live tree.
 *
 * Offsets are those of the source's directory, so that telldir and seekdir mean what they mean
 * there, also after entries came and went. The root begins with one entry more, the directory of
 * snapshots, at offset 0; the source's first entry is then at FIRST_AFTER_SNAPDIR, a number that
 * no filesystem uses.
 *
 * A block of entries is read at a time. At any moment `at` is the offset of the entry at `pos`, or
 * of the first one of the next block when pos == len: the kernel asks for entries in order, or
 * again for the one that did not fit, and everything else is a seek. All of this is guarded by
 * dir_lock of the handle.
 */
#include "fusefs/live.h"

#include <dirent.h>
#include <fcntl.h>
#include <string.h>

#include "ff_util.h"
#include "fusefs/inode.h"

#define FIRST_AFTER_SNAPDIR ((off_t)0x7ffffffffffffff0)

struct live_dir {
	struct handle h;
	int fd;
	dev_t dev;
	off_t at; /* dir_lock, as all below */
	size_t pos, len;
	char block[32768] __attribute__((aligned(8)));
};

static struct live_dir *dir_of(struct handle *h)
{
	return FF_CONTAINER(h, struct live_dir, h);
}

static const struct dirent64 *in_block(const struct live_dir *d)
{
	return (const struct dirent64 *)(const void *)(d->block + d->pos);
}

/* Goes to the source's offset OFF. */
static int seek_to(struct live_dir *d, off_t off)
{
	if (off != d->at && d->pos < d->len && in_block(d)->d_off == off) {
		d->pos += in_block(d)->d_reclen;
		d->at = off;
	}
	if (off == d->at)
		return 0;
	if (lseek(d->fd, off, SEEK_SET) < 0)
		return -errno;
	d->at = off;
	d->pos = d->len = 0;
	return 0;
}

/* Sees to it that there is an entry at d->at. */
static int load(struct live_dir *d)
{
	if (d->pos == d->len) {
		ssize_t n = getdents64(d->fd, d->block, sizeof d->block);

		if (n < 0)
			return -errno;
		d->pos = 0;
		d->len = n;
		if (n == 0)
			return -ENOENT;
	}
	return 0;
}

static bool shown(struct live_dir *d, const struct dirent64 *e)
{
	struct fs *fs = d->h.fs;

	if (d->h.node == fs->root &&
	    (!strcmp(e->d_name, FF_HIDDEN_NAME) || !strcmp(e->d_name, fs->snapdir)))
		return false;
	return !ff_store_hides(fs->store, d->dev, e->d_ino);
}

static int live_item(struct handle *h, off_t off, struct dir_item *out)
{
	struct live_dir *d = dir_of(h);
	int r;

	if (h->node == h->fs->root && off == 0) {
		*out =
		    (struct dir_item){h->fs->snapdir, FS_SNAPDIR_INO, S_IFDIR, FIRST_AFTER_SNAPDIR};
		/* a rewound directory is read anew */
		d->pos = d->len = 0;
		d->at = -1;
		return 0;
	}
	if (off == 0 && d->at != 0)
		d->at = -1;
	r = seek_to(d, off == FIRST_AFTER_SNAPDIR ? 0 : off);
	while (r == 0) {
		const struct dirent64 *e;

		r = load(d);
		if (r < 0)
			break;
		e = in_block(d);
		if (shown(d, e)) {
			*out = (struct dir_item){e->d_name, e->d_ino, DTTOIF(e->d_type), e->d_off};
			if (e->d_type == DT_LNK || e->d_type == DT_UNKNOWN)
				live_device_item(h->fs, d->fd, e->d_name, out);
			break;
		}
		d->pos += e->d_reclen;
		d->at = e->d_off;
	}
	return r;
}

static int live_dir_sync(struct handle *h, bool data_only)
{
	return (data_only ? fdatasync : fsync)(dir_of(h)->fd) < 0 ? -errno : 0;
}

static void live_dir_free(struct handle *h)
{
	close(dir_of(h)->fd);
	free(dir_of(h));
}

static const struct handle_ops live_dir_ops = {
    .item = live_item,
    .sync = live_dir_sync,
    .free = live_dir_free,
};

int live_opendir(struct fs *fs, struct node *node, struct handle **out)
{
	struct live_dir *d = malloc(sizeof *d);
	struct stat st;
	int r = 0;

	if (!d)
		return -ENOMEM;
	d->fd = open(live_path(node->fd).s, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (d->fd < 0 || fstat(d->fd, &st) < 0)
		r = -errno;
	if (r < 0) {
		if (d->fd >= 0)
			close(d->fd);
		free(d);
		return r;
	}
	d->dev = st.st_dev;
	d->at = 0;
	d->pos = d->len = 0;
	handle_init(&d->h, &live_dir_ops, fs, node);
	*out = &d->h;
	return 0;
}
