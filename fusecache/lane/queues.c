#define _GNU_SOURCE
#include "queues.h"

#include <errno.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "serve.h"

#define ROOM 256 /* calls prepared at a time */
#define AT_ONCE 64
#define READY 16       /* entries of a queue that are not away */
#define HEAVY 8        /* what a thread does not do alone while the next one is idle */
#define A_PART 16384   /* bytes that weigh as much as a request */
#define SOON 1000000   /* ns */
#define STRANGE 16     /* requests of another thread's queue before it gets its entries back */
#define MOST_PATIENCE 4096
#define LATELY 100000 /* ns */

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

/* Room for one request and its answer. In its MESSAGE bytes the kernel's ``struct room`` comes first;
 * what follows the fixed part of a request, and all of an answer, begins at REST, page by page;
 * header and fixed part are copied before it, so that the request lies there in one piece. */
#define REST 4096

/* A thread's until the kernel has it: ``queues`` says whose. Whoever commits it gets the next request
 * that it brings. */
struct entry {
    struct cold_read cold; /* first: its address is the entry's */
    struct buffer buffer;  /* at REST */
    struct room *room;
    struct iovec parts[2];
    struct queues *queues;
    struct entry *next;
    enum { TO_SERVE, TO_TAKE_BACK, TO_COMMIT } errand; /* why it is handed over */
    uint64_t commit;
    unsigned number;
    uint16_t queue;
    bool reading;
};

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

/* Of a queue: the thread that runs on its processor, if there are as many threads. */
static struct queues *owner(struct lane *lane, unsigned queue)
{
    return &all(lane)->of[queue % all(lane)->threads];
}

static struct queues *next_one(struct queues *queues)
{
    return owner(queues->lane, (unsigned)(queues - all(queues->lane)->of) + 1);
}

static bool asleep(const struct queues *queues)
{
    return __atomic_load_n(&queues->sleeps, __ATOMIC_RELAXED);
}

static void set_asleep(struct queues *queues, bool sleeps)
{
    __atomic_store_n(&queues->sleeps, sleeps, __ATOMIC_RELAXED);
}

/* -- entries ----------------------------------------------------------------------------------- */

static void command(struct entry *entry, uint32_t what)
{
    struct command command = {.commit = entry->commit, .queue = entry->queue};
    bool new = what == REGISTER;
    ring_command(&entry->queues->ring, entry->queues->lane->fuse, what, &command, sizeof command,
                 new ? entry->parts : NULL, new ? 2 : 0, entry);
}

static struct entry *new_entry(struct queues *queues, unsigned queue)
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

/* Linux (6.18) gives a new entry to who comes next, and not to whoever has come already and waits
 * because there was none: he gets one when another request is answered. This is that request: the
 * kernel makes it, on the processor where we ask, because we ask for no bytes of an image. */
static void pump(struct queues *queues, unsigned queue)
{
    static uint64_t last = UINT64_C(1) << 62;
    struct {
        struct fuse_out_header header;
        struct fuse_notify_retrieve_out out;
    } message = {.header = {.len = sizeof message, .error = FUSE_NOTIFY_RETRIEVE},
                 .out = {.notify_unique = __atomic_add_fetch(&last, 2, __ATOMIC_RELAXED),
                         .nodeid = queues->node}};
    ring_start(&queues->ring);
    cpu_set_t here, there;
    bool away = sched_getaffinity(0, sizeof here, &here) == 0;
    CPU_ZERO(&there);
    CPU_SET(queue, &there);
    away = away && sched_setaffinity(0, sizeof there, &there) == 0;
    while (write(queues->lane->fuse, &message, sizeof message) < 0 && errno == EINTR)
        ;
    if (away)
        sched_setaffinity(0, sizeof here, &here);
}

/* The request of one of this queue's waits for somebody else: meanwhile another takes its place. */
static void go_away(struct queues *queues, unsigned queue)
{
    struct share *share = &all(queues->lane)->shares[queue];
    unsigned away = __atomic_add_fetch(&share->away, 1, __ATOMIC_RELAXED);
    if (__atomic_load_n(&share->entries, __ATOMIC_RELAXED) - away >= READY ||
        __atomic_load_n(&queues->lane->ended, __ATOMIC_ACQUIRE))
        return;
    struct entry *other = new_entry(queues, queue);
    if (!other)
        return;
    command(other, REGISTER);
    pump(queues, queue);
}

static void come_back(struct lane *lane, unsigned queue)
{
    __atomic_fetch_sub(&all(lane)->shares[queue].away, 1, __ATOMIC_RELAXED);
}

