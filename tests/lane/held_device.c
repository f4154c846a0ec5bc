/* A cache device for tests: reads find nothing in memory, and calls wait or fail, if told to. */
#define _GNU_SOURCE
#undef preadv2 /* the build renames the lane's calls to the ones below */
#undef pwrite
#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static bool cold, before, after, broken, busy;
static int inside;
static long reads, writes;

/* before: calls wait before they do anything; after: they wait when they have done it; busy: writes
 * take 20 ms without waiting for anything, as on a host that has others to run. */
void device_set(int is_cold, int hold_before, int hold_after, int is_broken, int is_busy)
{
    pthread_mutex_lock(&mutex);
    cold = is_cold;
    before = hold_before;
    after = hold_after;
    broken = is_broken;
    busy = is_busy;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&mutex);
}

/* How many calls wait. */
int device_inside(void)
{
    pthread_mutex_lock(&mutex);
    int now = inside;
    pthread_mutex_unlock(&mutex);
    return now;
}

long device_calls(int of_writes)
{
    pthread_mutex_lock(&mutex);
    long now = of_writes ? writes : reads;
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
    if (pass(&before, &reads))
        got = preadv2(fd, parts, count, offset, flags);
    else
        errno = EIO;
    pass(&after, NULL);
    return got;
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
    if (!pass(&before, &writes)) {
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
