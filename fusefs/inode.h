/*
 * The node table: what the kernel calls an inode number (node id) to what it stands for.
 */
#ifndef FF_INODE_H
#define FF_INODE_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "fusefs/fs.h"

#define NODE_ROOT_ID 1

struct node {
	/* constant while the node is in the table */
	const struct node_ops *ops; /* also says of which kind it is */
	uint64_t id;
	uint64_t key[2]; /* live: device and inode number; frozen: snapshot and inode objects */
	int fd;          /* live: O_PATH descriptor; else -1 */
	struct ff_snap *snap; /* frozen, derived: a reference; else NULL */
	const struct ff_frozen *frozen;
	void *made; /* derived: what it is made up from, freed by made_free; else NULL */
	void (*made_free)(void *made);
	bool pinned; /* never forgotten */

	atomic_uint refs; /* one while in the table, one for each node_get() and node_ref() */
	uint64_t lookups; /* lock of its key bucket */
	struct node *next_by_id;  /* lock of its id bucket */
	struct node *next_by_key; /* lock of its key bucket */
};

int nodes_create(struct node_table **out);
/* Frees every node. No other thread may use the table. */
void nodes_destroy(struct node_table *t);

/* The node with PROTO's kind and key, made from PROTO if there is none, with one more lookup; the
 * pointer is good until that lookup is forgotten. PROTO's fd, snap and made are taken over or given
 * back, also on failure. */
int node_enter(struct node_table *t, const struct node *proto, struct node **out);

/* The node with this kind and key and one more lookup, if there is one. */
bool node_find(struct node_table *t, const struct node_ops *ops, const uint64_t key[2],
               struct node **out);

/* The node with this id and a reference to it, or NULL. */
struct node *node_get(struct node_table *t, uint64_t id);
struct node *node_ref(struct node *node);
void node_put(struct node *node);

/* The kernel forgets COUNT lookups. */
void node_forget(struct node_table *t, uint64_t id, uint64_t count);

/* Calls FN with each node of snapshot SNAP. FN must not use the table. */
void nodes_of_snap(struct node_table *t, const struct ff_snap *snap,
                   void (*fn)(void *ctx, const struct node *node), void *ctx);

#endif
