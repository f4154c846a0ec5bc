/* The guest's only program of its own: it writes and checks stamped data (tests/support/stamps.py).
 *
 *   stamper write FILE NUMBER    a file of stamps, fsynced, its directory too
 *   stamper check FILE NUMBER    that every byte of it is right
 *   stamper churn DEVICE IMAGE   writes and reads a disk at random until "stop" comes on standard
 *                                input; then checks all of it and prints the version of each page
 *
 * Statically linked, so that the guest needs no library. Exits with 1, and says what was wrong, at
 * the first byte that is.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <libgen.h>
#include <poll.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { STAMP = 512, PAGE = 4096, LARGEST = 32 * PAGE };

static unsigned char *buffer; /* LARGEST bytes, aligned for O_DIRECT */

static _Noreturn void fail(const char *format, ...)
{
    va_list values;
    va_start(values, format);
    printf("guest: WRONG: ");
    vprintf(format, values);
    printf("\n");
    va_end(values);
    exit(1);
}

static void stamp(unsigned char *at, uint32_t image, uint64_t place, uint32_t version)
{
    memcpy(at, "STAMPED!", 8);
    memcpy(at + 8, &image, 4);
    memcpy(at + 12, &place, 8);
    memcpy(at + 20, &version, 4);
    memset(at + 24, version & 0xFF, STAMP - 24);
}

static void fill(uint32_t image, uint64_t place, size_t length, uint32_t version)
{
    for (size_t at = 0; at < length; at += STAMP)
        stamp(buffer + at, image, place + at, version);
}

static void verify(const unsigned char *data, uint32_t image, uint64_t place, uint32_t version)
{
    unsigned char expected[STAMP];
    uint32_t found_image, found_version;
    uint64_t found_place;
    stamp(expected, image, place, version);
    if (memcmp(data, expected, STAMP) == 0)
        return;
    memcpy(&found_image, data + 8, 4);
    memcpy(&found_place, data + 12, 8);
    memcpy(&found_version, data + 20, 4);
    fail("image %" PRIu32 " at %" PRIu64 ": version %" PRIu32 " expected, found %.8s image %" PRIu32
         " place %" PRIu64 " version %" PRIu32,
         image, place, version, (const char *)data, found_image, found_place, found_version);
}

static void put(int fd, uint64_t place, size_t length)
{
    if (pwrite(fd, buffer, length, (off_t)place) != (ssize_t)length)
        fail("write of %zu at %" PRIu64 ": %s", length, place, strerror(errno));
}

static void get(int fd, uint64_t place, size_t length)
{
    if (pread(fd, buffer, length, (off_t)place) != (ssize_t)length)
        fail("read of %zu at %" PRIu64 ": %s", length, place, strerror(errno));
}

/* -- files --------------------------------------------------------------------------------------- */

static size_t length_of(uint32_t number)
{
    return (number % 7 + 1) * 8 * PAGE + (number % 5) * STAMP;
}

static void write_file(char *path, uint32_t number)
{
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0644);
    if (fd < 0)
        fail("%s: %s", path, strerror(errno));
    for (size_t left = length_of(number), at = 0; left > 0;) {
        size_t part = left < LARGEST ? left : LARGEST;
        fill(number, at, part, number);
        put(fd, at, part);
        at += part;
        left -= part;
    }
    int directory = open(dirname(path), O_RDONLY | O_DIRECTORY);
    if (fsync(fd) != 0 || directory < 0 || fsync(directory) != 0)
        fail("fsync of file %" PRIu32 ": %s", number, strerror(errno));
}

static void check_file(const char *path, uint32_t number)
{
    int fd = open(path, O_RDONLY);
    if (fd < 0)
        fail("%s: %s", path, strerror(errno));
    if (lseek(fd, 0, SEEK_END) != (off_t)length_of(number))
        fail("%s has another length", path);
    for (size_t at = 0; at < length_of(number); at += STAMP) {
        get(fd, at, STAMP);
        verify(buffer, number, at, number);
    }
}

/* -- a whole disk -------------------------------------------------------------------------------- */

static uint32_t random_state = 2463534242u;

static uint32_t below(uint32_t limit)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 17;
    random_state ^= random_state << 5;
    return random_state % limit;
}

static int told_to_stop(void)
{
    static char line[64];
    static size_t length;
    struct pollfd input = {.fd = 0, .events = POLLIN};
    while (length < sizeof line - 1 && poll(&input, 1, 0) == 1 && read(0, line + length, 1) == 1)
        length++;
    return strstr(line, "stop") != NULL;
}

static void check_pages(int fd, uint32_t image, const uint32_t *versions, uint32_t first,
                        uint32_t count)
{
    get(fd, (uint64_t)first * PAGE, (size_t)count * PAGE);
    for (uint32_t at = 0; at < count * PAGE; at += STAMP)
        verify(buffer + at, image, (uint64_t)first * PAGE + at, versions[first + at / PAGE]);
}

/* The versions are in the guest's memory, which migrates: what the disk shows must fit them. */
static void churn(const char *path, uint32_t image)
{
    int fd = open(path, O_RDWR | O_DIRECT);
    if (fd < 0)
        fail("%s: %s", path, strerror(errno));
    uint32_t pages = (uint32_t)(lseek(fd, 0, SEEK_END) / PAGE);
    uint32_t *versions = calloc(pages, sizeof *versions);
    const uint32_t most = LARGEST / PAGE;
    if (versions == NULL || pages < most)
        fail("%s has %" PRIu32 " pages", path, pages);
    for (uint32_t page = 0; page < pages; page++)
        versions[page] = 1; /* as the image was made */
    for (uint32_t turn = 1; !told_to_stop(); turn++) {
        uint32_t count = 1 + below(below(4) ? 4 : most);
        /* Half of all writes go to the first pages: old data would be seen soon. */
        uint32_t first = below((below(2) ? pages : 4 * most) - count);
        fill(image, (uint64_t)first * PAGE, (size_t)count * PAGE, turn + 1);
        put(fd, (uint64_t)first * PAGE, (size_t)count * PAGE);
        for (uint32_t page = first; page < first + count; page++)
            versions[page] = turn + 1;
        check_pages(fd, image, versions, below(pages - most), most);
        check_pages(fd, image, versions, below(3 * most), most);
        if (turn % 16 == 0 && fsync(fd) != 0)
            fail("fsync: %s", strerror(errno));
        if (turn % 64 == 0)
            printf("guest: turn %" PRIu32 "\n", turn);
    }
    if (fsync(fd) != 0)
        fail("fsync: %s", strerror(errno));
    for (uint32_t page = 0; page < pages; page += most)
        check_pages(fd, image, versions, page, page + most <= pages ? most : pages - page);
    for (uint32_t page = 0; page < pages; page++)
        printf("%s%" PRIx32, page % 32 ? " " : page ? "\nguest: versions " : "guest: versions ",
               versions[page]);
    printf("\nguest: all right\n");
}

int main(int argc, char **argv)
{
    if (argc != 4)
        return 2;
    setvbuf(stdout, NULL, _IOLBF, 0);
    buffer = aligned_alloc(PAGE, LARGEST);
    uint32_t number = (uint32_t)strtoul(argv[3], NULL, 10);
    if (strcmp(argv[1], "write") == 0)
        write_file(argv[2], number);
    else if (strcmp(argv[1], "check") == 0)
        check_file(argv[2], number);
    else if (strcmp(argv[1], "churn") == 0)
        churn(argv[2], number);
    else
        return 2;
    return 0;
}
