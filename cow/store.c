/*
 * Opening and closing of the store: descriptors, locks, the lock file.
 *
 * SOURCE and FLEECE_DIR are held by descriptors from the beginning, so that a mount which covers
 * either of them changes nothing for us.
 */
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/resource.h>
#include <unistd.h>
#include <libqcow.h>
#include <xxhash.h>

#include "cow/device.h"
#include "cow/ending.h"
#include "cow/engine.h"
#include "cow/io.h"
#include "cow/open_regular.h"
#include "ff_log.h"
#include "ff_util.h"

enum {
	LATE_WAIT_MS = 10000,
	LOCK_POLL_MS = 20,
	LOCK_MS = 1500,
	LOCK_SAY_MS = 3000,
	LOCK_ENDING_MS = 300000,
	RAW_KEPT_MAX = 64 << 20, /* bytes of all decoded disks together */
};

#define ENDING "ending\n" /* in the lock file, while the store is closed */

const char *ff_store_libraries(void)
{
	static char text[96];
	unsigned v = XXH_versionNumber();

	/* The same bytes each time, so writing them twice at once does no harm. */
	snprintf(text, sizeof text, "libqcow %s\nxxHash %u.%u.%u", libqcow_get_version(), v / 10000,
	         v / 100 % 100, v % 100);
	return text;
}

bool ff_store_hides(const struct ff_store *store, dev_t dev, ino_t ino)
{
	return dev == store->fleece_dev && ino == store->fleece_ino;
}

void ff_store_change_begin(struct ff_store *store)
{
	pthread_rwlock_rdlock(&store->names);
}

void ff_store_change_end(struct ff_store *store)
{
	pthread_rwlock_unlock(&store->names);
}

static int path_of_fd(int fd, char **out)
{
	char proc[40], path[PATH_MAX];
	int r;

	snprintf(proc, sizeof proc, "/proc/self/fd/%d", fd);
	r = io_readlinkat(AT_FDCWD, proc, path, sizeof path);
	if (r)
		return r;
	*out = strdup(path);
	return *out ? 0 : -ENOMEM;
}

static bool path_is_below(const char *path, const char *dir)
{
	size_t n = strlen(dir);

	return strncmp(path, dir, n) == 0 && (path[n] == '/' || n == 1);
}

/* Only we (and root) may write FLEECE_DIR: what is in it is believed. */
static int check_fleece_dir(struct ff_store *s)
{
	struct stat st;
	int r = io_fstat(s->fleece_fd, &st);

	if (r)
		return r;
	if ((st.st_mode & 022) || (st.st_uid != geteuid() && st.st_uid != 0)) {
		ff_error("%s may be written by others: chmod go-w it, and chown it to the user who "
		         "mounts",
		         s->fleece_path);
		return -EPERM;
	}
	s->fleece_dev = st.st_dev;
	s->fleece_ino = st.st_ino;
	r = io_fstat(s->source_fd, &st);
	if (!r && st.st_dev == s->fleece_dev && st.st_ino == s->fleece_ino) {
		ff_error("%s is SOURCE itself: give another --fleece-dir", s->fleece_path);
		r = -EINVAL;
	}
	s->source_dev = st.st_dev;
	s->knows_holes = io_knows_holes(s->source_fd);
	if (!r && path_is_below(s->source_path, s->fleece_path)) {
		ff_error("%s holds SOURCE: give another --fleece-dir", s->fleece_path);
		r = -EINVAL;
	}
	return r;
}

static int open_fleece_dir(struct ff_store *s, const char *path)
{
	int at = path ? AT_FDCWD : s->source_fd, r;

	r = io_mkdirat(at, path ? path : FF_HIDDEN_NAME, 0700);
	/* a wrong name, or storage that is not mounted, would else go unnoticed for long */
	if (!r && path)
		ff_info("%s was not there: it is new", path);
	path = path ? path : FF_HIDDEN_NAME;
	if (!r || r == -EEXIST)
		r = io_openat(at, path, O_RDONLY | O_DIRECTORY | (at == AT_FDCWD ? 0 : O_NOFOLLOW),
		              0, &s->fleece_fd);
	if (r) {
		ff_error("%s: cannot be the fleece directory: %s", path, strerror(-r));
		return r;
	}
	r = path_of_fd(s->fleece_fd, &s->fleece_path);
	if (!r)
		r = check_fleece_dir(s);
	return r ? r : aside_home(s->fleece_fd, s->aside_path, sizeof s->aside_path);
}

