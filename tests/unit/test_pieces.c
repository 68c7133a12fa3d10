/*
 * The pure parts: names in FLEECE_DIR, manifests; and the barrier.
 */
#include <criterion/criterion.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <xxhash.h>

#include "cow/barrier.h"
#include "cow/manifest.h"
#include "cow/names.h"
#include "ff_util.h"
#include "fixture.h"

Test(names, an_image_is_called_as_its_disk)
{
	char *name = names_image("vm/100/disk.raw", 7);

	cr_assert_str_eq(name, "vm/100/disk.raw-fleece-7.qcow2");
	free(name);
}

Test(names, long_ones_fit_and_stay_apart)
{
	char a[300], b[300];
	char *x, *y;

	memset(a, 'a', 255);
	a[255] = '\0';
	strcpy(b, a);
	b[254] = 'b';
	x = names_image(a, 123456789);
	y = names_image(b, 123456789);
	cr_assert_leq(strlen(x), 255);
	cr_assert_str_neq(x, y);
	cr_assert(strcmp(x + strlen(x) - 23, "-fleece-123456789.qcow2") == 0);
	free(x);
	free(y);
}

Test(names, as_long_as_a_name_may_be_it_is_kept)
{
	const size_t room = 255 - strlen("-fleece-1.qcow2");
	char rel[256];

	memset(rel, 'a', sizeof rel);
	for (size_t len = room; len <= room + 1; len++) {
		char *name;

		rel[len] = '\0';
		name = names_image(rel, 1);
		cr_assert_leq(strlen(name), 255);
		cr_assert_eq(strncmp(name, rel, len) == 0, len == room);
		free(name);
		rel[len] = 'a';
	}
}

Test(names, directories_do_not_stand_where_files_of_ours_do)
{
	static const char *const paths[] = {"manifest/x", "d-fleece-1.qcow2/x", "d-fleece-1.xxh3/x",
	                                    "d-fleece-1.zeros/x"};

	for (size_t i = 0; i < FF_ARRAY_SIZE(paths); i++) {
		char *name = names_image(paths[i], 1);

		cr_assert(strncmp(name, paths[i], strcspn(paths[i], "/") + 1) != 0, "%s", name);
		free(name);
	}
}

Test(names, backing_files)
{
	char *name =
	    names_backing_image("vm/100/d-fleece-1.qcow2", "nightly", "vm/100/d-fleece-2.qcow2");

	cr_assert_str_eq(name, "../../../nightly/vm/100/d-fleece-2.qcow2");
	free(name);
}

Test(names, paths_that_lead_out_are_refused)
{
	static const char *const bad[] = {"", "/etc", "a//b", "../x", "a/../b", "a/.", "a/"};

	for (size_t i = 0; i < FF_ARRAY_SIZE(bad); i++)
		cr_assert(!names_safe_path(bad[i]), "%s", bad[i]);
	cr_assert(names_safe_path("a/.b/..c"));
}

/* The manifest of a real tree, encoded. */
static void *some_manifest(struct fixture *fx, uint64_t made, size_t *len, struct tree **tree)
{
	struct manifest m = {.seq = 5, .made = made, .durable = true};
	struct tree_walk how = {.xattrs = true};
	struct stat st;
	void *buf;

	mkdirat(fx->source_fd, "dir", 0700);
	mkdirat(fx->source_fd, "dir/empty", 0711);
	fixture_file(fx, "dir/file", 5000, 1);
	fixture_file(fx, "plain", 0, 1);
	cr_assert_eq(symlinkat("../plain", fx->source_fd, "dir/link"), 0);
	cr_assert_eq(linkat(fx->source_fd, "plain", fx->source_fd, "dir/hard", 0), 0);
	how.source_fd = fx->source_fd;
	fstat(fx->source_fd, &st);
	how.dev = st.st_dev;
	cr_assert_eq(tree_walk(&how, &m.tree), 0);
	for (uint32_t i = 0; i < m.tree->disk_count; i++) {
		struct ff_frozen *f = &m.tree->inodes[m.tree->disks[i]];

		f->image = names_image(f->path, m.seq);
	}
	cr_assert_eq(manifest_encode(&m, &buf, len), 0);
	*tree = m.tree;
	return buf;
}

