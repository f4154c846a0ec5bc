/* The lane: threads between the kernel and Python. No function here takes the GIL. */
#ifndef FUSECACHE_LANE_H
#define FUSECACHE_LANE_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "attributes.h"
#include "cold.h"
#include "core.h"
#include "queues.h"
#include "request.h"
#include "syncs.h"
#include "turns.h"

#define HANDLES (1u << 16)
#define MOST_GATES 0xFFFE /* what fits into a table beside a number */
#define BUCKETS 32
#define MESSAGE (LARGEST + 8192) /* the kernel wants room for its largest request and its header */

/* A request that Python answers. */
struct waiting {
    struct request request;
    struct buffer *buffer; /* of a WRITE or LOOKUP: holds its data; NULL: an entry does */
    struct waiting *next;
};

struct buffer {
    struct buffer *next;
    char *bytes; /* MESSAGE of them; of an entry: LARGEST */
    struct entry *entry; /* whose room this is; NULL: nobody's, so that it can be exchanged */
};

struct lane_counters {
    uint64_t forwarded; /* to pyfuse3 */
    uint64_t queued;    /* to Python, past pyfuse3 */
    uint64_t repeated;  /* hits that moved while they were read */
    uint64_t together;  /* cold hits that io_uring awaited */
    uint64_t apart;     /* overwrites given to Python because the SSD was slow */
    uint64_t fsyncs;    /* answered here */
    uint64_t syncs;     /* of the cache device, for these */
    uint64_t missing;   /* look-ups answered here: there is no such name */
    uint64_t found;     /* look-ups that Python finishes without asking the origin */
    uint64_t told;      /* questions for attributes answered here */
};

struct lane {
    struct core core;
    struct turns turns;
    struct cold cold;
    struct syncs syncs;
    struct all_queues queues;
    int fuse;    /* /dev/fuse; this and the next two become the lane's own when it starts */
    int pass;    /* our end of the pair; pyfuse3 has the other one */
    int device;  /* the cache device */
    int nowhere; /* what these, and syncs.file, are from lane_stop on: nobody answers or writes by
                  * a number that may be another file's by now */
    uint64_t data_offset;
    unsigned readers; /* threads that wait for requests */
    unsigned spares;  /* more of them, in the place of those that wait for the device */
    bool ring;        /* use io_uring, if we may: then there are no spares */
    bool capability;  /* answer the question for security.capability */
    unsigned max_background;
    unsigned queue_count;   /* of the kernel, see queues.h; 0: none */
    unsigned queue_threads; /* that serve them */
    unsigned queue_numbers; /* that have begun */
    unsigned sync_numbers;  /* the same of those that sync */

    pthread_t *ids; /* readers and spares, those of queues, who syncs, and who awaits cold hits */
    unsigned threads;
    unsigned started;
    bool owns; /* the three descriptors */

    uint64_t unanswered;   /* requests that pyfuse3 has */
    struct buffer *answer; /* room for one of its answers; for who brings them */

    pthread_mutex_t mutex; /* over all that follows up to the tables */
    pthread_cond_t spare;  /* somebody is to read */
    pthread_cond_t room;   /* a buffer came back */
    pthread_cond_t gone;   /* a thread ended */
    unsigned active;       /* threads that read, or are about to */
    unsigned blocked;      /* threads that wait for the device */
    unsigned parked;       /* threads that could read */
    unsigned alive;
    bool ended; /* the kernel has no more requests, or we were told to stop */
    struct buffer *buffers;
    struct buffer *all_buffers;
    unsigned buffer_count;
    struct waiting *first, **last;
    struct waiting *free_waiting;
    struct waiting *all_waiting;
    bool signalled;
    int queue; /* eventfd: something waits, or the lane has ended */

    bool can_nowait;
    uint64_t init_unique;
    uint64_t init_flags; /* what the kernel can do */
    uint64_t slow_until; /* monotonic ns: until then overwrites are Python's */

    /* Direct-mapped: number << 16 | gate + 1; what finds no place is simply not known here. */
    uint64_t *handles;
    uint64_t *readers_only; /* those handles that nothing is written by */
    uint64_t *nodes;
    uint64_t *directories; /* Python's descriptors of them, instead of gates */
    uint64_t *questions; /* by unique: nodes whose attributes are asked for */
    uint64_t *opened;     /* by gate: the node that was opened last */
    uint64_t *held_until; /* by gate: monotonic ns */
    struct told *told;    /* by node; under the mutex */

    struct lane_counters counters;
    uint64_t read_ns[BUCKETS]; /* hits by how long they took, each bucket twice the last */
    uint64_t read_ns_sum;
    uint64_t write_ns[BUCKETS];
    uint64_t write_ns_sum;
};

/* 0, or an errno; ``lane_stop`` and ``lane_free`` come after it in any case. */
int lane_start(struct lane *lane);

/* Wakes all threads and waits for them for so long; false if one still hangs in the device. Its
 * request is not answered any more, even if it comes back. */
bool lane_stop(struct lane *lane, unsigned milliseconds);

/* Instead of another lane_stop: nobody will wait for its threads any more. */
void lane_abandon(struct lane *lane);

/* Gives back all memory, once no thread is left. */
void lane_free(struct lane *lane);

/* Detaches what waits for Python; ``lane_done`` takes every one of it back. */
struct waiting *lane_take(struct lane *lane);
void lane_done(struct lane *lane, struct waiting *waiting);

/* Answers a request; errors of the kernel mean that nobody waits for it any more. */
int lane_reply(struct lane *lane, uint64_t unique, int error, const void *data, size_t size);

/* ``gate`` is below MOST_GATES. */
void table_put(uint64_t *table, uint64_t number, uint32_t gate);
void table_drop(uint64_t *table, uint64_t number);
/* The gate, or UINT32_MAX. */
uint32_t table_get(const uint64_t *table, uint64_t number);

uint64_t now_ns(void);

#endif
