/* Entries: room for one request that comes by a queue of the kernel, and for its answer; and who
 * may answer it. */
#ifndef FUSECACHE_ENTRIES_H
#define FUSECACHE_ENTRIES_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/uio.h>

#include "lane.h"

#define READY 16 /* entries of a queue that are not away */

enum errand { TO_SERVE, TO_TAKE_BACK, TO_COMMIT }; /* why an entry is handed over */

struct room;

/* A thread's until the kernel has it: ``queues`` says whose. Whoever commits it gets the next
 * request that it brings. */
struct entry {
    struct cold_read cold; /* first: its address is the entry's */
    struct buffer buffer;  /* for what is read; the answer's */
    struct room *room;
    struct iovec parts[2];
    struct queues *queues;
    struct entry *next;
    enum errand errand;
    uint64_t commit; /* 0: it has brought nothing yet */
    unsigned number;
    uint16_t queue;
    bool reading;
};

/* NULL: no memory, or there are too many. */
struct entry *entry_new(struct queues *queues, unsigned queue);

/* Prepares the call that gives the kernel a new entry, or one that is answered. */
void entry_register(struct entry *entry);
void entry_commit(struct entry *entry);

/* The request in one piece, and its size; 0: the kernel's numbers do not fit. */
size_t entry_request(struct entry *entry, struct fuse_in_header *header, char **message);

/* How much work the request is, in small ones. */
unsigned entry_weight(const struct entry *entry);

/* The request of one of this queue's waits for somebody else: meanwhile another takes its place. */
void entry_away(struct queues *queues, unsigned queue);
void entry_back(struct lane *lane, unsigned queue);

/* From now on the entry is this thread's. */
void entry_hand_over(struct entry *entry, enum errand errand, struct queues *queues);

/* Answers a request that came by a queue, from any thread; false if it did not, or somebody has
 * answered it already. */
bool entries_answer(struct lane *lane, uint64_t unique, int error, const void *data, size_t size);

void entry_free(struct entry *entry);

/* The caller is the thread that serves these. */
void entries_served_by(struct queues *queues);

#endif
