#define _GNU_SOURCE
#include "serve.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "attributes.h"
#include "entries.h"
#include "names.h"

#define PIECE (32u << 10)     /* see store/cache_device.py */
#define IN_PLACE (128u << 10) /* see engine/slot_io.py */
#define TOO_LONG 4000000u     /* ns; see engine/in_place.py */
#define APART 500000000u
#define OVER_IO_URING (1u << 9) /* of the second 32 flags, see queues.h */

enum outcome { HIT, COLD, NO_HIT };

static void add(uint64_t *counter, uint64_t amount)
{
    __atomic_fetch_add(counter, amount, __ATOMIC_RELAXED);
}

static void took(uint64_t *buckets, uint64_t *sum, uint64_t began)
{
    uint64_t ns = now_ns() - began;
    unsigned bucket = 63 - (unsigned)__builtin_clzll(ns | 1);
    add(&buckets[bucket < BUCKETS ? bucket : BUCKETS - 1], 1);
    add(sum, ns);
}

/* -- reads ------------------------------------------------------------------------------------- */

/* Reads what is left, neighbouring slots at once. With RWF_NOWAIT *done stops at what is not in
 * memory. */
static enum outcome read_slots(struct lane *lane, const struct found *found, char *into,
                               uint32_t *done, int flags)
{
    uint64_t position;
    uint32_t length;
    while (core_piece(found, *done, &position, &length)) {
        struct iovec part = {into + *done, length};
        ssize_t got =
            preadv2(lane->device, &part, 1, (off_t)(lane->data_offset + position), flags);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0 && flags && errno == EOPNOTSUPP)
            __atomic_store_n(&lane->can_nowait, false, __ATOMIC_RELAXED);
        if (got <= 0)
            return flags && (got == 0 || errno == EAGAIN || errno == EOPNOTSUPP) ? COLD : NO_HIT;
        *done += (uint32_t)got;
    }
    return HIT;
}

bool serve_hit(struct lane *lane, const struct request *request, uint32_t gate,
               const struct found *found, const char *data, bool cold, uint64_t began)
{
    struct gate *at = &lane->core.gates[gate];
    if (!core_unmoved(&lane->core, at, found)) {
        add(&lane->counters.repeated, 1);
        return false;
    }
    core_touch(&lane->core, found);
    /* Counted before the guest knows of it, so that whoever asks then finds it counted. */
    add(&at->reads, 1);
    add(&at->read_bytes, found->length);
    if (cold) {
        add(&at->ssd_reads, 1);
        add(&at->ssd_read_bytes, found->length);
    }
    lane_reply(lane, request->unique, 0, data, found->length);
    took(lane->read_ns, &lane->read_ns_sum, began);
    return true;
}

/* Returns the buffer to go on with, or NULL if Python has to answer. *reads becomes false if this
 * thread is no reader any more. */
static struct buffer *try_read(struct lane *lane, const struct request *request,
                               struct buffer *buffer, struct found *found, bool *reads)
{
    uint32_t gate = table_get(lane->handles, request->handle);
    if (gate >= lane->core.gate_count)
        return NULL;
    if (!attributes_overtake(lane, gate, buffer->entry == NULL))
        return NULL;
    uint64_t began = now_ns();
    if (!core_locate(&lane->core, &lane->core.gates[gate], request->offset,
                     (uint32_t)request->length, found) ||
        found->marked)
        return NULL;
    uint32_t done = 0;
    enum outcome outcome = COLD;
    if (__atomic_load_n(&lane->can_nowait, __ATOMIC_RELAXED))
        outcome = read_slots(lane, found, buffer->bytes, &done, RWF_NOWAIT);
    bool cold = outcome == COLD;
    if (cold && buffer->entry) {
        add(&lane->counters.together, 1);
        queues_read(buffer->entry, request, gate, found, done, began);
        return buffer;
    }
    if (cold) {
        if (cold_crowd(&lane->cold) || !lane_step_back(lane)) {
            /* If there is no room for more of them: Python has threads, too. */
            buffer = cold_take(&lane->cold, request, gate, found, done, began, buffer);
            if (buffer)
                add(&lane->counters.together, 1);
            return buffer;
        }
        *reads = false;
        outcome = read_slots(lane, found, buffer->bytes, &done, 0);
    }
    bool answered = outcome == HIT &&
                    serve_hit(lane, request, gate, found, buffer->bytes, cold, began);
    return answered ? buffer : NULL;
}

/* -- writes ------------------------------------------------------------------------------------ */

static bool write_slots(struct lane *lane, const struct found *found, const char *data)
{
    for (unsigned i = 0; i < found->count; i++) {
        const struct extent *extent = &found->extents[i];
        for (uint32_t done = 0; done < extent->length;) {
            uint32_t left = extent->length - done;
            ssize_t put = pwrite(lane->device, data, left < PIECE ? left : PIECE,
                                 (off_t)(lane->data_offset + extent->position + done));
            if (put < 0 && errno == EINTR)
                continue;
            if (put <= 0)
                return false;
            done += (uint32_t)put;
            data += put;
        }
    }
    return true;
}

