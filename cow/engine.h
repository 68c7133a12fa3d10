/*
 * The structures that the files of cow/ share: store, disk, link (a disk's place in a snapshot) and
 * snapshot. Nothing here is visible outside cow/.
 *
 * Lock order, outermost first; a thread takes only locks that stand further right than those it
 * holds:
 *
 *   admin → names → disk.append → barrier `writes` → disk.fd → paths → chain → the leaves
 *
 *   admin    one freeze, drop, rename, open or close of the store at a time
 *   names    rwlock: shared by changes of names and metadata in SOURCE, exclusive for the walk
 *            and the flip of a freeze, and for taking links out of chains
 *   append   one append to a disk at a time
 *   writes   barrier: shared by each change of a source's bytes (the system call alone, not the
 *            saving before it), closed for the flip
 *   fd       opening of a disk's source descriptor
 *   paths    where each disk with a chain lies below SOURCE
 *   chain    the older/hidden/pin members of links
 *   leaves   disks (the table), snaps (the list and its names), disk.claims, snap.lock, guards
 *
 * A second barrier, `reads`, is held shared by frozen reads alone, so that a link can be freed when
 * no reader stands on it. Frozen readers take no lock but that and the leaves of their own
 * snapshot.
 */
#ifndef FF_COW_ENGINE_H
#define FF_COW_ENGINE_H

#include <limits.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/stat.h>

#include "cow/barrier.h"
#include "cow/qcow2_image.h"
#include "cow/qsource/kept.h"
#include "cow/stats.h"
#include "cow/tree.h"
#include "ff_store.h"

enum { DISK_BUCKETS = 16384, FORGOTTEN_WORDS = 256, FD_REFUSED = -2 };
enum { OLD_DATA_BYTES = 2 << 20, OLD_DATA_BUFFERS = 8 };

/* Identity of a source: the inode, told from a later one of the same number by its birth time. */
struct identity {
	dev_t dev;
	ino_t ino;
	int64_t btime_sec;
	uint32_t btime_nsec;
};

/* A directory of FLEECE_DIR: NAME of a visible snapshot, or .dropped-SEQ of a hidden one. */
struct fleece_dir {
	int fd;
	char *name;     /* lock: admin and snaps to change it, one of the two to read it */
	unsigned links; /* links whose images lie here; lock: admin */
	bool kept;      /* it holds images that are left to the next mount; lock: admin */
	struct fleece_dir *next_hidden; /* lock: admin */
	struct link *_Atomic notable;   /* links with something to tell: see stats.c */
};

/* Keeps a snapshot from being dropped: see ff_snap_hold(). */
struct ff_hold {
	struct ff_snap *snap; /* a reference */
	bool flushed;         /* lock: snap->lock */
};

/* XXH128 of a frozen disk, once it was computed. */
struct digest {
	bool known;
	uint8_t bytes[16];
};

/* The image of one disk in one snapshot. Made by freeze or recovery, linked into the disk's chain
 * while the barrier is closed, freed after it was taken out and no reader or writer can hold it. */
struct link {
	struct ff_image *img;
	struct ff_disk *disk;
	struct fleece_dir *dir;
	uint64_t clusters;          /* of the disk at the freeze */
	struct link *_Atomic newer; /* release/acquire; NULL: live comes next */
	struct link *older;         /* lock: chain */
	struct ff_snap *snap;       /* lock: chain; NULL: hidden, only older ones need it */
	bool collecting;            /* lock: admin; drop_collect() has it in hand */
	bool kept;                  /* lock: admin; has left, its image stays: still named */
	bool charged;               /* lock: admin; its allocation counts as used space */
	bool out;                   /* lock: chain; no longer in its chain, about to be freed */
	atomic_bool broken;         /* set before the guest goes on; never cleared */
	atomic_bool checkpoint;     /* its snapshot is one: the view is never read again; set under
	                               chain, once storage has it; never cleared */
	atomic_bool noted;          /* a note on SOURCE's side says that it is broken */
	atomic_bool recorded;       /* broken, and so to a later mount; never cleared */
	bool unrecorded;            /* broken, and no storage took it; lock: disk.claims */
	atomic_uint_fast64_t flushed; /* that many of the saves are durable */
	atomic_int pins;            /* taken within `writes` or under chain; writers saving to it */
	atomic_uint_fast64_t saves; /* clusters saved here by this daemon */
	uint32_t number;            /* of the disk in the snapshot; constant */
	atomic_bool consume;        /* reading it gives up what is left behind: see consume.c */
	struct consumer *consumers; /* lock: snap.lock; who has it open */
	uint64_t unswept,
	    unswept_end;           /* lock: snap.lock; clusters given up, perhaps not given back */
	atomic_bool notable;       /* on its directory's list; set once */
	atomic_bool torn;          /* set before broken: it broke by a loss of power */
	const char *_Atomic why;   /* it broke, set before broken; static */
	struct link *next_notable; /* constant once on the list */
	struct link_stats *_Atomic stats; /* NULL until there is something to count */
	struct zero_map *_Atomic zeros;   /* NULL until first asked for; set once */
};

