/* Requests of the kernel, as far as the lane looks into them. */
#ifndef FUSECACHE_REQUEST_H
#define FUSECACHE_REQUEST_H

#include <stddef.h>
#include <stdint.h>

#include <linux/fuse.h>

enum request_kind {
    REQUEST_BAD,     /* its lengths do not fit; answered with EIO if it can be answered */
    REQUEST_OTHER,   /* for pyfuse3, unchanged */
    REQUEST_NOTHING, /* needs no work and no answer */
    REQUEST_INIT,
    REQUEST_GETATTR,
    REQUEST_CAPABILITY, /* the question for security.capability that comes before every write */
    REQUEST_READ,
    REQUEST_WRITE,
    REQUEST_FSYNC,
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
    uint64_t length;  /* bytes asked for, written, or to be allocated */
    uint32_t detail;  /* FSYNC, INIT: flags; FALLOCATE: mode; LSEEK: whence */
    const char *data; /* WRITE: length bytes inside the message */
};

/* Reads what is in size bytes at message, which need not be aligned or trusted. */
void request_parse(const void *message, size_t size, struct request *request);

#endif
