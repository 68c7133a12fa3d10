/*
 * The contract between the filesystem (fusefs/) and the preserving engine (cow/).
 *
 * The engine knows SOURCE by one directory descriptor, keeps the snapshots and their fleecing
 * images in FLEECE_DIR, and is the only code that changes a byte of a source. It knows nothing of
 * FUSE; the filesystem knows nothing of qcow2.
 *
 * Conventions: functions return 0 or -errno, outputs come last and are written on success only.
 * All functions are thread-safe unless a comment says otherwise. Offsets and sizes are bytes.
 * Every function may block on storage; none may be called with a lock of the caller held that
 * ff_store_freeze() could need.
 */
#ifndef FF_STORE_H
#define FF_STORE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <time.h>

struct ff_store;
struct ff_disk;
struct ff_snap;
struct ff_frozen;
struct ff_reader;
struct ff_since;
struct ff_since_file;

/* The name in the root of SOURCE that the mount never shows: the default FLEECE_DIR, and the home
 * of disks which were unlinked but are still needed. */
#define FF_HIDDEN_NAME ".fleecefs"

/* Longest snapshot name, in bytes. */
#define FF_SNAP_NAME_MAX 200

enum ff_cbw_policy {
	FF_BREAK_SNAPSHOT,    /* the guest goes on, the frozen views that needed the data break */
	FF_BREAK_GUEST_WRITE, /* the guest's write fails, the frozen views stay right */
};

struct ff_store_config {
	int source_fd;           /* directory descriptor of SOURCE, opened before it is covered */
	const char *source_path; /* its absolute path, for backing file names and messages */
	const char *fleece_path; /* absolute or relative path of FLEECE_DIR; created 0700 if it is
	                            missing. NULL: FF_HIDDEN_NAME in SOURCE */
	uint32_t cluster_size;   /* bytes, a power of two, 4096 to 2 MiB */
	enum ff_cbw_policy policy;
	unsigned cbw_timeout;    /* seconds, 0: no limit */
	uint64_t fleece_limit;   /* bytes, 0: none */
	uint64_t fleece_reserve; /* bytes to leave free on the filesystem of FLEECE_DIR */
	bool source_lock;        /* keep QEMU from opening files of SOURCE for writing */
	bool durable;            /* flush each save before the overwrite it protects from */
	const char *const
	    *exclude; /* globs (fnmatch, on the path below SOURCE and on the last name) */
	size_t exclude_count;
	const char *const *device; /* globs (fnmatch, FNM_PATHNAME): block devices that are served
	                              as files, by the targets of symlinks in SOURCE */
	size_t device_count;
};

/* --- the store ------------------------------------------------------------------------------ */

/* Opens FLEECE_DIR, takes its lock, brings back the snapshots found in it and removes what an
 * interrupted mkdir or rmdir left. CONFIG is copied, source_fd duplicated. Not thread-safe.
 * -EBUSY: another fleecefs has this FLEECE_DIR, or this SOURCE. Errors are logged with the file
 * they are about. */
int ff_store_open(const struct ff_store_config *config, struct ff_store **out);

/* Makes everything durable, records the state of the sources so that a later change behind the
 * mount's back is noticed, frees the store. All disks, snapshots and readers must have been given
 * back. -EIO: storage hangs; the store is not freed, and the process should end. Not thread-safe.
 */
int ff_store_close(struct ff_store *store);

/* Call it once a second while the store is open: should the process be killed, the next open
 * notices what was changed in SOURCE after that. Never waits. Thread-safe. */
void ff_store_pulse(struct ff_store *store);

/* Is this inode one that the mount must not show (FLEECE_DIR itself, when it lies in SOURCE)?
 * The name FF_HIDDEN_NAME in the root is the caller's to hide. */
bool ff_store_hides(const struct ff_store *store, dev_t dev, ino_t ino);

/* Versions of the libraries that the engine runs with, as "name version" lines without a newline at
 * the end. Static. */
const char *ff_store_libraries(void);

/* --- live: the tree's names and metadata ----------------------------------------------------- */

/* Encloses any change of names or metadata of SOURCE other than the calls of this header (create,
 * mkdir, rmdir, symlink, mknod, link, chmod, chown, utimens, setxattr, removexattr …), so that a
 * freeze sees it whole or not at all. Many threads may be between begin and end; a freeze waits for
 * them and holds later ones off. Do not nest, and do not call the functions below in between. */
