#define _GNU_SOURCE
#include "syncs.h"

#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

#include "serve.h"

#define MOST_FSYNCS 1024
#define MOST_TRIES 10 /* for a turn, each of which takes turns.c's patience */
#define PYTHONS (-1)

int syncs_make(struct syncs *syncs)
{
    pthread_mutex_init(&syncs->mutex, NULL);
    pthread_cond_init(&syncs->wanted, NULL);
    syncs->asked = calloc(MOST_FSYNCS, sizeof *syncs->asked);
    bool all = syncs->asked != NULL;
    for (unsigned i = 0; i < SYNC_THREADS; i++)
        all = (syncs->taken[i] = calloc(MOST_FSYNCS, sizeof *syncs->asked)) && all;
    return all ? 0 : ENOMEM;
}

void syncs_free(struct syncs *syncs)
{
    free(syncs->asked);
    for (unsigned i = 0; i < SYNC_THREADS; i++)
        free(syncs->taken[i]);
    pthread_cond_destroy(&syncs->wanted);
    pthread_mutex_destroy(&syncs->mutex);
}

/* Whether all that an fsync of this image has to make stable is data in the cache. */
static bool only_data(struct lane *lane, uint32_t gate)
{
    uint32_t both = GATE_READS | GATE_SYNCS;
    return (__atomic_load_n(&lane->core.gates[gate].flags, __ATOMIC_ACQUIRE) & both) == both;
}

bool syncs_take(struct lane *lane, const struct request *request)
{
    struct syncs *syncs = &lane->syncs;
    uint32_t gate = table_get(lane->handles, request->handle);
    if (gate >= lane->core.gate_count || !only_data(lane, gate))
        return false;
    pthread_mutex_lock(&syncs->mutex);
    bool taken = syncs->count < MOST_FSYNCS && syncs->file >= 0 &&
                 !__atomic_load_n(&syncs->failed, __ATOMIC_ACQUIRE);
    if (taken) {
        syncs->asked[syncs->count++] = (struct fsync){*request, gate};
        if (!syncs->under_way) /* else pass_on does */
            pthread_cond_signal(&syncs->wanted);
    }
    pthread_mutex_unlock(&syncs->mutex);
    return taken;
}

void syncs_end(struct lane *lane)
{
    pthread_mutex_lock(&lane->syncs.mutex);
    pthread_cond_broadcast(&lane->syncs.wanted);
    pthread_mutex_unlock(&lane->syncs.mutex);
}

static bool has_ended(struct lane *lane)
{
    return __atomic_load_n(&lane->ended, __ATOMIC_ACQUIRE);
}

/* Waits for fsyncs while nobody syncs, and takes all there are; 0 at the end. */
static unsigned take_all(struct lane *lane, unsigned number)
{
    struct syncs *syncs = &lane->syncs;
    pthread_mutex_lock(&syncs->mutex);
    while ((!syncs->count || syncs->under_way) && !has_ended(lane))
        pthread_cond_wait(&syncs->wanted, &syncs->mutex);
    struct fsync *all = syncs->asked;
    unsigned count = has_ended(lane) ? 0 : syncs->count;
    syncs->asked = syncs->taken[number];
    syncs->taken[number] = all;
    syncs->count = 0;
    syncs->under_way = true;
    pthread_mutex_unlock(&syncs->mutex);
    return count;
}

/* What is unsynced now is what the sync is about: if it fails that is lost (R1). */
static bool begin(struct lane *lane)
{
    for (unsigned tries = 0; tries < MOST_TRIES; tries++)
        if (turns_take(&lane->turns)) {
            core_sync_begins(&lane->core);
            turns_give(&lane->turns);
            return true;
        }
    return false;
}

/* 0, an errno, or PYTHONS. */
static int make_stable(struct lane *lane)
{
    int error;
    /* After an error the kernel says that all is well: what it could not write is forgotten. */
    if (__atomic_load_n(&lane->syncs.failed, __ATOMIC_ACQUIRE) || !begin(lane))
        return PYTHONS;
    do
        error = fdatasync(lane->syncs.file) < 0 ? errno : 0;
    while (error == EINTR);
    if (!error) {
        core_sync_worked(&lane->core);
        __atomic_fetch_add(&lane->counters.syncs, 1, __ATOMIC_RELAXED);
    }
    return error;
}

/* The sync is over: those that came meanwhile are another thread's, if one waits. */
static void pass_on(struct syncs *syncs)
{
    pthread_mutex_lock(&syncs->mutex);
    syncs->under_way = false;
    if (syncs->count)
        pthread_cond_signal(&syncs->wanted);
    pthread_mutex_unlock(&syncs->mutex);
}

static void answer(struct lane *lane, struct fsync *fsync, int error)
{
    /* Once more: when Python's sync fails it shuts the gates. */
    if (!error && only_data(lane, fsync->gate)) {
        __atomic_fetch_add(&lane->counters.fsyncs, 1, __ATOMIC_RELAXED);
        lane_reply(lane, fsync->request.unique, 0, NULL, 0);
    } else {
        fsync->request.length = error > 0 ? (uint64_t)error : 0;
        lane_queue(lane, &fsync->request, NULL);
    }
}

void syncs_run(struct lane *lane, unsigned number)
{
    unsigned count;
    while ((count = take_all(lane, number))) {
        int error = make_stable(lane);
        if (error <= 0)
            pass_on(&lane->syncs);
        for (unsigned i = 0; i < count; i++)
            answer(lane, &lane->syncs.taken[number][i], error);
        if (error > 0) { /* Python has heard of it before any other fsync is given to it */
            __atomic_store_n(&lane->syncs.failed, true, __ATOMIC_RELEASE);
            pass_on(&lane->syncs);
        }
    }
}