static void hand_over(struct entry *entry, int errand, struct queues *queues)
{
    pthread_mutex_lock(&queues->mutex);
    if (entry->queues != queues) /* who answers for its thread changes nothing */
        entry->queues = queues;
    entry->errand = errand;
    entry->next = NULL;
    *queues->last = entry;
    queues->last = &entry->next;
    bool wake = queues->sleeps;
    set_asleep(queues, false);
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

bool queues_answer(struct lane *lane, uint64_t unique, int error, const void *data, size_t size)
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
        hand_over(entry, TO_TAKE_BACK, entry->queues);
        return true;
    }
    own->serving = NULL;
    struct queues *its = owner(lane, entry->queue);
    if (its == own || (own->strange < STRANGE && !own->busy))
        command(entry, COMMIT_AND_FETCH);
    else
        hand_over(entry, TO_COMMIT, its);
    return true;
}

/* -- a thread ---------------------------------------------------------------------------------- */

void queues_read(struct entry *entry, const struct request *request, uint32_t gate,
                 const struct found *found, uint32_t done, uint64_t began)
{
    struct cold_read *read = &entry->cold;
    read->request = *request;
    read->gate = gate;
    read->done = done;
    read->began = began;
    memcpy(&read->found, found,
           offsetof(struct found, extents) + found->count * sizeof found->extents[0]);
    entry->reading = true;
    entry->queues->reading++;
    cold_go_on(entry->queues->lane, &entry->queues->ring, read, -EAGAIN);
}

static void read_done(struct entry *entry, int result)
{
    struct queues *queues = entry->queues;
    queues->serving = entry;
    entry->reading = false;
    if (cold_go_on(queues->lane, &queues->ring, &entry->cold, result)) {
        entry->reading = true;
    } else {
        queues->reading--;
        if (!queues->serving)
            come_back(queues->lane, entry->queue);
    }
    queues->serving = NULL;
}

