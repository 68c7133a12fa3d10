/*
 * The node table.
 *
 * A node is made by the first lookup of what it stands for and lives until the kernel has forgotten
 * as many lookups as it was told of. Its id is a counter's next value and never comes back within
 * a mount, so that nothing which the kernel still holds of a dead node (a dentry, a page) can be
 * taken for a new one. What a node stands for is its kind and its key:
 *
 *   live     device and inode number. The O_PATH descriptor held by the node keeps the inode from
 *            being freed, hence the number from being given to another file.
 *   frozen   the addresses of the snapshot and of its inode. The reference held by the node keeps
 *            both from being freed. A new snapshot under an old name is another object.
 *   derived  of a snapshot as well: its kind, and addresses that its snapshot keeps: see derived.h
 *   the directory of snapshots   there is one, pinned; .fleecefs and its files likewise, key: which
 *
 * States: in the table (lookups > 0 or pinned) → out of it (lookups 0; users with a reference may
 * remain) → freed (no reference left). A node is never put back.
 *
 * The table is two hash tables, by id and by key, with NODE_LOCKS locks each; bucket b belongs to
 * lock b % NODE_LOCKS. Lock order: key, then id. A node enters and leaves both tables under its
 * key lock, so under that lock it is in both or in none; who finds it by id alone holds a reference
 * and may see it leave.
 */
#include "fusefs/inode.h"

#include "ff_util.h"

#define NODE_BUCKETS 65536
#define NODE_LOCKS   64

struct node_table {
	atomic_uint_fast64_t next_id;
	pthread_mutex_t id_locks[NODE_LOCKS];
	pthread_mutex_t key_locks[NODE_LOCKS];
	struct node *by_id[NODE_BUCKETS];  /* id_locks */
	struct node *by_key[NODE_BUCKETS]; /* key_locks */
};

static uint64_t mix(uint64_t x)
{
	x ^= x >> 33;
	x *= 0xff51afd7ed558ccdULL;
	x ^= x >> 33;
	return x;
}

static size_t id_bucket(uint64_t id)
{
	return id % NODE_BUCKETS;
}

static size_t key_bucket(const struct node *n)
{
	return mix(n->key[0] * 31 + mix(n->key[1])) % NODE_BUCKETS;
}

int nodes_create(struct node_table **out)
{
	struct node_table *t = calloc(1, sizeof *t);

	if (!t)
		return -ENOMEM;
	for (size_t i = 0; i < NODE_LOCKS; i++) {
		pthread_mutex_init(&t->id_locks[i], NULL);
		pthread_mutex_init(&t->key_locks[i], NULL);
	}
	atomic_init(&t->next_id, NODE_ROOT_ID);
	*out = t;
	return 0;
}

/* Gives back what a node, or the model of one, holds. */
static void drop_contents(const struct node *n)
{
	if (n->fd >= 0)
		close(n->fd);
	if (n->made)
		n->made_free(n->made);
	if (n->snap)
		ff_snap_put(n->snap);
}

void nodes_destroy(struct node_table *t)
{
	if (!t)
		return;
	for (size_t b = 0; b < NODE_BUCKETS; b++) {
		while (t->by_id[b]) {
			struct node *n = t->by_id[b];

			t->by_id[b] = n->next_by_id;
			drop_contents(n);
			free(n);
		}
	}
	for (size_t i = 0; i < NODE_LOCKS; i++) {
		pthread_mutex_destroy(&t->id_locks[i]);
		pthread_mutex_destroy(&t->key_locks[i]);
	}
	free(t);
}

/* Puts a new node into both tables. Its key lock is held. */
static void insert(struct node_table *t, struct node *n)
{
	size_t kb = key_bucket(n), ib;

	n->id = atomic_fetch_add_explicit(&t->next_id, 1, memory_order_relaxed);
	n->next_by_key = t->by_key[kb];
	t->by_key[kb] = n;
	ib = id_bucket(n->id);
	FF_GUARD(&t->id_locks[ib % NODE_LOCKS]);
	n->next_by_id = t->by_id[ib];
	t->by_id[ib] = n;
}