/* How often this thread has given up its processor by itself, as whoever waits for I/O does. */
static long waits(void)
{
    struct rusage used;
    getrusage(RUSAGE_THREAD, &used);
    return used.ru_nvcsw;
}

static bool try_write(struct lane *lane, const struct request *request, struct found *found)
{
    uint32_t gate = table_get(lane->handles, request->handle);
    if (gate >= lane->core.gate_count || request->length > IN_PLACE)
        return false;
    struct gate *at = &lane->core.gates[gate];
    if (!(__atomic_load_n(&at->flags, __ATOMIC_RELAXED) & GATE_WRITES))
        return false;
    uint64_t began = now_ns();
    if (began < __atomic_load_n(&lane->slow_until, __ATOMIC_RELAXED)) {
        add(&lane->counters.apart, 1);
        return false;
    }
    if (!turns_take(&lane->turns))
        return false;
    uint64_t ours = now_ns();
    long waited = waits();
    bool done = core_overwrite(&lane->core, at, request->offset, (uint32_t)request->length,
                               found) &&
                write_slots(lane, found, request->data);
    if (done) {
        at->changes++;
        add(&at->writes, 1);
        add(&at->write_bytes, request->length);
    }
    /* On a busy host it takes long because others run; only if we waited was it the SSD. */
    uint64_t now = now_ns();
    if (now - ours > TOO_LONG && waits() > waited)
        __atomic_store_n(&lane->slow_until, now + APART, __ATOMIC_RELAXED);
    turns_give(&lane->turns);
    if (!done)
        return false; /* Python meets the error again and deals with it */
    struct fuse_write_out out = {.size = (uint32_t)request->length};
    lane_reply(lane, request->unique, 0, &out, sizeof out);
    took(lane->write_ns, &lane->write_ns_sum, began);
    return true;
}

/* -- requests ---------------------------------------------------------------------------------- */

static void forward(struct lane *lane, const char *message, size_t size)
{
    struct fuse_in_header header;
    memcpy(&header, message, sizeof header);
    bool answered = header.opcode != FUSE_FORGET && header.opcode != FUSE_BATCH_FORGET;
    add(&lane->counters.forwarded, 1);
    add(&lane->unanswered, answered);
    while (send(lane->pass, message, size, MSG_NOSIGNAL) < 0) {
        if (errno == EINTR && !__atomic_load_n(&lane->ended, __ATOMIC_ACQUIRE))
            continue;
        __atomic_fetch_sub(&lane->unanswered, answered, __ATOMIC_RELAXED);
        lane_reply(lane, header.unique, EIO, NULL, 0);
        return;
    }
}

/* The kernel sends as many as fit into its largest request, which the pair might refuse, and for
 * which libfuse has no room: then they were lost. */
static void forward_forgets(struct lane *lane, const char *message, const struct request *request)
{
    char part[FORGETS_SIZE];
    for (uint64_t first = 0; first < request->length; first += FORGETS)
        forward(lane, part, request_forgets(message, request, first, part));
}

/* Returns the buffer to go on with. */
static struct buffer *dispatch(struct lane *lane, char *message, size_t size,
                               struct buffer *buffer, struct found *found, bool *reads)
{
    struct request parsed, *request = &parsed;
    struct buffer *next;
    request_parse(message, size, request);
    switch (request->kind) {
    case REQUEST_READ:
        next = try_read(lane, request, buffer, found, reads);
        return next ? next : lane_queue(lane, request, buffer);
    case REQUEST_WRITE:
        if (try_write(lane, request, found))
            return buffer;
        return lane_queue(lane, request, buffer);
    case REQUEST_GETATTR:
        if (attributes_tell(lane, request))
            return buffer;
        return lane_queue(lane, request, buffer);
    case REQUEST_STATFS:
        if (!attributes_space(lane, request))
            break;
        return buffer;
    case REQUEST_FSYNC:
        if (syncs_take(lane, request))
            return buffer;
        return lane_queue(lane, request, buffer);
    case REQUEST_LOOKUP:
        if (names_find(lane, request))
            return buffer;
        return lane_queue(lane, request, buffer);
    case REQUEST_FLUSH:
        if (table_get(lane->readers_only, request->handle) == UINT32_MAX)
            return lane_queue(lane, request, buffer);
        lane_reply(lane, request->unique, 0, NULL, 0);
        return buffer;
    case REQUEST_OPEN:
    case REQUEST_RELEASE:
    case REQUEST_FALLOCATE:
    case REQUEST_LSEEK:
        return lane_queue(lane, request, buffer);
    case REQUEST_CAPABILITY:
        if (lane->capability && table_get(lane->nodes, request->node) != UINT32_MAX)
            lane_reply(lane, request->unique, ENODATA, NULL, 0);
        else
            forward(lane, message, size);
        return buffer;
    case REQUEST_FORGETS:
        forward_forgets(lane, message, request);
        return buffer;
    case REQUEST_BAD:
        if (request->unique)
            lane_reply(lane, request->unique, EIO, NULL, 0);
        return buffer;
    case REQUEST_NOTHING:
        return buffer;
    case REQUEST_INIT:
        __atomic_store_n(&lane->init_flags, request->detail | request->length << 32,
                         __ATOMIC_RELAXED);
        __atomic_store_n(&lane->init_unique, request->unique, __ATOMIC_RELEASE);
        break;
    case REQUEST_OTHER:
        break;
    }
    if (buffer->entry)
        queues_start(buffer->entry);
    forward(lane, message, size);
    return buffer;
}

