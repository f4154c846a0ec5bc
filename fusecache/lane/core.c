/* Looking up blocks in what Python keeps. */
#include "core.h"

/* The same factors as in core/tags.py. */
#define BLOCK_FACTOR 0x9E3779B1u
#define IMAGE_FACTOR 0x85EBCA77u
#define MOST_PROBES 4096
#define NO_SLOT UINT32_MAX

/* Python changes these arrays while we look, with plain stores in program order. Every load that
 * takes part in the argument of docs/architecture.md is one that the compiler may neither repeat
 * nor move past the next one; the processor keeps the order by itself on x86-64, and elsewhere
 * an acquire does, as far as the stores were made in order. */
#define LOAD(place) __atomic_load_n((place), __ATOMIC_ACQUIRE)

static uint32_t find(const struct core *core, uint32_t image, uint32_t block)
{
    uint32_t at = (block * BLOCK_FACTOR + image * IMAGE_FACTOR) >> core->tag_shift;
    for (unsigned probes = 0; probes < MOST_PROBES; probes++) {
        uint32_t entry = LOAD(&core->tags[at & core->tag_mask]);
        if (entry == 0)
            return NO_SLOT;
        uint32_t slot = entry - 1;
        if (slot < core->slot_count && LOAD(&core->block[slot]) == block &&
            LOAD(&core->image[slot]) == image)
            return slot;
        at++;
    }
    return NO_SLOT; /* the table changes under us */
}

static uint16_t touched(const struct core *core, uint64_t start, uint64_t stop)
{
    unsigned first = (unsigned)(start >> core->page_shift);
    unsigned last = (unsigned)((stop - 1) >> core->page_shift);
    return (uint16_t)((1u << (last + 1)) - (1u << first));
}

static bool is_marked(const struct gate *gate, uint64_t first, uint64_t last)
{
    for (unsigned i = 0; i < MARKS; i++) {
        uint32_t mark = LOAD(&gate->marks[i]);
        if (mark != NO_BLOCK && mark >= first && mark <= last)
            return true;
    }
    return false;
}

/* One block of a request: its slot and generation, with the pages in question valid. The
 * generation comes first: it changes while nothing is valid, after the tag and before the pages. */
static bool locate_block(const struct core *core, uint32_t image, uint32_t block, uint64_t start,
                         uint64_t stop, struct extent *extent)
{
    uint32_t slot = find(core, image, block);
    if (slot == NO_SLOT)
        return false;
    extent->generation = LOAD(&core->generation[slot]);
    if (LOAD(&core->block[slot]) != block || LOAD(&core->image[slot]) != image)
        return false;
    extent->pages = touched(core, start, stop);
    if ((LOAD(&core->valid[slot]) & extent->pages) != extent->pages)
        return false;
    extent->slot = slot;
    extent->position = ((uint64_t)slot << core->block_shift) + start;
    extent->length = (uint32_t)(stop - start);
    return true;
}

static bool locate(const struct core *core, uint64_t offset, uint32_t length, struct found *found)
{
    uint64_t size = UINT64_C(1) << core->block_shift;
    uint64_t end = offset + length;
    found->count = 0;
    found->length = length;
    while (offset < end) {
        uint64_t block = offset >> core->block_shift;
        uint64_t start = offset & (size - 1);
        uint64_t stop = start + (end - offset);
        if (stop > size)
            stop = size;
        if (block >= NO_BLOCK || found->count == MOST_EXTENTS)
            return false;
        if (!locate_block(core, found->image, (uint32_t)block, start, stop,
                          &found->extents[found->count]))
            return false;
        found->count++;
        offset += stop - start;
    }
    return true;
}

