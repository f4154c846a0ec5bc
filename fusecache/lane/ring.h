/* The few words of io_uring that the lane needs. Of one thread, but for making, freeing, and
 * ringing its bell. */
#ifndef FUSECACHE_RING_H
#define FUSECACHE_RING_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct io_uring_cqe;
struct io_uring_sqe;

struct ring {
    int fd; /* -1: there is none */
    uint32_t room;
    uint32_t prepared;
    uint32_t mask, done_mask;
    uint32_t *tail, *slots;
    uint32_t *done_head, *done_tail;
    char *entries;
    unsigned shift; /* of the size of an entry */
    const struct io_uring_cqe *results;
    void *maps[3];
    size_t sizes[3];
    bool cut;
};

struct ring_done {
    void *tag;
    int result; /* bytes, or an errno, negative */
};

/* Wakes the thread of a ring. */
struct bell {
    int fd;
    uint64_t count; /* what is read from fd */
    bool armed;     /* it is being read */
};

/* With room for so many calls to be prepared. 0, or an errno where io_uring is forbidden or too old
 * (it needs Linux 6.1). Nothing runs before ``ring_enter``. */
int ring_make(struct ring *ring, unsigned room);

/* The same with entries that have room for a command; it needs no ``ring_enter``. */
int ring_make_for_commands(struct ring *ring, unsigned room);

/* Whoever calls this is the one thread of the ring. False: it cannot be used. */
bool ring_enter(struct ring *ring);

/* Prepares a call; ``tag`` tells it from others when it is done. The descriptor and the bytes have
 * to stay until then. */
void ring_read(struct ring *ring, int fd, void *into, uint32_t length, uint64_t position,
               void *tag);

/* The same for a command to the driver of a descriptor, with up to 80 bytes of its own; ``address``
 * and ``length`` are what that command takes them for. */
void ring_command(struct ring *ring, int fd, uint32_t command, const void *own, size_t own_size,
                  const void *address, uint32_t length, void *tag);

/* Starts what is prepared and waits until something is done, or a signal comes. Returns how many of
 * the calls are done, ``most`` at most. */
unsigned ring_wait(struct ring *ring, struct ring_done *done, unsigned most);

/* Starts what is prepared and waits for nothing. */
void ring_start(struct ring *ring);

/* From any thread: ends what is under way, and from now on nothing is done, as far as its thread
 * can see. ``nowhere`` is a descriptor that cannot be a ring. */
void ring_cut(struct ring *ring, int nowhere);

bool ring_is_cut(const struct ring *ring);

/* With nothing under way. */
void ring_free(struct ring *ring);

/* 0, or an errno. */
int bell_make(struct bell *bell);

/* From any thread: a call with the bell as its tag is done, if it is armed or as soon as it is. */
void bell_ring(struct bell *bell);

void bell_arm(struct bell *bell, struct ring *ring);
void bell_free(struct bell *bell);

#endif
