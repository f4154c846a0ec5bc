/* Whose turn it is to change the core: Python's, from when its event loop has something to do until
 * it waits again, or that of one writer of the lane. */
#ifndef FUSECACHE_TURNS_H
#define FUSECACHE_TURNS_H

#include <pthread.h>
#include <stdbool.h>

struct turns {
    pthread_mutex_t mutex;
    pthread_cond_t lane;
    pthread_cond_t python;
    bool lane_in;
    bool python_in;
    bool python_waits;
};

/* Python has the first turn. */
void turns_init(struct turns *turns);
void turns_destroy(struct turns *turns);

/* A writer's turn; false if Python had it for too long, and then it has to do the work. */
bool turns_take(struct turns *turns);
void turns_give(struct turns *turns);

/* Python's turn. It goes first; a writer's lasts for one write into memory. turns_try_enter does
 * not wait. */
bool turns_try_enter(struct turns *turns);
void turns_enter(struct turns *turns);
void turns_leave(struct turns *turns);

#endif
