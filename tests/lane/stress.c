/* One process of the stress test: reads stamped images and checks every byte, or changes them.
 *
 * usage: stress ROLE DIRECTORY SHARED SEED
 *
 * SHARED is a file that all of them map. For each page of each image it has two versions: the one
 * that a write has begun to bring, and the one that was surely brought. Whatever is read lies
 * between the second as of before the read and the first as of after it. Even versions are
 * stamps of tests/support/stamps.py, odd ones zeros or the end of the file. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define IMAGES 8
#define PAGES 2048 /* of an image: 8 MiB */
#define PAGE 4096
#define STAMP 512
#define MOST 32 /* pages of one call */
#define HOT 96  /* pages of an image that are read most */

/* Images by number: what happens to them. */
enum { WRITTEN = 3, BUFFERED = 4, CUT = 5, OUTSIDE = 7 }; /* the last one of each kind; 8: nothing */

struct version {
    uint32_t begun, done;
};

struct shared {
    uint32_t stop, failed;
    uint32_t round, opened, closed; /* all close their files when round grows, see Python */
    uint32_t pad;
    uint64_t pages_read, pages_written;
    struct version versions[IMAGES + 1][PAGES];
};

struct stamp {
    char magic[8];
    uint32_t image;
    uint64_t offset;
    uint32_t version;
} __attribute__((packed));

static struct shared *shared;
static const char *directory;
static uint64_t state;
static int files[IMAGES + 1];
static const char *maps[IMAGES + 1];
static uint32_t at_open[IMAGES + 1][PAGES];
static uint32_t my_round;

#define GET(place) __atomic_load_n(&(place), __ATOMIC_SEQ_CST)
#define SET(place, value) __atomic_store_n(&(place), (value), __ATOMIC_SEQ_CST)
#define ADD(place, value) __atomic_fetch_add(&(place), (value), __ATOMIC_SEQ_CST)

static void fail(const char *format, ...)
{
    va_list words;
    va_start(words, format);
    vprintf(format, words);
    va_end(words);
    printf("\n");
    SET(shared->failed, 1);
    SET(shared->stop, 1);
    exit(1);
}

static uint32_t chance(uint32_t below)
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (uint32_t)((state >> 11) % below);
}

static uint64_t hot_page(unsigned image)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
    uint64_t window = ((uint64_t)now.tv_sec / 2 + image) * 977 % (PAGES - HOT);
    return chance(200) ? window + chance(HOT) : chance(PAGES);
}

static void make_stamp(char *into, unsigned image, uint64_t offset, uint32_t version)
{
    struct stamp stamp = {"STAMPED!", image, offset, version};
    memset(into, (int)(version & 0xFF), STAMP);
    memcpy(into, &stamp, sizeof stamp);
}

static void make_stamps(char *into, unsigned image, uint64_t page, uint32_t version)
{
    for (unsigned at = 0; at < PAGE; at += STAMP)
        make_stamp(into + at, image, page * PAGE + at, version);
}

/* -- checking ---------------------------------------------------------------------------------- */

static bool is_zero(const char *data)
{
    static const char zeros[STAMP];
    return memcmp(data, zeros, STAMP) == 0;
}

/* As a write over zeros may leave it that is under way. */
static bool is_partly(const char *data, unsigned image, uint64_t offset, uint32_t version)
{
    char stamp[STAMP];
    unsigned at = 0;
    make_stamp(stamp, image, offset, version);
    while (at < STAMP && (!data[at] || data[at] == stamp[at]))
        at++;
    return at == STAMP;
}

/* Only while a write is under way may a stamp be made of several versions. */
static void check_stamp(const char *data, unsigned image, uint64_t offset, uint32_t low,
                        uint32_t high, const char *how)
{
    struct stamp stamp;
    if ((low & 1 || high > low) && is_zero(data))
        return;
    if (low & 1 && high == low + 1 && is_partly(data, image, offset, high))
        return;
    memcpy(&stamp, data, sizeof stamp);
    if (memcmp(stamp.magic, "STAMPED!", 8) == 0 && stamp.image == image &&
        stamp.offset == offset && stamp.version >= low && stamp.version <= high) {
        unsigned at = sizeof stamp;
        while (at < STAMP && (uint8_t)((uint8_t)data[at] - low) <= high - low)
            at++;
        if (at == STAMP)
            return;
    }
    if (image == CUT && high - low > 1)
        return; /* cut and written again meanwhile: parts of it may be zeros */
    fail("%s: image %u at %llu, version %u to %u: found %.8s image %u at %llu version %u, then %02x",
         how, image, (unsigned long long)offset, low, high, stamp.magic, stamp.image,
         (unsigned long long)stamp.offset, stamp.version, (uint8_t)data[STAMP - 1]);
}

