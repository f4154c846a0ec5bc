/* The kernel's queues: requests that come by io_uring, and their answers, instead of by reading and
 * writing /dev/fuse. Linux 6.14 can, if the parameter enable_uring of its module fuse is set. There
 * is a queue for each processor; who asks there waits there. The interface is that of
 * Documentation/filesystems/fuse/fuse-io-uring.rst. */
#ifndef FUSECACHE_QUEUES_H
#define FUSECACHE_QUEUES_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "cold.h"
#include "ring.h"

#define MOST_QUEUES 4096
#define MOST_ENTRIES 49152 /* requests under way: more than WAITING */

struct entry;
struct lane;

/* A queue's. */
struct share {
    unsigned entries;
    unsigned away; /* of these: their requests wait for Python or the device */
};

/* A thread's. */
struct queues {
    struct lane *lane;
    pthread_mutex_t mutex; /* over the next two */
    struct entry *first, **last; /* handed over to the thread */
    bool sleeps;                 /* waits for requests: to be woken; read without it, too */

    struct ring ring; /* all that follows is the thread's own */
    struct bell bell;
    struct found *found;
    struct entry *serving; /* until it is answered */
    unsigned reading;      /* entries that the device reads into */
    unsigned strange;      /* requests in a row, each alone, of queues that are others' */
    uint64_t asked_at;     /* the last request of a queue of its own, monotonic ns; others read it */
    unsigned alone;        /* times it has served what came, while another one was idle */
    unsigned patience;     /* of these before it tries something else */
    bool gives_back;       /* what it answers for others' queues goes back to them */
    uint64_t node;         /* of an image that was read or written here */
    bool registered;
};

/* What there is of them, in all threads; begins with zeros. */
struct all_queues {
    unsigned threads; /* 0: there are no queues */
    unsigned count;
    struct queues *of; /* by thread */
    struct share *shares; /* by queue */

    /* By entry. A request's number as long as it is not answered: whoever sets it to 0 answers. */
    uint64_t *asked;
    struct entry **entries;
    unsigned entry_count;
    unsigned first_count; /* that were there when the threads began */

    bool open; /* the kernel has been told that we use them */
};

/* For so many queues and threads. False: there are none, because io_uring is forbidden or too old,
 * or for want of memory; then the kernel is not told of them. */
bool queues_make(struct lane *lane, unsigned count, unsigned threads);

/* The kernel has been told: from now on requests come. */
void queues_open(struct lane *lane);

/* A thread. Ends when the lane has ended, a signal comes, and the device reads nothing. */
void queues_run(struct lane *lane, unsigned number);

/* Reads the rest of a hit without waiting for it, in the thread that serves it. */
void queues_read(struct entry *entry, const struct request *request, uint32_t gate,
                 const struct found *found, uint32_t done, uint64_t began);

/* Hands what is answered to the kernel now, for a thread that is about to wait. */
void queues_start(struct entry *entry);

/* After the end: the kernel has nothing of ours any more, even if a thread hangs in the device. */
void queues_cut(struct lane *lane);

/* Of a queue: the thread that runs on its processor, if there are as many threads. */
struct queues *queues_owner(struct lane *lane, unsigned queue);

void queues_set_asleep(struct queues *queues, bool sleeps);

/* With no thread left. */
void queues_free(struct lane *lane);

#endif