void serve_request(struct lane *lane, char *message, size_t size, struct buffer *buffer,
                   struct found *found)
{
    bool reads = true;
    dispatch(lane, message, size, buffer, found, &reads);
}

void serve(struct lane *lane, struct buffer *buffer)
{
    struct found *found = malloc(sizeof *found);
    bool reads = true;
    while (found) {
        bool aside = reads && lane_step_aside(lane);
        if (!reads || aside) {
            if (!lane_step_up(lane, !aside))
                break;
            reads = true;
        }
        ssize_t size = read(lane->fuse, buffer->bytes, MESSAGE);
        if (__atomic_load_n(&lane->ended, __ATOMIC_ACQUIRE))
            break;
        if (size < 0 && (errno == EINTR || errno == EAGAIN || errno == ENOENT))
            continue;
        if (size <= 0)
            break; /* unmounted or aborted */
        buffer = dispatch(lane, buffer->bytes, (size_t)size, buffer, found, &reads);
    }
    free(found);
}

/* -- answers ----------------------------------------------------------------------------------- */

/* Completes pyfuse3's answer to INIT. Returns whether the kernel shall use its queues. */
static bool widen(struct lane *lane, char *message, size_t size)
{
    struct fuse_out_header header;
    struct fuse_init_out init;
    if (size < sizeof header + sizeof init)
        return false;
    memcpy(&header, message, sizeof header);
    if (header.error)
        return false;
    memcpy(&init, message + sizeof header, sizeof init);
    /* Or the kernel asks whether there are privileges to drop before every write. They are dropped
     * when an image is opened for writing, see fuse/privileges.py. */
    uint64_t can = __atomic_load_n(&lane->init_flags, __ATOMIC_RELAXED);
    init.flags |= can & FUSE_HANDLE_KILLPRIV_V2;
    bool queues = lane->queues.threads && can >> 32 & OVER_IO_URING;
    if (queues) {
        init.flags |= FUSE_INIT_EXT;
        init.flags2 |= OVER_IO_URING;
    }
    /* Larger requests would be cut off: MESSAGE is our room for them. */
    if (init.max_write > LARGEST)
        init.max_write = LARGEST;
    if (init.max_pages > LARGEST / 4096)
        init.max_pages = LARGEST / 4096;
    init.max_background = (uint16_t)lane->max_background;
    init.congestion_threshold = (uint16_t)(lane->max_background * 3 / 4);
    memcpy(message + sizeof header, &init, sizeof init);
    return queues;
}

static void serve_answer(struct lane *lane, char *message, size_t size)
{
    struct fuse_out_header header;
    bool queues = false;
    if (size < sizeof header)
        return;
    memcpy(&header, message, sizeof header);
    if (header.unique && header.unique == __atomic_load_n(&lane->init_unique, __ATOMIC_ACQUIRE)) {
        __atomic_store_n(&lane->init_unique, 0, __ATOMIC_RELAXED);
        queues = widen(lane, message, size);
    }
    if (entries_answer(lane, header.unique, -header.error, message + sizeof header,
                      size - sizeof header))
        return;
    while (write(lane->fuse, message, size) < 0 && errno == EINTR)
        ;
    if (queues)
        queues_open(lane);
}

void serve_answers(struct lane *lane)
{
    /* Counted before pyfuse3 can have it: what it has answered cannot be missed. */
    while (__atomic_load_n(&lane->unanswered, __ATOMIC_ACQUIRE)) {
        ssize_t size = recv(lane->pass, lane->answer->bytes, MESSAGE, MSG_DONTWAIT);
        if (size < 0 && errno == EINTR)
            continue;
        if (size <= 0)
            return;
        __atomic_fetch_sub(&lane->unanswered, 1, __ATOMIC_RELAXED);
        serve_answer(lane, lane->answer->bytes, (size_t)size);
    }
}
