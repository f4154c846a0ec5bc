#define _GNU_SOURCE
#include "cold.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "serve.h"

int cold_make(struct cold *cold, bool wanted)
{
    cold->last = &cold->first;
    cold->bell.fd = cold->ring.fd = -1;
    pthread_mutex_init(&cold->mutex, NULL);
    if (!wanted || ring_make(&cold->ring, 2 * COLD_READS) != 0)
        return 0;
    int error = bell_make(&cold->bell);
    if (error)
        return error;
    cold->all = calloc(COLD_READS, sizeof *cold->all);
    for (unsigned i = 0; cold->all && i < COLD_READS; i++) {
        cold->all[i].next = cold->free;
        cold->free = &cold->all[i];
    }
    return cold->all ? 0 : ENOMEM;
}

void cold_free(struct cold *cold)
{
    ring_free(&cold->ring);
    bell_free(&cold->bell);
    free(cold->all);
    pthread_mutex_destroy(&cold->mutex);
}

bool cold_crowd(struct cold *cold)
{
    return __atomic_load_n(&cold->under_way, __ATOMIC_RELAXED) > 0;
}

void cold_note(struct cold_read *read, const struct request *request, uint32_t gate,
               const struct found *found, uint32_t done, uint64_t began)
{
    read->request = *request;
    read->gate = gate;
    read->done = done;
    read->began = began;
    memcpy(&read->found, found,
           offsetof(struct found, extents) + found->count * sizeof found->extents[0]);
}

struct buffer *cold_take(struct cold *cold, const struct request *request, uint32_t gate,
                         const struct found *found, uint32_t done, uint64_t began,
                         struct buffer *buffer)
{
    struct buffer *other = NULL;
    bool wake = false;
    pthread_mutex_lock(&cold->mutex);
    struct cold_read *read = cold->free;
    if (read) {
        cold->free = read->next;
        other = read->buffer;
        read->next = NULL;
        read->buffer = buffer;
        cold_note(read, request, gate, found, done, began);
        __atomic_fetch_add(&cold->under_way, 1, __ATOMIC_RELAXED);
        *cold->last = read;
        cold->last = &read->next;
        wake = cold->sleeps;
        cold->sleeps = false;
    }
    pthread_mutex_unlock(&cold->mutex);
    if (wake)
        bell_ring(&cold->bell);
    return other;
}

static void give_back(struct cold *cold, struct cold_read *read)
{
    pthread_mutex_lock(&cold->mutex);
    read->next = cold->free;
    cold->free = read;
    __atomic_fetch_sub(&cold->under_way, 1, __ATOMIC_RELAXED);
    pthread_mutex_unlock(&cold->mutex);
}

bool cold_go_on(struct lane *lane, struct ring *ring, struct cold_read *read, int result)
{
    uint64_t position;
    uint32_t length;
    bool failed = result <= 0 && result != -EINTR && result != -EAGAIN;
    if (result > 0)
        read->done += (uint32_t)result;
    if (!failed && core_piece(&read->found, read->done, &position, &length)) {
        ring_read(ring, lane->device, read->buffer->bytes + read->done, length,
                  lane->data_offset + position, read);
        return true;
    }
    if (failed || !serve_hit(lane, &read->request, read->gate, &read->found, read->buffer->bytes,
                             true, read->began))
        lane_queue(lane, &read->request, NULL);
    return false;
}

/* Starts what was handed over; once the lane has ended it is dropped. */
static void start(struct lane *lane, bool ended)
{
    struct cold *cold = &lane->cold;
    pthread_mutex_lock(&cold->mutex);
    struct cold_read *first = cold->first;
    cold->first = NULL;
    cold->last = &cold->first;
    cold->sleeps = true; /* or is about to: whatever comes from here on wakes it */
    pthread_mutex_unlock(&cold->mutex);
    for (struct cold_read *next, *read = first; read; read = next) {
        next = read->next;
        if (ended || !cold_go_on(lane, &cold->ring, read, -EAGAIN))
            give_back(cold, read);
    }
    bell_arm(&cold->bell, &cold->ring);
}

/* From now on there is no room, and whatever came already is Python's. */
static void give_up(struct lane *lane)
{
    struct cold *cold = &lane->cold;
    pthread_mutex_lock(&cold->mutex);
    cold->free = NULL;
    struct cold_read *first = cold->first;
    cold->first = NULL;
    __atomic_store_n(&cold->under_way, 0, __ATOMIC_RELAXED);
    pthread_mutex_unlock(&cold->mutex);
    for (; first; first = first->next)
        lane_queue(lane, &first->request, NULL);
}

void cold_run(struct lane *lane)
{
    struct cold *cold = &lane->cold;
    struct ring_done done[COLD_READS + 1];
    if (!ring_enter(&cold->ring)) {
        give_up(lane);
        return;
    }
    for (;;) {
        bool ended = __atomic_load_n(&lane->ended, __ATOMIC_ACQUIRE);
        start(lane, ended);
        if (ended && !cold_crowd(cold))
            return;
        unsigned count = ring_wait(&cold->ring, done, COLD_READS + 1);
        pthread_mutex_lock(&cold->mutex);
        cold->sleeps = false;
        pthread_mutex_unlock(&cold->mutex);
        for (unsigned i = 0; i < count; i++) {
            if (done[i].tag == &cold->bell)
                cold->bell.armed = false;
            else if (!cold_go_on(lane, &cold->ring, done[i].tag, done[i].result))
                give_back(cold, done[i].tag);
        }
    }
}
