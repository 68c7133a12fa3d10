/*
 * A mount from beginning to end.
 *
 * States, in the process that serves (the child, when it goes to the background):
 *
 *   starting   store opened, node table made, --snapshot frozen; nothing is mounted. SIGTERM,
 *              SIGINT and SIGHUP are blocked and thus wait; a failure ends here with a message.
 *   mounted    capabilities that serving does not need are gone. The session loop runs in the
 *              main thread. One thread waits for signals; before it ends the loop it lets the
 *              kernel write back dirty mapped pages. A helper thread asks the mount for its root:
 *              an answer means that the kernel and we understand each other, and is what "ready"
 *              means. Only then the parent is told (background.c); in the foreground a service
 *              manager is told instead (READY=1). One line is logged, and one when all has ended
 *              well.
 *   ending     the loop has ended (unmount, signal or error); unmount, wait for threads that make
 *              or drop a snapshot, give back handles and nodes, drop the ephemeral snapshot, close
 *              the store. In this order: the unmount first, so that nobody is served any more;
 *              the store last, for everything refers to it.
 */
#include "fusefs/session.h"

#include <fcntl.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sysmacros.h>

#include "ff_log.h"
#include "ff_util.h"
#include "fusefs/background.h"
#include "fusefs/creds.h"
#include "fusefs/dispatch.h"
#include "fusefs/inode.h"
#include "fusefs/limits.h"
#include "fusefs/loop.h"
#include "fusefs/mountpoint.h"
#include "fusefs/notify.h"
#include "fusefs/own_mount.h"
#include "fusefs/privileges.h"

#define READ_AHEAD_KB    4096
#define MAX_THREADS      64
#define MAX_IDLE_THREADS 16
#define WAKE             SIGUSR1 /* to the main thread: look whether the session has ended */
#define SYNC_STEPS       200     /* of 50 ms: longest wait for dirty pages at a signal */

struct session {
	const struct options *o;
	struct places places;
	struct fuse_session *se;
	struct fs fs;
	int ready_fd; /* for background_ready(); -1 in the foreground */
	pthread_t main_thread;
	atomic_bool ending; /* the loop has ended: the watcher of signals is to end, too */
	bool never_ready;   /* set by the helper thread, read after it was joined */
};

/* Lines of libfuse become lines of our log. */
static __attribute__((format(printf, 2, 0))) void log_libfuse(enum fuse_log_level level,
                                                              const char *fmt, va_list ap)
{
	enum ff_log_level to = level <= FUSE_LOG_ERR       ? FF_LOG_ERROR
	                       : level == FUSE_LOG_WARNING ? FF_LOG_WARNING
	                       : level < FUSE_LOG_DEBUG    ? FF_LOG_INFO
	                                                   : FF_LOG_DEBUG;
	char line[1024];

	vsnprintf(line, sizeof line, fmt, ap);
	line[strcspn(line, "\n")] = '\0';
	if (*line)
		ff_log(to, "%s", line);
}

static int add_mount_options(struct fuse_args *args, const struct session *s)
{
	ff_autofree char *fsname = NULL, *escaped = NULL, *opt = NULL;

	if (asprintf(&fsname, "fsname=%s", s->places.source) < 0) {
		fsname = NULL;
		return -ENOMEM;
	}
	if (fuse_opt_add_opt_escaped(&escaped, fsname) < 0 ||
	    asprintf(&opt, "default_permissions,nosuid,nodev,subtype=fleecefs,%s", escaped) < 0)
		return -ENOMEM;
	if (fuse_opt_add_arg(args, "-o") < 0 || fuse_opt_add_arg(args, opt) < 0)
		return -ENOMEM;
	if (s->o->debug && fuse_opt_add_arg(args, "-d") < 0)
		return -ENOMEM;
	return 0;
}

static int open_store(struct session *s)
{
	const struct options *o = s->o;
	struct ff_store_config config = {
	    .source_fd = s->places.source_fd,
	    .source_path = s->places.source,
	    .fleece_path = o->fleece_dir,
	    .cluster_size = o->cluster_size,
	    .policy = o->policy,
	    .cbw_timeout = o->cbw_timeout,
	    .fleece_limit = o->fleece_limit,
	    .fleece_reserve = o->fleece_reserve,
	    .durable = o->durable,
	    .source_lock = o->source_lock,
	    .exclude = (const char *const *)o->exclude,
	    .exclude_count = o->exclude_count,
	    .device = (const char *const *)o->device,
	    .device_count = o->device_count,
	};
	int r = ff_store_open(&config, &s->fs.store);

	if (r < 0)
		ff_error("%s cannot be mounted: %s", s->places.source, strerror(-r));
	return r;
}