void ff_store_change_begin(struct ff_store *store);
void ff_store_change_end(struct ff_store *store);

/* unlinkat(2) and renameat2(2) below SOURCE, with the preserving that they need: a disk that loses
 * its last name while a snapshot needs it is kept aside, and stays the same disk. They enclose
 * themselves. FLAGS: RENAME_NOREPLACE or RENAME_EXCHANGE. */
int ff_store_unlink(struct ff_store *store, int parent_fd, const char *name);
int ff_store_rename(struct ff_store *store, int old_parent_fd, const char *old_name,
                    int new_parent_fd, const char *new_name, unsigned flags);

/* Corrects what the kernel said of an inode of SOURCE where keeping disks aside shows (st_nlink).
 */
void ff_store_fix_stat(struct ff_store *store, struct stat *st);

/* --- live: block devices that are served as files --------------------------------------------- */

/* The symlink behind LINK_FD (O_PATH) may lead to a block device that is to be served as a file in
 * its place: *FD is a descriptor (O_PATH) of that, the caller's to close, and what the two below
 * take. A device without a medium is one too. -ENOENT: it is a symlink like any other. */
int ff_device_at(struct ff_store *store, int link_fd, int *fd);

/* What stat(2) is to tell of it: a regular file of the device's size, with the node's mode and
 * owner. Its mtime is never older than the latest change of it that nobody saw. One that is gone,
 * or has no medium, has size 0. */
int ff_device_stat(struct ff_store *store, int fd, struct stat *st);

/* Opens it with FLAGS; *OUT is a descriptor of it for the calls below, but FF_COPY, which it has
 * not. -EBUSY: another program has claimed it. -ENXIO: it is gone, or has no medium. */
int ff_device_open(struct ff_store *store, int fd, int flags, int *out);

/* --- live: the bytes of a disk ---------------------------------------------------------------- */

/* The disk of a regular file of SOURCE, or of a block device opened by ff_device_open(); FD is any
 * descriptor of it (O_PATH will do), which the call does not keep. Give it back with ff_disk_put().
 * A device's size does not change: FF_TRUNCATE is -EPERM but to what it is, a write beyond the end
 * -ENOSPC. */
int ff_disk_get(struct ff_store *store, int fd, struct ff_disk **out);
void ff_disk_put(struct ff_disk *disk);

enum ff_change_kind {
	FF_WRITE,     /* buf, len at off; append: at the end of the file instead of at off */
	FF_TRUNCATE,  /* to off bytes */
	FF_FALLOCATE, /* fallocate(2) with mode over off, len: 0, KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE
	               */
	FF_COPY,      /* copy_file_range(2) of len bytes from in_fd at in_off to off */
};

/* One change of a disk's bytes. FD must be open for writing on the disk's inode, without O_APPEND;
 * with O_DIRECT, buf may be at any address (it is copied when not aligned as the source needs). */
struct ff_change {
	enum ff_change_kind kind;
	int fd;
	off_t off;
	size_t len;
	const void *buf;
	bool append;
	int mode;
	int in_fd;
	off_t in_off;
};

/* The only way to a source's bytes: preserves what the change destroys, then makes it.
 * *DONE: bytes written or copied (may be short for FF_COPY), 0 for the other kinds.
 * Errors: those of the system call, and, under FF_BREAK_GUEST_WRITE, those of the failed save. */
int ff_disk_change(struct ff_disk *disk, const struct ff_change *change, size_t *done);

/* fsync(2) (or fdatasync(2)) of FD, an open descriptor of the disk: the fleecing images' data and
 * metadata become durable first, then the source's. */
int ff_disk_sync(struct ff_disk *disk, int fd, bool data_only);

/* --- snapshots ---------------------------------------------------------------------------------
 */

#define FF_FREEZE_EPHEMERAL 1u /* removed by the next ff_store_open(), should a drop never come */

/* Freezes every disk of SOURCE at one moment under NAME. When it returns the view is complete.
 * -EEXIST; -EINVAL: not a valid snapshot name (1 to FF_SNAP_NAME_MAX bytes, no leading dot, no
 * slash); -ETIMEDOUT: a write to a source did not end in time, nothing was frozen. */
