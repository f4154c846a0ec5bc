/* What the lane shares with the core: the slot table, the tag index and the gates, all of them flat
 * buffers that Python made and that never move. See docs/architecture.md, "The lane". */
#ifndef FUSECACHE_CORE_H
#define FUSECACHE_CORE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define LARGEST (1u << 20) /* bytes of one request; the kernel's limit is 256 pages */
#define MOST_EXTENTS (LARGEST / 4096 + 1)
#define MARKS 8
#define NO_BLOCK UINT32_MAX

enum { GATE_READS = 1, GATE_WRITES = 2, GATE_SYNCS = 4 }; /* core/gates.py has the same */

/* One image that is open. 128 bytes; core/gates.py lays it out in the same way. Python writes what
 * is above the line, the lane what is below. */
struct gate {
    uint32_t flags;
    uint32_t image;
    uint64_t size;
    uint32_t marks[MARKS]; /* a hit in one of these blocks is Python's: readahead goes on there */
    uint64_t pad;
    /* ---- */
    uint64_t changes;
    uint64_t reads;
    uint64_t read_bytes;
    uint64_t ssd_reads;
    uint64_t ssd_read_bytes;
    uint64_t writes;
    uint64_t write_bytes;
    uint64_t pad2[2];
};

struct core {
    uint32_t slot_count;
    uint32_t gate_count;
    unsigned block_shift;
    unsigned page_shift;
    unsigned tag_shift;
    uint32_t tag_mask;
    uint32_t soiled_room;
    const uint32_t *tags;
    const uint32_t *image;
    const uint32_t *block;
    const uint32_t *generation;
    const uint16_t *valid;
    const uint16_t *dirty;
    uint16_t *cleaning;
    uint16_t *unsynced;
    const uint8_t *pins;
    uint64_t *last_used;
    struct gate *gates;
    uint64_t *clock;        /* the next tick of the LRU order */
    uint64_t *soiled_count; /* of soiled[]: slots that had nothing unsynced and now have */
    uint32_t *soiled;
    uint64_t *syncs; /* of the lane: how many began; the last good one; how much there is of the
                      * next two */
    uint32_t *syncing;       /* slots that the sync under way, or a failed one, is about */
    uint16_t *syncing_pages; /* of these, as masks */
};

/* A part of a request within one block. */
struct extent {
    uint64_t position; /* in slot space */
    uint32_t length;
    uint32_t slot;
    uint32_t generation;
    uint16_t pages;
};

struct found {
    unsigned count;
    uint32_t image;
    uint32_t length;
    bool marked; /* a mark lies in it */
    struct extent extents[MOST_EXTENTS];
};

/* Finds where the bytes of a read lie, cut at the end of the image. False: not simply a hit. */
bool core_locate(const struct core *core, const struct gate *gate, uint64_t offset, uint32_t length,
                 struct found *found);

/* Where the bytes from ``done`` on lie, as far as they lie in a row. False: that is all. */
bool core_piece(const struct found *found, uint32_t done, uint64_t *position, uint32_t *length);

/* Whether all that was found is still so: what was read meanwhile is what the image holds. */
bool core_unmoved(const struct core *core, const struct gate *gate, const struct found *found);

/* The slots were used. */
void core_touch(const struct core *core, const struct found *found);

/* Prepares a write over pages that are all dirty. False, and nothing is changed, for anything else.
 * Only for a caller that excludes Python (see turns.h), until its data is written. */
bool core_overwrite(const struct core *core, const struct gate *gate, uint64_t offset,
                    uint32_t length, struct found *found);

/* Notes what a sync of the device is about that comes next. Only for a caller that excludes
 * Python, and after the end of the one before. */
void core_sync_begins(const struct core *core);

/* It was good. If it was not, Python is told, and there is no other. */
void core_sync_worked(const struct core *core);

#endif