struct device;
struct devices;

struct claim {
	uint64_t first, count;
	const struct link *link; /* saved to; pinned by who claims */
	struct claim *next;
};

struct ff_disk {
	struct ff_store *store;
	struct identity id;
	struct ff_disk *next;          /* lock: disks */
	unsigned refs;                 /* lock: disks; handles, readers and links */
	unsigned users;                /* lock: disks; see disk_use() */
	bool stale;                    /* lock: disks; the inode is gone, no longer in the table */
	struct device *_Atomic device; /* set once; see disk_device() */
	struct link *_Atomic top;      /* written within the closed barrier */
	atomic_bool wanted;            /* see chain_wanted(); lock: chain, read without */
	atomic_bool lean;              /* some view needs less than all: see needs.c; the same */
	atomic_uint touched;           /* the store's epoch as read after the latest change */
	pthread_mutex_t claim_lock;    /* claims */
	pthread_cond_t claim_freed;
	struct claim *claims;
	unsigned recording;  /* lock: claims; broken views that storage is being told of */
	unsigned unrecorded; /* lock: claims; broken views that no storage took */
	atomic_bool durable; /* set before the flip, cleared without a chain: a view of it was
	                        promised to survive power loss, so all its saves are flushed */
	pthread_mutex_t append;
	pthread_mutex_t fd_lock;    /* opening of the four */
	_Atomic uint64_t saved_end; /* a hint of old_data.c's */
	_Atomic int path_fd;        /* O_PATH, -1 until a handle was opened */
	_Atomic int source_fd;      /* O_RDONLY, -1 until first needed */
	_Atomic int old_fd;         /* the same for saves */
	_Atomic int direct_fd;      /* the same, O_DIRECT; FD_REFUSED: the filesystem has none */
	char *path;                 /* lock: paths; below SOURCE, NULL without a chain; of a block
	                               device: its own, absolute */
	char *next_path;            /* lock: paths; where a move in hand takes it */
	bool aside;                 /* lock: paths; one of its names is the one aside */
	atomic_bool has_aside;      /* mirror of aside, for stat */
};

struct ff_snap {
	struct ff_store *store;
	atomic_uint refs;
	char *name;                     /* lock: snaps */
	atomic_uint_fast64_t name_hash; /* of the name, for st_ino */
	uint64_t naming;                /* lock: snaps; no other snapshot or name has it */
	uint64_t seq;
	bool ephemeral;
	struct fleece_dir *dir; /* lock: admin */
	struct tree *tree;      /* constant once published */
	struct link **links;    /* by the tree's disk number; lock: admin, and constant for
	                           readers until dropped; NULL: that image is lost */
	size_t link_count;      /* as many as the tree has disks, but for a damaged one */
	uint64_t made;          /* the mount that made it: see known.c; 0: not known */
	bool absent;            /* from an earlier mount: no link of it is believed */
	bool damaged;           /* its manifest is; there is no tree to show, only EIO */
	bool checkpoint;        /* lock: snap.lock; its views are not opened any more */
	/* for looks at it; constant once published: see status_prepare() */
	struct timespec created;
	bool durable;
	uint64_t files, frozen_bytes;
	uint64_t first_allocated; /* by its images when they were made */
	size_t missing;           /* NULLs in links */
	size_t unfrozen;          /* files and directories that could not be frozen */
	struct ff_snap *next;     /* lock: snaps; towards newer */
	pthread_mutex_t lock;     /* the following */
	pthread_cond_t idle;
	unsigned readers;           /* open */
	unsigned unflushed_readers; /* open, and no descriptor of theirs was closed yet */
	unsigned looks;             /* at its state: a drop waits, they are short */
	struct digest *digests;     /* by the tree's disk number; NULL until one is known */
	bool dropped;
};

