/*
 * Format, all numbers big-endian:
 *
 *   0   8  "FLEECEMF"
 *   8   4  version, 2; in 1 the mount is missing, and the inodes begin at 32
 *  12   4  flags: 1 ephemeral, 2 durable
 *  16   8  seq
 *  24   4  number of inodes
 *  28   4  number of disks
 *  32   8  the mount that made it, not 0
 *  40      the inodes, each
 *            mode, nlink, uid, gid, rdev, blksize      6 × 4 (rdev 8)
 *            ino, size, blocks                          3 × 8
 *            atime, mtime, ctime, btime                 4 × (8 seconds + 4 nanoseconds)
 *            parent, disk                               2 × 4
 *            target, image                              2 × (4 length + bytes)
 *            xattrs                                     4 length + (name NUL, 4 length, value)*
 *            entries                                    4 count + (4 inode, 4 length + bytes)*
 *  end-8 8  XXH3-64 of all before
 *
 * The decoder trusts nothing: the hash finds accidents, the checks on each number keep a manifest
 * made to harm from doing more than being refused. The tree it returns satisfies what the accessors
 * assume: every index is in range, a directory's parent is a directory and leads to the root, names
 * are single path components in order, xattr blobs are well formed.
 */
#include "cow/manifest.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

#include "cow/io.h"
#include "cow/names.h"
#include "cow/open_regular.h"
#include "ff_log.h"
#include "ff_util.h"

static const char magic[8] FF_NONSTRING = "FLEECEMF";

enum {
	VERSION = 2,
	VERSION_NO_MOUNT = 1,
	HEAD = 32,
	TAIL = 8,
	EPHEMERAL = 1,
	DURABLE = 2,
	MAX_BYTES = 1 << 30
};

struct out {
	char *buf;
	size_t len, room;
	bool failed;
};

static void put(struct out *o, const void *p, size_t n)
{
	if (o->failed || n == 0)
		return;
	if (o->len + n > o->room) {
		size_t room = FF_MAX(o->room * 2, o->len + n + 4096);
		char *b = realloc(o->buf, room);

		if (!b) {
			o->failed = true;
			return;
		}
		o->buf = b;
		o->room = room;
	}
	memcpy(o->buf + o->len, p, n);
	o->len += n;
}

static void put32(struct out *o, uint32_t v)
{
	char b[4];

	ff_put_be32(b, v);
	put(o, b, sizeof b);
}

static void put64(struct out *o, uint64_t v)
{
	char b[8];

	ff_put_be64(b, v);
	put(o, b, sizeof b);
}

static void put_time(struct out *o, int64_t sec, int64_t nsec)
{
	put64(o, (uint64_t)sec);
	put32(o, (uint32_t)nsec);
}

static void put_text(struct out *o, const char *s)
{
	size_t n = s ? strlen(s) : 0;

	put32(o, (uint32_t)n);
	put(o, s, n);
}

static void put_inode(struct out *o, const struct ff_frozen *f)
{
	put32(o, f->st.st_mode);
	put32(o, (uint32_t)f->st.st_nlink);
	put32(o, f->st.st_uid);
	put32(o, f->st.st_gid);
	put64(o, f->st.st_rdev);
	put32(o, (uint32_t)f->st.st_blksize);
	put64(o, f->st.st_ino);
	put64(o, (uint64_t)f->st.st_size);
	put64(o, (uint64_t)f->st.st_blocks);
	put_time(o, f->st.st_atim.tv_sec, f->st.st_atim.tv_nsec);
	put_time(o, f->st.st_mtim.tv_sec, f->st.st_mtim.tv_nsec);
	put_time(o, f->st.st_ctim.tv_sec, f->st.st_ctim.tv_nsec);
	put_time(o, f->btime_sec, f->btime_nsec);
	put32(o, f->parent);
	put32(o, f->disk);
	put_text(o, f->target);
	put_text(o, f->image);
	put32(o, f->xattr_len);
	put(o, f->xattrs, f->xattr_len);
	put32(o, f->entry_count);
	for (uint32_t i = 0; i < f->entry_count; i++) {
		put32(o, f->entries[i].inode);
		put_text(o, f->entries[i].name);
	}
}

