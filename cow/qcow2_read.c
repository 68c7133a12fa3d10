/*
 * Reading what was saved.
 *
 * Clusters lie in an image in the order in which they were saved, so that what is read from a disk
 * one after the other is scattered over the image. A read of many clusters takes their table
 * entries with one call, asks for all data that is not in the page cache before it waits for any,
 * and has the kernel read the neighbourhood too: a backup will come to most of it, and reading an
 * image of gigabytes in pieces of a cluster takes many times as long as reading it whole.
 *
 * A piece of a disk may have its clusters in many images, one for each snapshot: each of these is
 * to be told what it will be asked for before any is waited for, or every cluster is three waits,
 * for its table entry, its data and its checksum.
 *
 * That wager is limited: an image which is large beside the machine's memory is read exactly, and
 * so is one of which much more was read ahead than was wanted after that, for then its pages do not
 * stay until they are. `ahead` and `used` count it.
 */
#include <errno.h>
#include <string.h>
#include <unistd.h>

#include "cow/io.h"
#include "cow/qcow2_private.h"
#include "ff_log.h"
#include "ff_util.h"

enum {
	LONG = 64 << 10,  /* least length of a run that is no small piece */
	WINDOW = 1 << 20, /* bytes that are read for a cluster which is not in the page cache */
	AHEAD_TIMES = 4,  /* read ahead at most that many times what the image has allocated, and
	                     as many times what was read of it */
	MEMORY_SHARE = 8, /* of memory: largest image that is read ahead */
};

/* Clusters that are neighbours on the disk and in the image. */
struct run {
	uint32_t at, count;
	bool missing; /* from the page cache */
};

static int check_range(const struct ff_image *img, uint64_t first, uint64_t count)
{
	return first > img->l.clusters || count > img->l.clusters - first ? -EINVAL : 0;
}

static bool counts(const struct ff_image *img, const uint8_t *wanted, uint64_t first, uint64_t i)
{
	return (!wanted || wanted[i]) && clustermap_test(&img->marks, first + i);
}

int image_entries(struct ff_image *img, uint64_t first, uint64_t count, const uint8_t *wanted,
                  uint64_t *host, uint8_t *kinds)
{
	uint8_t raw[IMAGE_ENTRIES * 8];
	uint64_t low = 0, end = count;
	int fd, r = image_fd(img, &fd);

	memset(host, 0, count * sizeof *host);
	memset(kinds, FF_KIND_NONE, count);
	while (low < end && !counts(img, wanted, first, low))
		low++;
	while (end > low && !counts(img, wanted, first, end - 1))
		end--;
	if (!r && end > low)
		r = io_pread_full(fd, raw, (end - low) * 8, image_l2_offset(img, first + low));
	for (uint64_t i = low; !r && i < end; i++) {
		enum ff_image_kind kind;

		if (!counts(img, wanted, first, i))
			continue;
		r = qcow2_entry_decode(&img->l, ff_be64(raw + (i - low) * 8), img->l.capacity,
		                       &host[i], &kind);
		kinds[i] = (uint8_t)kind;
		if (r)
			ff_error("%s: the table entry of the cluster at %llu is damaged", img->path,
			         (unsigned long long)(first + i) * img->l.cluster_size);
	}
	return r == -EINVAL ? -EIO : r;
}

int ff_image_kinds(struct ff_image *img, uint64_t first, uint64_t count, uint8_t *kinds)
{
	uint64_t host[IMAGE_ENTRIES], done = 0;
	int r = check_range(img, first, count);

	while (!r && done < count) {
		uint64_t n = FF_MIN(count - done, (uint64_t)IMAGE_ENTRIES);

		r = image_entries(img, first + done, n, NULL, host, kinds + done);
		done += n;
	}
	return r;
}

/* May the neighbourhood of a run be read ahead? */
static bool may_wager(struct ff_image *img)
{
	uint64_t allocated = ff_image_allocated(img);
	uint64_t memory = (uint64_t)sysconf(_SC_PHYS_PAGES) * (uint64_t)sysconf(_SC_PAGESIZE);

	return allocated <= memory / MEMORY_SHARE &&
	       atomic_load(&img->ahead) / AHEAD_TIMES <
	           FF_MAX(allocated, WINDOW) + atomic_load(&img->used);
}

/* Has the kernel begin to read what a missing run needs, and what lies around it. If most of that
 * is on its way already, the run is, too. */
static void read_ahead(struct ff_image *img, int fd, uint64_t off, uint64_t len)
{
	uint64_t begin = off - off % WINDOW, end = ff_round_up(off + len, WINDOW), got;
	/* an image may be smaller than a window, or have little in this one */
	uint64_t room = FF_MIN(end - begin, ff_image_allocated(img));

	if (io_cached(fd, begin, end - begin, &got) == 0 && got >= room / 4)
		return;
	if (!may_wager(img)) {
		io_will_need(fd, off, len);
		return;
	}
	atomic_fetch_add(&img->ahead, room);
	io_will_need(fd, begin, end - begin);
}

