#define _GNU_SOURCE
#include "attributes.h"

#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <time.h>

#include "lane.h"

#define OVERTAKING 200000u /* ns; see fuse/operations.py */

/* -- the moment after a question --------------------------------------------------------------- */

static void hold(struct lane *lane, uint32_t gate)
{
    if (gate < lane->core.gate_count)
        __atomic_store_n(&lane->held_until[gate], now_ns() + OVERTAKING, __ATOMIC_RELAXED);
}

static uint64_t *question_of(struct lane *lane, uint64_t unique)
{
    return &lane->questions[unique / 2 % HANDLES];
}

void attributes_told(struct lane *lane, uint64_t unique)
{
    uint64_t *asked = question_of(lane, unique);
    uint64_t question = __atomic_load_n(asked, __ATOMIC_RELAXED);
    if (question && question >> 16 == (unique & 0xFFFFFFFFFFFF)) {
        hold(lane, (uint32_t)(question & 0xFFFF) - 1);
        __atomic_store_n(asked, 0, __ATOMIC_RELAXED);
    }
}

bool attributes_overtake(struct lane *lane, uint32_t gate, bool may_wait)
{
    if (!__atomic_load_n(&lane->held_until[gate], __ATOMIC_RELAXED))
        return true;
    uint64_t until = __atomic_exchange_n(&lane->held_until[gate], 0, __ATOMIC_RELAXED);
    uint64_t now = now_ns();
    if (until > now && until - now <= OVERTAKING) {
        struct timespec rest = {0, (long)(until - now)};
        if (!may_wait)
            return false;
        nanosleep(&rest, NULL);
    }
    return true;
}

/* -- answers ----------------------------------------------------------------------------------- */

void attributes_keep(struct lane *lane, const struct told *told)
{
    pthread_mutex_lock(&lane->mutex);
    lane->told[told->node % HANDLES] = *told;
    pthread_mutex_unlock(&lane->mutex);
}

void attributes_drop(struct lane *lane, uint64_t node)
{
    struct told *told = &lane->told[node % HANDLES];
    pthread_mutex_lock(&lane->mutex);
    if (told->node == node)
        told->node = 0;
    pthread_mutex_unlock(&lane->mutex);
}

/* As fuse/attributes.py packs them. */
static struct fuse_attr packed(uint64_t node, const struct stat *st)
{
    return (struct fuse_attr){
        .ino = node,
        .size = (uint64_t)st->st_size,
        .blocks = (uint64_t)st->st_blocks,
        .atime = (uint64_t)st->st_atim.tv_sec,
        .mtime = (uint64_t)st->st_mtim.tv_sec,
        .ctime = (uint64_t)st->st_ctim.tv_sec,
        .atimensec = (uint32_t)st->st_atim.tv_nsec,
        .mtimensec = (uint32_t)st->st_mtim.tv_nsec,
        .ctimensec = (uint32_t)st->st_ctim.tv_nsec,
        .mode = st->st_mode,
        .nlink = (uint32_t)st->st_nlink,
        .uid = st->st_uid,
        .gid = st->st_gid,
        .rdev = (uint32_t)st->st_rdev,
        .blksize = (uint32_t)st->st_blksize,
    };
}

/* The descriptor stays while the kernel asks, as those of directories do; see names.c. */
static bool was_told(struct lane *lane, uint64_t node, struct told *told)
{
    pthread_mutex_lock(&lane->mutex);
    *told = lane->told[node % HANDLES];
    pthread_mutex_unlock(&lane->mutex);
    return told->node == node;
}

bool attributes_tell(struct lane *lane, const struct request *request)
{
    uint32_t gate = table_get(lane->nodes, request->node);
    struct told told;
    struct stat st;
    if (was_told(lane, request->node, &told) && fstat(told.fd, &st) == 0) {
        struct fuse_attr now = packed(request->node, &st);
        bool same = memcmp(&now, &told.answer.attr, sizeof now) == 0;
        if (same || S_ISDIR(st.st_mode)) {
            told.answer.attr = now;
            __atomic_fetch_add(&lane->counters.told, 1, __ATOMIC_RELAXED);
            hold(lane, gate);
            lane_reply(lane, request->unique, 0, &told.answer, sizeof told.answer);
            return true;
        }
    }
    if (gate < lane->core.gate_count)
        __atomic_store_n(question_of(lane, request->unique), request->unique << 16 | (gate + 1),
                         __ATOMIC_RELAXED);
    return false;
}

bool attributes_space(struct lane *lane, const struct request *request)
{
    struct told told;
    struct statvfs st;
    if (request->node != FUSE_ROOT_ID || !was_told(lane, FUSE_ROOT_ID, &told) ||
        fstatvfs(told.fd, &st))
        return false;
    struct fuse_statfs_out space = {.st = {.blocks = st.f_blocks,
                                           .bfree = st.f_bfree,
                                           .bavail = st.f_bavail,
                                           .files = st.f_files,
                                           .ffree = st.f_ffree,
                                           .bsize = (uint32_t)st.f_bsize,
                                           .namelen = (uint32_t)st.f_namemax,
                                           .frsize = (uint32_t)st.f_frsize}};
    __atomic_fetch_add(&lane->counters.told, 1, __ATOMIC_RELAXED);
    lane_reply(lane, request->unique, 0, &space, sizeof space);
    return true;
}
