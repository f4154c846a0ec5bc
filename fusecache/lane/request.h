/* Requests of the kernel, as far as the lane looks into them. */
#ifndef FUSECACHE_REQUEST_H
#define FUSECACHE_REQUEST_H

#include <stddef.h>
#include <stdint.h>

#include <linux/fuse.h>

#define FORGETS 1024 /* entries in one part */
#define FORGETS_SIZE                                                                               \
    (sizeof(struct fuse_in_header) + sizeof(struct fuse_batch_forget_in) +                         \
     FORGETS * sizeof(struct fuse_forget_one))

enum request_kind {
    REQUEST_BAD,     /* its lengths do not fit; answered with EIO if it can be answered */
    REQUEST_OTHER,   /* for pyfuse3, unchanged */
    REQUEST_NOTHING, /* needs no work and no answer */
    REQUEST_INIT,
    REQUEST_FORGETS,    /* a FUSE_BATCH_FORGET: for pyfuse3, in parts */
    REQUEST_CAPABILITY, /* the question for security.capability that comes before every write */
    REQUEST_LOOKUP,
    REQUEST_GETATTR,
    REQUEST_STATFS,
    REQUEST_OPEN,
    REQUEST_READ,
    REQUEST_WRITE,
    REQUEST_FSYNC,
    REQUEST_FLUSH,   /* one of the closes of a handle */
    REQUEST_RELEASE, /* the last one */
    REQUEST_FALLOCATE,
    REQUEST_LSEEK,
};

struct request {
    enum request_kind kind;
    uint32_t opcode;
    uint64_t unique;
    uint64_t node;
    uint64_t handle;
    uint64_t offset;
    uint64_t length;  /* bytes read, written, of a name, or to be allocated; FORGETS: entries;
                       * INIT: the second 32 flags; OPEN: whose it is, a process id */
    uint32_t detail;  /* FSYNC, INIT, OPEN: flags; FALLOCATE: mode; LSEEK: whence; LOOKUP: 0, or one more
                       * than a descriptor of what has that name, which the receiver closes */
    const char *data; /* inside the message: length bytes of a WRITE or LOOKUP, FORGETS: entries */
};

/* Reads what is in size bytes at message, which need not be aligned or trusted. */
void request_parse(const void *message, size_t size, struct request *request);

/* Makes a request of its own of the entries of REQUEST_FORGETS from ``first`` on, FORGETS at most,
 * in FORGETS_SIZE bytes at ``into``. Returns its size. */
size_t request_forgets(const void *message, const struct request *request, uint64_t first,
                       char *into);

#endif
