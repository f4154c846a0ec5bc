#include "turns.h"

#include <time.h>

#define PATIENCE 300000 /* nanoseconds: several times what one round of the event loop takes */

void turns_init(struct turns *turns)
{
    pthread_condattr_t steady;
    pthread_condattr_init(&steady);
    pthread_condattr_setclock(&steady, CLOCK_MONOTONIC);
    pthread_mutex_init(&turns->mutex, NULL);
    pthread_cond_init(&turns->lane, &steady);
    pthread_cond_init(&turns->python, NULL);
    pthread_condattr_destroy(&steady);
    turns->lane_in = turns->python_waits = false;
    turns->python_in = true;
}

void turns_destroy(struct turns *turns)
{
    pthread_cond_destroy(&turns->python);
    pthread_cond_destroy(&turns->lane);
    pthread_mutex_destroy(&turns->mutex);
}

bool turns_take(struct turns *turns)
{
    bool taken = true;
    pthread_mutex_lock(&turns->mutex);
    if (turns->lane_in || turns->python_in || turns->python_waits) {
        struct timespec until;
        clock_gettime(CLOCK_MONOTONIC, &until);
        until.tv_nsec += PATIENCE;
        if (until.tv_nsec >= 1000000000) {
            until.tv_nsec -= 1000000000;
            until.tv_sec++;
        }
        while (taken && (turns->lane_in || turns->python_in || turns->python_waits))
            taken = pthread_cond_timedwait(&turns->lane, &turns->mutex, &until) == 0;
        if (!taken)
            taken = !(turns->lane_in || turns->python_in || turns->python_waits);
    }
    if (taken)
        turns->lane_in = true;
    pthread_mutex_unlock(&turns->mutex);
    return taken;
}

void turns_give(struct turns *turns)
{
    pthread_mutex_lock(&turns->mutex);
    turns->lane_in = false;
    pthread_cond_signal(turns->python_waits ? &turns->python : &turns->lane);
    pthread_mutex_unlock(&turns->mutex);
}

bool turns_try_enter(struct turns *turns)
{
    pthread_mutex_lock(&turns->mutex);
    bool entered = !turns->lane_in;
    if (entered)
        turns->python_in = true;
    pthread_mutex_unlock(&turns->mutex);
    return entered;
}

void turns_enter(struct turns *turns)
{
    pthread_mutex_lock(&turns->mutex);
    turns->python_waits = true;
    while (turns->lane_in)
        pthread_cond_wait(&turns->python, &turns->mutex);
    turns->python_waits = false;
    turns->python_in = true;
    pthread_mutex_unlock(&turns->mutex);
}

void turns_leave(struct turns *turns)
{
    pthread_mutex_lock(&turns->mutex);
    turns->python_in = false;
    pthread_cond_broadcast(&turns->lane);
    pthread_mutex_unlock(&turns->mutex);
}
