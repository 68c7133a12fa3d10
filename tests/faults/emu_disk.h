/*
 * Storage that can lose power: two filesystems, "source" and "fleece" (or one), as they lie in a
 * real directory, and beside that what of them is durable.
 *
 * emu_io.c stands in for the functions of cow/io.h: each call is made on the real directory and
 * noted here. emu_power_loss() then puts one of the states in the place of the real directory that
 * storage may hold when the power fails:
 *
 *   data    Every write, truncation and punched hole that no completed fsync, fdatasync or syncfs
 *           covers is kept, lost, or kept in some of its sectors of 512 bytes.
 *   names   Changes of directories that no fsync of the directory and no syncfs covers are kept or
 *           lost, each as a whole. EMU_JOURNAL: some prefix of all of them is kept, and an fsync of
 *           anything makes all before it durable, as journalling filesystems do. EMU_PREFIX: some
 *           prefix in each directory. EMU_ANY: any of them, in any order; an fsync of a file says
 *           nothing of its name. POSIX promises no more.
 *
 * Inodes keep their number, birth time and times through all that: fstat and statx tell those of
 * here. All functions are thread-safe but for emu_start(), emu_power_loss() and emu_stop().
 */
#ifndef FF_TEST_EMU_DISK_H
#define FF_TEST_EMU_DISK_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/stat.h>

enum emu_names { EMU_JOURNAL, EMU_PREFIX, EMU_ANY, EMU_NAMES };

struct emu_rng {
	uint64_t state;
};

/* A number below N. */
unsigned emu_random(struct emu_rng *rng, unsigned n);

struct emu_counts {
	unsigned syncs; /* fsync and fdatasync of files of the fleece side */
	unsigned events;
};

/* Takes ROOT/source and ROOT/fleece, with all that is in them, as durable. ONE: they are one
 * filesystem (and ROOT/fleece need not be there). */
void emu_start(const char *root, enum emu_names names, bool one, unsigned sync_us);
void emu_stop(void);
/* Cuts the power after so many more events (changes; beginnings and ends of syncs); 0: not. What
 * happens after the cut changes nothing. FN is called at that instant, whatever other threads do.
 */
void emu_cut_in(unsigned events, void (*fn)(void *ctx), void *ctx);
void emu_cut_now(void);
bool emu_is_cut(void);
/* Makes the real directory what storage holds after the cut, with a new boot id. Nobody may use it.
 */
void emu_power_loss(struct emu_rng *rng);
struct emu_counts emu_counts(void);
/* From here on the calling thread's syncs of SOURCE's DISK, whose fleecing images have names that
 * begin with its, are watched: none may begin while something that it saved before this call is
 * not durable. WRITES: nor may any change of it, and whatever the saves. NULL: no more. */
void emu_guest(const char *disk, bool writes);
unsigned emu_order_violations(void);
/* Files, and names of files, that begin with DISK and are not durable. */
unsigned emu_pending(const char *disk);
/* As a syncfs of both would. */
void emu_settle(void);

/* --- between emu_disk.c and emu_io.c ------------------------------------------------------------
 */

enum emu_kind { EMU_WRITE, EMU_ZERO, EMU_SIZE };

struct emu_inode;

void emu_lock(void);
void emu_unlock(void);
/* The following with the lock held. */
struct emu_inode *emu_inode_of(int fd);
struct emu_inode *emu_inode_at(int dirfd, const char *name);
/* The inode called NAME in DIRFD is new. */
struct emu_inode *emu_new(int dirfd, const char *name);
void emu_note_data(struct emu_inode *in, enum emu_kind kind, uint64_t off, uint64_t len,
                   const void *data);
struct emu_inode *emu_dir_of(int dirfd);
/* It is called NAME now. */
void emu_rename(struct emu_inode *in, const char *name);
/* NAME in DIR becomes TO (NULL: nothing); and, if DIR2, NAME2 in it becomes TO2, at once. */
void emu_note_names(struct emu_inode *dir, const char *name, struct emu_inode *to,
                    struct emu_inode *dir2, const char *name2, struct emu_inode *to2);
/* FS: all of the filesystem that IN is on. Takes the lock itself. */
void emu_sync(struct emu_inode *in, bool fs);
void emu_times(const struct emu_inode *in, uint64_t *ino, int64_t *btime, struct timespec *mtime,
               struct timespec *ctime);
const char *emu_boot_id_path(void);

#endif
