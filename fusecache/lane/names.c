#define _GNU_SOURCE
#include "names.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <linux/openat2.h>

#include "lane.h"

/* The kernel sends .. when an NFS server asks it to; see store/tree.py. */
static bool leaves_its_directory(const struct request *request)
{
    return strcmp(request->data, "..") == 0 || memchr(request->data, '/', request->length);
}

bool names_find(struct lane *lane, struct request *request)
{
    /* The descriptor is Python's. It stays while the kernel asks: whoever looks something up in a
     * directory keeps it from being forgotten. */
    uint32_t directory = table_get(lane->directories, request->node);
    if (directory == UINT32_MAX || leaves_its_directory(request))
        return false;
    struct open_how how = {.flags = O_PATH | O_NOFOLLOW | O_CLOEXEC,
                           .resolve = RESOLVE_CACHED | RESOLVE_NO_XDEV};
    long found = syscall(SYS_openat2, (int)directory, request->data, &how, sizeof how);
    if (found < 0 && errno == ENOENT) {
        __atomic_fetch_add(&lane->counters.missing, 1, __ATOMIC_RELAXED);
        lane_reply(lane, request->unique, ENOENT, NULL, 0);
        return true;
    }
    if (found >= 0) {
        __atomic_fetch_add(&lane->counters.found, 1, __ATOMIC_RELAXED);
        request->detail = (uint32_t)found + 1;
    }
    return false;
}

void names_drop(const struct request *request)
{
    if (request->kind == REQUEST_LOOKUP && request->detail)
        close((int)request->detail - 1);
}
