/* Hits whose bytes are not in memory, when there are several of them: one thread awaits them all,
 * by io_uring. A single one is awaited sooner by the thread that has it, which is what is done with
 * all of them where there is no io_uring. */
#ifndef FUSECACHE_COLD_H
#define FUSECACHE_COLD_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "core.h"
#include "request.h"
#include "ring.h"

#define COLD_READS 64 /* at a time */

struct buffer;
struct lane;

struct cold_read {
    struct cold_read *next;
    struct buffer *buffer;
    struct request request;
    uint32_t gate;
    uint32_t done; /* bytes of it */
    uint64_t began;
    struct found found;
};

struct cold {
    pthread_mutex_t mutex; /* over the next four */
    struct cold_read *free;
    struct cold_read *first, **last; /* for the thread to start */
    unsigned under_way;              /* handed over and not answered; read without it, too */
    bool sleeps;                     /* waits for what is under way: to be woken */

    struct cold_read *all;
    struct ring ring; /* the thread's own */
    struct bell bell;
};

/* 0, or an errno. ``free`` is NULL afterwards if io_uring is not wanted, forbidden, or too old. */
int cold_make(struct cold *cold, bool wanted);

/* Whether such reads are under way: then the next one is better handed over. */
bool cold_crowd(struct cold *cold);

/* Hands over a read, of which ``done`` bytes are in the buffer. Returns another buffer to go on
 * with; NULL: nothing is handed over, there is no io_uring or no room. */
struct buffer *cold_take(struct cold *cold, const struct request *request, uint32_t gate,
                         const struct found *found, uint32_t done, uint64_t began,
                         struct buffer *buffer);

/* Notes what is to be read, of which ``done`` bytes are in the buffer. */
void cold_note(struct cold_read *read, const struct request *request, uint32_t gate,
               const struct found *found, uint32_t done, uint64_t began);

/* Goes on with a read, of which the last piece was done with this result (-EAGAIN: begins it).
 * False: it is over, and the request is answered or waits for Python. */
bool cold_go_on(struct lane *lane, struct ring *ring, struct cold_read *read, int result);

/* The thread. Ends when the lane has ended, a signal comes, and nothing is under way. */
void cold_run(struct lane *lane);

/* With no thread left. */
void cold_free(struct cold *cold);

#endif
