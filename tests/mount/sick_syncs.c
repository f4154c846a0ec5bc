/* Loaded before libc by a daemon under test: as long as ``hold-sync`` is in the directory that
 * FUSECACHE_FAULTS names, syncs of the cache device wait; the next one takes ``fail-sync`` away and
 * fails. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define CACHE "/cache.img"

static void name_of(char *path, size_t size, const char *what)
{
    const char *directory = getenv("FUSECACHE_FAULTS");
    snprintf(path, size, "%s/%s", directory ? directory : "", what);
}

static bool told(const char *what)
{
    char path[4096];
    name_of(path, sizeof path, what);
    return access(path, F_OK) == 0;
}

static void take_away(const char *what)
{
    char path[4096];
    name_of(path, sizeof path, what);
    if (unlink(path) != 0)
        abort();
}

static bool is_cache(int fd)
{
    char name[64], path[4096];
    snprintf(name, sizeof name, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(name, path, sizeof path - 1);
    path[size > 0 ? size : 0] = '\0';
    size_t length = strlen(path);
    return length >= strlen(CACHE) && strcmp(path + length - strlen(CACHE), CACHE) == 0;
}

int fdatasync(int fd)
{
    int (*real)(int) = (int (*)(int))dlsym(RTLD_NEXT, "fdatasync");
    if (is_cache(fd)) {
        while (told("hold-sync"))
            usleep(2000);
        if (told("fail-sync")) {
            take_away("fail-sync");
            errno = EIO;
            return -1;
        }
    }
    return real(fd);
}