/* Enters the nodes that are always there. */
static int enter_roots(struct session *s)
{
	struct fs *fs = &s->fs;
	struct node root = {.ops = &live_node_ops, .fd = -1, .pinned = true};
	struct node snaps = {.ops = &snapdir_node_ops, .fd = -1, .pinned = true};
	struct stat st;
	int r;

	root.fd = openat(fs->source_fd, ".", O_PATH | O_CLOEXEC);
	if (root.fd < 0 || fstat(root.fd, &st) < 0) {
		r = -errno;
		if (root.fd >= 0)
			close(root.fd);
		return r;
	}
	root.key[0] = st.st_dev;
	root.key[1] = st.st_ino;
	r = node_enter(fs->nodes, &root, &fs->root);
	if (r == 0)
		r = node_enter(fs->nodes, &snaps, &fs->snaps);
	return r < 0 ? r : control_enter(fs);
}

static int freeze_ephemeral(struct session *s)
{
	const char *name = s->o->snapshot;
	int r;

	if (!name)
		return 0;
	r = ff_store_freeze(s->fs.store, name, FF_FREEZE_EPHEMERAL);
	if (r < 0) {
		ff_error("--snapshot=%s: %s", name, strerror(-r));
		return r;
	}
	s->fs.ephemeral = strdup(name);
	return s->fs.ephemeral ? 0 : -ENOMEM;
}

static void set_read_ahead(const struct statx *stx)
{
	char path[80], value[16];
	int fd, n = snprintf(value, sizeof value, "%d", READ_AHEAD_KB);

	snprintf(path, sizeof path, "/sys/class/bdi/%u:%u/read_ahead_kb", stx->stx_dev_major,
	         stx->stx_dev_minor);
	fd = open(path, O_WRONLY | O_CLOEXEC);
	if (fd < 0)
		return;
	if (write(fd, value, n) != n)
		ff_debug("%s: %m", path);
	close(fd);
}

/* Ends the loop, which the main thread may be asleep in. */
static void end_loop(struct session *s)
{
	fuse_session_exit(s->se);
	pthread_kill(s->main_thread, WAKE);
}

/* Only the process that a service manager started speaks to it: a mount in the background has been
 * ready, for it, when the parent ended. */
static void tell_manager(const struct session *s, const char *text)
{
	if (s->o->foreground)
		notify(text);
}

static void give_up(struct session *s)
{
	s->never_ready = true;
	end_loop(s);
}

static void *check_ready(void *arg)
{
	struct session *s = arg;
	struct statx stx;
	int r = own_mount_stat(s->places.mountpoint, &stx);

	if (r < 0) {
		if (!fuse_session_exited(s->se))
			ff_error("%s: the new mount does not answer: %s", s->places.mountpoint,
			         strerror(-r));
		give_up(s);
		return NULL;
	}
	set_read_ahead(&stx);
	if (s->ready_fd >= 0 && !background_ready(s->ready_fd)) {
		ff_error("%s: nobody waited for the mount any more: unmounted",
		         s->places.mountpoint);
		give_up(s);
		return NULL;
	}
	ff_info("%s is mounted on %s", s->places.source, s->places.mountpoint);
	tell_manager(s, "READY=1\nSTATUS=Mounted");
	return NULL;
}

static int loop(struct session *s)
{
	const struct options *o = s->o;
	unsigned max = o->single_thread ? 1 : o->max_threads ? o->max_threads : MAX_THREADS;
	unsigned max_idle = o->max_idle_threads ? o->max_idle_threads : MAX_IDLE_THREADS;
	struct fuse_loop_config *config;
	int r;

	if (!o->clone_fd || o->single_thread)
		return loop_run(s->se, max, max_idle);
	config = fuse_loop_cfg_create();
	if (!config)
		return -ENOMEM;
	fuse_loop_cfg_set_clone_fd(config, true);
	fuse_loop_cfg_set_max_threads(config, max);
	fuse_loop_cfg_set_idle_threads(config, max_idle);
	r = fuse_session_loop_mt(s->se, config);
	fuse_loop_cfg_destroy(config);
	return r;
}

static void end_signals(sigset_t *set)
{
	sigemptyset(set);
	sigaddset(set, SIGTERM);
	sigaddset(set, SIGINT);
	sigaddset(set, SIGHUP);
}

/* What programs have written by mapped memory is still with the kernel: an unmount would wait for
 * it, the end of the loop would lose it. Not waited for without end, nor after a second signal. */
static void take_dirty_pages(struct session *s)
{
	const struct timespec step = {.tv_nsec = 50000000};
	sigset_t ends;
	pid_t sync;

	end_signals(&ends);
	if (own_mount_sync(s->places.mountpoint, &sync))
		return;
	for (int i = 0; i < SYNC_STEPS && !own_mount_synced(sync); i++)
		if (sigtimedwait(&ends, NULL, &step) > 0)
			return;
}

/* Waits for a signal to end, and says meanwhile that we live; one comes at the end in any case. */
static void *watch_signals(void *arg)
{
	const struct timespec second = {.tv_sec = 1};
	struct session *s = arg;
	sigset_t ends;

	end_signals(&ends);
	while (sigtimedwait(&ends, NULL, &second) < 0) {
		ff_store_pulse(s->fs.store);
		ff_log_pulse();
	}
	if (!atomic_load(&s->ending)) {
		tell_manager(s, "STOPPING=1\nSTATUS=Writing back, unmounting");
		take_dirty_pages(s);
		end_loop(s);
	}
	return NULL;
}

static void wake(int sig)
{
}