bool core_locate(const struct core *core, const struct gate *gate, uint64_t offset, uint32_t length,
                 struct found *found)
{
    if (!(LOAD(&gate->flags) & GATE_READS))
        return false;
    uint64_t size = LOAD(&gate->size);
    if (offset >= size || length == 0 || length > LARGEST)
        return false;
    if (length > size - offset)
        length = (uint32_t)(size - offset);
    found->image = LOAD(&gate->image);
    if (!locate(core, offset, length, found))
        return false;
    found->marked = is_marked(gate, offset >> core->block_shift,
                              (offset + length - 1) >> core->block_shift);
    return true;
}

bool core_piece(const struct found *found, uint32_t done, uint64_t *position, uint32_t *length)
{
    unsigned i = 0;
    while (i < found->count && done >= found->extents[i].length)
        done -= found->extents[i++].length;
    if (i == found->count)
        return false;
    *position = found->extents[i].position + done;
    *length = found->extents[i].length - done;
    while (++i < found->count && found->extents[i].position == *position + *length)
        *length += found->extents[i].length;
    return true;
}

bool core_unmoved(const struct core *core, const struct gate *gate, const struct found *found)
{
    __atomic_signal_fence(__ATOMIC_ACQ_REL); /* after the system call that read; see LOAD */
    for (unsigned i = 0; i < found->count; i++) {
        const struct extent *extent = &found->extents[i];
        if ((LOAD(&core->valid[extent->slot]) & extent->pages) != extent->pages ||
            LOAD(&core->generation[extent->slot]) != extent->generation)
            return false;
    }
    return (LOAD(&gate->flags) & GATE_READS) && LOAD(&gate->image) == found->image;
}

void core_touch(const struct core *core, const struct found *found)
{
    uint64_t tick = __atomic_fetch_add(core->clock, found->count, __ATOMIC_RELAXED);
    for (unsigned i = 0; i < found->count; i++)
        __atomic_store_n(&core->last_used[found->extents[i].slot], tick + i, __ATOMIC_RELAXED);
}

bool core_overwrite(const struct core *core, const struct gate *gate, uint64_t offset,
                    uint32_t length, struct found *found)
{
    uint64_t size = gate->size;
    if ((gate->flags & (GATE_READS | GATE_WRITES)) != (GATE_READS | GATE_WRITES) || length == 0 ||
        offset > size || length > size - offset)
        return false;
    found->image = gate->image;
    if (!locate(core, offset, length, found) ||
        *core->soiled_count + found->count > core->soiled_room)
        return false;
    for (unsigned i = 0; i < found->count; i++) {
        const struct extent *extent = &found->extents[i];
        if (core->pins[extent->slot] ||
            (core->dirty[extent->slot] & extent->pages) != extent->pages)
            return false;
    }
    for (unsigned i = 0; i < found->count; i++) {
        const struct extent *extent = &found->extents[i];
        uint32_t slot = extent->slot;
        core->cleaning[slot] &= (uint16_t)~extent->pages;
        if (!core->unsynced[slot])
            core->soiled[(*core->soiled_count)++] = slot;
        core->unsynced[slot] |= extent->pages;
    }
    core_touch(core, found);
    return true;
}

enum { SYNCS_BEGUN, SYNCS_GOOD, SYNCING }; /* core/gates.py has the same */

void core_sync_begins(const struct core *core)
{
    uint64_t count = *core->soiled_count;
    for (uint64_t i = 0; i < count; i++) {
        uint32_t slot = core->soiled[i];
        core->syncing[i] = slot;
        core->syncing_pages[i] = core->unsynced[slot];
        core->unsynced[slot] = 0;
    }
    *core->soiled_count = 0;
    core->syncs[SYNCING] = count;
    core->syncs[SYNCS_BEGUN]++;
}

void core_sync_worked(const struct core *core)
{
    __atomic_store_n(&core->syncs[SYNCS_GOOD], core->syncs[SYNCS_BEGUN], __ATOMIC_RELEASE);
    /* Not put off beyond the next look at a gate; see Gates.shut. */
    __atomic_exchange_n(&core->syncs[SYNCING], 0, __ATOMIC_SEQ_CST);
}