static void check(const char *data, ssize_t got, unsigned image, uint64_t page, unsigned count,
                  const uint32_t *low, const char *how)
{
    for (unsigned i = 0; i < count; i++) {
        uint32_t high = GET(shared->versions[image][page + i].begun);
        if ((ssize_t)((i + 1) * PAGE) > got) {
            if (got < 0 || (!(low[i] & 1) && high == low[i]))
                fail("%s: image %u page %llu version %u to %u: only %zd bytes, errno %d", how,
                     image, (unsigned long long)page, low[i], high, got, errno);
            continue;
        }
        for (unsigned at = 0; at < PAGE; at += STAMP)
            check_stamp(data + i * PAGE + at, image, (page + i) * PAGE + at, low[i], high, how);
    }
    ADD(shared->pages_read, count);
}

/* -- files ------------------------------------------------------------------------------------- */

static void close_all(void)
{
    for (unsigned image = 1; image <= IMAGES; image++) {
        if (maps[image])
            munmap((void *)maps[image], (size_t)PAGES * PAGE);
        if (files[image] >= 0)
            close(files[image]);
        maps[image] = NULL;
        files[image] = -1;
    }
}

/* False at the end. */
static bool go_on(void)
{
    if (GET(shared->round) != my_round) {
        my_round = GET(shared->round);
        close_all();
        ADD(shared->closed, 1);
        while (GET(shared->opened) != my_round && !GET(shared->stop))
            usleep(1000);
    }
    return !GET(shared->stop);
}

static int file_of(unsigned image, int flags)
{
    char path[4096];
    if (files[image] >= 0)
        return files[image];
    for (unsigned page = 0; page < PAGES; page++)
        at_open[image][page] = GET(shared->versions[image][page].done);
    snprintf(path, sizeof path, "%s/%u.img", directory, image);
    if ((files[image] = open(path, flags | O_CLOEXEC)) < 0)
        fail("open %s: errno %d", path, errno);
    return files[image];
}

static void close_one(unsigned image)
{
    if (maps[image])
        munmap((void *)maps[image], (size_t)PAGES * PAGE);
    maps[image] = NULL;
    if (files[image] >= 0)
        close(files[image]);
    files[image] = -1;
}

/* -- roles ------------------------------------------------------------------------------------- */

static void read_all(const char *how, int flags, bool mapped)
{
    char *buffer;
    uint32_t low[MOST];
    if (posix_memalign((void **)&buffer, PAGE, (size_t)MOST * PAGE))
        abort();
    while (go_on()) {
        unsigned image = 1 + chance(IMAGES);
        if (mapped && image == CUT)
            continue; /* a SIGBUS */
        /* The kernel unlocks a page that is written before it sends the write. If the page is
         * invalidated then (at an open, by new attributes, by an evict) and read again before the
         * write is done, the kernel keeps what was read: with the lane and without. */
        if (!(flags & O_DIRECT) && image == BUFFERED)
            continue;
        if (chance(3000) == 0)
            close_one(image);
        int fd = file_of(image, flags);
        uint64_t page = hot_page(image);
        unsigned count = chance(20) ? 1 : 1 + chance(MOST);
        if (count > PAGES - page)
            count = (unsigned)(PAGES - page);
        for (unsigned i = 0; i < count; i++) /* others may change it only before the next open */
            low[i] = image > CUT ? at_open[image][page + i]
                                 : GET(shared->versions[image][page + i].done);
        ssize_t got = (ssize_t)count * PAGE;
        if (mapped) {
            if (!maps[image]) {
                maps[image] = mmap(NULL, (size_t)PAGES * PAGE, PROT_READ, MAP_SHARED, fd, 0);
                if (maps[image] == MAP_FAILED)
                    fail("mmap: errno %d", errno);
            }
            memcpy(buffer, maps[image] + page * PAGE, (size_t)got);
        } else {
            got = pread(fd, buffer, (size_t)got, (off_t)(page * PAGE));
        }
        check(buffer, got, image, page, count, low, how);
        if (!(flags & O_DIRECT))
            usleep(200); /* mostly from the kernel's pages, at the cost of those who ask the lane */
    }
}

