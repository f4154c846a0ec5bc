#define _GNU_SOURCE
#include "entries.h"

#include <errno.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "serve.h"

#define A_PART 16384 /* bytes that weigh as much as a request */

/* What the kernel and we agree on, see <linux/fuse.h> since Linux 6.14. */
enum { REGISTER = 1, COMMIT_AND_FETCH = 2 };

struct room {
    char header[128]; /* of the request, then of the answer */
    char fixed[128];  /* what follows the header of a request and is always as long */
    uint64_t flags;
    uint64_t commit; /* what to call the request when it is answered */
    uint32_t rest;   /* bytes of what follows, and of the answer */
    uint32_t pad;
    uint64_t reserved;
};

struct command {
    uint64_t flags;
    uint64_t commit;
    uint16_t queue;
    uint8_t pad[6];
};

/* Room for one request and its answer. In its MESSAGE bytes the kernel's ``struct room`` comes
 * first; what follows the fixed part of a request, and all of an answer, begins at REST, page by
 * page; header and fixed part are copied before it, so that the request lies there in one piece. */
#define REST 4096

_Static_assert(offsetof(struct entry, cold) == 0, "results of both kinds have the same tag");
_Static_assert(sizeof(struct room) == 288, "the kernel's");
_Static_assert(sizeof(struct command) == 24, "the kernel's");
_Static_assert(sizeof(struct room) + sizeof(struct fuse_in_header) + 128 <= REST, "both fit");
_Static_assert(REST + LARGEST <= MESSAGE, "the largest answer fits");

/* The queues that this thread serves; NULL: it does something else. */
static _Thread_local struct queues *own;

static struct all_queues *all(struct lane *lane)
{
    return &lane->queues;
}

static void command(struct entry *entry, uint32_t what)
{
    struct command command = {.commit = entry->commit, .queue = entry->queue};
    bool new = what == REGISTER;
    ring_command(&entry->queues->ring, entry->queues->lane->fuse, what, &command, sizeof command,
                 new ? entry->parts : NULL, new ? 2 : 0, entry);
}

void entry_register(struct entry *entry)
{
    command(entry, REGISTER);
}

void entry_commit(struct entry *entry)
{
    command(entry, COMMIT_AND_FETCH);
}