/* The node of this kind and key in its bucket KB, or NULL. Its key lock is held. */
static struct node *find_in(struct node_table *t, size_t kb, const struct node *proto)
{
	struct node *n = t->by_key[kb];

	while (n &&
	       (n->ops != proto->ops || n->key[0] != proto->key[0] || n->key[1] != proto->key[1]))
		n = n->next_by_key;
	return n;
}

bool node_find(struct node_table *t, const struct node_ops *ops, const uint64_t key[2],
               struct node **out)
{
	struct node proto = {.ops = ops, .key = {key[0], key[1]}}, *n;
	size_t kb = key_bucket(&proto);

	FF_GUARD(&t->key_locks[kb % NODE_LOCKS]);
	n = find_in(t, kb, &proto);
	if (!n)
		return false;
	n->lookups++;
	*out = n;
	return true;
}

int node_enter(struct node_table *t, const struct node *proto, struct node **out)
{
	size_t kb = key_bucket(proto);
	struct node *n;

	FF_GUARD(&t->key_locks[kb % NODE_LOCKS]);
	n = find_in(t, kb, proto);
	if (n) {
		drop_contents(proto);
	} else {
		n = malloc(sizeof *n);
		if (!n) {
			drop_contents(proto);
			return -ENOMEM;
		}
		*n = *proto;
		n->lookups = 0;
		atomic_init(&n->refs, 1);
		insert(t, n);
	}
	n->lookups++;
	*out = n;
	return 0;
}

struct node *node_get(struct node_table *t, uint64_t id)
{
	size_t ib = id_bucket(id);
	struct node *n;

	FF_GUARD(&t->id_locks[ib % NODE_LOCKS]);
	for (n = t->by_id[ib]; n; n = n->next_by_id)
		if (n->id == id)
			return node_ref(n);
	return NULL;
}

struct node *node_ref(struct node *node)
{
	atomic_fetch_add_explicit(&node->refs, 1, memory_order_relaxed);
	return node;
}

void node_put(struct node *node)
{
	if (!node || atomic_fetch_sub_explicit(&node->refs, 1, memory_order_acq_rel) != 1)
		return;
	drop_contents(node);
	free(node);
}

/* Takes a node out of both tables. Its key lock is held. */
static void remove_node(struct node_table *t, struct node *n)
{
	size_t kb = key_bucket(n), ib = id_bucket(n->id);
	struct node **p;

	for (p = &t->by_key[kb]; *p != n; p = &(*p)->next_by_key)
		;
	*p = n->next_by_key;
	FF_GUARD(&t->id_locks[ib % NODE_LOCKS]);
	for (p = &t->by_id[ib]; *p != n; p = &(*p)->next_by_id)
		;
	*p = n->next_by_id;
}

/* True: the last lookup is gone, and the table's reference is the caller's to drop. */
static bool forget(struct node_table *t, struct node *n, uint64_t count)
{
	size_t kb = key_bucket(n);

	FF_GUARD(&t->key_locks[kb % NODE_LOCKS]);
	if (n->lookups == 0) /* forgotten by another thread; a kernel does not do this */
		return false;
	n->lookups -= FF_MIN(count, n->lookups);
	if (n->lookups > 0)
		return false;
	remove_node(t, n);
	return true;
}

void node_forget(struct node_table *t, uint64_t id, uint64_t count)
{
	struct node *n = node_get(t, id);

	if (!n)
		return;
	if (!n->pinned && forget(t, n, count))
		node_put(n);
	node_put(n);
}

void nodes_of_snap(struct node_table *t, const struct ff_snap *snap,
                   void (*fn)(void *ctx, const struct node *node), void *ctx)
{
	for (size_t b = 0; b < NODE_BUCKETS; b++) {
		FF_GUARD(&t->id_locks[b % NODE_LOCKS]);
		for (const struct node *n = t->by_id[b]; n; n = n->next_by_id)
			if (n->snap == snap)
				fn(ctx, n);
	}
}