/* Has the holder of the lock begun to end? It says so in the file. */
static bool holder_ends(struct ff_store *s)
{
	char text[sizeof ENDING];
	size_t got;

	return io_pread(s->lock_fd, text, sizeof text, 0, &got) == 0 && got == strlen(ENDING);
}

/* umount(8) returns before the daemon has come to its end, and a mount may follow at once: so a
 * holder that ends is waited for, and one that may be about to is given a moment. */
static int take_lock(struct ff_store *s)
{
	bool ends = false;
	int r = io_openat(s->fleece_fd, ".lock", O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW, 0600,
	                  &s->lock_fd);

	if (r == -EEXIST)
		r = open_regular(s->fleece_fd, ".lock", O_RDWR, &s->lock_fd);
	for (int waited = 0; !r; waited += LOCK_POLL_MS) {
		r = io_flock(s->lock_fd, LOCK_EX);
		if (!r)
			r = io_truncate(s->lock_fd, 0);
		if (!r)
			return 0;
		if (r != -EWOULDBLOCK)
			break;
		ends = holder_ends(s);
		if (waited == LOCK_SAY_MS)
			ff_info("%s: waiting for the fleecefs that was unmounted, which still "
			        "writes back what it had changed",
			        s->fleece_path);
		r = waited >= (ends ? LOCK_ENDING_MS : LOCK_MS) ? -EBUSY : 0;
		if (!r)
			nanosleep(&(struct timespec){.tv_nsec = LOCK_POLL_MS * 1000000L}, NULL);
	}
	ff_error("%s/.lock: %s", s->fleece_path,
	         r == -EBUSY && ends
	             ? "the fleecefs that was unmounted still writes back what it had "
	               "changed: mount again when its process has ended"
	         : r == -EBUSY  ? "another fleecefs uses this fleece directory: unmount it first"
	         : r == -EINVAL ? "not a regular file: remove it"
	                        : strerror(-r));
	return r;
}

static int copy_config(struct ff_store *s, const struct ff_store_config *config)
{
	s->cfg = *config;
	s->source_path = strdup(config->source_path);
	s->exclude = calloc(config->exclude_count + 1, sizeof *s->exclude);
	if (!s->source_path || !s->exclude)
		return -ENOMEM;
	for (size_t i = 0; i < config->exclude_count; i++)
		if (!(s->exclude[i] = strdup(config->exclude[i])))
			return -ENOMEM;
	s->cfg.source_path = s->source_path;
	s->cfg.fleece_path = NULL;
	s->cfg.exclude = NULL; /* see s->exclude */
	s->cfg.device = NULL;  /* see s->devices */
	s->source_fd = fcntl(config->source_fd, F_DUPFD_CLOEXEC, 3);
	return s->source_fd < 0 ? -errno : 0;
}