int manifest_encode(const struct manifest *m, void **out, size_t *len)
{
	struct out o = {0};

	put(&o, magic, sizeof magic);
	put32(&o, m->made ? VERSION : VERSION_NO_MOUNT);
	put32(&o, (m->ephemeral ? EPHEMERAL : 0) | (m->durable ? DURABLE : 0));
	put64(&o, m->seq);
	put32(&o, m->tree->count);
	put32(&o, m->tree->disk_count);
	if (m->made)
		put64(&o, m->made);
	for (uint32_t i = 0; i < m->tree->count; i++)
		put_inode(&o, &m->tree->inodes[i]);
	if (!o.failed)
		put64(&o, XXH3_64bits(o.buf, o.len));
	if (o.failed || o.len > MAX_BYTES) {
		free(o.buf);
		return o.failed ? -ENOMEM : -EFBIG;
	}
	*out = o.buf;
	*len = o.len;
	return 0;
}

struct in {
	const char *p, *end;
	const char *why; /* the first thing that was wrong */
	bool no_memory;
};

static const char *take(struct in *in, size_t n)
{
	const char *p = in->p;

	if (in->why || (size_t)(in->end - in->p) < n) {
		if (!in->why)
			in->why = "it is cut short";
		return NULL;
	}
	in->p += n;
	return p;
}

static uint32_t take32(struct in *in)
{
	const char *p = take(in, 4);

	return p ? ff_be32(p) : 0;
}

static uint64_t take64(struct in *in)
{
	const char *p = take(in, 8);

	return p ? ff_be64(p) : 0;
}

static struct timespec take_time(struct in *in)
{
	struct timespec t;

	t.tv_sec = (time_t)take64(in);
	t.tv_nsec = (long)take32(in);
	if (t.tv_nsec >= 1000000000 && !in->why)
		in->why = "a time has too many nanoseconds";
	return t;
}

/* A text of 0 to MAX bytes without NULs; NULL when it is empty or there is an error. */
static char *take_text(struct in *in, size_t max)
{
	size_t n = take32(in);
	const char *p = take(in, n);
	char *s;

	if (!p || n == 0)
		return NULL;
	if (n > max || memchr(p, 0, n)) {
		in->why = "a name is too long or has a NUL";
		return NULL;
	}
	s = malloc(n + 1);
	if (!s) {
		in->no_memory = true;
		return NULL;
	}
	memcpy(s, p, n);
	s[n] = '\0';
	return s;
}

static void take_xattrs(struct in *in, struct ff_frozen *f)
{
	uint32_t len = take32(in);
	const char *p = take(in, len), *q = p;

	if (!p || !len)
		return;
	while (q < p + len) {
		const char *nul = memchr(q, 0, (size_t)(p + len - q));

		if (!nul || nul == q || p + len - nul < 5 ||
		    ff_be32(nul + 1) > (size_t)(p + len - nul - 5)) {
			in->why = "its extended attributes are malformed";
			return;
		}
		q = nul + 5 + ff_be32(nul + 1);
	}
	f->xattrs = malloc(len);
	if (!f->xattrs) {
		in->no_memory = true;
		return;
	}
	memcpy(f->xattrs, p, len);
	f->xattr_len = len;
}

static void take_entries(struct in *in, struct ff_frozen *f, uint32_t inodes)
{
	uint32_t count = take32(in);

	/* An entry takes nine bytes at least: a count that cannot be true allocates nothing. */
	if (in->why || count == 0)
		return;
	if (!S_ISDIR(f->st.st_mode) || count > (size_t)(in->end - in->p) / 9) {
		in->why = "a directory's entries are malformed";
		return;
	}
	f->entries = calloc(count, sizeof *f->entries);
	if (!f->entries) {
		in->no_memory = true;
		return;
	}
	while (f->entry_count < count && !in->why && !in->no_memory) {
		struct tree_entry *e = &f->entries[f->entry_count];

		e->inode = take32(in);
		e->name = take_text(in, 255);
		if (!e->name) {
			if (!in->why)
				in->why = "an entry has no name";
			return;
		}
		f->entry_count++;
		if (e->inode == 0 || e->inode >= inodes || strchr(e->name, '/') ||
		    strcmp(e->name, ".") == 0 || strcmp(e->name, "..") == 0 ||
		    (f->entry_count > 1 && strcmp(e[-1].name, e->name) >= 0))
			in->why = "an entry's name or inode is impossible";
	}
}

