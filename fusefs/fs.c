/*
 * The mounted filesystem as a whole: what its threads keep, and the list of open handles, which
 * exists only for the teardown: after a forced unmount the kernel releases nothing, yet the engine
 * wants every disk and reader back before it closes.
 */
#include "fusefs/fs.h"

#include "ff_util.h"
#include "fusefs/inode.h"

static void thread_free(void *p)
{
	struct fs_thread *th = p;

	free(th->buf);
	free(th);
}

struct fs_thread *fs_thread(struct fs *fs)
{
	struct fs_thread *th = pthread_getspecific(fs->thread_key);

	if (th)
		return th;
	th = calloc(1, sizeof *th);
	if (!th)
		return NULL;
	if (posix_memalign(&th->buf, 4096, FS_MAX_IO) != 0) {
		free(th);
		return NULL;
	}
	if (pthread_setspecific(fs->thread_key, th) != 0) {
		thread_free(th);
		return NULL;
	}
	return th;
}

void handle_init(struct handle *h, const struct handle_ops *ops, struct fs *fs, struct node *node)
{
	h->ops = ops;
	h->fs = fs;
	h->node = node_ref(node);
	h->open_flags = 0;
	pthread_mutex_init(&h->dir_lock, NULL);
	FF_GUARD(&fs->handles_lock);
	h->next = fs->handles;
	h->prev = &fs->handles;
	if (h->next)
		h->next->prev = &h->next;
	fs->handles = h;
}

void handle_free(struct handle *h)
{
	struct node *node = h->node;

	pthread_mutex_lock(&h->fs->handles_lock);
	*h->prev = h->next;
	if (h->next)
		h->next->prev = h->prev;
	pthread_mutex_unlock(&h->fs->handles_lock);
	pthread_mutex_destroy(&h->dir_lock);
	h->ops->free(h);
	node_put(node);
}

int fs_init(struct fs *fs)
{
	int r;

	pthread_mutex_init(&fs->handles_lock, NULL);
	pthread_mutex_init(&fs->tasks_lock, NULL);
	pthread_mutex_init(&fs->snapdir_lock, NULL);
	pthread_cond_init(&fs->tasks_done, NULL);
	r = -pthread_key_create(&fs->thread_key, thread_free);
	if (r < 0)
		return r;
	r = nodes_create(&fs->nodes);
	if (r < 0)
		pthread_key_delete(fs->thread_key);
	return r;
}

void fs_destroy(struct fs *fs)
{
	struct fs_thread *th = pthread_getspecific(fs->thread_key);

	while (fs->handles)
		handle_free(fs->handles);
	nodes_destroy(fs->nodes);
	if (th)
		thread_free(th);
	pthread_key_delete(fs->thread_key);
	pthread_cond_destroy(&fs->tasks_done);
	pthread_mutex_destroy(&fs->handles_lock);
	pthread_mutex_destroy(&fs->tasks_lock);
	pthread_mutex_destroy(&fs->snapdir_lock);
}