int ff_store_freeze(struct ff_store *store, const char *name, unsigned flags);

/* Drops NAME and every fleecing image that no older snapshot needs. -ENOENT; -EBUSY: a frozen file
 * of it is open. Waits a few seconds for readers whose last descriptor has been flushed
 * (ff_reader_flushed()), for their close is already on its way. */
int ff_store_drop(struct ff_store *store, const char *name);

/* Makes a checkpoint of a snapshot: what was saved for it alone is given up, its frozen files are
 * never read again (-EIO), and which clusters changed since is all that is kept, for a bit each.
 * What older snapshots need is saved as before. -EBUSY: a frozen file of it is open; waits as
 * ff_store_drop() does. 0, too, if it is one already. */
int ff_snap_checkpoint(struct ff_snap *snap);
bool ff_snap_is_checkpoint(struct ff_snap *snap);

/* Switches on, or off, that reading gives up what it leaves behind, of the file F or (NULL) of all
 * files of the snapshot, until the store is closed: see ff_reader_passed(). -EIO: there is nothing
 * to read. */
int ff_snap_consume(struct ff_snap *snap, const struct ff_frozen *f, bool on);
bool ff_frozen_consumes(struct ff_snap *snap, const struct ff_frozen *f);

/* Renames a snapshot. -ENOENT, -EINVAL, -EEXIST. Open readers stay valid. Where views are durable
 * and storage fails half-way, it may have the new name after an error, as fsync may have written.
 */
int ff_store_rename_snap(struct ff_store *store, const char *from, const char *to);

/* A reference to the snapshot called NAME, or -ENOENT. */
int ff_snap_get(struct ff_store *store, const char *name, struct ff_snap **out);
struct ff_snap *ff_snap_ref(struct ff_snap *snap);
void ff_snap_put(struct ff_snap *snap);

/* Calls FN with each snapshot's name, in the order of their making, until it returns non-zero;
 * returns that. FN must not call back into the store. */
int ff_snap_each(struct ff_store *store, int (*fn)(void *ctx, const char *name), void *ctx);

/* When the names in the set of snapshots last changed: for the times of the directory. */
struct timespec ff_store_snaps_changed(struct ff_store *store);

/* --- frozen tree ---------------------------------------------------------------------------------
 * A struct ff_frozen is one inode of a snapshot. It never changes, is owned by the snapshot and
 * lives as long as a reference to that (ff_snap_get). None of these blocks. */

const struct ff_frozen *ff_snap_root(const struct ff_snap *snap);

/* The inode called NAME in DIR, or -ENOENT, -ENOTDIR; -ENOENT too once the snapshot is dropped;
 * -EIO: DIR could not be frozen. */
int ff_frozen_lookup(const struct ff_snap *snap, const struct ff_frozen *dir, const char *name,
                     const struct ff_frozen **out);

/* The I-th entry of DIR, from 0; -ENOENT past the last. NAME is owned by the snapshot. */
int ff_frozen_entry(const struct ff_snap *snap, const struct ff_frozen *dir, size_t i,
                    const char **name, const struct ff_frozen **out);

/* The inode that holds DIR; the root's is the root. */
const struct ff_frozen *ff_frozen_parent(const struct ff_snap *snap, const struct ff_frozen *dir);

/* Everything stat(2) tells, as of the freeze, write bits and all; st_ino is a function of the
 * snapshot's name and the source's inode, and differs from every live inode's. */
void ff_frozen_stat(const struct ff_snap *snap, const struct ff_frozen *f, struct stat *out);

/* The target of a symlink, owned by the snapshot, or NULL. */
const char *ff_frozen_readlink(const struct ff_snap *snap, const struct ff_frozen *f);

/* getxattr(2), listxattr(2): SIZE 0 asks for the length. *LEN: bytes. -ENODATA, -ERANGE. */
int ff_frozen_getxattr(const struct ff_snap *snap, const struct ff_frozen *f, const char *name,
                       void *buf, size_t size, size_t *len);
int ff_frozen_listxattr(const struct ff_snap *snap, const struct ff_frozen *f, char *buf,
                        size_t size, size_t *len);

/* Opens a frozen regular file for reading; keeps the snapshot from being dropped until it is
 * closed. -EIO: its view is broken (said in the log when it broke), or a checkpoint's. Use by many
 * threads at once. */