static void init_locks(struct ff_store *s)
{
	pthread_rwlockattr_t attr;

	/* A freeze that waits for names must not starve behind a stream of changes. */
	pthread_rwlockattr_init(&attr);
	pthread_rwlockattr_setkind_np(&attr, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
	pthread_rwlock_init(&s->names, &attr);
	pthread_rwlockattr_destroy(&attr);
	pthread_mutex_init(&s->admin, NULL);
	pthread_mutex_init(&s->reads_closing, NULL);
	pthread_mutex_init(&s->paths, NULL);
	pthread_mutex_init(&s->chain, NULL);
	pthread_mutex_init(&s->snaps_lock, NULL);
	pthread_mutex_init(&s->disks_lock, NULL);
	pthread_mutex_init(&s->space_lock, NULL);
	atomic_init(&s->epoch, 1);
	s->next_seq = 1;
	clock_gettime(CLOCK_REALTIME, &s->changed);
}

static void close_fd(int fd)
{
	if (fd >= 0)
		close(fd);
}

static void free_snapshots(struct ff_store *s)
{
	while (s->snaps) {
		struct ff_snap *snap = s->snaps;

		s->snaps = snap->next;
		if (snap->dir) {
			close(snap->dir->fd);
			free(snap->dir->name);
			free(snap->dir);
		}
		ff_snap_put(snap);
	}
	while (s->hidden) {
		struct fleece_dir *dir = s->hidden;

		s->hidden = dir->next_hidden;
		close(dir->fd);
		free(dir->name);
		free(dir);
	}
}

static int free_chain(struct ff_disk *d, void *ctx)
{
	struct link *l = atomic_exchange(&d->top, NULL);

	while (l) {
		struct link *older = l->older;

		link_free(l);
		l = older;
	}
	return 0;
}

static void store_free(struct ff_store *s)
{
	disk_each(s, free_chain, NULL);
	free_snapshots(s);
	devices_close(s);
	barrier_free(s->writes);
	old_data_free_buffers(s);
	barrier_free(s->reads);
	close_fd(s->aside_fd);
	close_fd(s->pulse_fd);
	guard_close(s);
	close_fd(s->lock_fd);
	close_fd(s->fleece_fd);
	close_fd(s->source_fd);
	for (size_t i = 0; s->exclude && i < s->cfg.exclude_count; i++)
		free(s->exclude[i]);
	free(s->exclude);
	free(s->source_path);
	free(s->fleece_path);
	pthread_rwlock_destroy(&s->names);
	pthread_mutex_destroy(&s->admin);
	pthread_mutex_destroy(&s->reads_closing);
	pthread_mutex_destroy(&s->paths);
	pthread_mutex_destroy(&s->chain);
	pthread_mutex_destroy(&s->snaps_lock);
	pthread_mutex_destroy(&s->disks_lock);
	pthread_mutex_destroy(&s->space_lock);
	free(s);
}

struct tree_walk source_walk(const struct ff_store *s)
{
	return (struct tree_walk){
	    .source_fd = s->source_fd,
	    .dev = s->source_dev,
	    .hide_dev = s->fleece_dev,
	    .hide_ino = s->fleece_ino,
	    .hide_name = FF_HIDDEN_NAME,
	    .exclude = s->exclude,
	    .exclude_count = s->cfg.exclude_count,
	};
}

int ff_store_open(const struct ff_store_config *config, struct ff_store **out)
{
	struct ff_store *s = aligned_alloc(_Alignof(struct ff_store), sizeof *s);
	struct rlimit rl;
	int r;

	if (!s)
		return -ENOMEM;
	memset(s, 0, sizeof *s);
	s->source_fd = s->fleece_fd = s->lock_fd = s->aside_fd = s->pulse_fd = s->source_lock_fd =
	    -1;
	init_locks(s);
	s->raw_kept.max = RAW_KEPT_MAX;
	s->many_fds = getrlimit(RLIMIT_NOFILE, &rl) == 0 && rl.rlim_cur / 2 < INT_MAX
	                  ? (int)(rl.rlim_cur / 2)
	                  : INT_MAX;
	r = copy_config(s, config);
	if (!r)
		r = barrier_new(&s->writes);
	if (!r)
		r = barrier_new(&s->reads);
	if (!r)
		r = open_fleece_dir(s, config->fleece_path);
	if (!r)
		r = take_lock(s);
	if (!r)
		r = guard_source(s);
	if (!r)
		r = guard_open(s);
	if (!r)
		r = devices_open(s, config->device, config->device_count);
	if (!r)
		r = recover(s);
	if (r) {
		store_free(s);
		return r;
	}
	space_begin(s);
	*out = s;
	return 0;
}

/* Jobs that hang on fleece storage still use the store: give them some time. */
static bool all_ended(struct ff_store *s)
{
	for (int i = 0; i < LATE_WAIT_MS && atomic_load(&s->late) + atomic_load(&s->asking) > 0;
	     i++)
		nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
	return atomic_load(&s->late) + atomic_load(&s->asking) == 0;
}

int ff_store_close(struct ff_store *store)
{
	int r = io_pwrite(store->lock_fd, ENDING, strlen(ENDING), 0);

	if (r)
		ff_warning("%s/.lock: %s", store->fleece_path, strerror(-r));
	if (!all_ended(store)) {
		ff_error("%s: the storage hangs: the end of this mount is not recorded, and what "
		         "it still does not answer is left to the end of the process",
		         store->fleece_path);
		return -EIO;
	}
	/* Another fleecefs that has slipped in may be changing disks already. */
	r = guard_ending(store);
	if (!r)
		r = session_end(store);
	if (r)
		ff_error("%s: the clean end could not be recorded: %s", store->fleece_path,
		         strerror(-r));
	store_free(store);
	return r;
}
