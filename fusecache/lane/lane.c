#define _GNU_SOURCE
#include "lane.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "entries.h"
#include "names.h"
#include "serve.h"

#define SPARE_BUFFERS 32 /* writes that wait for Python, beside one for each thread */
#define STACK (512 << 10)
#define NAME "lane" /* of its threads, for top -H */

uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* -- tables ------------------------------------------------------------------------------------ */

void table_put(uint64_t *table, uint64_t number, uint32_t gate)
{
    uint64_t *entry = &table[number % HANDLES];
    if (*entry == 0 && number < UINT64_C(1) << 48)
        __atomic_store_n(entry, number << 16 | (gate + 1), __ATOMIC_RELEASE);
}

void table_drop(uint64_t *table, uint64_t number)
{
    uint64_t *entry = &table[number % HANDLES];
    if (*entry >> 16 == number)
        __atomic_store_n(entry, 0, __ATOMIC_RELEASE);
}

uint32_t table_get(const uint64_t *table, uint64_t number)
{
    uint64_t entry = __atomic_load_n(&table[number % HANDLES], __ATOMIC_ACQUIRE);
    return entry && entry >> 16 == number ? (uint32_t)(entry & 0xFFFF) - 1 : UINT32_MAX;
}

/* -- the queue to Python ----------------------------------------------------------------------- */

static void signal_python(struct lane *lane)
{
    uint64_t one = 1;
    if (!lane->signalled) {
        lane->signalled = true;
        while (write(lane->queue, &one, sizeof one) < 0 && errno == EINTR)
            ;
    }
}

struct buffer *lane_queue(struct lane *lane, const struct request *request, struct buffer *buffer)
{
    bool keeps = request->data && !buffer->entry;
    pthread_mutex_lock(&lane->mutex);
    while (!lane->ended && (!lane->free_waiting || (keeps && !lane->buffers)))
        pthread_cond_wait(&lane->room, &lane->mutex);
    if (!lane->ended) {
        struct waiting *waiting = lane->free_waiting;
        lane->free_waiting = waiting->next;
        waiting->request = *request;
        waiting->buffer = keeps ? buffer : NULL;
        waiting->next = NULL;
        if (keeps) {
            buffer = lane->buffers;
            lane->buffers = buffer->next;
        }
        *lane->last = waiting;
        lane->last = &waiting->next;
        __atomic_fetch_add(&lane->counters.queued, 1, __ATOMIC_RELAXED);
        signal_python(lane);
    } else {
        names_drop(request);
    }
    pthread_mutex_unlock(&lane->mutex);
    return buffer;
}

struct waiting *lane_take(struct lane *lane)
{
    uint64_t count;
    pthread_mutex_lock(&lane->mutex);
    while (read(lane->queue, &count, sizeof count) < 0 && errno == EINTR)
        ;
    lane->signalled = false;
    struct waiting *taken = lane->first;
    lane->first = NULL;
    lane->last = &lane->first;
    pthread_mutex_unlock(&lane->mutex);
    return taken;
}

void lane_done(struct lane *lane, struct waiting *waiting)
{
    pthread_mutex_lock(&lane->mutex);
    if (waiting->buffer) {
        waiting->buffer->next = lane->buffers;
        lane->buffers = waiting->buffer;
    }
    waiting->next = lane->free_waiting;
    lane->free_waiting = waiting;
    pthread_cond_broadcast(&lane->room); /* some wait for a buffer, others do not */
    pthread_mutex_unlock(&lane->mutex);
}

int lane_reply(struct lane *lane, uint64_t unique, int error, const void *data, size_t size)
{
    if (entries_answer(lane, unique, error, data, size))
        return 0;
    struct fuse_out_header header = {
        .len = (uint32_t)(sizeof header + size), .error = -error, .unique = unique};
    struct iovec parts[2] = {{&header, sizeof header}, {(void *)data, size}};
    ssize_t done;
    do
        done = writev(lane->fuse, parts, size ? 2 : 1);
    while (done < 0 && errno == EINTR);
    return done < 0 ? errno : 0;
}

/* -- threads ----------------------------------------------------------------------------------- */

/* How many may read: two, and one more for each that waits for the device. What is cold comes in
 * crowds: then whoever is done with the device is a reader again at once, and nobody need be woken
 * to take the place of the next one that waits. */
