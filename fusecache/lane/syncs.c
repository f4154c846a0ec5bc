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
    bool all = true;
    for (unsigned i = 0; i < SYNC_BATCHES; i++)
        all = (syncs->batches[i].fsyncs = calloc(MOST_FSYNCS, sizeof(struct fsync))) && all;
    return all ? 0 : ENOMEM;
}

void syncs_free(struct syncs *syncs)
{
    for (unsigned i = 0; i < SYNC_BATCHES; i++)
        free(syncs->batches[i].fsyncs);
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
    struct batch *asked = &syncs->batches[ASKED];
    bool taken = asked->count < MOST_FSYNCS && syncs->file >= 0 &&
                 !__atomic_load_n(&syncs->failed, __ATOMIC_ACQUIRE);
    if (taken) {
        asked->fsyncs[asked->count++] = (struct fsync){*request, gate};
        if (!syncs->under_way) /* else end_sync does */
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

static void swap(struct batch *one, struct batch *other)
{
    struct batch kept = *one;
    *one = *other;
    *other = kept;
}

enum task { WAIT, SYNC, ANSWER, END };

static enum task what_to_do(struct lane *lane)
{
    const struct syncs *syncs = &lane->syncs;
    bool ended = has_ended(lane);
    if (syncs->batches[ASKED].count && !syncs->under_way && !ended)
        return SYNC;
    if (syncs->batches[STABLE].count)
        return ANSWER;
    return ended ? END : WAIT;
}

/* Waits until there is something to do for a thread: it has *mine then, which was empty. */
static enum task next_task(struct lane *lane, struct batch *mine)
{
    struct syncs *syncs = &lane->syncs;
    enum task task;
    pthread_mutex_lock(&syncs->mutex);
    while ((task = what_to_do(lane)) == WAIT) {
        syncs->idle++;
        pthread_cond_wait(&syncs->wanted, &syncs->mutex);
        syncs->idle--;
    }
    if (task == SYNC) {
        syncs->under_way = true;
        swap(mine, &syncs->batches[ASKED]);
    } else if (task == ANSWER) {
        swap(mine, &syncs->batches[STABLE]);
    }
    pthread_mutex_unlock(&syncs->mutex);
    return task;
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

/* The sync is over. If there is another one to do, the thread does it at once, after a good one,
 * and leaves *mine to one that is idle: the device should not wait while answers are given. */
static void end_sync(struct syncs *syncs, struct batch *mine, bool good)
{
    struct batch *asked = &syncs->batches[ASKED], *stable = &syncs->batches[STABLE];
    pthread_mutex_lock(&syncs->mutex);
    syncs->under_way = false;
    if (asked->count) {
        if (good && syncs->idle && !stable->count)
            swap(mine, stable);
        pthread_cond_signal(&syncs->wanted);
    }
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

static void answer_all(struct lane *lane, struct batch *mine, int error)
{
    for (unsigned i = 0; i < mine->count; i++)
        answer(lane, &mine->fsyncs[i], error);
    mine->count = 0;
}

void syncs_run(struct lane *lane, unsigned number)
{
    struct batch *mine = &lane->syncs.batches[TAKEN + number];
    enum task task;
    while ((task = next_task(lane, mine)) != END) {
        int error = 0;
        if (task == SYNC) {
            error = make_stable(lane);
            if (error > 0) { /* Python hears of it before any other fsync is given to it */
                answer_all(lane, mine, error);
                __atomic_store_n(&lane->syncs.failed, true, __ATOMIC_RELEASE);
            }
            end_sync(&lane->syncs, mine, error == 0);
        }
        answer_all(lane, mine, error);
    }
}
