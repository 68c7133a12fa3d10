/*
 * The tree of the model. Names hold references to inodes; a directory's inode knows its parent.
 * A frozen tree is a deep copy: names of one inode lead to one copy.
 */
#include "model.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void *must(void *p)
{
	if (!p) {
		fprintf(stderr, "out of memory, or a name that should be there is not\n");
		abort();
	}
	return p;
}

struct inode *inode_new(struct model *m, enum itype type)
{
	struct inode *ino = must(calloc(1, sizeof *ino));

	ino->refs = 1;
	ino->id = ++m->next_id;
	ino->type = type;
	return ino;
}

void inode_put(struct inode *ino)
{
	if (--ino->refs)
		return;
	for (unsigned i = 0; i < ino->nents; i++)
		inode_put(ino->ents[i].ino);
	free(ino->ents);
	free(ino->target);
	content_free(&ino->data);
	free(ino);
}

void dir_add(struct inode *dir, const char *name, struct inode *ino)
{
	struct ent *e;

	dir->ents = must(realloc(dir->ents, (dir->nents + 1) * sizeof *dir->ents));
	e = &dir->ents[dir->nents++];
	snprintf(e->name, sizeof e->name, "%s", name);
	e->ino = ino;
	ino->refs++;
	ino->nlink++;
	if (ino->type == I_DIR)
		ino->parent = dir;
}

struct ent *dir_find(struct inode *dir, const char *name)
{
	for (unsigned i = 0; i < dir->nents; i++)
		if (strcmp(dir->ents[i].name, name) == 0)
			return &dir->ents[i];
	return NULL;
}

void dir_remove(struct inode *dir, const char *name)
{
	struct ent *e = must(dir_find(dir, name));
	struct inode *ino = e->ino;

	*e = dir->ents[--dir->nents];
	ino->nlink--;
	inode_put(ino);
}

bool is_below(const struct inode *dir, const struct inode *top)
{
	for (; dir; dir = dir->parent)
		if (dir == top)
			return true;
	return false;
}

static const char *name_in_parent(const struct inode *dir)
{
	for (unsigned i = 0; i < dir->parent->nents; i++)
		if (dir->parent->ents[i].ino == dir)
			return dir->parent->ents[i].name;
	return "?";
}

void path_of(const char *base, const struct inode *dir, const char *name, char path[PATH_LEN])
{
	char tmp[PATH_LEN];

	if (!dir->parent)
		snprintf(path, PATH_LEN, "%.600s", base);
	else
		path_of(base, dir->parent, name_in_parent(dir), path);
	if (name) {
		snprintf(tmp, sizeof tmp, "%.900s/%s", path, name);
		memcpy(path, tmp, PATH_LEN);
	}
}

/* Reservoir sampling: each match so far is kept with the same chance. */
static void pick(struct model *m, struct inode *d, unsigned types, unsigned *seen,
                 struct inode **dir, struct ent **ent)
{
	for (unsigned i = 0; i < d->nents; i++) {
		struct inode *ino = d->ents[i].ino;

		if ((ino->type & types) && rng_below(&m->rng, ++*seen) == 0) {
			*dir = d;
			*ent = &d->ents[i];
		}
		if (ino->type == I_DIR)
			pick(m, ino, types, seen, dir, ent);
	}
}

bool tree_pick(struct model *m, struct inode *root, unsigned types, struct inode **dir,
               struct ent **ent)
{
	unsigned seen = 0;

	pick(m, root, types, &seen, dir, ent);
	return seen > 0;
}

unsigned tree_count(const struct inode *root, unsigned types)
{
	unsigned n = 0;

	for (unsigned i = 0; i < root->nents; i++) {
		const struct inode *ino = root->ents[i].ino;

		n += (ino->type & types) != 0;
		if (ino->type == I_DIR)
			n += tree_count(ino, types);
	}
	return n;
}

struct inode *tree_big(const struct inode *root)
{
	struct inode *r = NULL;

	for (unsigned i = 0; i < root->nents && !r; i++) {
		struct inode *ino = root->ents[i].ino;

		if (ino->type == I_DIR)
			r = tree_big(ino);
		else if (ino->big)
			r = ino;
	}
	return r;
}

/* The copy of INO, with a reference of the caller's. */
static struct inode *clone_inode(struct inode *ino)
{
	struct inode *c;

	if (ino->clone) {
		ino->clone->refs++;
		return ino->clone;
	}
	c = must(calloc(1, sizeof *c));
	ino->clone = c;
	c->refs = 1;
	c->id = ino->id;
	c->type = ino->type;
	c->big = ino->big;
	c->mode = ino->mode;
	memcpy(c->xattr, ino->xattr, sizeof c->xattr);
	content_copy(&c->data, &ino->data);
	if (ino->target)
		c->target = must(strdup(ino->target));
	for (unsigned i = 0; i < ino->nents; i++) {
		struct inode *child = clone_inode(ino->ents[i].ino);

		dir_add(c, ino->ents[i].name, child);
		inode_put(child);
	}
	return c;
}

static void forget_clones(struct inode *ino)
{
	ino->clone = NULL;
	for (unsigned i = 0; i < ino->nents; i++)
		forget_clones(ino->ents[i].ino);
}

struct inode *tree_freeze(struct model *m)
{
	struct inode *c = clone_inode(m->root);

	forget_clones(m->root);
	return c;
}

void snap_path(const struct model *m, const char *name, char path[PATH_LEN])
{
	snprintf(path, PATH_LEN, "%.500s/snapshots%s%s", m->live, name ? "/" : "",
	         name ? name : "");
}
