/*
 * Checks one fleecing image: tables, reference counts, checksums, and what libqcow says of it.
 */
#ifndef FF_CTL_AUDIT_H
#define FF_CTL_AUDIT_H

#include "cow/ctl/ctl.h"
#include "cow/ctl/view.h"

enum finding_kind {
	FINDING_OPEN,     /* it cannot be opened, or its header is no good */
	FINDING_BLOCK,    /* entry of the refcount table */
	FINDING_TABLE,    /* L1 entry */
	FINDING_ENTRY,    /* L2 entry, by guest cluster */
	FINDING_OVERLAP,  /* the same: its data is another's too */
	FINDING_REFCOUNT, /* of a host cluster in use: 0 */
	FINDING_SUMS,     /* the checksum file */
	FINDING_SUM,      /* of a guest cluster */
	FINDING_LEDGER,   /* its record of changes */
	FINDING_READ,     /* a guest cluster's data cannot be read */
	FINDING_LIBQCOW,  /* libqcow does not open it */
	FINDING_SIZE,     /* libqcow takes it for another size */
};

struct finding {
	enum finding_kind kind;
	uint64_t index;
	const char *why; /* static, or NULL */
	int error;
};

enum { FINDINGS_MAX = 256 };

struct audit {
	struct finding findings[FINDINGS_MAX];
	size_t count;   /* of those */
	uint64_t total; /* with those that had no room */
	uint64_t data, zeros, leaks;
	uint64_t noted; /* clusters that changed and are not saved */
	uint64_t hash;  /* of the L2 entries and the ledger, as in cow/qcow2_load.c */
	uint32_t cluster_size;
	bool broken;
};

struct audit_how {
	bool sums;                  /* read the data */
	const struct audit *before; /* look only at what was found then; NULL: at everything */
	struct progress *progress;  /* counts bytes of data; NULL: nobody looks */
};

/* What is wrong with the image goes to OUT; an error: it could not be looked at. -ENOENT: it is not
 * there. */
int audit_image(int dirfd, const char *path, const struct audit_how *how, struct audit *out);
/* Leaves in A what B has as well. */
void audit_keep_common(struct audit *a, const struct audit *b);
/* Says it of the image called PATH. */
void audit_say(const struct audit *a, const struct finding *f, const char *path);

/* --- second.c: libqcow --- */
/* Does libqcow open the image behind FD, and is it of SIZE bytes to it? 0: yes; 1: no, and *KIND
 * says what; -errno. */
int second_opinion(int fd, uint64_t size, enum finding_kind *kind);

#endif