static bool is_type(mode_t mode)
{
	return S_ISREG(mode) || S_ISDIR(mode) || S_ISLNK(mode) || S_ISFIFO(mode) ||
	       S_ISSOCK(mode) || S_ISCHR(mode) || S_ISBLK(mode);
}

static bool is_disk(const struct ff_frozen *f)
{
	return f->disk != TREE_NO_DISK && f->disk != TREE_UNFROZEN;
}

/* Every regular file is a disk, and nothing else is, but for what is too deep. */
static bool may_be_disk(const struct ff_frozen *f)
{
	if (f->disk == TREE_UNFROZEN)
		return S_ISREG(f->st.st_mode) || (S_ISDIR(f->st.st_mode) && !f->entry_count);
	return is_disk(f) == !!S_ISREG(f->st.st_mode);
}

static void take_inode(struct in *in, struct ff_frozen *f, uint32_t inodes)
{
	struct timespec btime;

	memset(f, 0, sizeof *f);
	f->st.st_mode = take32(in);
	f->st.st_nlink = take32(in);
	f->st.st_uid = take32(in);
	f->st.st_gid = take32(in);
	f->st.st_rdev = take64(in);
	f->st.st_blksize = (blksize_t)take32(in);
	f->st.st_ino = take64(in);
	f->st.st_size = (off_t)take64(in);
	f->st.st_blocks = (blkcnt_t)take64(in);
	f->st.st_atim = take_time(in);
	f->st.st_mtim = take_time(in);
	f->st.st_ctim = take_time(in);
	btime = take_time(in);
	f->btime_sec = btime.tv_sec;
	f->btime_nsec = (uint32_t)btime.tv_nsec;
	f->parent = take32(in);
	f->disk = take32(in);
	f->target = take_text(in, 4095);
	f->image = take_text(in, 4095);
	take_xattrs(in, f);
	take_entries(in, f, inodes);
	if (in->why || in->no_memory)
		return;
	if (f->st.st_size < 0 || f->parent >= inodes || !is_type(f->st.st_mode))
		in->why = "an inode's size, parent or type is impossible";
	if (!may_be_disk(f) || (f->image != NULL) != is_disk(f) ||
	    (f->image && !names_safe_path(f->image)))
		in->why = "a fleecing image's path is impossible";
	if ((f->target != NULL) != !!S_ISLNK(f->st.st_mode))
		in->why = "a symlink has no target";
}

/* Every directory but the root stands in exactly one directory, its parent, made before it: so
 * there is no loop, and the way up ends at the root. */
static void check_shape(struct in *in, const struct tree *t)
{
	ff_autofree uint8_t *seen = calloc(t->count, 1);

	if (!seen) {
		in->no_memory = true;
		return;
	}
	if (!S_ISDIR(t->inodes[0].st.st_mode) || t->inodes[0].parent != 0 ||
	    t->inodes[0].disk == TREE_UNFROZEN)
		in->why = "its root is not a directory";
	for (uint32_t i = 0; i < t->count && !in->why; i++) {
		const struct ff_frozen *f = &t->inodes[i];

		for (uint32_t k = 0; k < f->entry_count && !in->why; k++) {
			uint32_t child = f->entries[k].inode;

			if (S_ISDIR(t->inodes[child].st.st_mode) &&
			    (t->inodes[child].parent != i || child <= i || seen[child]))
				in->why = "its directories do not form a tree";
			seen[child] = 1;
		}
	}
	for (uint32_t i = 1; i < t->count && !in->why; i++)
		if (!seen[i])
			in->why = "an inode has no name";
}

