/* Fsyncs that need no more than a sync of the cache device: callers that wait for each other share
 * one. One thread syncs while another one answers. See docs/architecture.md, "The lane". */
#ifndef FUSECACHE_SYNCS_H
#define FUSECACHE_SYNCS_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "request.h"

#define SYNC_THREADS 2

struct lane;

struct fsync {
    struct request request;
    uint32_t gate;
};

struct batch {
    struct fsync *fsyncs; /* room for MOST_FSYNCS */
    unsigned count;
};

/* Those for the next sync; those of a good one, to be answered by whoever is idle; then what a
 * thread has taken. */
enum { ASKED, STABLE, TAKEN, SYNC_BATCHES = TAKEN + SYNC_THREADS };

struct syncs {
    pthread_mutex_t mutex; /* over the next three, and the first two batches */
    pthread_cond_t wanted;
    unsigned idle;  /* threads */
    bool under_way; /* a sync: one at a time */
    struct batch batches[SYNC_BATCHES];
    bool failed; /* a sync, once: from then on all are Python's */
    int file; /* the cache device, opened once more: the kernel tells each open file once that it
               * could not write something, and who shared Python's might miss it. -1: none */
};

/* 0, or an errno. */
int syncs_make(struct syncs *syncs);

/* Takes over an fsync. False: Python has to do it. */
bool syncs_take(struct lane *lane, const struct request *request);

/* A thread. Ends when the lane has ended, with the sync that is under way. */
void syncs_run(struct lane *lane, unsigned number);

/* Wakes the threads, for their end. */
void syncs_end(struct lane *lane);

/* With no thread left. */
void syncs_free(struct syncs *syncs);

#endif
