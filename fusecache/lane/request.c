/* Parsing requests: no length is believed that was not checked. */
#include "request.h"

#include <string.h>

#include "core.h"

static const char CAPABILITY[] = "security.capability";

/* Copies the fixed part of a request that follows its header; false if it is not there. */
static int body(const char *message, size_t size, void *into, size_t length)
{
    if (size - sizeof(struct fuse_in_header) < length)
        return 0;
    memcpy(into, message + sizeof(struct fuse_in_header), length);
    return 1;
}

static enum request_kind parse_read(const char *message, size_t size, struct request *request)
{
    struct fuse_read_in in;
    if (!body(message, size, &in, sizeof in) || in.size > LARGEST)
        return REQUEST_BAD;
    request->handle = in.fh;
    request->offset = in.offset;
    request->length = in.size;
    return REQUEST_READ;
}

static enum request_kind parse_write(const char *message, size_t size, struct request *request)
{
    struct fuse_write_in in;
    size_t before = sizeof(struct fuse_in_header) + sizeof in;
    if (!body(message, size, &in, sizeof in) || in.size > LARGEST || size - before != in.size)
        return REQUEST_BAD;
    request->handle = in.fh;
    request->offset = in.offset;
    request->length = in.size;
    request->data = message + before;
    return REQUEST_WRITE;
}

static enum request_kind parse_fsync(const char *message, size_t size, struct request *request)
{
    struct fuse_fsync_in in;
    if (!body(message, size, &in, sizeof in))
        return REQUEST_BAD;
    request->handle = in.fh;
    request->detail = in.fsync_flags;
    return REQUEST_FSYNC;
}

static enum request_kind parse_open(const char *message, size_t size, struct request *request)
{
    struct fuse_in_header header;
    struct fuse_open_in in;
    if (!body(message, size, &in, sizeof in))
        return REQUEST_BAD;
    memcpy(&header, message, sizeof header);
    request->detail = in.flags;
    request->length = header.pid;
    return REQUEST_OPEN;
}

static enum request_kind parse_flush(const char *message, size_t size, struct request *request)
{
    struct fuse_flush_in in;
    if (!body(message, size, &in, sizeof in))
        return REQUEST_BAD;
    request->handle = in.fh;
    return REQUEST_FLUSH;
}

static enum request_kind parse_release(const char *message, size_t size, struct request *request)
{
    struct fuse_release_in in;
    if (!body(message, size, &in, sizeof in))
        return REQUEST_BAD;
    request->handle = in.fh;
    return REQUEST_RELEASE;
}

static enum request_kind parse_fallocate(const char *message, size_t size, struct request *request)
{
    struct fuse_fallocate_in in;
    if (!body(message, size, &in, sizeof in))
        return REQUEST_BAD;
    request->handle = in.fh;
    request->offset = in.offset;
    request->length = in.length;
    request->detail = in.mode;
    return REQUEST_FALLOCATE;
}

static enum request_kind parse_lseek(const char *message, size_t size, struct request *request)
{
    struct fuse_lseek_in in;
    if (!body(message, size, &in, sizeof in))
        return REQUEST_BAD;
    request->handle = in.fh;
    request->offset = in.offset;
    request->detail = in.whence;
    return REQUEST_LSEEK;
}

/* A name that ends where the request ends, with a zero. */
static enum request_kind parse_lookup(const char *message, size_t size, struct request *request)
{
    const char *name = message + sizeof(struct fuse_in_header);
    size_t room = size - sizeof(struct fuse_in_header);
    if (room == 0 || memchr(name, 0, room) != name + room - 1)
        return REQUEST_BAD;
    request->length = room - 1;
    request->data = name;
    return REQUEST_LOOKUP;
}

static enum request_kind parse_init(const char *message, size_t size, struct request *request)
{
    uint32_t in[5]; /* what fuse_init_in begins with: major, minor, readahead, flags, flags2 */
    if (body(message, size, in, 4 * sizeof in[0]))
        request->detail = in[3];
    if (request->detail & FUSE_INIT_EXT && body(message, size, in, sizeof in))
        request->length = in[4];
    return REQUEST_INIT;
}

static enum request_kind parse_forgets(const char *message, size_t size, struct request *request)
{
    struct fuse_batch_forget_in in;
    size_t before = sizeof(struct fuse_in_header) + sizeof in;
    if (!body(message, size, &in, sizeof in) ||
        size - before != (uint64_t)in.count * sizeof(struct fuse_forget_one))
        return REQUEST_BAD;
    request->length = in.count;
    request->data = message + before;
    return REQUEST_FORGETS;
}

static enum request_kind parse_getxattr(const char *message, size_t size)
{
    size_t before = sizeof(struct fuse_in_header) + sizeof(struct fuse_getxattr_in);
    if (size < before + sizeof CAPABILITY)
        return REQUEST_OTHER;
    return memcmp(message + before, CAPABILITY, sizeof CAPABILITY) ? REQUEST_OTHER
                                                                   : REQUEST_CAPABILITY;
}

static enum request_kind parse_body(const char *message, size_t size, struct request *request)
{
    switch (request->opcode) {
    case FUSE_READ:
        return parse_read(message, size, request);
    case FUSE_WRITE:
        return parse_write(message, size, request);
    case FUSE_FSYNC:
        return parse_fsync(message, size, request);
    case FUSE_OPEN:
        return parse_open(message, size, request);
    case FUSE_FLUSH:
        return parse_flush(message, size, request);
    case FUSE_RELEASE:
        return parse_release(message, size, request);
    case FUSE_FALLOCATE:
        return parse_fallocate(message, size, request);
    case FUSE_LSEEK:
        return parse_lseek(message, size, request);
    case FUSE_BATCH_FORGET:
        return parse_forgets(message, size, request);
    case FUSE_GETXATTR:
        return parse_getxattr(message, size);
    case FUSE_LOOKUP:
        return parse_lookup(message, size, request);
    case FUSE_GETATTR:
        return REQUEST_GETATTR;
    case FUSE_STATFS:
        return REQUEST_STATFS;
    case FUSE_INIT:
        return parse_init(message, size, request);
    case FUSE_INTERRUPT:
        return REQUEST_NOTHING; /* nothing we do can be interrupted, and it has no answer */
    default:
        return REQUEST_OTHER;
    }
}

void request_parse(const void *message, size_t size, struct request *request)
{
    struct fuse_in_header header;
    memset(request, 0, sizeof *request);
    request->kind = REQUEST_BAD;
    if (size < sizeof header)
        return;
    memcpy(&header, message, sizeof header);
    request->opcode = header.opcode;
    request->unique = header.unique;
    request->node = header.nodeid;
    if (header.len != size)
        return;
    request->kind = parse_body(message, size, request);
}

size_t request_forgets(const void *message, const struct request *request, uint64_t first,
                       char *into)
{
    struct fuse_in_header header;
    uint64_t left = request->length - first;
    struct fuse_batch_forget_in in = {.count = left < FORGETS ? (uint32_t)left : FORGETS};
    size_t length = in.count * sizeof(struct fuse_forget_one);
    memcpy(&header, message, sizeof header);
    header.len = (uint32_t)(sizeof header + sizeof in + length);
    memcpy(into, &header, sizeof header);
    memcpy(into + sizeof header, &in, sizeof in);
    memcpy(into + sizeof header + sizeof in,
           request->data + first * sizeof(struct fuse_forget_one), length);
    return header.len;
}
