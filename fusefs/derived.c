/*
 * Derived nodes: see derived.h.
 *
 * A node is made by a lookup and holds its snapshot in memory, as a frozen one does; so what it is
 * made from does not change, and names, attributes and pages may be cached for long. An open file
 * holds the snapshot itself, by a struct ff_hold: a drop is -EBUSY, or waits for a RELEASE that is
 * on its way, exactly as with frozen files. Readers of disks that it opens inside are to be
 * declared flushed at once (ff_reader_flushed()), so that the hold alone says what its user did.
 *
 * st_ino has bit 63 set and bit 62 clear: no frozen inode's has, and no live one's.
 */
#include "fusefs/derived.h"

#include <fcntl.h>
#include <linux/fuse.h>
#include <string.h>

#include "ff_util.h"

static const struct {
	const char *name;
	int (*enter)(struct fs *fs, struct ff_snap *snap, struct entry *out);
} roots[] = {
    {".since", since_enter},
    {".raw", raw_enter},
    {CHECKPOINT_NAME, checkpoint_enter},
    {".xxh128", digests_enter},
};

int derived_lookup(struct fs *fs, struct ff_snap *snap, const char *name, struct entry *out)
{
	for (size_t i = 0; i < FF_ARRAY_SIZE(roots); i++)
		if (strcmp(name, roots[i].name) == 0)
			return ff_snap_dropped(snap) ? -ENOENT : roots[i].enter(fs, snap, out);
	return -ENOENT;
}

int derived_enter(struct fs *fs, const struct node_ops *ops, struct ff_snap *snap,
                  const struct ff_frozen *f, const uint64_t key[2], void *made,
                  void (*made_free)(void *made), struct entry *out)
{
	struct node proto = {
	    .ops = ops,
	    .key = {key[0], key[1]},
	    .fd = -1,
	    .snap = ff_snap_ref(snap),
	    .frozen = f,
	    .made = made,
	    .made_free = made_free,
	};

	out->timeout = FS_FROZEN_TIMEOUT;
	return node_enter(fs->nodes, &proto, &out->node);
}

ino_t derived_ino(const struct ff_snap *snap, const struct ff_frozen *f, uint64_t salt)
{
	struct stat st;
	uint64_t x;

	ff_frozen_stat(snap, f, &st);
	x = (uint64_t)st.st_ino + salt * UINT64_C(0x9e3779b97f4a7c15);
	x = (x ^ (x >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
	x = (x ^ (x >> 27)) * UINT64_C(0x94d049bb133111eb);
	x ^= x >> 31;
	return (x & ~(UINT64_C(3) << 62)) | UINT64_C(1) << 63;
}

void derived_stat(const struct ff_snap *snap, const struct ff_frozen *f, uint64_t salt,
                  struct stat *out)
{
	struct timespec created = ff_snap_created(snap);
	struct stat st;

	ff_frozen_stat(snap, f, &st);
	*out = (struct stat){
	    .st_mode = st.st_mode & (S_IFMT | (S_ISDIR(st.st_mode) ? 0777 : 0666)),
	    .st_nlink = S_ISDIR(st.st_mode) ? 2 : 1,
	    .st_uid = st.st_uid,
	    .st_gid = st.st_gid,
	    .st_ino = derived_ino(snap, f, salt),
	    .st_blksize = 4096,
	    .st_atim = created,
	    .st_mtim = created,
	    .st_ctim = created,
	};
}

int derived_file_init(struct derived_file *file, const struct handle_ops *ops, struct fs *fs,
                      struct node *node, int flags)
{
	int r;

	if ((flags & O_ACCMODE) != O_RDONLY || flags & O_TRUNC)
		return -EROFS;
	r = ff_snap_hold(node->snap, &file->hold);
	if (r < 0)
		return r;
	handle_init(&file->h, ops, fs, node);
	file->h.open_flags = flags & O_DIRECT ? FOPEN_DIRECT_IO : FOPEN_KEEP_CACHE;
	return 0;
}

void derived_file_fini(struct derived_file *file)
{
	ff_hold_release(file->hold);
}

void derived_flush(struct handle *h)
{
	ff_hold_flushed(FF_CONTAINER(h, struct derived_file, h)->hold);
}

int derived_nothing_to_sync(struct handle *h, bool data_only)
{
	return 0;
}

int derived_opendir(struct fs *fs, struct node *node, const struct handle_ops *ops,
                    struct handle **out)
{
	struct handle *h = calloc(1, sizeof *h);

	if (!h)
		return -ENOMEM;
	handle_init(h, ops, fs, node);
	*out = h;
	return 0;
}

void derived_dir_free(struct handle *h)
{
	free(h);
}

static bool is_acl(const char *name)
{
	return strncmp(name, "system.posix_acl_", 17) == 0;
}

int derived_getxattr(struct fs *fs, struct node *node, const char *name, void *buf, size_t size,
                     size_t *len)
{
	return is_acl(name) ? ff_frozen_getxattr(node->snap, node->frozen, name, buf, size, len)
	                    : -ENODATA;
}

/* BUF has room for all that there may be. */
int derived_listxattr(struct fs *fs, struct node *node, char *buf, size_t size, size_t *len)
{
	size_t kept = 0, n;
	int r = ff_frozen_listxattr(node->snap, node->frozen, buf, size, len);

	for (size_t i = 0; r == 0 && i < *len; i += n) {
		n = strlen(buf + i) + 1;
		if (!is_acl(buf + i))
			continue;
		memmove(buf + kept, buf + i, n);
		kept += n;
	}
	if (r == 0)
		*len = kept;
	return r;
}

size_t derived_copy(const char *content, size_t len, void *buf, size_t size, off_t off)
{
	size_t at = FF_MIN((uint64_t)off, len), n = FF_MIN(size, len - at);

	memcpy(buf, content + at, n);
	return n;
}