static unsigned wanted(const struct lane *lane)
{
    return lane->readers + __atomic_load_n(&lane->blocked, __ATOMIC_RELAXED);
}

static void add_active(struct lane *lane, int more)
{
    __atomic_fetch_add(&lane->active, (unsigned)more, __ATOMIC_RELAXED);
}

bool lane_step_back(struct lane *lane)
{
    pthread_mutex_lock(&lane->mutex);
    unsigned most = lane->ring ? 1 : lane->spares; /* io_uring is better for more */
    bool may = lane->blocked < most && (lane->active > 1 || lane->parked > 0);
    if (may) {
        add_active(lane, -1);
        __atomic_fetch_add(&lane->blocked, 1, __ATOMIC_RELAXED);
        if (lane->active < lane->readers)
            pthread_cond_signal(&lane->spare);
    }
    pthread_mutex_unlock(&lane->mutex);
    return may;
}

bool lane_step_up(struct lane *lane, bool was_back)
{
    pthread_mutex_lock(&lane->mutex);
    if (was_back)
        __atomic_fetch_sub(&lane->blocked, 1, __ATOMIC_RELAXED);
    lane->parked++;
    while (!lane->ended && lane->active >= wanted(lane))
        pthread_cond_wait(&lane->spare, &lane->mutex);
    lane->parked--;
    bool reads = !lane->ended;
    if (reads)
        add_active(lane, 1);
    pthread_mutex_unlock(&lane->mutex);
    return reads;
}

bool lane_step_aside(struct lane *lane)
{
    if (__atomic_load_n(&lane->active, __ATOMIC_RELAXED) <= wanted(lane))
        return false;
    pthread_mutex_lock(&lane->mutex);
    bool aside = lane->active > wanted(lane);
    if (aside)
        add_active(lane, -1);
    pthread_mutex_unlock(&lane->mutex);
    return aside;
}

void lane_end(struct lane *lane)
{
    pthread_mutex_lock(&lane->mutex);
    if (!lane->ended) {
        __atomic_store_n(&lane->ended, true, __ATOMIC_RELEASE);
        signal_python(lane);
    }
    pthread_cond_broadcast(&lane->spare);
    pthread_cond_broadcast(&lane->room);
    pthread_mutex_unlock(&lane->mutex);
    syncs_end(lane);
}

static void leave(struct lane *lane)
{
    pthread_mutex_lock(&lane->mutex);
    lane->alive--;
    pthread_cond_broadcast(&lane->gone);
    pthread_mutex_unlock(&lane->mutex);
}

static void *serve_thread(void *argument)
{
    struct lane *lane = argument;
    struct buffer *buffer;
    pthread_mutex_lock(&lane->mutex);
    while (!lane->buffers && !lane->ended) /* a late thread: the others' writes have them all */
        pthread_cond_wait(&lane->room, &lane->mutex);
    buffer = lane->buffers;
    if (buffer)
        lane->buffers = buffer->next;
    pthread_mutex_unlock(&lane->mutex);
    if (buffer && lane_step_up(lane, false))
        serve(lane, buffer);
    lane_end(lane);
    leave(lane);
    return NULL;
}

static void *syncs_thread(void *argument)
{
    struct lane *lane = argument;
    syncs_run(lane, __atomic_fetch_add(&lane->sync_numbers, 1, __ATOMIC_RELAXED));
    leave(lane);
    return NULL;
}

static void *cold_thread(void *argument)
{
    struct lane *lane = argument;
    cold_run(lane);
    leave(lane);
    return NULL;
}

static void *queues_thread(void *argument)
{
    struct lane *lane = argument;
    queues_run(lane, __atomic_fetch_add(&lane->queue_numbers, 1, __ATOMIC_RELAXED));
    leave(lane);
    return NULL;
}

static void nothing(int number)
{
    (void)number; /* it is there to end a read */
}