/* Checks N clusters against their checksums. */
static int check_sums(struct ff_image *img, int sums_fd, uint64_t first, uint64_t n, uint64_t host,
                      const uint8_t *data)
{
	uint8_t sums[IMAGE_ENTRIES * 8];
	uint32_t cs = img->l.cluster_size;
	size_t got = 0;
	int r = io_pread(sums_fd, sums, n * 8, qcow2_sum_offset(&img->l, host), &got);

	for (uint64_t i = 0; !r && i < n; i++) {
		if ((i + 1) * 8 <= got &&
		    ff_be64(sums + i * 8) == qcow2_sum(data + i * cs, cs, first + i))
			continue;
		ff_error("%s: the saved cluster of the disk's offset %llu (offset %llu of the "
		         "image) does not match its checksum",
		         img->path, (unsigned long long)(first + i) * cs,
		         (unsigned long long)(host + i) * cs);
		r = -EIO;
	}
	return r;
}

/* Reads and checks these runs of data clusters. */
static int read_runs(struct ff_image *img, uint64_t first, const uint64_t *host, struct run *runs,
                     size_t count, uint8_t *buf)
{
	uint64_t cs = img->l.cluster_size, used = 0;
	bool alone = count == 1 && runs[0].count * cs >= LONG;
	int fd, sums_fd, r = image_fd(img, &fd);

	if (!r)
		r = image_sums_fd(img, false, &sums_fd);
	/* A long run has nothing to wait beside. */
	for (size_t i = 0; !r && i < count && !alone; i++) {
		uint64_t off = host[runs[i].at] * cs, len = runs[i].count * cs;

		runs[i].missing = !io_pread_cached(fd, buf + runs[i].at * cs, len, off);
		if (runs[i].missing)
			read_ahead(img, fd, off, len);
	}
	for (size_t i = 0; !r && i < count; i++) {
		uint64_t at = runs[i].at, n = runs[i].count;

		used += n * cs;
		if (alone || runs[i].missing)
			r = io_pread_full(fd, buf + at * cs, n * cs, host[at] * cs);
		if (!r)
			r = check_sums(img, sums_fd, first + at, n, host[at], buf + at * cs);
	}
	atomic_fetch_add(&img->used, used);
	return r;
}

/* At most IMAGE_ENTRIES clusters. */
static int read_some(struct ff_image *img, uint64_t first, uint64_t count, const uint8_t *wanted,
                     uint8_t *buf)
{
	uint64_t host[IMAGE_ENTRIES], cs = img->l.cluster_size;
	uint8_t kinds[IMAGE_ENTRIES];
	struct run runs[IMAGE_ENTRIES];
	size_t n = 0;
	int r = image_entries(img, first, count, wanted, host, kinds);

	for (uint32_t i = 0; !r && i < count; i++) {
		struct run *last = n ? &runs[n - 1] : NULL;

		if (wanted && !wanted[i])
			continue;
		if (kinds[i] == FF_KIND_NONE)
			return -ENODATA;
		if (kinds[i] == FF_KIND_ZERO)
			memset(buf + i * cs, 0, cs);
		else if (last && last->at + last->count == i &&
		         host[i] == host[last->at] + last->count)
			last->count++;
		else
			runs[n++] = (struct run){.at = i, .count = 1};
	}
	return r || !n ? r : read_runs(img, first, host, runs, n, buf);
}

int ff_image_read_wanted(struct ff_image *img, uint64_t first, uint64_t count,
                         const uint8_t *wanted, void *buf)
{
	uint8_t *p = buf;
	int r = check_range(img, first, count);

	for (uint64_t done = 0; !r && done < count;) {
		uint64_t n = FF_MIN(count - done, (uint64_t)IMAGE_ENTRIES);

		r = read_some(img, first + done, n, wanted ? wanted + done : NULL,
		              p + done * img->l.cluster_size);
		done += n;
	}
	return r;
}

int ff_image_read(struct ff_image *img, uint64_t first, uint64_t count, void *buf)
{
	return ff_image_read_wanted(img, first, count, NULL, buf);
}

void ff_image_expect_entry(struct ff_image *img, uint64_t cluster)
{
	int fd;

	if (!image_fd(img, &fd))
		io_will_need(fd, image_l2_offset(img, cluster), 8);
}

void ff_image_expect_data(struct ff_image *img, uint64_t cluster)
{
	uint64_t host, cs = img->l.cluster_size;
	uint8_t kind;
	int fd, sums_fd;

	if (image_entries(img, cluster, 1, NULL, &host, &kind) || kind != FF_KIND_DATA)
		return;
	if (!image_fd(img, &fd))
		read_ahead(img, fd, host * cs, cs);
	if (!image_sums_fd(img, false, &sums_fd))
		io_will_need(sums_fd, qcow2_sum_offset(&img->l, host), 8);
}