int ff_reader_open(struct ff_snap *snap, const struct ff_frozen *f, struct ff_reader **out);

/* Reads LEN bytes at OFF, short only at the end of the file. -EIO: broken, or a saved cluster whose
 * checksum does not match (logged). Never delays a writer. */
int ff_reader_read(struct ff_reader *reader, void *buf, size_t len, off_t off, size_t *got);

/* lseek(2) with WHENCE SEEK_DATA or SEEK_HOLE. -ENXIO as there. */
int ff_reader_seek(struct ff_reader *reader, off_t off, int whence, off_t *out);

/* The user was given these bytes. Where that was switched on, what this reader and all others of
 * the file have left behind by more than 64 MiB is given up: reading it is -EIO from then on, and
 * what was saved of it goes. Never delays a writer. */
void ff_reader_passed(struct ff_reader *reader, off_t off, size_t len);
/* Gives up the whole clusters in a range, at once and for good. */
int ff_reader_release(struct ff_reader *reader, off_t off, off_t len);

/* A descriptor of this reader was closed by its user; others may remain. */
void ff_reader_flushed(struct ff_reader *reader);
void ff_reader_close(struct ff_reader *reader);

/* Keeps a snapshot from being dropped as an open reader does, for an open file that is made up from
 * several disks, or from what is known of them. -ESTALE: it was dropped. FLUSHED: a descriptor of
 * the file was closed by its user. */
struct ff_hold;
int ff_snap_hold(struct ff_snap *snap, struct ff_hold **out);
void ff_hold_flushed(struct ff_hold *hold);
void ff_hold_release(struct ff_hold *hold);

/* Has it been dropped? Once true it stays so. */
bool ff_snap_dropped(const struct ff_snap *snap);

/* The XXH128 of a frozen regular file, in the canonical order of its bytes. Reads it unless that
 * was done before; STOP is asked now and then whether to give up (-EINTR). -EIO: see
 * ff_reader_open(). */
int ff_frozen_digest(struct ff_snap *snap, const struct ff_frozen *f, bool (*stop)(void *ctx),
                     void *ctx, uint8_t out[16]);

/* --- what changed between two snapshots ---------------------------------------------------------
 * A struct ff_since is one frozen disk as against an older snapshot, or against nothing: then all
 * of it counts as changed. Two files can be made up from it, which never change: an image, that is
 * a file in the format of images with what changed, which leads to the image of the older snapshot
 * that a backup has already; and the ranges that changed, as a sparse file. */

/* A name that no other snapshot has, nor this one once it was renamed, with the present name. */
uint64_t ff_snap_naming(const struct ff_snap *snap, char name[FF_SNAP_NAME_MAX + 1]);
/* Was it made before the other? */
bool ff_snap_older(const struct ff_snap *snap, const struct ff_snap *than);

#define FF_SINCE_NAME_MAX 255

enum ff_since_kind {
	FF_SINCE_NONE, /* nothing is made up from it */
	FF_SINCE_DIR,
	FF_SINCE_IMAGE,
	FF_SINCE_RANGES, /* is found, and not listed */
};

/* The I-th inode of DIR, and the name of the directory or image that is made up from it; -ENOENT
 * past the last. */
int ff_since_entry(const struct ff_snap *snap, const struct ff_frozen *dir, size_t i,
                   char name[FF_SINCE_NAME_MAX + 1], enum ff_since_kind *kind,
                   const struct ff_frozen **out);

/* What is called NAME where DIR is shown in this way, and the inode that it is made up from.
 * STORED: the name of that one, owned by the snapshot; no other name in it is at the same address.
 */
int ff_since_find(const struct ff_snap *snap, const struct ff_frozen *dir, const char *name,
                  enum ff_since_kind *kind, const char **stored, const struct ff_frozen **out);

struct ff_since_pair {
	struct ff_snap *new;
	struct ff_snap *old;  /* NULL: nothing; else older than NEW */
	const char *old_name; /* for names of backing files */
	const char *backing;  /* the pattern of those, or NULL for "%u%o/%p": %u leads out of the
	                         copy's root ("../" for each directory), %o is OLD_NAME, %p the path
	                         of the disk's image in OLD, %% is % */
};

/* Is it one? */
bool ff_since_backing_valid(const char *pattern);

