/* The yardstick for compiled code: the least a server at /dev/fuse can do. It shows files read-only
 * below one directory and answers a read by one pread(2), or, with "-0", by zeros from memory
 * without any; no cache, no checks, nothing that is counted. Two threads unless told otherwise.
 *
 *     ceiling [-0] [-t THREADS] MOUNTPOINT FILE...
 *
 * Mounts with mount(2), so as root; ends when it is unmounted. Run by lane.py and cold.py. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include <linux/fuse.h>

#define LARGEST (1u << 20)
#define MESSAGE (LARGEST + 8192)
#define VALID 300 /* seconds that names and attributes hold */
#define FIRST 2   /* the node of the first file; 1 is the directory */
#define MOST_THREADS 64

struct served {
    const char *name;
    int fd;
    struct stat st;
};

static struct served *files;
static unsigned count;
static int fuse;
static int zeros;

static void reply(uint64_t unique, int error, const void *data, size_t size)
{
    struct fuse_out_header header = {
        .len = (uint32_t)(sizeof header + size), .error = -error, .unique = unique};
    struct iovec parts[] = {{&header, sizeof header}, {(void *)data, size}};
    if (writev(fuse, parts, size ? 2 : 1) < 0 && errno != ENOENT)
        perror("answer");
}

static struct fuse_attr attributes(uint64_t node)
{
    struct fuse_attr found = {.ino = node, .mode = S_IFDIR | 0755, .nlink = 2, .blksize = 4096};
    if (node >= FIRST) {
        const struct stat *st = &files[node - FIRST].st;
        found.mode = S_IFREG | 0444;
        found.nlink = 1;
        found.size = (uint64_t)st->st_size;
        found.blocks = (uint64_t)st->st_blocks;
        found.mtime = (uint64_t)st->st_mtime;
    }
    return found;
}

static void answer_init(const struct fuse_in_header *header, const char *body)
{
    struct fuse_init_in in;
    memcpy(&in, body, sizeof in);
    struct fuse_init_out out = {
        .major = FUSE_KERNEL_VERSION,
        .minor = 31,
        .max_readahead = in.max_readahead,
        .flags = in.flags & (FUSE_ASYNC_READ | FUSE_ASYNC_DIO | FUSE_MAX_PAGES),
        .max_background = 256,
        .congestion_threshold = 192,
        .max_write = LARGEST,
        .time_gran = 1,
        .max_pages = LARGEST / 4096,
    };
    reply(header->unique, 0, &out, sizeof out);
}

static void answer_lookup(const struct fuse_in_header *header, const char *name)
{
    for (unsigned i = 0; i < count; i++)
        if (!strcmp(files[i].name, name)) {
            struct fuse_entry_out out = {.nodeid = i + FIRST,
                                         .entry_valid = VALID,
                                         .attr_valid = VALID,
                                         .attr = attributes(i + FIRST)};
            reply(header->unique, 0, &out, sizeof out);
            return;
        }
    reply(header->unique, ENOENT, NULL, 0);
}

static void answer_read(const struct fuse_in_header *header, const char *body, char *buffer)
{
    struct fuse_read_in in;
    memcpy(&in, body, sizeof in);
    const struct served *file = &files[header->nodeid - FIRST];
    ssize_t size = in.size;
    if (!zeros)
        size = pread(file->fd, buffer, in.size, (off_t)in.offset);
    else if (in.offset + in.size > (uint64_t)file->st.st_size)
        size = in.offset < (uint64_t)file->st.st_size ? file->st.st_size - (off_t)in.offset : 0;
    if (size < 0)
        reply(header->unique, errno, NULL, 0);
    else
        reply(header->unique, 0, buffer, (size_t)size);
}

static void answer(const char *message, char *buffer)
{
    struct fuse_in_header header;
    memcpy(&header, message, sizeof header);
    const char *body = message + sizeof header;
    struct fuse_attr_out attr = {.attr_valid = VALID};
    struct fuse_open_out open = {.fh = header.nodeid};
    switch (header.opcode) {
    case FUSE_INIT:
        answer_init(&header, body);
        break;
    case FUSE_LOOKUP:
        answer_lookup(&header, body);
        break;
    case FUSE_GETATTR:
        attr.attr = attributes(header.nodeid);
        reply(header.unique, 0, &attr, sizeof attr);
        break;
    case FUSE_OPEN:
        reply(header.unique, 0, &open, sizeof open);
        break;
    case FUSE_READ:
        answer_read(&header, body, buffer);
        break;
    case FUSE_FLUSH:
    case FUSE_RELEASE:
        reply(header.unique, 0, NULL, 0);
        break;
    case FUSE_FORGET:
    case FUSE_BATCH_FORGET:
    case FUSE_INTERRUPT:
        break; /* have no answer */
    default:
        reply(header.unique, ENOSYS, NULL, 0);
    }
}

static void *serve(void *unused)
{
    char *message = aligned_alloc(4096, MESSAGE), *buffer = aligned_alloc(4096, LARGEST);
    if (!message || !buffer)
        exit(1);
    memset(buffer, 0, LARGEST);
    for (;;) {
        ssize_t size = read(fuse, message, MESSAGE);
        if (size >= (ssize_t)sizeof(struct fuse_in_header))
            answer(message, buffer);
        else if (size >= 0 || (errno != EINTR && errno != EAGAIN && errno != ENOENT))
            return unused; /* unmounted */
    }
}

static void fail(const char *what)
{
    perror(what);
    exit(1);
}

int main(int argc, char **argv)
{
    unsigned threads = 2;
    for (int option; (option = getopt(argc, argv, "0t:")) != -1;) {
        if (option == '0')
            zeros = 1;
        else if (option == 't')
            threads = (unsigned)atoi(optarg);
        else
            return 2;
    }
    if (argc - optind < 2 || threads < 1 || threads > MOST_THREADS)
        return 2;
    const char *mountpoint = argv[optind];
    count = (unsigned)(argc - optind - 1);
    files = calloc(count, sizeof *files);
    if (!files)
        fail("memory");
    for (unsigned i = 0; i < count; i++) {
        char *path = argv[optind + 1 + (int)i];
        files[i].fd = open(path, O_RDONLY);
        if (files[i].fd < 0 || fstat(files[i].fd, &files[i].st) < 0)
            fail(path);
        files[i].name = basename(path);
    }
    fuse = open("/dev/fuse", O_RDWR | O_CLOEXEC);
    char options[100];
    snprintf(options, sizeof options, "fd=%d,rootmode=40000,user_id=0,group_id=0,allow_other", fuse);
    if (fuse < 0 || mount("ceiling", mountpoint, "fuse.ceiling", MS_NOSUID | MS_NODEV, options) < 0)
        fail(mountpoint);
    pthread_t ids[MOST_THREADS];
    for (unsigned i = 0; i < threads; i++)
        if (pthread_create(&ids[i], NULL, serve, NULL) != 0)
            fail("threads");
    for (unsigned i = 0; i < threads; i++)
        pthread_join(ids[i], NULL);
    return 0;
}