/* Mounted: until the end of the loop. */
static int serve_mounted(struct session *s)
{
	const struct sigaction wakes = {.sa_handler = wake}; /* and interrupts what it sleeps in */
	pthread_t helper, watcher;
	int r;

	s->main_thread = pthread_self();
	sigaction(WAKE, &wakes, NULL);
	r = -pthread_create(&watcher, NULL, watch_signals, s);
	if (r == 0) {
		r = -pthread_create(&helper, NULL, check_ready, s);
		if (r < 0) {
			atomic_store(&s->ending, true);
			pthread_kill(watcher, SIGTERM);
			pthread_join(watcher, NULL);
		}
	}
	if (r < 0) {
		ff_error("no thread: %s", strerror(-r));
		fuse_session_unmount(s->se);
		return r;
	}
	r = loop(s);
	tell_manager(s, "STOPPING=1\nSTATUS=Unmounting, flushing the fleecing images");
	fuse_session_unmount(s->se);
	pthread_join(helper, NULL);
	atomic_store(&s->ending, true);
	pthread_kill(watcher, SIGTERM);
	pthread_join(watcher, NULL);
	if (r < 0)
		ff_error("%s: the session ended: %s", s->places.mountpoint, strerror(-r));
	dispatch_wait_tasks(&s->fs);
	return r < 0 ? r : s->never_ready ? -EIO : 0;
}

static int serve_store(struct session *s)
{
	int r = enter_roots(s);

	if (r < 0)
		ff_error("%s: %s", s->places.source, strerror(-r));
	if (r == 0)
		r = freeze_ephemeral(s);
	if (r < 0)
		return r;
	if (s->ready_fd >= 0 && chdir("/") < 0)
		ff_warning("/: %m");
	/* libfuse leaves ignored signals alone, and a shell ignores SIGINT for what it starts with
	 * & */
	signal(SIGINT, SIG_DFL);
	signal(SIGTERM, SIG_DFL);
	if (fuse_set_signal_handlers(s->se) < 0)
		return -EIO;
	/* libfuse says what is wrong */
	r = fuse_session_mount(s->se, s->places.mountpoint) < 0 ? -EIO : 0;
	if (r == 0) {
		r = privileges_drop();
		if (r == 0)
			r = serve_mounted(s);
		else
			fuse_session_unmount(s->se);
	}
	fuse_remove_signal_handlers(s->se);
	return r;
}

/* The life of the process that serves, after the fork. */
static int serve(struct session *s)
{
	struct fs *fs = &s->fs;
	sigset_t ours;
	int r;

	end_signals(&ours);
	pthread_sigmask(SIG_BLOCK, &ours, NULL);
	limits_raise();
	fs->highest_fd = limits_highest_node_fd();
	creds_setup(&fs->as_caller);
	fs->se = s->se;
	fs->source_fd = s->places.source_fd;
	fs->snapdir = s->o->snapdir;
	fs->uncached = !s->o->source_lock;
	fs->options = s->o;
	fs->source = s->places.source;
	fs->mountpoint = s->places.mountpoint;
	clock_gettime(CLOCK_REALTIME, &fs->started);
	clock_gettime(CLOCK_BOOTTIME, &fs->started_boot);
	fs->snapdir_attr.st_mode = S_IFDIR | 0755;
	fs->snapdir_attr.st_uid = geteuid();
	fs->snapdir_attr.st_gid = getegid();
	r = fs_init(fs);
	if (r < 0)
		return r;
	r = open_store(s);
	if (r == 0) {
		int closed;

		r = serve_store(s);
		fs_destroy(fs);
		if (fs->ephemeral)
			ff_store_drop(fs->store, fs->ephemeral);
		free(fs->ephemeral);
		closed = ff_store_close(fs->store);
		r = r < 0 ? r : closed;
		if (r == 0)
			ff_info("%s is unmounted", s->places.mountpoint);
		return r;
	}
	fs_destroy(fs);
	return r;
}

static int run(struct session *s)
{
	int status;

	s->ready_fd = -1;
	if (!s->o->foreground && !background(s->places.mountpoint, &s->ready_fd, &status))
		return status;
	return serve(s) < 0 ? EXIT_FAILURE : EXIT_SUCCESS;
}

int session_run(const struct options *o, struct fuse_args *args)
{
	struct session s = {.o = o};
	struct fuse_lowlevel_ops ops = dispatch_ops();
	int status = EXIT_FAILURE;

	fuse_set_log_func(log_libfuse);
	ff_log_threshold(o->log_level);
	if (places_find(o, &s.places) < 0)
		goto out;
	s.fs.conn_opts = fuse_parse_conn_info_opts(args);
	if (!s.fs.conn_opts || add_mount_options(args, &s) < 0)
		goto out;
	s.se = fuse_session_new(args, &ops, sizeof ops, &s.fs);
	if (!s.se) {
		ff_error("fleecefs -h lists all options");
		status = EXIT_USAGE;
		goto out;
	}
	status = run(&s);
	fuse_session_destroy(s.se);
out:
	free(s.fs.conn_opts);
	places_free(&s.places);
	return status;
}
