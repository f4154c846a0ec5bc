/* Feeds the request parser with requests near the border between good and bad, each in memory of
 * exactly its size, so that a sanitizer sees whatever is read beyond it.
 *
 * usage: fuzz_request SEED COUNT */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core.h"
#include "request.h"

#define DATA 8000
#define ROOM (DATA + 40 + FORGETS_SIZE * 2)

static uint64_t state;

static uint64_t any(void)
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state * 0x2545F4914F6CDD1Du;
}

static uint32_t below(uint32_t limit)
{
    return (uint32_t)((any() >> 32) % limit);
}

static uint64_t border(void)
{
    static const uint64_t borders[] = {0,       1,           39,         40,        41,
                                       79,      80,          81,         4095,      4096,
                                       LARGEST, LARGEST + 1, 1u << 31,   UINT32_MAX, 1ull << 32,
                                       1ull << 63, UINT64_MAX, UINT64_MAX - 1};
    return below(4) ? borders[below(sizeof borders / sizeof *borders)] : any() >> below(64);
}

/* A request that could be good. */
static size_t make(char *message)
{
    static const uint32_t opcodes[] = {FUSE_READ,      FUSE_WRITE, FUSE_FSYNC,    FUSE_FALLOCATE,
                                       FUSE_LSEEK,     FUSE_INIT,  FUSE_GETXATTR, FUSE_GETATTR,
                                       FUSE_INTERRUPT, FUSE_LOOKUP, 0,            UINT32_MAX,
                                       FUSE_BATCH_FORGET, FUSE_FLUSH, FUSE_OPEN, FUSE_RELEASE,
                                       FUSE_STATFS};
    uint32_t data = below(3) ? below(100) : below(DATA);
    uint32_t forgets = below(8) ? below(6) : below(2 * FORGETS + 2);
    size_t size = sizeof(struct fuse_in_header) + below(2) * 40 + data;
    struct fuse_in_header header = {.len = (uint32_t)size,
                                    .opcode = opcodes[below(sizeof opcodes / sizeof *opcodes)],
                                    .unique = any(),
                                    .nodeid = any()};
    if (header.opcode == FUSE_BATCH_FORGET) {
        size = sizeof header + 8 + forgets * sizeof(struct fuse_forget_one);
        header.len = (uint32_t)size;
    }
    for (size_t at = 0; at < size; at++)
        message[at] = (char)any();
    if (header.opcode == FUSE_WRITE && size >= sizeof header + 40) {
        struct fuse_write_in in = {.fh = border(), .offset = border(), .size = data};
        memcpy(message + sizeof header, &in, sizeof in);
    }
    if (header.opcode == FUSE_BATCH_FORGET)
        memcpy(message + sizeof header, &forgets, sizeof forgets);
    if (header.opcode == FUSE_GETXATTR && size >= sizeof header + 28)
        memcpy(message + sizeof header + 8, "security.capability", 20);
    if (header.opcode == FUSE_LOOKUP && size > sizeof header && below(4)) {
        for (size_t at = sizeof header; at < size - 1; at++)
            message[at] |= 1;
        message[size - 1] = 0;
    }
    memcpy(message, &header, sizeof header);
    return size;
}

static size_t spoil(char *message, size_t size)
{
    for (unsigned times = below(4); times; times--) {
        size_t at = below((uint32_t)(size < 120 ? size + 1 : 120));
        uint64_t value = border();
        switch (below(5)) {
        case 0:
            size = at; /* cut short */
            break;
        case 1: /* says so, too */
            size = at;
            value = at;
            at = 0;
            /* fall through */
        case 2:
            memcpy(message + (at & ~(size_t)3), &value, 4);
            break;
        case 3:
            memcpy(message + (at & ~(size_t)7), &value, 8);
            break;
        default:
            message[at] = (char)value;
        }
    }
    return size;
}

/* Whether its parts are requests that may be sent, and have all of it, in order. */
static int splits(const char *message, size_t size, const struct request *request)
{
    static const size_t before = sizeof(struct fuse_in_header) + 8;
    const size_t each = sizeof(struct fuse_forget_one);
    const char *at = message + before;
    char *part = malloc(FORGETS_SIZE);
    int right = part && request->data == at && at + request->length * each == message + size;
    for (uint64_t first = 0; right && first < request->length; first += FORGETS) {
        struct request parsed;
        size_t length = request_forgets(message, request, first, part);
        request_parse(part, length, &parsed);
        right = parsed.kind == REQUEST_FORGETS && length <= FORGETS_SIZE && parsed.length &&
                parsed.unique == request->unique && !memcmp(part + before, at, length - before);
        at += length - before;
    }
    free(part);
    return right && at == message + size;
}

static void check(const char *message, size_t size, const struct request *request)
{
    int right = request->kind >= REQUEST_BAD && request->kind <= REQUEST_LSEEK;
    if (request->kind == REQUEST_LOOKUP)
        right = request->data >= message && request->data + request->length + 1 == message + size &&
                strlen(request->data) == request->length;
    else if (request->kind == REQUEST_WRITE)
        right = request->data >= message && request->length <= LARGEST &&
                request->data + request->length == message + size;
    else if (request->kind == REQUEST_FORGETS)
        right = splits(message, size, request);
    else
        right = right && !request->data;
    if (request->kind == REQUEST_READ)
        right = right && request->length <= LARGEST;
    if (size < sizeof(struct fuse_in_header))
        right = right && request->kind == REQUEST_BAD && !request->unique;
    else if (memcmp(message, &(uint32_t){(uint32_t)size}, 4))
        right = right && request->kind == REQUEST_BAD;
    if (!right) {
        printf("kind %d of %zu bytes, opcode %u\n", request->kind, size, request->opcode);
        exit(1);
    }
}

int main(int count, char **words)
{
    static char room[ROOM + 16];
    unsigned long kinds[REQUEST_LSEEK + 1] = {0};
    if (count != 3)
        return 2;
    state = strtoull(words[1], NULL, 10) * 0x9E3779B97F4A7C15u + 1;
    for (unsigned long left = strtoul(words[2], NULL, 10); left; left--) {
        size_t size = spoil(room, make(room));
        char *message = malloc(size ? size : 1);
        struct request request;
        if (!message)
            return 2;
        memcpy(message, room, size);
        request_parse(message, size, &request);
        check(message, size, &request);
        kinds[request.kind]++;
        free(message);
    }
    for (unsigned kind = 0; kind <= REQUEST_LSEEK; kind++)
        printf("%lu ", kinds[kind]);
    return 0;
}
