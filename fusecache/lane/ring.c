#define _GNU_SOURCE
#include "ring.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <linux/io_uring.h>

#define SOON 1000000 /* ns */
#define MANY 4096
#define COMMAND_AT 48 /* in an entry of 128 bytes */

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
    ring->shift = params->flags & IORING_SETUP_SQE128 ? 7 : 6;
    ring->entries = map(ring, 2, (size_t)params->sq_entries << ring->shift, IORING_OFF_SQES);
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

static int make(struct ring *ring, unsigned room, struct io_uring_params params)
{
    memset(ring, 0, sizeof *ring);
    ring->fd = (int)syscall(SYS_io_uring_setup, room, &params);
    if (ring->fd < 0)
        return errno;
    ring->room = params.sq_entries;
    if (map_all(ring, &params))
        return 0;
    ring_free(ring);
    return ENOMEM;
}

int ring_make(struct ring *ring, unsigned room)
{
    /* Completions are worked off by the one thread when it waits for them, and interrupt nobody. */
    struct io_uring_params params = {.flags = IORING_SETUP_R_DISABLED |
                                              IORING_SETUP_SINGLE_ISSUER |
                                              IORING_SETUP_DEFER_TASKRUN};
    return make(ring, room, params);
}

int ring_make_for_commands(struct ring *ring, unsigned room)
{
    /* Requests may come faster than they are looked at. */
    struct io_uring_params params = {.flags = IORING_SETUP_SQE128 | IORING_SETUP_COOP_TASKRUN |
                                              IORING_SETUP_CQSIZE,
                                     .cq_entries = MANY};
    return make(ring, room, params);
}

bool ring_enter(struct ring *ring)
{
    return syscall(SYS_io_uring_register, ring->fd, IORING_REGISTER_ENABLE_RINGS, NULL, 0) == 0 &&
           syscall(SYS_io_uring_enter, ring->fd, 0, 0, 0, NULL, 0) == 0;
}

bool ring_is_cut(const struct ring *ring)
{
    return __atomic_load_n(&ring->cut, __ATOMIC_ACQUIRE);
}

/* Waits until so many calls are done. */
static void start(struct ring *ring, unsigned done)
{
    if (ring_is_cut(ring))
        return;
    long taken = syscall(SYS_io_uring_enter, ring->fd, ring->prepared, done, IORING_ENTER_GETEVENTS,
                         NULL, 0);
    if (taken > 0) {
        ring->prepared -= (uint32_t)taken;
    } else if (taken < 0 && errno != EINTR) {
        /* Short of memory: what is prepared stays so, for the next call. */
        struct timespec soon = {0, SOON};
        nanosleep(&soon, NULL);
    }
}

static struct io_uring_sqe *next_entry(struct ring *ring)
{
    while (ring->prepared == ring->room && !ring_is_cut(ring))
        start(ring, 0);
    uint32_t slot = *ring->tail & ring->mask;
    struct io_uring_sqe *entry = (void *)(ring->entries + ((size_t)slot << ring->shift));
    memset(entry, 0, (size_t)1 << ring->shift);
    ring->slots[slot] = slot;
    return entry;
}

static void prepared(struct ring *ring)
{
    __atomic_store_n(ring->tail, *ring->tail + 1, __ATOMIC_RELEASE);
    ring->prepared++;
}

void ring_read(struct ring *ring, int fd, void *into, uint32_t length, uint64_t position,
               void *tag)
{
    struct io_uring_sqe *entry = next_entry(ring);
    entry->opcode = IORING_OP_READ;
    entry->fd = fd;
    entry->addr = (uint64_t)(uintptr_t)into;
    entry->len = length;
    entry->off = position;
    entry->user_data = (uint64_t)(uintptr_t)tag;
    prepared(ring);
}

void ring_command(struct ring *ring, int fd, uint32_t command, const void *own, size_t own_size,
                  const void *address, uint32_t length, void *tag)
{
    struct io_uring_sqe *entry = next_entry(ring);
    entry->opcode = IORING_OP_URING_CMD;
    entry->fd = fd;
    entry->off = command; /* its lower half is cmd_op */
    entry->addr = (uint64_t)(uintptr_t)address;
    entry->len = length;
    entry->user_data = (uint64_t)(uintptr_t)tag;
    memcpy((char *)entry + COMMAND_AT, own, own_size);
    prepared(ring);
}

void ring_start(struct ring *ring)
{
    if (ring->prepared)
        start(ring, 0);
}

void ring_cut(struct ring *ring, int nowhere)
{
    __atomic_store_n(&ring->cut, true, __ATOMIC_SEQ_CST);
    /* Who holds the ring are its descriptor and its maps; its thread finds zeros in their place. */
    for (unsigned i = 0; i < 3; i++)
        if (ring->maps[i])
            mmap(ring->maps[i], ring->sizes[i], PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    if (ring->fd >= 0)
        while (dup3(nowhere, ring->fd, O_CLOEXEC) < 0 && (errno == EINTR || errno == EBUSY))
            ;
}

unsigned ring_wait(struct ring *ring, struct ring_done *done, unsigned most)
{
    start(ring, 1);
    uint32_t head = *ring->done_head;
    uint32_t tail = __atomic_load_n(ring->done_tail, __ATOMIC_ACQUIRE);
    unsigned count = 0;
    if (ring_is_cut(ring))
        return 0;
    for (; head != tail && count < most; head++) {
        const struct io_uring_cqe *result = &ring->results[head & ring->done_mask];
        if (result->user_data) /* else it was cut just now */
            done[count++] = (struct ring_done){(void *)(uintptr_t)result->user_data, result->res};
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

int bell_make(struct bell *bell)
{
    bell->armed = false;
    bell->fd = eventfd(0, EFD_CLOEXEC);
    return bell->fd < 0 ? errno : 0;
}

void bell_ring(struct bell *bell)
{
    uint64_t one = 1;
    while (write(bell->fd, &one, sizeof one) < 0 && errno == EINTR)
        ;
}

void bell_arm(struct bell *bell, struct ring *ring)
{
    if (!bell->armed)
        ring_read(ring, bell->fd, &bell->count, sizeof bell->count, 0, bell);
    bell->armed = true;
}

void bell_free(struct bell *bell)
{
    if (bell->fd >= 0)
        close(bell->fd);
}
