#define _GNU_SOURCE
#include "queues.h"

#include <errno.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "entries.h"
#include "serve.h"

#define ROOM 256 /* calls prepared at a time */
#define AT_ONCE 64
#define HEAVY 8        /* what a thread does not do alone while the next one is idle */
#define SOON 1000000   /* ns */
#define STRANGE 16     /* requests of another thread's queue before it gets its entries back */
#define MOST_PATIENCE 4096
#define LATELY 100000 /* ns */

static struct all_queues *all(struct lane *lane)
{
    return &lane->queues;
}

struct queues *queues_owner(struct lane *lane, unsigned queue)
{
    return &all(lane)->of[queue % all(lane)->threads];
}

static struct queues *next_one(struct queues *queues)
{
    return queues_owner(queues->lane, (unsigned)(queues - all(queues->lane)->of) + 1);
}

static bool asleep(const struct queues *queues)
{
    return __atomic_load_n(&queues->sleeps, __ATOMIC_RELAXED);
}

void queues_set_asleep(struct queues *queues, bool sleeps)
{
    __atomic_store_n(&queues->sleeps, sleeps, __ATOMIC_RELAXED);
}

static bool lately(uint64_t asked_at, uint64_t now)
{
    return asked_at + LATELY > now;
}

/* -- a thread ---------------------------------------------------------------------------------- */

void queues_read(struct entry *entry, const struct request *request, uint32_t gate,
                 const struct found *found, uint32_t done, uint64_t began)
{
    cold_note(&entry->cold, request, gate, found, done, began);
    entry->reading = true;
    entry->queues->reading++;
    cold_go_on(entry->queues->lane, &entry->queues->ring, &entry->cold, -EAGAIN);
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
            entry_back(queues->lane, entry->queue);
    }
    queues->serving = NULL;
}

static void serve_entry(struct entry *entry)
{
    struct queues *queues = entry->queues;
    struct fuse_in_header header;
    char *message;
    size_t size = entry_request(entry, &header, &message);
    queues->serving = entry;
    if (size && (header.opcode == FUSE_READ || header.opcode == FUSE_WRITE))
        queues->node = header.nodeid;
    __atomic_store_n(&all(queues->lane)->asked[entry->number], header.unique, __ATOMIC_RELEASE);
    if (size && header.opcode == FUSE_NOTIFY_REPLY)
        entries_answer(queues->lane, header.unique, 0, NULL, 0);
    else if (size)
        serve_request(queues->lane, message, size, &entry->buffer, queues->found);
    else
        entries_answer(queues->lane, header.unique, EIO, NULL, 0);
    if (queues->serving)
        entry_away(queues, entry->queue);
    queues->serving = NULL;
}

static void run_errand(struct queues *queues, struct entry *entry)
{
    if (entry->errand == TO_SERVE) {
        serve_entry(entry);
        return;
    }
    if (entry->errand == TO_TAKE_BACK)
        entry_back(queues->lane, entry->queue);
    entry_commit(entry);
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
        queues_set_asleep(queues, !first); /* or is about to: what comes from now on wakes it */
        pthread_mutex_unlock(&queues->mutex);
        if (first) /* what was so when requests came by themselves may be long ago */
            queues->gives_back = lately(queues->asked_at, now_ns());
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

/* The kernel has not taken a command. Without memory it may the next time; what else it refuses
 * would leave whoever waits for the answer waiting for ever, so that all ends. */
static void refused(struct entry *entry, int error)
{
    struct queues *queues = entry->queues;
    struct timespec soon = {0, SOON};
    switch (error) {
    case ENOMEM:
    case EAGAIN:
    case EINTR:
        nanosleep(&soon, NULL);
        (entry->commit ? entry_commit : entry_register)(entry);
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

/* Whether a thread sleeps, and nobody on its processor has asked for anything lately. */
static bool idle(const struct queues *queues, uint64_t now)
{
    return asleep(queues) && !lately(__atomic_load_n(&queues->asked_at, __ATOMIC_RELAXED), now);
}

/* How many of those that came at once another thread serves, which is idle: half, if they are much
 * work. And now and then one: for who has many requests under way it is better to be served on
 * another processor than his own, even if they come one by one, because then each of them
 * interrupts him. If that thread finds more than one the next time it goes on with it. */
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
    struct queues *next = next_one(queues), *its = queues_owner(queues->lane, entries[0]->queue);
    unsigned work = 0, given = 0;
    for (unsigned i = 0; i < count; i++)
        work += entry_weight(entries[i]);
    uint64_t now = now_ns();
    if (its == queues)
        __atomic_store_n(&queues->asked_at, now, __ATOMIC_RELAXED);
    if (next != queues && idle(next, now) && (its == queues || count > 1))
        given = given_away(queues, count, work);
    for (unsigned i = count - given; i < count; i++)
        entry_hand_over(entries[i], TO_SERVE, next);
    bool strange = count == 1 && !queues->reading && its != queues && asleep(its);
    queues->strange = strange ? (queues->strange + 1) % STRANGE : 0;
    queues->gives_back =
        lately(queues->asked_at, now) || (strange && queues->strange == 0);
    for (unsigned i = 0; i < count - given; i++)
        serve_entry(entries[i]);
}

static void register_all(struct queues *queues)
{
    struct all_queues *all_queues = all(queues->lane);
    for (unsigned i = 0; i < all_queues->first_count; i++)
        if (queues_owner(queues->lane, all_queues->entries[i]->queue) == queues)
            entry_register(all_queues->entries[i]);
    queues->registered = true;
}

/* With a thread for each processor each one stays on its own: then a single request is answered
 * where it was made. Where it may not run it stays where it is. */
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
    entries_served_by(queues);
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
        queues_set_asleep(queues, false);
        pthread_mutex_unlock(&queues->mutex);
        sort_out(queues, done, count, ended);
    }
}

/* -- all of them ------------------------------------------------------------------------------- */

/* Whether the kernel takes commands of ours, from here and now: it does if it says that it is too
 * early for them. A security module may forbid what io_uring itself allows. */
static bool may_command(struct lane *lane)
{
    struct ring *ring = &all(lane)->of[0].ring;
    struct ring_done done;
    ring_command(ring, lane->fuse, 0, "", 0, NULL, 0, lane);
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
            if (!entry_new(queues_owner(lane, queue), queue))
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
    for (unsigned i = 0; all_queues->entries && i < all_queues->entry_count; i++)
        if (all_queues->entries[i])
            entry_free(all_queues->entries[i]);
    free(all_queues->of);
    free(all_queues->shares);
    free(all_queues->asked);
    free(all_queues->entries);
    memset(all_queues, 0, sizeof *all_queues);
}
