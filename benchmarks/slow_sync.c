/* Loaded before libc by a fusecache on an SSD whose sync takes longer: by SLOW_SYNC_MS, of the file
 * SLOW_SYNC_OF. A disk that is a file on another disk may sync in 0.1 ms; many SSDs without a
 * power-safe write cache take 0.5 to 2 ms. Run by writes.py. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int is_late(int fd)
{
    char name[64], path[4096];
    const char *late = getenv("SLOW_SYNC_OF");
    snprintf(name, sizeof name, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(name, path, sizeof path - 1);
    path[size > 0 ? size : 0] = '\0';
    return late && strcmp(path, late) == 0;
}

int fdatasync(int fd)
{
    int (*real)(int) = (int (*)(int))dlsym(RTLD_NEXT, "fdatasync");
    const char *ms = getenv("SLOW_SYNC_MS");
    if (ms && is_late(fd))
        usleep((useconds_t)(atof(ms) * 1e3));
    return real(fd);
}