static void take_tree(struct in *in, struct tree *t, uint32_t inodes, uint32_t disks)
{
	uint32_t index;

	for (uint32_t i = 0; i < inodes && !in->why && !in->no_memory; i++) {
		struct ff_frozen f;

		take_inode(in, &f, inodes);
		if (tree_add(t, &f, &index)) {
			tree_free_inode(&f);
			in->no_memory = true;
			return;
		}
		if (!is_disk(&f))
			continue;
		if (f.disk != t->disk_count)
			in->why = "its disks are not numbered in order";
		else if (tree_add_disk(t, index))
			in->no_memory = true;
	}
	if (!in->why && !in->no_memory && t->disk_count != disks)
		in->why = "its number of disks is wrong";
	if (!in->why && !in->no_memory && in->p != in->end)
		in->why = "it has bytes left over";
	if (!in->why && !in->no_memory)
		check_shape(in, t);
}

int manifest_decode(const void *buf, size_t len, struct manifest *out, const char **why)
{
	struct in in = {buf, (const char *)buf + len, NULL, false};
	uint32_t version, flags, inodes, disks;
	struct tree *t;

	*why = "it is not a manifest of fleecefs";
	if (len < HEAD + TAIL || memcmp(buf, magic, sizeof magic) != 0)
		return -EINVAL;
	*why = "it is of another version";
	in.p += sizeof magic;
	version = take32(&in);
	if (version != VERSION && version != VERSION_NO_MOUNT)
		return -EINVAL;
	*why = "its checksum does not match";
	in.end -= TAIL;
	if (ff_be64(in.end) != XXH3_64bits(buf, len - TAIL))
		return -EINVAL;
	flags = take32(&in);
	out->seq = take64(&in);
	inodes = take32(&in);
	disks = take32(&in);
	out->made = version == VERSION ? take64(&in) : 0;
	*why = "it has no inodes, no mount, or unknown flags";
	if (in.why || inodes == 0 || (version == VERSION && !out->made) ||
	    (flags & ~(uint32_t)(EPHEMERAL | DURABLE)) || out->seq == 0)
		return -EINVAL;
	t = calloc(1, sizeof *t);
	if (!t)
		return -ENOMEM;
	take_tree(&in, t, inodes, disks);
	if (in.why || in.no_memory) {
		tree_free(t);
		*why = in.why;
		return in.no_memory ? -ENOMEM : -EINVAL;
	}
	out->ephemeral = flags & EPHEMERAL;
	out->durable = flags & DURABLE;
	out->tree = t;
	return 0;
}

int manifest_write(int dirfd, const struct manifest *m, bool sync)
{
	ff_autofree void *buf = NULL;
	ff_autoclose int fd = -1;
	size_t len;
	int r = manifest_encode(m, &buf, &len);

	if (r)
		return r;
	r = io_unlinkat(dirfd, MANIFEST_NAME ".tmp", 0);
	if (!r || r == -ENOENT)
		r = io_openat(dirfd, MANIFEST_NAME ".tmp", O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW,
		              0600, &fd);
	if (r)
		return r;
	r = io_pwrite(fd, buf, len, 0);
	if (!r && sync)
		r = io_fsync(fd);
	if (!r)
		r = io_renameat(dirfd, MANIFEST_NAME ".tmp", dirfd, MANIFEST_NAME, 0);
	if (r)
		io_unlinkat(dirfd, MANIFEST_NAME ".tmp", 0);
	return r;
}

int manifest_read(int dirfd, const char *where, struct manifest *out)
{
	ff_autofree void *buf = NULL;
	ff_autoclose int fd = -1;
	const char *why = NULL;
	struct stat st;
	int r = open_regular(dirfd, MANIFEST_NAME, O_RDONLY, &fd);

	if (!r)
		r = io_fstat(fd, &st);
	if (r == -EINVAL)
		why = "it is not a regular file";
	if (!r && st.st_size > MAX_BYTES) {
		why = "it is too large";
		r = -EINVAL;
	}
	if (!r) {
		buf = malloc((size_t)st.st_size + 1);
		r = buf ? io_pread_full(fd, buf, (size_t)st.st_size, 0) : -ENOMEM;
	}
	if (!r)
		r = manifest_decode(buf, (size_t)st.st_size, out, &why);
	if (r && r != -ENOENT)
		ff_error("%s/%s cannot be used: %s", where, MANIFEST_NAME,
		         why ? why : strerror(-r));
	return r;
}
