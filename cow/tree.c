/*
 * A tree in memory: how it grows, and is freed.
 */
#include "cow/tree.h"

#include <errno.h>
#include <stdlib.h>

void tree_free_inode(struct ff_frozen *f)
{
	for (uint32_t k = 0; k < f->entry_count; k++)
		free(f->entries[k].name);
	free(f->entries);
	free(f->xattrs);
	free(f->target);
	free(f->image);
	free(f->path);
}

void tree_free(struct tree *t)
{
	if (!t)
		return;
	for (uint32_t i = 0; i < t->count; i++)
		tree_free_inode(&t->inodes[i]);
	free(t->inodes);
	free(t->disks);
	free(t);
}

int tree_add(struct tree *t, const struct ff_frozen *inode, uint32_t *index)
{
	if (t->count == t->room) {
		uint32_t room = t->room ? t->room * 2 : 16;
		void *p = t->room > UINT32_MAX / 4
		              ? NULL
		              : realloc(t->inodes, room * sizeof(struct ff_frozen));

		if (!p)
			return -ENOMEM;
		t->inodes = p;
		t->room = room;
	}
	t->inodes[t->count] = *inode;
	*index = t->count++;
	return 0;
}

int tree_add_disk(struct tree *t, uint32_t inode)
{
	if (t->disk_count == t->disk_room) {
		uint32_t room = t->disk_room ? t->disk_room * 2 : 16;
		void *p = realloc(t->disks, room * sizeof(uint32_t));

		if (!p)
			return -ENOMEM;
		t->disks = p;
		t->disk_room = room;
	}
	t->inodes[inode].disk = t->disk_count;
	t->disks[t->disk_count++] = inode;
	return 0;
}