struct ff_store {
	struct ff_store_config cfg;
	char *source_path;
	char *fleece_path;
	char **exclude;
	int source_fd;
	int fleece_fd;
	int lock_fd;
	int aside_fd;        /* lock: paths; -1 until first needed */
	char aside_path[64]; /* of that directory, below SOURCE; constant */
	atomic_uint asides;  /* disks that have a name there */
	dev_t source_dev, fleece_dev;
	bool knows_holes; /* constant: SOURCE's filesystem is quick to tell where they are */
	ino_t fleece_ino;
	struct barrier *writes;
	struct barrier *reads;
	pthread_mutex_t reads_closing; /* one closer of it at a time; a lock right of admin */
	pthread_mutex_t admin;
	pthread_rwlock_t names;
	pthread_mutex_t paths;
	pthread_mutex_t chain;
	pthread_mutex_t snaps_lock;
	struct ff_snap *snaps;     /* lock: snaps_lock; oldest first */
	struct timespec changed;   /* lock: snaps_lock */
	uint64_t namings;          /* lock: snaps_lock; names that were given */
	struct fleece_dir *hidden; /* lock: admin; directories of dropped snapshots */
	uint64_t mount;            /* the number of this one: see known.c; constant once open */
	uint64_t next_seq;         /* lock: admin */
	uint64_t next_drop;        /* lock: admin; for names of dropped snapshots */
	atomic_uint late;          /* jobs on fleece storage that nobody waits for any more */
	atomic_uint asking;        /* the same, those that use neither disk nor image */
	atomic_bool left_open;     /* descriptors were kept that would have been closed, for late */
	struct guards *guards;     /* NULL: QEMU is not to be kept off the sources */
	struct devices *devices;   /* NULL: no block device is served */
	int source_lock_fd;
	struct qs_kept raw_kept; /* by the caches of decoded disks */
	atomic_bool pulsing;     /* the time is being written; who set it owns the next three */
	int pulse_fd;
	bool pulse_named; /* it is durable that there is one */
	int64_t pulse_time;
	bool pulse_failed;
	int many_fds;      /* constant; descriptors from this number on are not kept when idle */
	atomic_uint epoch; /* raised by each freeze before it looks at the sources */
	/* A bit for each hash of an inode number: a disk object that said `touched` of this epoch
	 * may have been freed. Cleared before the epoch rises; set within disks_lock. */
	_Atomic uint64_t forgotten[FORGOTTEN_WORDS];
	void *_Atomic old_data[OLD_DATA_BUFFERS]; /* whoever takes one puts NULL in its place */
	pthread_mutex_t disks_lock;
	struct ff_disk *disks[DISK_BUCKETS]; /* lock: disks_lock */
	pthread_mutex_t space_lock;          /* the next four; a leaf */
	uint64_t space_used;                 /* bytes that the images have allocated */
	uint64_t space_unchecked;            /* allocated since free space was last asked for */
	int64_t space_headroom;              /* what could still be allocated then */
	uint64_t space_charged;              /* since the store was opened, never less */
	uint64_t space_grown;                /* allocated since the store was opened; lock: space */
	uint64_t growth_seen;                /* of that, in growth_bytes; lock: space */
	struct timespec growth_time;         /* when; lock: space */
	double growth_bytes, growth_seconds; /* lock: space; their quotient is the rate */
	int64_t space_avail;                 /* lock: space; on the filesystem, when last asked */
	atomic_bool space_asking;            /* a job asks, and has not come back */
	unsigned space_warned;               /* of that many per cent; who set `pulsing` */
	struct store_stats stats[STATS_SHARDS];
};

/* --- store.c --- */
/* A walk of all that the mount shows of SOURCE. */
struct tree_walk source_walk(const struct ff_store *s);