static struct buffer *new_buffer(struct lane *lane)
{
    struct buffer *buffer = &lane->all_buffers[lane->buffer_count++];
    /* Untouched pages of it take no memory. */
    buffer->bytes = mmap(NULL, MESSAGE, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (buffer->bytes == MAP_FAILED)
        buffer->bytes = NULL;
    return buffer->bytes ? buffer : NULL;
}

static int make_room(struct lane *lane)
{
    unsigned buffers = lane->readers + lane->spares + SPARE_BUFFERS;
    lane->all_buffers = calloc(buffers + COLD_READS + 1, sizeof *lane->all_buffers);
    lane->all_waiting = calloc(WAITING, sizeof *lane->all_waiting);
    lane->ids = calloc(lane->threads, sizeof *lane->ids);
    lane->handles = calloc(HANDLES, sizeof *lane->handles);
    lane->readers_only = calloc(HANDLES, sizeof *lane->readers_only);
    lane->nodes = calloc(HANDLES, sizeof *lane->nodes);
    lane->directories = calloc(HANDLES, sizeof *lane->directories);
    lane->questions = calloc(HANDLES, sizeof *lane->questions);
    lane->opened = calloc(lane->core.gate_count, sizeof *lane->opened);
    lane->held_until = calloc(lane->core.gate_count, sizeof *lane->held_until);
    lane->told = calloc(HANDLES, sizeof *lane->told);
    if (!lane->all_buffers || !lane->all_waiting || !lane->ids || !lane->handles ||
        !lane->readers_only || !lane->nodes || !lane->directories || !lane->questions ||
        !lane->opened || !lane->held_until || !lane->told)
        return ENOMEM;
    for (unsigned i = 0; i < buffers; i++) {
        struct buffer *buffer = new_buffer(lane);
        if (!buffer)
            return ENOMEM;
        buffer->next = lane->buffers;
        lane->buffers = buffer;
    }
    for (struct cold_read *read = lane->cold.free; read; read = read->next)
        if (!(read->buffer = new_buffer(lane)))
            return ENOMEM;
    if (!(lane->answer = new_buffer(lane)))
        return ENOMEM;
    /* The kernel has at most max_background requests under way, and one for each thread of each
     * guest; with more than this the lane waits for Python. */
    for (unsigned i = 0; i < WAITING; i++) {
        lane->all_waiting[i].next = lane->free_waiting;
        lane->free_waiting = &lane->all_waiting[i];
    }
    return 0;
}

static void make_locks(struct lane *lane)
{
    pthread_condattr_t steady;
    pthread_condattr_init(&steady);
    pthread_condattr_setclock(&steady, CLOCK_MONOTONIC);
    pthread_mutex_init(&lane->mutex, NULL);
    pthread_cond_init(&lane->spare, NULL);
    pthread_cond_init(&lane->room, NULL);
    pthread_cond_init(&lane->gone, &steady);
    pthread_condattr_destroy(&steady);
    turns_init(&lane->turns);
}

/* Descriptors of our own: the caller may close his while a thread still hangs in the device. */
static int own(struct lane *lane)
{
    int *theirs[3] = {&lane->fuse, &lane->pass, &lane->device}, ours[3];
    int error = 0;
    if ((lane->queue = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) < 0 ||
        (lane->nowhere = open("/dev/null", O_RDWR | O_CLOEXEC)) < 0)
        return errno;
    for (unsigned i = 0; i < 3; i++) {
        ours[i] = fcntl(*theirs[i], F_DUPFD_CLOEXEC, 0);
        if (ours[i] < 0 && !error)
            error = errno;
    }
    for (unsigned i = 0; i < 3; i++) {
        if (!error)
            *theirs[i] = ours[i];
        else if (ours[i] >= 0)
            close(ours[i]);
    }
    lane->owns = !error;
    if (lane->owns) {
        char path[32];
        snprintf(path, sizeof path, "/proc/self/fd/%d", lane->device);
        lane->syncs.file = open(path, O_RDONLY | O_CLOEXEC);
    }
    return error;
}

static void lead_nowhere(struct lane *lane)
{
    int numbers[4] = {lane->fuse, lane->pass, lane->device, lane->syncs.file};
    for (unsigned i = 0; lane->owns && i < 4; i++)
        while (numbers[i] >= 0 && dup3(lane->nowhere, numbers[i], O_CLOEXEC) < 0 &&
               (errno == EINTR || errno == EBUSY))
            ;
    queues_cut(lane);
}

static void *(*work_of(const struct lane *lane, unsigned number))(void *)
{
    unsigned first = lane->readers + lane->spares;
    if (number < first)
        return serve_thread;
    if (number < first + lane->queues.threads)
        return queues_thread;
    first += lane->queues.threads;
    return number < first + SYNC_THREADS ? syncs_thread : cold_thread;
}

int lane_start(struct lane *lane)
{
    lane->queue = lane->nowhere = lane->syncs.file = -1;
    lane->last = &lane->first;
    lane->can_nowait = true;
    make_locks(lane);
    int error = syncs_make(&lane->syncs), other = cold_make(&lane->cold, lane->ring);
    lane->ring = lane->cold.free != NULL;
    if (lane->ring)
        lane->spares = 0;
    queues_make(lane, lane->queue_count, lane->queue_threads);
    lane->threads =
        lane->readers + lane->spares + lane->queues.threads + SYNC_THREADS + lane->ring;
    if (error || (error = other) || (error = make_room(lane)) || (error = own(lane)))
        return error;
    struct sigaction wake = {.sa_handler = nothing};
    sigaction(SIGRTMAX, &wake, NULL);

    /* Signals are Python's main thread's. */
    sigset_t all, before;
    sigfillset(&all);
    sigdelset(&all, SIGRTMAX);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_attr_t small;
    pthread_attr_init(&small);
    pthread_attr_setstacksize(&small, STACK);
    pthread_mutex_lock(&lane->mutex); /* none of them ends before it is counted and named */
    for (unsigned i = 0; i < lane->threads && !error; i++)
        if ((error = pthread_create(&lane->ids[i], &small, work_of(lane, i), lane)) == 0)
            pthread_setname_np(lane->ids[lane->started++], NAME);
    lane->alive = lane->started;
    pthread_mutex_unlock(&lane->mutex);
    pthread_attr_destroy(&small);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return error;
}

bool lane_stop(struct lane *lane, unsigned milliseconds)
{
    uint64_t until = now_ns() + milliseconds * UINT64_C(1000000);
    lane_end(lane);
    if (lane->owns)
        shutdown(lane->pass, SHUT_RDWR);
    pthread_mutex_lock(&lane->mutex);
    while (lane->alive && now_ns() < until) {
        /* A signal that comes just before a read begins does not end it: again and again. */
        for (unsigned i = 0; i < lane->started; i++)
            pthread_kill(lane->ids[i], SIGRTMAX);
        struct timespec soon;
        clock_gettime(CLOCK_MONOTONIC, &soon);
        soon.tv_nsec += 5000000;
        if (soon.tv_nsec >= 1000000000) {
            soon.tv_nsec -= 1000000000;
            soon.tv_sec++;
        }
        pthread_cond_timedwait(&lane->gone, &lane->mutex, &soon);
    }
    bool all = lane->alive == 0;
    pthread_mutex_unlock(&lane->mutex);
    lead_nowhere(lane);
    if (all) {
        for (unsigned i = 0; i < lane->started; i++)
            pthread_join(lane->ids[i], NULL);
        lane->started = 0;
    }
    return all;
}

void lane_abandon(struct lane *lane)
{
    for (unsigned i = 0; i < lane->started; i++)
        pthread_detach(lane->ids[i]);
}

void lane_free(struct lane *lane)
{
    for (const struct waiting *waiting = lane->first; waiting; waiting = waiting->next)
        names_drop(&waiting->request);
    for (unsigned i = 0; i < lane->buffer_count; i++)
        if (lane->all_buffers && lane->all_buffers[i].bytes)
            munmap(lane->all_buffers[i].bytes, MESSAGE);
    free(lane->all_buffers);
    free(lane->all_waiting);
    free(lane->ids);
    free(lane->handles);
    free(lane->readers_only);
    free(lane->nodes);
    free(lane->directories);
    free(lane->questions);
    free(lane->opened);
    free(lane->held_until);
    free(lane->told);
    cold_free(&lane->cold);
    syncs_free(&lane->syncs);
    queues_free(lane);
    int descriptors[6] = {lane->queue, lane->nowhere, lane->syncs.file, /* or -1 */
                          lane->fuse, lane->pass, lane->device};
    for (unsigned i = 0; i < (lane->owns ? 6 : 3); i++)
        if (descriptors[i] >= 0)
            close(descriptors[i]);
    turns_destroy(&lane->turns);
    pthread_cond_destroy(&lane->gone);
    pthread_cond_destroy(&lane->room);
    pthread_cond_destroy(&lane->spare);
    pthread_mutex_destroy(&lane->mutex);
}
