#define _GNU_SOURCE
#include "ring.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <linux/io_uring.h>

#define SOON 1000000 /* ns */

static void *map(struct ring *ring, unsigned which, size_t size, uint64_t offset)
{
    void *at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring->fd,
                    (off_t)offset);
    ring->maps[which] = at == MAP_FAILED ? NULL : at;
    ring->sizes[which] = size;
    return ring->maps[which];
}

static bool map_all(struct ring *ring, const struct io_uring_params *params)
{
    char *asked = map(ring, 0, params->sq_off.array + params->sq_entries * sizeof(uint32_t),
                      IORING_OFF_SQ_RING);
    char *done = map(ring, 1,
                     params->cq_off.cqes + params->cq_entries * sizeof(struct io_uring_cqe),
                     IORING_OFF_CQ_RING);
    ring->entries = map(ring, 2, params->sq_entries * sizeof(struct io_uring_sqe),
                        IORING_OFF_SQES);
    if (!asked || !done || !ring->entries)
        return false;
    ring->tail = (uint32_t *)(asked + params->sq_off.tail);
    ring->mask = *(uint32_t *)(asked + params->sq_off.ring_mask);
    ring->slots = (uint32_t *)(asked + params->sq_off.array);
    ring->done_head = (uint32_t *)(done + params->cq_off.head);
    ring->done_tail = (uint32_t *)(done + params->cq_off.tail);
    ring->done_mask = *(uint32_t *)(done + params->cq_off.ring_mask);
    ring->results = (struct io_uring_cqe *)(done + params->cq_off.cqes);
    return true;
}

int ring_make(struct ring *ring, unsigned room)
{
    /* Completions are worked off by the one thread when it waits for them, and interrupt nobody. */
    struct io_uring_params params = {.flags = IORING_SETUP_R_DISABLED |
                                              IORING_SETUP_SINGLE_ISSUER |
                                              IORING_SETUP_DEFER_TASKRUN};
    memset(ring, 0, sizeof *ring);
    ring->fd = (int)syscall(SYS_io_uring_setup, room, &params);
    if (ring->fd < 0)
        return errno;
    if (map_all(ring, &params))
        return 0;
    ring_free(ring);
    return ENOMEM;
}

bool ring_enter(struct ring *ring)
{
    return syscall(SYS_io_uring_register, ring->fd, IORING_REGISTER_ENABLE_RINGS, NULL, 0) == 0 &&
           syscall(SYS_io_uring_enter, ring->fd, 0, 0, 0, NULL, 0) == 0;
}

void ring_read(struct ring *ring, int fd, void *into, uint32_t length, uint64_t position,
               void *tag)
{
    uint32_t tail = *ring->tail, slot = tail & ring->mask;
    struct io_uring_sqe *entry = &ring->entries[slot];
    memset(entry, 0, sizeof *entry);
    entry->opcode = IORING_OP_READ;
    entry->fd = fd;
    entry->addr = (uint64_t)(uintptr_t)into;
    entry->len = length;
    entry->off = position;
    entry->user_data = (uint64_t)(uintptr_t)tag;
    ring->slots[slot] = slot;
    __atomic_store_n(ring->tail, tail + 1, __ATOMIC_RELEASE);
    ring->prepared++;
}

unsigned ring_wait(struct ring *ring, struct ring_done *done, unsigned most)
{
    long taken = syscall(SYS_io_uring_enter, ring->fd, ring->prepared, 1, IORING_ENTER_GETEVENTS,
                         NULL, 0);
    if (taken > 0) {
        ring->prepared -= (uint32_t)taken;
    } else if (taken < 0 && errno != EINTR) {
        /* Short of memory: what is prepared stays so, for the next call. */
        struct timespec soon = {0, SOON};
        nanosleep(&soon, NULL);
    }
    uint32_t head = *ring->done_head;
    uint32_t tail = __atomic_load_n(ring->done_tail, __ATOMIC_ACQUIRE);
    unsigned count = 0;
    for (; head != tail && count < most; head++, count++) {
        const struct io_uring_cqe *result = &ring->results[head & ring->done_mask];
        done[count] = (struct ring_done){(void *)(uintptr_t)result->user_data, result->res};
    }
    __atomic_store_n(ring->done_head, head, __ATOMIC_RELEASE);
    return count;
}

void ring_free(struct ring *ring)
{
    for (unsigned i = 0; i < 3; i++) {
        if (ring->maps[i])
            munmap(ring->maps[i], ring->sizes[i]);
        ring->maps[i] = NULL;
    }
    if (ring->fd >= 0)
        close(ring->fd);
    ring->fd = -1;
}