/* --- disk.c, disk_fds.c --- */
int identity_of(int dirfd, const char *path, struct identity *id, struct stat *st);
bool identity_same(const struct identity *a, const struct identity *b);
/* The disk with this identity, made if MAKE; a reference. -ENOENT. */
int disk_find(struct ff_store *s, const struct identity *id, bool make, struct ff_disk **out);
void disk_ref(struct ff_disk *d);
/* Who uses the disk's descriptors, or those of the images in its chain, is one of its users: a
 * handle, a reader, and any other call for its length. The last to leave closes those that have
 * high numbers. The caller has a reference. disk_unuse(): chain lock not held. */
void disk_use(struct ff_disk *d);
void disk_unuse(struct ff_disk *d);
/* If descriptors are scarce, closes those of images that are not the newest of their disk, whoever
 * has the disk open; D NULL: of all disks. Frozen reads wait a moment. */
void disk_make_room(struct ff_store *s, struct ff_disk *d);
/* Of a disk that is referred to: may an object of it have been freed, in this epoch, that was
 * touched in it? */
bool disk_was_forgotten(const struct ff_disk *d);
/* Before the epoch rises. */
void disk_forget_none(struct ff_store *s);
void disk_unref(struct ff_disk *d);
/* A descriptor to read the source with, owned by the disk. */
int disk_source(struct ff_disk *d, int *fd);
/* The same for saves; DIRECT: past the page cache, or -EINVAL where that cannot be. */
int disk_old_source(struct ff_disk *d, bool direct, int *fd);
/* The same as io_seek() of the source. A block device has no holes, wherever it ends. */
int disk_seek(struct ff_disk *d, uint64_t off, int whence, uint64_t *out);
/* What fstat says of the source now. */
int disk_stat(struct ff_disk *d, struct stat *st);
/* The disk with this inode that is in the table, whatever its birth time; a reference, or NULL. */
struct ff_disk *disk_peek(struct ff_store *s, dev_t dev, ino_t ino);
/* Calls FN for each disk that has a chain, with a reference held and no lock of disk.c. */
int disk_each(struct ff_store *s, int (*fn)(struct ff_disk *, void *), void *ctx);

/* --- chain.c --- */
enum owner_kind { OWNER_LIVE, OWNER_ZERO, OWNER_LINK };
struct owner {
	enum owner_kind kind;
	struct link *link;
};
/* Who holds the clusters from FIRST for a reader of LINK: length of the run, at most MAX, with the
 * same owner. Lock-free; the caller holds the `reads` barrier or the chain still. */
uint64_t chain_resolve(struct link *link, uint64_t first, uint64_t max, struct owner *out);
/* The same for each of COUNT clusters from FIRST on, at most OWNERS_MAX, in one walk of the chain.
 */
enum { OWNERS_MAX = 256 };
void chain_owners(struct link *link, uint64_t first, unsigned count, struct owner *out);
/* Breaks, for good, every view from TOP's to the oldest that needed one of these clusters, which
 * could not be saved to TOP: ERROR says why. -ETIMEDOUT: the storage hangs, and is not waited for.
 * UNTRACKED: nor could it be recorded that they changed, so those break as well that are there for
 * that alone. An error: some view's loss could not be recorded, and what was to be destroyed must
 * not be. */
int chain_break(struct link *top, uint64_t first, uint64_t count, bool untracked, int error);
/* Breaks every view of the disk. WHY is static, here and below. */
int chain_break_all(struct ff_disk *d, const char *why);
/* Breaks the view of this link alone. */
int chain_break_one(struct link *l, const char *why);
/* Is some view of the disk still worth saving for? Lock-free. */
bool chain_wanted(struct ff_disk *d);
/* To be called when that may have changed. Lock: chain, or the only thread. */
void chain_recount(struct ff_disk *d);
struct link *link_new(struct ff_disk *d, struct fleece_dir *dir, struct ff_snap *snap,
                      struct ff_image *img);
void link_free(struct link *l);
/* Keeps the link, and the descriptors of its image, until pins is lowered. Chain lock not held. */
void link_pin(struct link *l);
/* The absolute path, malloc'd, of the source that a disk's path names. */
char *source_path(const struct ff_store *s, const char *path);
/* The name that LINK's directory has now, for messages: to be asked by any thread. */
void link_dir_name(const struct link *l, char out[NAME_MAX + 1]);
/* Sets the backing file name of LINK's image to NEWER's image, or to the source. Locks: admin. */
int link_set_backing(struct link *l, struct link *newer);
/* The same for the newest link of a disk whose path changed. Locks: paths held. */
void disk_repath(struct ff_disk *d);

