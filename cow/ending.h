/*
 * What a mount leaves to the next one, so that this can tell how it ended, and what may have been
 * changed since: a record of its end (session.c), the snapshots that it had (known.c), which mounts
 * of filesystems it saw (superblock.c), and until when it lived (pulse.c).
 */
#ifndef FF_COW_ENDING_H
#define FF_COW_ENDING_H

#include "cow/engine.h"

/* --- session.c --- */
enum ending {
	ENDED_NEVER,  /* there was none */
	ENDED_CLEAN,  /* what the sources looked like then is known */
	ENDED_KILLED, /* on this boot: all that was written is in the page cache */
	ENDED_TORN,   /* on another boot: what was not flushed is lost */
	ENDED_FAILED, /* on this boot, but a filesystem has, or may have, lost what was not flushed
	               */
};
struct ending_record;
int session_ending(struct ff_store *s, enum ending *how, struct ending_record **record);
/* Tells this boot from all others, a line. */
int session_boot_id(char *out, size_t size);
/* Does the source look as the record says? */
bool session_unchanged(const struct ending_record *record, const struct identity *id,
                       const struct stat *st);
/* By the record, have the L2 entries of the disk's image SEQ changed since the end? */
bool session_entries_changed(const struct ending_record *record, const struct identity *id,
                             uint64_t seq, uint64_t hash);
/* Was that image in the disk's chain at the end? */
bool session_image_known(const struct ending_record *record, const struct identity *id,
                         uint64_t seq);
void session_record_free(struct ending_record *record);
/* All has been taken notice of: begin anew. */
int session_begin(struct ff_store *s);
int session_end(struct ff_store *s);
/* FLEECE_DIR is this SOURCE's, or nobody's yet: -EINVAL, logged. HAS_SNAPSHOTS: is it in use? */
int session_check_source(struct ff_store *s, bool has_snapshots);

/* --- known.c --- */
struct known;
int known_load(struct ff_store *s, struct known **out);
/* Did it have the one that the mount MADE made as SEQ, in the directory DIRFD? */
bool known_has(const struct known *k, uint64_t made, uint64_t seq, int dirfd);
void known_free(struct known *k);
/* This mount gets a number, and has the snapshots that are there. Locks: admin. */
int known_begin(struct ff_store *s);
/* What a text says, for tests: -EINVAL. */
int known_parse(const char *text, struct known **out);

/* --- superblock.c --- */
/* Names, in OUT, this mount of the filesystem that FD is on, as no other of this boot; "-": that
 * cannot be told. */
int superblock_of(int fd, char *out, size_t size);

/* --- pulse.c --- */
/* Until when the last daemon lived, in seconds of the real-time clock and with some slack;
 * INT64_MAX: it is not known. */
int pulse_last(struct ff_store *s, int64_t *until);
/* That has been taken notice of. */
int pulse_forget(struct ff_store *s);

#endif