struct entry *entry_new(struct queues *queues, unsigned queue)
{
    struct all_queues *all_queues = all(queues->lane);
    unsigned number = __atomic_fetch_add(&all_queues->entry_count, 1, __ATOMIC_RELAXED);
    struct entry *entry = number < MOST_ENTRIES ? calloc(1, sizeof *entry) : NULL;
    /* Untouched pages of it take no memory. */
    char *bytes = entry ? mmap(NULL, MESSAGE, PROT_READ | PROT_WRITE,
                               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
                        : MAP_FAILED;
    if (bytes == MAP_FAILED) {
        free(entry);
        if (number >= MOST_ENTRIES) /* else the number is used up */
            __atomic_fetch_sub(&all_queues->entry_count, 1, __ATOMIC_RELAXED);
        return NULL;
    }
    entry->queues = queues;
    entry->queue = (uint16_t)queue;
    entry->number = number;
    entry->room = (struct room *)bytes;
    entry->buffer.bytes = bytes + REST;
    entry->buffer.entry = entry;
    entry->cold.buffer = &entry->buffer;
    entry->parts[0] = (struct iovec){entry->room, sizeof *entry->room};
    entry->parts[1] = (struct iovec){entry->buffer.bytes, LARGEST};
    __atomic_fetch_add(&all_queues->shares[queue].entries, 1, __ATOMIC_RELAXED);
    __atomic_store_n(&all_queues->entries[number], entry, __ATOMIC_RELEASE);
    return entry;
}

/* Makes the kernel ask for no bytes of an image. False: it does not know that node any more. */
static bool make_it_ask(struct lane *lane, uint64_t node)
{
    static uint64_t last = UINT64_C(1) << 62;
    struct {
        struct fuse_out_header header;
        struct fuse_notify_retrieve_out out;
    } message = {.header = {.len = sizeof message, .error = FUSE_NOTIFY_RETRIEVE},
                 .out = {.notify_unique = __atomic_add_fetch(&last, 2, __ATOMIC_RELAXED),
                         .nodeid = node}};
    ssize_t done;
    do
        done = write(lane->fuse, &message, sizeof message);
    while (done < 0 && errno == EINTR);
    return done >= 0;
}

/* The same of an image that was read here, or else of one that is open: those who have none open
 * get no hits that could be held up. */
static void make_it_ask_something(struct queues *queues)
{
    struct lane *lane = queues->lane;
    if (queues->node && make_it_ask(lane, queues->node))
        return;
    for (uint32_t gate = 0; gate < lane->core.gate_count; gate++) {
        uint64_t node = __atomic_load_n(&lane->opened[gate], __ATOMIC_RELAXED);
        if (node && make_it_ask(lane, node)) {
            queues->node = node;
            return;
        }
        if (node) /* unless it is another one's by now */
            __atomic_compare_exchange_n(&lane->opened[gate], &node, 0, false, __ATOMIC_RELAXED,
                                        __ATOMIC_RELAXED);
    }
}

/* Linux (6.18) gives a new entry to who comes next, and not to whoever has come already and waits
 * because there was none: he gets one when another request is answered. This is that request: the
 * kernel makes it, on the processor where we ask. */
static void pump(struct queues *queues, unsigned queue)
{
    ring_start(&queues->ring);
    cpu_set_t here, there;
    bool moved = sched_getaffinity(0, sizeof here, &here) == 0;
    CPU_ZERO(&there);
    CPU_SET(queue, &there);
    moved = moved && sched_setaffinity(0, sizeof there, &there) == 0;
    make_it_ask_something(queues);
    if (moved)
        sched_setaffinity(0, sizeof here, &here);
}

void entry_away(struct queues *queues, unsigned queue)
{
    struct share *share = &all(queues->lane)->shares[queue];
    unsigned away = __atomic_add_fetch(&share->away, 1, __ATOMIC_RELAXED);
    if (__atomic_load_n(&share->entries, __ATOMIC_RELAXED) - away >= READY ||
        __atomic_load_n(&queues->lane->ended, __ATOMIC_ACQUIRE))
        return;
    struct entry *other = entry_new(queues, queue);
    if (!other)
        return;
    entry_register(other);
    pump(queues, queue);
}

void entry_back(struct lane *lane, unsigned queue)
{
    __atomic_fetch_sub(&all(lane)->shares[queue].away, 1, __ATOMIC_RELAXED);
}

void entry_hand_over(struct entry *entry, enum errand errand, struct queues *queues)
{
    pthread_mutex_lock(&queues->mutex);
    if (entry->queues != queues) /* who answers for its thread changes nothing */
        entry->queues = queues;
    entry->errand = errand;
    entry->next = NULL;
    *queues->last = entry;
    queues->last = &entry->next;
    bool wake = queues->sleeps;
    queues_set_asleep(queues, false);
    pthread_mutex_unlock(&queues->mutex);
    if (wake)
        bell_ring(&queues->bell);
}

/* Whoever gets the entry is the one to answer its request. */
static struct entry *claim(struct lane *lane, uint64_t unique)
{
    struct all_queues *all_queues = all(lane);
    struct entry *serving = own ? own->serving : NULL;
    unsigned count = __atomic_load_n(&all_queues->entry_count, __ATOMIC_RELAXED);
    for (unsigned i = serving ? serving->number : 0; i < count && i < MOST_ENTRIES; i++) {
        uint64_t asked = unique;
        if (__atomic_load_n(&all_queues->asked[i], __ATOMIC_RELAXED) == unique &&
            __atomic_compare_exchange_n(&all_queues->asked[i], &asked, 0, false,
                                        __ATOMIC_ACQUIRE, __ATOMIC_RELAXED))
            return __atomic_load_n(&all_queues->entries[i], __ATOMIC_ACQUIRE);
        if (serving)
            break; /* such a thread answers nothing else */
    }
    return NULL;
}

bool entries_answer(struct lane *lane, uint64_t unique, int error, const void *data, size_t size)
{
    struct entry *entry = unique && all(lane)->threads ? claim(lane, unique) : NULL;
    if (!entry)
        return false;
    if (error || size > LARGEST) {
        error = error ? error : EIO;
        size = 0;
    }
    struct fuse_out_header header = {
        .len = (uint32_t)(sizeof header + size), .error = -error, .unique = unique};
    if (size && data != entry->buffer.bytes)
        memcpy(entry->buffer.bytes, data, size);
    memcpy(entry->room->header, &header, sizeof header);
    entry->room->rest = (uint32_t)size;
    if (!own || own->serving != entry) {
        entry_hand_over(entry, TO_TAKE_BACK, entry->queues);
        return true;
    }
    own->serving = NULL;
    struct queues *its = queues_owner(lane, entry->queue);
    if (its == own || !own->gives_back)
        entry_commit(entry);
    else
        entry_hand_over(entry, TO_COMMIT, its);
    return true;
}

size_t entry_request(struct entry *entry, struct fuse_in_header *header, char **message)
{
    const struct room *room = entry->room;
    memcpy(header, room->header, sizeof *header);
    entry->commit = room->commit;
    size_t size = header->len, rest = room->rest;
    if (rest > LARGEST || size < sizeof *header + rest ||
        size - sizeof *header - rest > sizeof room->fixed)
        return 0;
    size_t fixed = size - sizeof *header - rest;
    *message = entry->buffer.bytes - fixed - sizeof *header;
    memcpy(*message, header, sizeof *header);
    memcpy(*message + sizeof *header, room->fixed, fixed);
    return size;
}

unsigned entry_weight(const struct entry *entry)
{
    struct fuse_in_header header;
    struct fuse_read_in in; /* a write has its size at the same place */
    memcpy(&header, entry->room->header, sizeof header);
    memcpy(&in, entry->room->fixed, sizeof in);
    bool data = header.opcode == FUSE_READ || header.opcode == FUSE_WRITE;
    return 1 + (data && in.size <= LARGEST ? in.size / A_PART : 0);
}

void entry_free(struct entry *entry)
{
    munmap(entry->room, MESSAGE);
    free(entry);
}

void entries_served_by(struct queues *queues)
{
    own = queues;
}