static void comes_back(uint64_t made)
{
	struct fixture fx;
	struct manifest m;
	struct tree *tree;
	const char *why;
	size_t len;
	void *buf;

	fixture_init(&fx, 4096);
	buf = some_manifest(&fx, made, &len, &tree);
	cr_assert_eq(manifest_decode(buf, len, &m, &why), 0);
	cr_assert_eq(m.seq, 5);
	cr_assert_eq(m.made, made);
	cr_assert(m.durable && !m.ephemeral);
	cr_assert_eq(m.tree->count, tree->count);
	cr_assert_eq(m.tree->disk_count, 2);
	for (uint32_t i = 0; i < tree->count; i++) {
		const struct ff_frozen *a = &tree->inodes[i], *b = &m.tree->inodes[i];

		cr_assert_eq(memcmp(&a->st, &b->st, sizeof a->st), 0);
		cr_assert_eq(a->entry_count, b->entry_count);
		for (uint32_t k = 0; k < a->entry_count; k++)
			cr_assert_str_eq(a->entries[k].name, b->entries[k].name);
		if (a->target)
			cr_assert_str_eq(a->target, b->target);
	}
	tree_free(tree);
	tree_free(m.tree);
	free(buf);
	fixture_done(&fx);
}

Test(manifest, comes_back_as_it_was)
{
	comes_back(UINT64_C(0xfedcba9876543210));
	comes_back(0); /* of before mounts were told */
}

/* Flips every bit in turn and cuts at every length; with the hash put right, so that each check of
 * the decoder is met, it may accept, but must never touch what it should not (the sanitizers say
 * so). */
Test(manifest, damaged_ones_do_no_harm)
{
	struct fixture fx;
	struct manifest m;
	struct tree *tree;
	const char *why;
	size_t len;
	char *buf, *copy;

	fixture_init(&fx, 4096);
	buf = some_manifest(&fx, 77, &len, &tree);
	copy = malloc(len);
	for (size_t i = 0; i < len; i++) {
		cr_assert_eq(manifest_decode(buf, i, &m, &why), -EINVAL);
		for (int bit = 0; bit < 8; bit++) {
			memcpy(copy, buf, len);
			copy[i] = (char)(copy[i] ^ (1 << bit));
			cr_assert_eq(manifest_decode(copy, len, &m, &why), -EINVAL);
			if (i >= len - 8)
				continue;
			ff_put_be64(copy + len - 8, XXH3_64bits(copy, len - 8));
			if (manifest_decode(copy, len, &m, &why) == 0)
				tree_free(m.tree);
		}
	}
	free(copy);
	free(buf);
	tree_free(tree);
	fixture_done(&fx);
}

struct crowd {
	struct barrier *b;
	atomic_bool stop;
	int guarded[2]; /* written by holders never, by the closer in two steps */
	atomic_long passes;
};

static void *passer(void *ctx)
{
	struct crowd *c = ctx;

	while (!atomic_load(&c->stop)) {
		unsigned token = barrier_enter(c->b);

		cr_assert_eq(c->guarded[0], c->guarded[1]);
		barrier_exit(c->b, token);
		atomic_fetch_add(&c->passes, 1);
	}
	return NULL;
}

Test(barrier, holders_see_all_or_nothing)
{
	struct crowd c = {.stop = false};
	pthread_t threads[4];

	cr_assert_eq(barrier_new(&c.b), 0);
	for (size_t i = 0; i < FF_ARRAY_SIZE(threads); i++)
		pthread_create(&threads[i], NULL, passer, &c);
	/* On a busy machine the others may not run for a while: not without them. */
	for (int i = 0; i < 500 || atomic_load(&c.passes) < 500; i++) {
		cr_assert_eq(barrier_close(c.b, 10000), 0);
		c.guarded[0]++;
		sched_yield();
		c.guarded[1]++;
		barrier_open(c.b);
	}
	atomic_store(&c.stop, true);
	for (size_t i = 0; i < FF_ARRAY_SIZE(threads); i++)
		pthread_join(threads[i], NULL);
	barrier_free(c.b);
}

Test(barrier, a_holder_that_stays_is_given_up_on)
{
	struct barrier *b;
	unsigned token;

	cr_assert_eq(barrier_new(&b), 0);
	token = barrier_enter(b);
	cr_assert_eq(barrier_close(b, 50), -ETIMEDOUT);
	barrier_exit(b, barrier_enter(b)); /* it is open again */
	barrier_exit(b, token);
	cr_assert_eq(barrier_close(b, 50), 0);
	barrier_open(b);
	barrier_free(b);
}
