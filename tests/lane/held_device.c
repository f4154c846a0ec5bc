/* A cache device for tests: reads find nothing in memory, and calls wait or fail, if told to. */
#define _GNU_SOURCE
#undef preadv2 /* the build renames the lane's calls to the ones below */
#undef pwrite
#undef fdatasync
#include "ring.h"

#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include <linux/io_uring.h>

#define PIECE 1000

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static bool cold, before, after, broken, busy, pieces, forbidden, sick, syncing;
static int sick_place[2] = {-1, -1};
static int inside;
static long calls[3]; /* reads, writes, syncs */

/* before: calls wait before they do anything; after: they wait when they have done it; busy: writes
 * take 20 ms without waiting for anything, as on a host that has others to run; pieces: io_uring
 * reads little at a time, and is interrupted in between; forbidden: there is no io_uring; sick: reads
 * by io_uring that begin wait until the place is healed, alone; syncing: syncs wait, alone. */
void device_set(int is_cold, int hold_before, int hold_after, int is_broken, int is_busy,
                int in_pieces, int is_forbidden, int is_sick, int hold_syncs)
{
    pthread_mutex_lock(&mutex);
    cold = is_cold;
    before = hold_before;
    after = hold_after;
    broken = is_broken;
    busy = is_busy;
    pieces = in_pieces;
    forbidden = is_forbidden;
    sick = is_sick;
    syncing = hold_syncs;
    if (sick && sick_place[0] < 0 && pipe(sick_place) != 0)
        abort();
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&mutex);
}

/* What is read there, and by nobody else. */
void device_heal(const void *data, size_t size)
{
    pthread_mutex_lock(&mutex);
    int end = sick_place[1];
    sick_place[0] = sick_place[1] = -1; /* the reading end is io_uring's */
    pthread_mutex_unlock(&mutex);
    if (write(end, data, size) != (ssize_t)size || close(end) != 0)
        abort();
}

/* How many calls wait. */
int device_inside(void)
{
    pthread_mutex_lock(&mutex);
    int now = inside;
    pthread_mutex_unlock(&mutex);
    return now;
}

long device_calls(int kind)
{
    pthread_mutex_lock(&mutex);
    long now = calls[kind];
    pthread_mutex_unlock(&mutex);
    return now;
}

static bool pass(const bool *held, long *count)
{
    pthread_mutex_lock(&mutex);
    if (count)
        ++*count;
    inside++;
    while (*held)
        pthread_cond_wait(&changed, &mutex);
    inside--;
    bool works = !broken;
    pthread_mutex_unlock(&mutex);
    return works;
}

ssize_t held_preadv2(int fd, const struct iovec *parts, int count, off_t offset, int flags)
{
    pthread_mutex_lock(&mutex);
    bool absent = cold && flags;
    pthread_mutex_unlock(&mutex);
    if (absent) {
        errno = EAGAIN;
        return -1;
    }
    ssize_t got = -1;
    if (pass(&before, &calls[0]))
        got = preadv2(fd, parts, count, offset, flags);
    else
        errno = EIO;
    pass(&after, NULL);
    return got;
}

/* -- the same by io_uring: the linker gives us the lane's calls (--wrap) ----------------------- */

int __real_ring_make(struct ring *ring, unsigned room);
bool __real_ring_enter(struct ring *ring);
unsigned __real_ring_wait(struct ring *ring, struct ring_done *done, unsigned most);

int __wrap_ring_make(struct ring *ring, unsigned room)
{
    pthread_mutex_lock(&mutex);
    bool refused = forbidden;
    pthread_mutex_unlock(&mutex);
    return refused ? EPERM : __real_ring_make(ring, room);
}

/* Not before something is handed over to its thread, if it is not to work. */
bool __wrap_ring_enter(struct ring *ring)
{
    pthread_mutex_lock(&mutex);
    bool works = !broken;
    pthread_mutex_unlock(&mutex);
    pass(&before, NULL);
    return works && __real_ring_enter(ring);
}

/* Slots do not begin at 0, and the lane reads 8 bytes of something else to be woken. */
static unsigned prepare(struct ring *ring, bool in_pieces, int place)
{
    unsigned count = 0;
    for (uint32_t i = 1; i <= ring->prepared; i++) {
        struct io_uring_sqe *entry = (void *)(ring->entries + ((size_t)((*ring->tail - i) & ring->mask) << ring->shift));
        count += entry->off > 0;
        if (entry->off > 0 && in_pieces && entry->len > PIECE)
            entry->len = PIECE;
        if (entry->off > 0 && place >= 0)
            entry->fd = place;
    }
    return count;
}

unsigned __wrap_ring_wait(struct ring *ring, struct ring_done *done, unsigned most)
{
    static unsigned turn;
    pthread_mutex_lock(&mutex);
    bool in_pieces = pieces;
    int place = sick ? sick_place[0] : -1;
    pthread_mutex_unlock(&mutex);
    unsigned count = prepare(ring, in_pieces, place);
    bool works = true;
    if (count) {
        works = pass(&before, &calls[0]);
        pthread_mutex_lock(&mutex);
        calls[0] += count - 1;
        pthread_mutex_unlock(&mutex);
    }
    count = __real_ring_wait(ring, done, most);
    bool read = false;
    for (unsigned i = 0; i < count; i++) {
        if (done[i].result == sizeof(uint64_t))
            continue;
        read = true;
        if (!works)
            done[i].result = -EIO;
        else if (in_pieces && turn++ % 3 == 0)
            done[i].result = -EINTR;
    }
    if (read)
        pass(&after, NULL);
    return count;
}

static void compute(void)
{
    struct timespec now, end;
    clock_gettime(CLOCK_MONOTONIC, &end);
    end.tv_sec += (end.tv_nsec + 20000000) / 1000000000;
    end.tv_nsec = (end.tv_nsec + 20000000) % 1000000000;
    do
        clock_gettime(CLOCK_MONOTONIC, &now);
    while (now.tv_sec < end.tv_sec || (now.tv_sec == end.tv_sec && now.tv_nsec < end.tv_nsec));
}

ssize_t held_pwrite(int fd, const void *data, size_t size, off_t offset)
{
    if (!pass(&before, &calls[1])) {
        errno = EIO;
        return -1;
    }
    pthread_mutex_lock(&mutex);
    bool computes = busy;
    pthread_mutex_unlock(&mutex);
    if (computes)
        compute();
    ssize_t put = pwrite(fd, data, size, offset);
    pass(&after, NULL);
    return put;
}

int held_fdatasync(int fd)
{
    int done = -1;
    if (pass(&before, &calls[2]) && pass(&syncing, NULL))
        done = fdatasync(fd);
    else
        errno = EIO;
    pass(&after, NULL);
    return done;
}