/* Brings header, fixed part and rest together; 0: the kernel's numbers do not fit. */
static size_t assemble(struct entry *entry, struct fuse_in_header *header, char **message)
{
    const struct room *room = entry->room;
    memcpy(header, room->header, sizeof *header);
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

static void serve_entry(struct entry *entry)
{
    struct queues *queues = entry->queues;
    struct fuse_in_header header;
    char *message;
    size_t size = assemble(entry, &header, &message);
    entry->commit = entry->room->commit;
    queues->serving = entry;
    if (size && (header.opcode == FUSE_READ || header.opcode == FUSE_WRITE))
        queues->node = header.nodeid;
    __atomic_store_n(&all(queues->lane)->asked[entry->number], header.unique, __ATOMIC_RELEASE);
    if (size && header.opcode == FUSE_NOTIFY_REPLY)
        queues_answer(queues->lane, header.unique, 0, NULL, 0);
    else if (size)
        serve_request(queues->lane, message, size, &entry->buffer, queues->found);
    else
        queues_answer(queues->lane, header.unique, EIO, NULL, 0);
    if (queues->serving)
        go_away(queues, entry->queue);
    queues->serving = NULL;
}

static void run_errand(struct queues *queues, struct entry *entry)
{
    if (entry->errand == TO_SERVE) {
        serve_entry(entry);
        return;
    }
    if (entry->errand == TO_TAKE_BACK)
        come_back(queues->lane, entry->queue);
    command(entry, COMMIT_AND_FETCH);
}

/* Does what the thread was handed entries for, until there is nothing left. */
static void run_errands(struct queues *queues)
{
    struct entry *first;
    do {
        pthread_mutex_lock(&queues->mutex);
        first = queues->first;
        queues->first = NULL;
        queues->last = &queues->first;
        set_asleep(queues, !first); /* or is about to: whatever comes from here on wakes it */
        pthread_mutex_unlock(&queues->mutex);
        for (struct entry *next, *entry = first; entry; entry = next) {
            next = entry->next;
            run_errand(queues, entry);
        }
    } while (first);
}

void queues_start(struct entry *entry)
{
    ring_start(&entry->queues->ring);
}

/* The kernel has not taken a command. Without memory it may the next time; what else it refuses would
 * leave whoever waits for the answer waiting for ever, so that all ends. */
static void refused(struct entry *entry, int error)
{
    struct queues *queues = entry->queues;
    struct timespec soon = {0, SOON};
    switch (error) {
    case ENOMEM:
    case EAGAIN:
    case EINTR:
        nanosleep(&soon, NULL);
        command(entry, entry->commit ? COMMIT_AND_FETCH : REGISTER);
        break;
    default:
        if (entry->commit)
            lane_end(queues->lane);
        /* fall through */
    case ENOTCONN: /* unmounted, or aborted */
    case ECONNABORTED:
    case ECANCELED:
    case ENOENT:
        __atomic_fetch_sub(&all(queues->lane)->shares[entry->queue].entries, 1,
                           __ATOMIC_RELAXED);
    }
}

/* How much work a request is, in small ones. */
static unsigned weight(const struct entry *entry)
{
    struct fuse_in_header header;
    struct fuse_read_in in; /* a write has its size at the same place */
    memcpy(&header, entry->room->header, sizeof header);
    memcpy(&in, entry->room->fixed, sizeof in);
    bool data = header.opcode == FUSE_READ || header.opcode == FUSE_WRITE;
    return 1 + (data && in.size <= LARGEST ? in.size / A_PART : 0);
}

static bool lately(uint64_t asked_at, uint64_t now)
{
    return asked_at + LATELY > now;
}

/* Whether a thread sleeps, and nobody on its processor has asked for anything lately. */
static bool idle(const struct queues *queues, uint64_t now)
{
    return asleep(queues) && !lately(__atomic_load_n(&queues->asked_at, __ATOMIC_RELAXED), now);
}

/* How many of those that came at once another thread serves, which is idle: half, if they are much
 * work. And now and then one: for who has many requests under way it is better to be served on
 * another processor than his own, even if they come one by one, because then each of them interrupts
 * him. If that thread finds more than one the next time it goes on with it. */
static unsigned given_away(struct queues *queues, unsigned count, unsigned work)
{
    if (queues->reading >= HEAVY || (count > 1 && work >= HEAVY)) {
        queues->patience = STRANGE;
        return (count + (queues->reading >= HEAVY)) / 2;
    }
    if (++queues->alone < queues->patience)
        return 0;
    queues->alone = 0;
    queues->patience = queues->patience < MOST_PATIENCE ? 2 * queues->patience : MOST_PATIENCE;
    return 1;
}

/* Who asks for one thing after the other is served soonest by the thread that runs where he does:
 * entries that another one has got go back to it. They do so, too, if that one has enough to do. */
static void serve_all(struct queues *queues, struct entry **entries, unsigned count)
{
    struct queues *next = next_one(queues), *its = owner(queues->lane, entries[0]->queue);
    unsigned work = 0, given = 0;
    for (unsigned i = 0; i < count; i++)
        work += weight(entries[i]);
    uint64_t now = now_ns();
    if (its == queues)
        __atomic_store_n(&queues->asked_at, now, __ATOMIC_RELAXED);
    if (next != queues && idle(next, now) && (its == queues || count > 1))
        given = given_away(queues, count, work);
    for (unsigned i = count - given; i < count; i++)
        hand_over(entries[i], TO_SERVE, next);
    queues->busy = lately(queues->asked_at, now);
    bool strange = count == 1 && !queues->reading && its != queues && asleep(its);
    queues->strange = strange ? queues->strange + 1 : 0;
    for (unsigned i = 0; i < count - given; i++)
        serve_entry(entries[i]);
    queues->strange = queues->strange < STRANGE ? queues->strange : 0;
}

static void register_all(struct queues *queues)
{
    struct all_queues *all_queues = all(queues->lane);
    for (unsigned i = 0; i < all_queues->first_count; i++)
        if (owner(queues->lane, all_queues->entries[i]->queue) == queues)
            command(all_queues->entries[i], REGISTER);
    queues->registered = true;
}

/* With a thread for each processor each one stays on its own: then a single request is answered where
 * it was made. Where it may not run it stays where it is. */
static void stay(const struct queues *queues, unsigned number)
{
    cpu_set_t there;
    if ((long)all(queues->lane)->threads < sysconf(_SC_NPROCESSORS_ONLN))
        return;
    if (sched_getaffinity(0, sizeof there, &there) == 0 && CPU_ISSET(number, &there)) {
        CPU_ZERO(&there);
        CPU_SET(number, &there);
        sched_setaffinity(0, sizeof there, &there);
    }
}

static void sort_out(struct queues *queues, const struct ring_done *done, unsigned count,
                     bool ended)
{
    struct entry *came[AT_ONCE];
    unsigned requests = 0;
    for (unsigned i = 0; i < count; i++) {
        struct entry *entry = done[i].tag;
        if (done[i].tag == &queues->bell)
            queues->bell.armed = false;
        else if (entry->reading)
            read_done(entry, done[i].result);
        else if (ended)
            continue; /* nobody answers any more; see also lead_nowhere */
        else if (done[i].result >= 0)
            came[requests++] = entry;
        else
            refused(entry, -done[i].result);
    }
    if (requests)
        serve_all(queues, came, requests);
}

void queues_run(struct lane *lane, unsigned number)
{
    struct queues *queues = &all(lane)->of[number];
    struct ring_done done[AT_ONCE];
    own = queues;
    stay(queues, number);
    for (;;) {
        bool ended = __atomic_load_n(&lane->ended, __ATOMIC_ACQUIRE);
        if (!ended && !queues->registered && __atomic_load_n(&all(lane)->open, __ATOMIC_ACQUIRE))
            register_all(queues);
        run_errands(queues);
        if (ended && (!queues->reading || ring_is_cut(&queues->ring))) {
            ring_start(&queues->ring); /* what was answered */
            break;
        }
        bell_arm(&queues->bell, &queues->ring);
        unsigned count = ring_wait(&queues->ring, done, AT_ONCE);
        pthread_mutex_lock(&queues->mutex);
        set_asleep(queues, false);
        pthread_mutex_unlock(&queues->mutex);
        sort_out(queues, done, count, ended);
    }
}

/* -- all of them ------------------------------------------------------------------------------- */

/* Whether the kernel takes commands of ours, from here and now: it does if it says that it is too early
 * for them. A security module may forbid what io_uring itself allows. */
static bool may_command(struct lane *lane)
{
    struct ring *ring = &all(lane)->of[0].ring;
    struct ring_done done;
    struct command nothing = {0};
    ring_command(ring, lane->fuse, 0, &nothing, sizeof nothing, NULL, 0, lane);
    while (ring_wait(ring, &done, 1) == 0)
        ;
    return done.result == -EAGAIN;
}

static bool make_thread(struct lane *lane, unsigned number)
{
    struct queues *queues = &all(lane)->of[number];
    queues->lane = lane;
    queues->last = &queues->first;
    queues->ring.fd = queues->bell.fd = -1;
    queues->patience = STRANGE;
    pthread_mutex_init(&queues->mutex, NULL);
    all(lane)->threads++;
    queues->found = malloc(sizeof *queues->found);
    return queues->found && ring_make_for_commands(&queues->ring, ROOM) == 0 &&
           bell_make(&queues->bell) == 0;
}

/* The first entries. The kernel waits for all queues, also of processors that are not there. */
static bool make_entries(struct lane *lane)
{
    long there = sysconf(_SC_NPROCESSORS_ONLN);
    for (unsigned queue = 0; queue < all(lane)->count; queue++) {
        unsigned ready = there < 0 || queue < (unsigned long)there ? READY : 1;
        for (unsigned made = 0; made < ready; made++)
            if (!new_entry(owner(lane, queue), queue))
                return false;
    }
    return true;
}

bool queues_make(struct lane *lane, unsigned count, unsigned threads)
{
    struct all_queues *all_queues = all(lane);
    if (!count || !threads)
        return false;
    all_queues->count = count;
    all_queues->of = calloc(threads, sizeof *all_queues->of);
    all_queues->shares = calloc(count, sizeof *all_queues->shares);
    all_queues->asked = calloc(MOST_ENTRIES, sizeof *all_queues->asked);
    all_queues->entries = calloc(MOST_ENTRIES, sizeof *all_queues->entries);
    bool fit = all_queues->of && all_queues->shares && all_queues->asked && all_queues->entries;
    for (unsigned i = 0; i < threads && fit; i++)
        fit = make_thread(lane, i);
    fit = fit && may_command(lane) && make_entries(lane);
    all_queues->first_count = all_queues->entry_count;
    if (!fit)
        queues_free(lane);
    return fit;
}

void queues_open(struct lane *lane)
{
    __atomic_store_n(&all(lane)->open, true, __ATOMIC_RELEASE);
    for (unsigned i = 0; i < all(lane)->threads; i++)
        bell_ring(&all(lane)->of[i].bell);
}

void queues_cut(struct lane *lane)
{
    for (unsigned i = 0; i < all(lane)->threads; i++)
        ring_cut(&all(lane)->of[i].ring, lane->nowhere);
}

void queues_free(struct lane *lane)
{
    struct all_queues *all_queues = all(lane);
    for (unsigned i = 0; i < all_queues->threads; i++) {
        free(all_queues->of[i].found);
        ring_free(&all_queues->of[i].ring);
        bell_free(&all_queues->of[i].bell);
        pthread_mutex_destroy(&all_queues->of[i].mutex);
    }
    for (unsigned i = 0; all_queues->entries && i < all_queues->entry_count; i++) {
        if (!all_queues->entries[i])
            continue;
        munmap(all_queues->entries[i]->room, MESSAGE);
        free(all_queues->entries[i]);
    }
    free(all_queues->of);
    free(all_queues->shares);
    free(all_queues->asked);
    free(all_queues->entries);
    memset(all_queues, 0, sizeof *all_queues);
}