/* Of the regular file F, called NAME in DIR, a directory of NEW. Takes as long as a look at what
 * changed; reads none of it. -EIO, logged: what changed cannot be known, or its view is lost.
 * -ENAMETOOLONG, logged: of the backing file. -ESTALE: one of the two was dropped. */
int ff_since_make(const struct ff_since_pair *pair, const struct ff_frozen *dir, const char *name,
                  const struct ff_frozen *f, struct ff_since **out);
void ff_since_free(struct ff_since *since);

uint64_t ff_since_image_size(const struct ff_since *since);
/* Bytes of the disk that count as changed. */
uint64_t ff_since_changed(const struct ff_since *since);
/* Its path in the older snapshot, or NULL: it is not there. */
const char *ff_since_old_path(const struct ff_since *since);

/* Opens it for the following; keeps both snapshots from being dropped. SINCE has to outlive it. Use
 * by many threads at once. */
int ff_since_open(const struct ff_since *since, struct ff_since_file **out);
void ff_since_flushed(struct ff_since_file *file);
void ff_since_close(struct ff_since_file *file);

/* As ff_reader_read(): of the image; and of the sparse file of the disk's size that has the bytes
 * of what changed, and zeros elsewhere. */
int ff_since_read_image(struct ff_since_file *file, void *buf, size_t len, off_t off, size_t *got);
int ff_since_read_ranges(struct ff_since_file *file, void *buf, size_t len, off_t off, size_t *got);

struct ff_since_run {
	uint64_t off, len;
	bool zero; /* reads as zeros; only if that was asked for */
};

/* The first run of changed bytes from OFF on, which may go on in the next. KINDS: all of it is
 * zeros, or is not known to be. -ENXIO: there is none. */
int ff_since_next(struct ff_since_file *file, uint64_t off, bool kinds, struct ff_since_run *out);

/* Calls FN with a path of each disk of OLD that NEW has not, until it returns non-zero; returns
 * that. */
int ff_since_deleted(const struct ff_snap *new, const struct ff_snap *old,
                     int (*fn)(void *ctx, const char *path), void *ctx);

/* --- guests' disks ----------------------------------------------------------------------------
 * A frozen file that is an image of a disk in a format of its own can also be read as the guest
 * sees it: decoded, with its backing files, which are looked for in the same snapshot only. The
 * bytes of a decoded disk never change. */

struct ff_raw;

/* Is the frozen regular file F such an image? True as well where that cannot be read: opening it
 * tells. */
bool ff_raw_is(struct ff_snap *snap, const struct ff_frozen *f);

/* *SIZE: of the disk in F, in bytes; of F itself, so that it never looks empty, where F does not
 * tell. -ESTALE: the snapshot was dropped. */
int ff_raw_size(struct ff_snap *snap, const struct ff_frozen *f, uint64_t *size);

/* Who asks. For an image may lead to other files of the snapshot. */
struct ff_raw_asker {
	/* The paths by which users know SOURCE, besides its own without symlinks: names that begin
	 * so are found. Ends with NULL; one that is not absolute is passed over. NULL: none. */
	const char *const *roots;
	/* May the caller read such a file, or (WHAT is 1, not 4) look names up in such a directory?
	 * ACL: it has a list of rights too. NULL: the store itself asks. */
	bool (*may)(void *ctx, const struct stat *st, bool acl, mode_t what);
	void *ctx;
};

/* Opens the disk in F, which is in DIR; keeps the snapshot from being dropped, and counts as
 * flushed. Errors say in the log which file they are about, and what to do: -EOPNOTSUPP: it is
 * encrypted, or has something that is not decoded; -EACCES: the caller may not read a file that
 * it needs; -EIO: it is damaged, lost, or something that it needs is not in the snapshot. Use by
 * many threads at once. */
int ff_raw_open(struct ff_snap *snap, const struct ff_frozen *dir, const struct ff_frozen *f,
                const struct ff_raw_asker *asker, struct ff_raw **out);

/* As of a reader: ff_reader_read(), ff_reader_seek(). -EIO also for damage (logged). */
int ff_raw_read(struct ff_raw *raw, void *buf, size_t len, off_t off, size_t *got);
int ff_raw_seek(struct ff_raw *raw, off_t off, int whence, off_t *out);