/* --- lost.c --- */
/* Records that the view of this link, which the caller has pinned and counted in disk.recording, is
 * broken. An error: nowhere. HANGS: fleece storage does not answer. */
int lost_record(struct link *l, bool hangs);
/* Waits until storage knows of every view of the disk that broke: a write may go on unsaved only
 * after that, and not if this gives an error. */
int lost_settled(struct ff_disk *d);
/* The link is about to go. */
void lost_forget(struct link *l);
/* Notes that the view which the disk's image SEQ is of is lost. */
int lost_note(struct ff_store *s, const struct identity *id, uint64_t seq, bool durable);
/* The snapshot is about to go: so are the notes on those of its disks that have no image. */
void lost_forget_missing(const struct ff_snap *snap);
/* At open, when chains are made: breaks the views that notes tell of. A note on an image that is
 * MISSING, but whose snapshot is there, is kept. */
int lost_recall(struct ff_store *s,
                bool (*missing)(void *ctx, const struct identity *id, uint64_t seq), void *ctx);

/* --- old_data.c --- */
/* Reads old data for a save, into memory aligned as O_DIRECT wants it. DIRECT: the change that asks
 * goes past the page cache. *GOT as in io_pread(). */
int old_data_read(struct ff_disk *d, bool direct, void *buf, size_t len, uint64_t off, size_t *got);
/* Memory for old data, at least OLD_DATA_BYTES and aligned for O_DIRECT: NULL without memory. To be
 * given back. */
void *old_data_buffer(struct ff_store *s);
void old_data_buffer_back(struct ff_store *s, void *buf);
void old_data_free_buffers(struct ff_store *s);

/* --- preserve.c --- */
/* What a guest is told when storage that it does not know of fails: hypervisors pause it for ENOSPC
 * and know EIO; ENOENT or EROFS from a write would mean nothing to anybody. */
int guest_error(int r);
/* ff_disk_change() within the bounds of a device. */
int preserve_change(struct ff_disk *d, const struct ff_change *c, size_t *done);

/* --- frozen.c --- */
/* The first entry of DIR that is not before NAME. */
uint32_t frozen_entry_at(const struct ff_frozen *dir, const char *name);

/* --- making.c --- */
/* Makes the directory of a snapshot, with the mark that it is being made. -EEXIST: something else
 * has its name; -EBUSY: something is mounted there. Errors are logged. Locks: admin. */
int making_begin(struct ff_store *s, const char *name, struct fleece_dir **out);
/* Has the directory that mark? */
bool making_marked(int dirfd);
/* It has its manifest: takes the mark away. Errors are logged. */
int making_done(struct ff_store *s, struct fleece_dir *dir);

/* --- freeze.c, drop.c, collect.c, recover.c --- */
#define DROPPED ".dropped-" /* begins the name of a dropped snapshot's directory */
enum { DROPPED_MAX = 40 };
void snap_free_memory(struct ff_snap *snap);
struct ff_snap *snap_new(struct ff_store *s, const char *name, uint64_t seq);
void snap_publish(struct ff_snap *snap);
void snap_set_name(struct ff_snap *snap, char *name);
bool snap_name_valid(const char *name);
/* Begins a hold. The caller has snap->lock, and has seen that it is not dropped. */
void hold_begin(struct ff_hold *hold, struct ff_snap *snap);
/* Ends it, and gives the reference back. */
void hold_end(struct ff_hold *hold);
/* Waits for readers that are about to close, and sets *FLAG, a member under snap.lock, when there
 * are none. -EBUSY. */
int snap_close_readers(struct ff_snap *snap, bool *flag);
int drop_snap(struct ff_snap *snap);
/* Takes one out again that was never shown. False: storage takes no change of it, so that it would
 * be a snapshot again after the next mount; all is as it was, and it must go on being right. */
bool drop_unpublished(struct ff_snap *snap);
/* Of these links, which become hidden, and of the hidden ones beside them in their chains: takes
 * out what no older visible one needs, deletes the images, shrinks the rest, and puts backing names
 * right. NULLs are skipped. Locks: admin. */
