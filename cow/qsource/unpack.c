/*
 * Unpacking, by zlib and libzstd.
 *
 * Input is untrusted. zlib gets QEMU's window of 4 KiB. zstd is given one frame after the other,
 * each as a whole and with the output as its window: so a frame that asks for a window of gigabytes
 * gets none. Frames of formats before its first version, which a library may know as well, are no
 * frames here.
 *
 * Few unpacked clusters are kept, so that small reads of a large cluster unpack it once. A place
 * is EMPTY (no layer has that number), BUSY (one thread fills it, without the lock) or READY. Who
 * copies out of a place or fills it is counted in users, and a place with users is not given to
 * another cluster. If none is left, a cluster is unpacked for its reader alone.
 */
#include "cow/qsource/unpack.h"

#include <string.h>
#include <zlib.h>
#include <zstd.h>
#include <zstd_errors.h>

#include "ff_util.h"

#define WINDOW_BITS (-12) /* negative: raw deflate */

enum { PLACES = 16, KEPT_BYTES = 4 << 20 };

static int unpack_zlib(const uint8_t *buf, size_t len, uint8_t *out, size_t size)
{
	z_stream z = {.next_in = (Bytef *)buf,
	              .avail_in = (uInt)len,
	              .next_out = out,
	              .avail_out = (uInt)size};
	int r = inflateInit2(&z, WINDOW_BITS);

	if (r != Z_OK)
		return -ENOMEM;
	r = inflate(&z, Z_FINISH);
	inflateEnd(&z);
	if (r == Z_MEM_ERROR)
		return -ENOMEM;
	return (r == Z_STREAM_END || r == Z_BUF_ERROR) && z.avail_out == 0 ? 0 : -EIO;
}

static int unpack_zstd(const uint8_t *buf, size_t len, uint8_t *out, size_t size)
{
	static const uint8_t magic[4] = {0x28, 0xb5, 0x2f, 0xfd};
	ZSTD_DCtx *ctx = ZSTD_createDCtx();
	size_t done = 0;
	int r = 0;

	if (!ctx)
		return -ENOMEM;
	while (!r && done < size) {
		size_t frame, got;

		r = -EIO;
		if (len < sizeof magic || memcmp(buf, magic, sizeof magic) != 0)
			break;
		frame = ZSTD_findFrameCompressedSize(buf, len);
		if (ZSTD_isError(frame) || frame == 0 || frame > len)
			break;
		got = ZSTD_decompressDCtx(ctx, out + done, size - done, buf, frame);
		if (ZSTD_isError(got)) {
			if (ZSTD_getErrorCode(got) == ZSTD_error_memory_allocation)
				r = -ENOMEM;
			break;
		}
		r = 0;
		done += got;
		buf += frame;
		len -= frame;
	}
	ZSTD_freeDCtx(ctx);
	return r;
}

int qs_unpack(bool zstd, const uint8_t *buf, size_t len, uint8_t *out, size_t size)
{
	return (zstd ? unpack_zstd : unpack_zlib)(buf, len, out, size);
}

struct place {
	unsigned layer;
	unsigned users;
	bool named, busy;
	uint64_t cluster;
	uint64_t used; /* when last */
	uint8_t *data; /* NULL until first used */
};

struct qs_unpacked {
	struct qs_kept *kept; /* constant */
	pthread_mutex_t lock; /* the rest but sizes, and of each place all but the data */
	pthread_cond_t filled;
	uint64_t clock;
	size_t size;
	size_t count;
	struct place places[PLACES];
};

int qs_unpacked_create(size_t size, struct qs_kept *kept, struct qs_unpacked **out)
{
	struct qs_unpacked *u = calloc(1, sizeof *u);

	if (!u)
		return -ENOMEM;
	pthread_mutex_init(&u->lock, NULL);
	pthread_cond_init(&u->filled, NULL);
	u->kept = kept;
	u->size = size;
	u->count = FF_MAX(2, FF_MIN(PLACES, KEPT_BYTES / FF_MAX(size, 1)));
	*out = u;
	return 0;
}

void qs_unpacked_destroy(struct qs_unpacked *u)
{
	if (!u)
		return;
	for (size_t i = 0; i < PLACES; i++)
		qs_kept_free(u->kept, u->places[i].data, u->size);
	pthread_mutex_destroy(&u->lock);
	pthread_cond_destroy(&u->filled);
	free(u);
}

/* The place without users that was used least lately; WITH_DATA: of those that have memory. */
static struct place *idle_place(struct qs_unpacked *u, bool with_data)
{
	struct place *best = NULL;

	for (size_t i = 0; i < u->count; i++) {
		struct place *p = &u->places[i];

		if (p->users == 0 && (p->data || !with_data) && (!best || p->used < best->used))
			best = p;
	}
	return best;
}

/* The place of the cluster, with one user more; *FILL: it is empty, to be filled and given back by
 * fill_end(). NULL: there is none. */
static struct place *take(struct qs_unpacked *u, unsigned layer, uint64_t cluster, bool *fill)
{
	struct place *best;

	FF_GUARD(&u->lock);
again:
	for (size_t i = 0; i < u->count; i++) {
		struct place *p = &u->places[i];

		if (p->named && p->layer == layer && p->cluster == cluster) {
			if (p->busy) {
				pthread_cond_wait(&u->filled, &u->lock);
				goto again;
			}
			p->users++;
			p->used = ++u->clock;
			*fill = false;
			return p;
		}
	}
	best = idle_place(u, false);
	if (best && !best->data && !(best->data = qs_kept_alloc(u->kept, u->size)))
		best = idle_place(u, true);
	if (!best)
		return NULL;
	best->layer = layer;
	best->cluster = cluster;
	best->named = best->busy = true;
	best->users = 1;
	best->used = ++u->clock;
	*fill = true;
	return best;
}

/* Those who wait look again; after an error one of them tries for itself. */
static void fill_end(struct qs_unpacked *u, struct place *p, bool good)
{
	FF_GUARD(&u->lock);
	p->busy = false;
	p->named = good;
	pthread_cond_broadcast(&u->filled);
}

static void give_back(struct qs_unpacked *u, struct place *p)
{
	FF_GUARD(&u->lock);
	p->users--;
}

int qs_unpacked_read(struct qs_unpacked *u, unsigned layer, uint64_t cluster, size_t size,
                     qs_unpacked_make make, void *ctx, size_t in, size_t len, uint8_t *buf)
{
	ff_autofree uint8_t *own = NULL;
	bool fill = true;
	struct place *p;
	int r = 0;

	if (len == size) /* nobody is left to want the rest */
		return make(ctx, buf, size);
	p = take(u, layer, cluster, &fill);
	if (!p && !(own = malloc(size)))
		return -ENOMEM;
	if (fill)
		r = make(ctx, p ? p->data : own, size);
	if (p && fill)
		fill_end(u, p, r == 0);
	if (!r)
		memcpy(buf, (p ? p->data : own) + in, len);
	if (p)
		give_back(u, p);
	return r;
}