/* Counts the 512-byte blocks of the disk that are not holes, which takes as long as its tables take
 * to read. After some seconds the rest counts as data. */
int ff_raw_blocks(struct ff_raw *raw, uint64_t *blocks);

void ff_raw_close(struct ff_raw *raw);

/* --- what happens: looks at the store while it works ------------------------------------------
 *
 * Nothing here takes a lock that a guest's write could wait for longer than
 * for an addition; a look at a snapshot costs as much as has happened in it, not as much as it has
 * disks. Numbers are each right by themselves; those that are read while guests write may be of
 * slightly different moments. */

/* How long operations of guests (writes, truncations …) that had to save old data were delayed by
 * that; one that saved nothing does not count. */
struct ff_waits {
	uint64_t saves;      /* such operations */
	uint64_t longest_us; /* microseconds; 0: there was none */
	uint64_t p99_us;     /* 99 of 100 were not delayed longer; exact to a quarter */
};

struct ff_store_status {
	const char *fleece_path; /* absolute; owned by the store */
	uint64_t used_bytes;     /* by all fleecing images, those of dropped snapshots included that
	                            older ones need */
	uint64_t free_bytes;     /* that they may still take: the smaller of what fleece_limit and
	                            what fleece_reserve leave */
	double growth;           /* bytes a second that they took, of late: see space.c */
	/* since the store was opened, all snapshots together */
	struct ff_waits waits;
	uint64_t saved_bytes; /* of old data, zeros included */
	uint64_t failed;      /* operations whose old data could not be saved, whatever gave way */
};

/* May wait a moment for the filesystem of FLEECE_DIR. */
void ff_store_status(struct ff_store *store, struct ff_store_status *out);

enum ff_view_state {
	FF_VIEW_OK,
	FF_VIEW_CHECKPOINT, /* given up on purpose: only which clusters changed is kept */
	FF_VIEW_BROKEN,     /* old data could not be saved, or was lost */
	FF_VIEW_TORN,       /* power failed (or a filesystem did) before it was durable */
};

struct ff_disk_status {
	const char *path; /* one of its paths in the snapshot, without a leading slash; owned by the
	                     caller of the function that gives it, until that function returns */
	enum ff_view_state state;
	const char *reason;       /* NULL unless it is broken or torn; static */
	uint64_t frozen_bytes;    /* its size */
	uint64_t read_bytes;      /* given to readers since the store was opened */
	uint64_t preserved_bytes; /* held by its own image, in whole clusters, zeros included */
	uint64_t released_bytes;  /* given up, in whole clusters */
	uint64_t allocated_bytes; /* by that image on FLEECE_DIR, tables included */
	struct ff_waits waits;    /* since the store was opened */
};

struct ff_snap_status {
	const char *name; /* as path above */
	struct timespec created;
	enum ff_view_state state; /* the worst of its disks' */
	const char *reason;
	bool durable;
	unsigned open_files;
	uint64_t files; /* frozen regular files; hard links of one count once */
	/* sums of its disks' */
	uint64_t frozen_bytes, read_bytes, preserved_bytes, released_bytes, allocated_bytes;
	struct ff_waits waits;
};

/* What is called for each snapshot, oldest first: DISK for each of its disks that has something to
 * tell (something was saved for it or read of it, or it is not ok), then SNAP. One that returns
 * non-zero ends it all, and that is returned. They may take their time and call functions that do
 * not change the set of snapshots: a drop of the snapshot waits for them. DISK may be NULL. */
struct ff_status_visitor {
	int (*disk)(void *ctx, const struct ff_disk_status *disk);
	int (*snap)(void *ctx, const struct ff_snap_status *snap);
	void *ctx;
};

/* -ENOMEM, or what the visitor returned. */
int ff_store_visit(struct ff_store *store, const struct ff_status_visitor *visitor);

/* The same for one snapshot: -ENOENT if it was dropped. */
int ff_snap_visit(struct ff_snap *snap, const struct ff_status_visitor *visitor);

/* When it was made. */
struct timespec ff_snap_created(const struct ff_snap *snap);

/* Of one frozen regular file: -ENOENT if the snapshot was dropped, -EINVAL if it is no regular
 * file. out->path is NULL. */
int ff_frozen_status(struct ff_snap *snap, const struct ff_frozen *f, struct ff_disk_status *out);

#endif