void drop_collect(struct ff_store *s, struct link *const *links, size_t count);
/* Gives the directory NAME a name of a dropped snapshot's, in OUT. */
int drop_rename(struct ff_store *s, const char *name, char *out, size_t size);
/* Makes a directory of such a name: one that holds nothing goes at the next mount. */
int drop_mkdir(struct ff_store *s, char *out, size_t size);
void fleece_dir_release(struct ff_store *s, struct fleece_dir *dir);
/* DIR has been renamed to NAME, which is malloc'd and taken over. Locks: admin. */
void fleece_dir_renamed(struct ff_store *s, struct fleece_dir *dir, char *name);
/* Frees DIR, of which no link is left, and makes it a dropped snapshot's; what is in it is left to
 * the next mount if it is NEEDED, or removed. */
void fleece_dir_leave(struct ff_store *s, struct fleece_dir *dir, bool needed);
int recover(struct ff_store *s);

/* --- consume.c, reader.c --- */
struct consumer;
struct consumer *reader_consumer(struct ff_reader *rd, struct ff_snap **snap);
/* As ff_reader_seek() of a file that ends at LIMIT, if not sooner: looks no further. */
int reader_seek_below(struct ff_reader *rd, uint64_t at, uint64_t limit, int whence, off_t *out);

/* --- checkpoint.c --- */
/* Is the snapshot in this directory a checkpoint? */
int checkpoint_marked(int dirfd, bool *out);
/* Makes its links those of a checkpoint. Locks: admin. */
void checkpoint_links(struct ff_snap *snap);

/* --- guard.c --- */
/* Locks SOURCE's directory. -EBUSY, logged: another fleecefs has. */
int guard_source(struct ff_store *s);
/* Locks SOURCE's files against QEMU, if that is wished. Only -ENOMEM is an error. */
int guard_open(struct ff_store *s);
/* The regular file behind FD is one that is used: locks it too. */
void guard_add(struct ff_store *s, int fd);
/* This inode has lost a name, or any may have: locks on those that have none left are given back.
 */
void guard_unnamed(struct ff_store *s, dev_t dev, ino_t ino);
void guard_sweep(struct ff_store *s);
/* From here on another fleecefs may wait for our end. An error: one has not waited. */
int guard_ending(struct ff_store *s);
void guard_close(struct ff_store *s);

/* --- aside.c --- */
/* The path below SOURCE of the directory of disks kept aside for this FLEECE_DIR: another one for
 * the same SOURCE has a place of its own. */
int aside_home(int fleece_fd, char *out, size_t size);
/* Opens the directory of the disks kept aside, made if need be; DURABLE: and that for good. */
int aside_open(const struct ff_store *s, bool durable, int *fd);
/* Only if it is there: -ENOENT, or, logged, an error of one that is not ours. */
int aside_find(const struct ff_store *s, int *fd);
/* The chain is empty: the name aside goes. */
void aside_release(struct ff_disk *d);
/* The path below SOURCE of the name that the disk has, or would have, aside. 0 or -ENAMETOOLONG. */
int aside_path(const struct ff_store *s, const struct identity *id, char *out, size_t size);
/* At open: D was found to have a name aside. */
void aside_adopt(struct ff_disk *d);
/* At open: removes names aside that no chain needs. */
void aside_sweep(struct ff_store *s);

/* --- status.c --- */
/* Takes what does not change of a snapshot that is about to be published, or was recovered. */
void status_prepare(struct ff_snap *snap);
/* The path below the snapshot's root that F has in DIR; malloc'd, NULL: no memory. */
char *status_path_in(const struct tree *t, const struct ff_frozen *dir, const struct ff_frozen *f);

/* --- space.c --- */
/* Counts what the link's image has allocated already; once. */
int space_charge_link(struct link *l);
void space_release_link(struct link *l);
/* Counts it even beyond the limit: it is there. */
void space_adopt_link(struct link *l);
/* For images: see ff_image_set_budget(). */
int space_charge(void *store, int64_t bytes, bool must);
/* From now on growth is measured. */
void space_begin(struct ff_store *s);
/* Fills in what is about space. Waits for storage that does not answer a second at most. */
void space_look(struct ff_store *s, struct ff_store_status *out);
/* Once a second, by one thread at a time, which may hang: says when space becomes scarce. */
void space_pulse(struct ff_store *s);

#endif