static void put(int fd, char *buffer, unsigned image, uint64_t page, unsigned count, uint32_t add)
{
    struct version *versions = shared->versions[image] + page;
    for (unsigned i = 0; i < count; i++) {
        SET(versions[i].begun, (versions[i].done + add) & ~1u);
        make_stamps(buffer + i * PAGE, image, page + i, versions[i].begun);
    }
    ssize_t put = pwrite(fd, buffer, (size_t)count * PAGE, (off_t)(page * PAGE));
    if (put != (ssize_t)count * PAGE)
        fail("write of image %u: %zd, errno %d", image, put, errno);
    for (unsigned i = 0; i < count; i++)
        SET(versions[i].done, versions[i].begun);
    ADD(shared->pages_written, count);
}

static char *new_buffer(void)
{
    char *buffer;
    if (posix_memalign((void **)&buffer, PAGE, (size_t)MOST * PAGE))
        abort();
    return buffer;
}

static void sync_now(int fd)
{
    if (fsync(fd))
        fail("fsync: errno %d", errno);
}

static void write_all(unsigned first, unsigned last, int flags, unsigned pause)
{
    char *buffer = new_buffer();
    while (go_on()) {
        unsigned image = first + chance(last - first + 1);
        if (chance(2000) == 0)
            close_one(image);
        int fd = file_of(image, O_RDWR | flags);
        uint64_t page = hot_page(image);
        unsigned count = chance(10) ? 1 : 1 + chance(16);
        if (count > PAGES - page)
            count = (unsigned)(PAGES - page);
        put(fd, buffer, image, page, count, 2);
        if (chance(100) == 0) { /* the second one is the lane's, if nobody else writes meanwhile */
            sync_now(fd);
            put(fd, buffer, image, page, count, 2);
            sync_now(fd);
        }
        usleep(pause);
    }
}

static void cut_all(void)
{
    char *buffer = new_buffer();
    while (go_on()) {
        struct version *versions = shared->versions[CUT];
        int fd = file_of(CUT, O_RDWR | O_DIRECT);
        uint64_t from = chance(4) ? hot_page(CUT) : chance(PAGES);
        for (uint64_t page = from; page < PAGES; page++)
            SET(versions[page].begun, versions[page].done | 1);
        if (ftruncate(fd, (off_t)(from * PAGE)))
            fail("truncate: errno %d", errno);
        if (chance(2) && ftruncate(fd, (off_t)PAGES * PAGE))
            fail("extend: errno %d", errno);
        for (uint64_t page = from; page < PAGES; page++)
            SET(versions[page].done, versions[page].begun);
        usleep(10000);
        for (unsigned times = chance(40); times && go_on(); times--) {
            uint64_t page = hot_page(CUT);
            put(file_of(CUT, O_RDWR | O_DIRECT), buffer, CUT, page, 1,
                versions[page].done & 1 ? 1 : 2);
            usleep(1000);
        }
    }
}

int main(int count, char **words)
{
    int fd = count == 5 ? open(words[3], O_RDWR | O_CLOEXEC) : -1;
    if (fd < 0)
        return 2;
    shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (shared == MAP_FAILED)
        return 2;
    directory = words[2];
    state = strtoull(words[4], NULL, 10) * 0x9E3779B97F4A7C15u + 1;
    my_round = GET(shared->round);
    for (unsigned image = 0; image <= IMAGES; image++)
        files[image] = -1;
    const char *role = words[1];
    if (!strcmp(role, "direct"))
        read_all(role, O_RDONLY | O_DIRECT, false);
    else if (!strcmp(role, "buffered"))
        read_all(role, O_RDONLY, false);
    else if (!strcmp(role, "mapped"))
        read_all(role, O_RDONLY, true);
    else if (!strcmp(role, "write"))
        write_all(1, WRITTEN, O_DIRECT, 300);
    else if (!strcmp(role, "write-buffered"))
        write_all(BUFFERED, BUFFERED, 0, 1000);
    else if (!strcmp(role, "outside"))
        write_all(CUT + 1, OUTSIDE, 0, 20000);
    else if (!strcmp(role, "cut"))
        cut_all();
    else
        return 2;
    close_all();
    return 0;
}
