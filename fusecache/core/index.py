"""CacheIndex: the only door to the core.

Everything the engine knows about cached blocks it asks here. Nothing in here waits, fails
half-way or looks at a clock; a change either happens whole or raises and leaves all as it was.

Invariants (checked by ``check``, which the tests call after every step):

- every slot that is not INVALID has a tag and is found under it, and no other slot is;
- a VALID slot has a valid page and no dirty one, a DIRTY one has a dirty page, a RESERVED or
  INVALID one has neither;
- a slot is free, leaving, retired, or has a tag: exactly one of them.
"""

from array import array
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fusecache.core.dirty import DirtyPages
from fusecache.core.gates import Gates
from fusecache.core.geometry import Geometry, Run
from fusecache.core.replacement import Lru
from fusecache.core.rows import U16, U32, U64, OwedRows, Rows
from fusecache.core.slots import SlotTable
from fusecache.core.states import Event, State, step
from fusecache.core.tags import TagIndex

_LAST_BLOCK = 0xFFFFFFFF
"""Block numbers have 32 bits: 16 TiB of an image with 4 KiB blocks; the rest is not cached."""
_LAST_TICK = 1 << 62


class Located(NamedTuple):
    """A block that is in the cache, as of now: compare ``generation`` after any wait."""

    slot: int
    generation: int
    valid: int


class Usage(NamedTuple):
    """What one image holds of the cache."""

    blocks: int
    pages: int


class CacheIndex:
    """Which block lies in which slot, which of its pages are valid, and who leaves next.

    Args:
        geometry: of the cache's block size.
        slot_count: how many slots the cache device has.
    """

    def __init__(self, geometry: Geometry, slot_count: int) -> None:
        self.geometry = geometry
        self.slot_count = slot_count
        self._slots = SlotTable(slot_count)
        self.gates = Gates(slot_count)
        """What the lane sees of open images."""
        self._tags = TagIndex(self._slots)
        self._policy = Lru(self._slots)
        self._clock = self.gates.clock
        self._blocks_of: dict[int, int] = {}
        self._pages_of: dict[int, int] = {}
        # A stack, lowest slot on top, so that a run of fills lies side by side on the device.
        self._free_of: U32 = np.arange(slot_count - 1, -1, -1, dtype=np.uint32)
        self._free = self._free_of.data
        self._free_count = slot_count
        self._leaving = array("I")
        self._retired: set[int] = set()
        self._owed = OwedRows(self._slots)
        self.dirty = DirtyPages(
            geometry,
            self._slots,
            self._tags.find,
            self._owed.changed,
            self._touch,
            self._invalidate,
            self._policy.returned,
            self.gates,
        )
        """What the origin has not, see ``DirtyPages``."""

    def _touch(self, slot: int) -> None:
        self._slots.last_used[slot] = tick = self._clock[0]
        self._clock[0] = tick + 1

    # -- the lane -----------------------------------------------------------------------------

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """What the lane looks into, and writes to in its turns; see ``lane/core.h``."""
        slots, gates = self._slots, self.gates
        return {
            "tags": self._tags.table_of,
            "image": slots.image_of,
            "block": slots.block_of,
            "generation": slots.generation_of,
            "valid": slots.valid_of,
            "dirty": slots.dirty_of,
            "cleaning": slots.cleaning_of,
            "unsynced": slots.unsynced_of,
            "pins": slots.pins_of,
            "last_used": slots.last_used_of,
            "gates": gates.words_of,
            "clock": gates.clock_of,
            "soiled_count": gates.soiled_count_of,
            "soiled": gates.soiled_of,
            "syncs": gates.syncs_of,
            "syncing": gates.syncing_of,
            "syncing_pages": gates.syncing_pages_of,
        }

    @property
    def tag_bits(self) -> int:
        """How many bits of a hash choose the place in ``arrays()["tags"]``."""
        return self._tags.bits

    # -- looking ------------------------------------------------------------------------------

    def hit(self, image: int, offset: int, length: int) -> list[Run] | None:
        """Where ``length`` > 0 bytes of an image lie, if every page of them is valid.

        Returns:
            Runs of bytes in slot space (slot number x block size + offset in the block), in
            order, neighbouring slots merged; None if any page is missing. Touches the slots.
        """
        geometry = self.geometry
        shift = geometry.block_shift
        block = offset >> shift
        start = offset - (block << shift)
        if start + length <= geometry.block_size:
            slot = self._tags.find(image, block)
            if slot is None:
                return None
            need = geometry.touched(start, start + length)
            slots = self._slots
            if slots.valid[slot] & need != need:
                return None
            slots.last_used[slot] = tick = self._clock[0]
            self._clock[0] = tick + 1
            return [Run((slot << shift) + start, length)]
        return self._hit_blocks(image, offset, length)

    def _hit_blocks(self, image: int, offset: int, length: int) -> list[Run] | None:
        geometry, slots, find = self.geometry, self._slots, self._tags.find
        runs: list[Run] = []
        found: list[int] = []
        begin = end = -1
        for block, start, stop in geometry.split(offset, length):
            slot = find(image, block)
            if slot is None:
                return None
            need = geometry.touched(start, stop)
            if slots.valid[slot] & need != need:
                return None
            found.append(slot)
            at = (slot << geometry.block_shift) + start
            if at != end:
                if begin >= 0:
                    runs.append(Run(begin, end - begin))
                begin = at
            end = at + stop - start
        runs.append(Run(begin, end - begin))
        for slot in found:
            self._touch(slot)
        return runs

    def valid_pages(self, image: int, block: int) -> int:
        """Mask of the block's valid pages; 0 if it is not cached."""
        slot = self._tags.find(image, block)
        return 0 if slot is None else self._slots.valid[slot]

    def locate(self, image: int, block: int) -> Located | None:
        """The slot of a block for a reader that must wait, and what to compare afterwards."""
        slot = self._tags.find(image, block)
        if slot is None:
            return None
        slots = self._slots
        self._touch(slot)
        return Located(slot, slots.generation[slot], slots.valid[slot])

    def unmoved(self, located: Located) -> bool:
        """Whether the slot has held the same block ever since ``located``."""
        return self._slots.generation[located.slot] == located.generation

    # -- storing ------------------------------------------------------------------------------

    def begin_store(self, image: int, block: int) -> int | None:
        """A slot to write pages of the block to, pinned; None if no slot is free for it.

        Ends with exactly one of ``stored`` and ``not_stored``.
        """
        slots = self._slots
        slot = self._tags.find(image, block)
        if slot is None:
            if not self._free_count or block > _LAST_BLOCK:
                return None
            slot = self._free[self._free_count - 1]
            slots.state[slot] = step(slots.state[slot], Event.RESERVE)
            self._free_count -= 1
            slots.image[slot] = image
            slots.block[slot] = block
            slots.generation[slot] = slots.generation[slot] + 1 & 0xFFFFFFFF
            self._tags.insert(slot)
            self._blocks_of[image] = self._blocks_of.get(image, 0) + 1
        slots.pins[slot] += 1
        return slot

    def stored(self, slot: int, pages: int) -> None:
        """The pages (a mask, not 0) are on the device: they are valid, and a row is owed.

        Nothing becomes valid if a reader retired the slot while it was written to.
        """
        slots = self._slots
        if slot in self._retired:
            self._unpin(slot)
            return
        slots.state[slot] = step(slots.state[slot], Event.STORE)
        slots.pins[slot] -= 1
        self._touch(slot)
        self._validate(slot, pages)

    def _validate(self, slot: int, pages: int) -> None:
        slots = self._slots
        before = slots.valid[slot]
        added = pages & ~before
        if added:
            slots.valid[slot] = before | added
            image = slots.image[slot]
            self._pages_of[image] = self._pages_of.get(image, 0) + added.bit_count()
            self._owed.changed(slot)

    def stored_dirty(self, slot: int, pages: int) -> None:
        """The pages (a mask, not 0) are on the device and the origin has them not: they are
        valid and dirty, and a row is owed unless they were. The slot stays pinned."""
        self.dirty.soil(slot, pages)
        self._validate(slot, pages)

    def unpin(self, slot: int) -> None:
        """Ends a ``begin_store`` whose pages are settled one by one; a slot without any is free."""
        slots = self._slots
        if slots.state[slot] == State.RESERVED:
            self.not_stored(slot, 0)
        else:
            self._unpin(slot)

    def _unpin(self, slot: int) -> None:
        """One pin less; a block that lost its last page while pinned goes now."""
        slots = self._slots
        slots.pins[slot] -= 1
        if slots.state[slot] != State.VALID or slots.pins[slot]:
            return
        if slots.valid[slot]:
            self._policy.returned(slot)
        else:
            self._drop(slot, Event.DROP)

    def rewritten(self, slot: int, pages: int) -> None:
        """Lost pages (a mask) that were written again as a whole can be read again."""
        self._validate(slot, pages & self._slots.dirty[slot])

    def not_stored(self, slot: int, spoiled: int) -> None:
        """The write failed; ``spoiled`` pages (a mask) may hold anything now and are invalid.

        Held pages are none of these: what is dirty never goes this way.
        """
        slots = self._slots
        slots.pins[slot] -= 1
        if slots.state[slot] == State.RESERVED:
            if slots.pins[slot]:
                return  # another one still stores there
            image = slots.image[slot]
            self._tags.remove(slot)
            slots.state[slot] = step(slots.state[slot], Event.ABORT)
            self._untag(slot, image)
            self._free[self._free_count] = slot
            self._free_count += 1
            return
        self._touch(slot)  # a pin ends with a use, or the LRU would not be exact
        self._clear(slot, spoiled)

    def clear(self, image: int, block: int, pages: int) -> None:
        """The clean ones of the pages (a mask) of the block are no longer valid; a row is owed if
        any was."""
        slot = self._tags.find(image, block)
        if slot is not None:
            self._clear(slot, pages)

    def supersede(self, image: int, block: int, pages: int) -> None:
        """The pages (a mask) go, dirty or not: the origin has newer data, synced."""
        slot = self._tags.find(image, block)
        if slot is not None:
            self.dirty.discard(slot, pages)
            self._clear(slot, pages)

    def _clear(self, slot: int, pages: int) -> None:
        slots = self._slots
        before = slots.valid[slot]
        held = slots.dirty[slot] | slots.cleaning[slot]
        lost = before & pages & ~held
        clean = slots.state[slot] == State.VALID
        if lost == before and not held and clean and not slots.pins[slot]:
            self._drop(slot, Event.DROP)
        elif lost:
            self._invalidate(slot, lost)

    def _invalidate(self, slot: int, pages: int) -> None:
        """Valid pages (a mask) are so no longer."""
        self._slots.valid[slot] &= ~pages & 0xFFFF
        self._pages_of[self._slots.image[slot]] -= pages.bit_count()
        self._owed.changed(slot)

    # -- leaving ------------------------------------------------------------------------------

    def reclaim(self, count: int) -> int:
        """Drops up to ``count`` clean blocks, least recently used first; returns how many."""
        victims = self._policy.victims(count)
        for slot in victims:
            self._drop(slot, Event.DROP)
        return len(victims)

    def slots_of(self, image: int, from_block: int = 0) -> U32:
        """The slots that hold blocks of an image at or after ``from_block``, for ``drop``."""
        slots = self._slots
        mine = (slots.image_of == image) & (slots.state_of >= State.VALID)
        if from_block:
            mine &= slots.block_of >= from_block
        return np.flatnonzero(mine).astype(np.uint32)

    def drop(self, image: int, slots: U32, *, dirty: bool) -> None:
        """Drops the blocks in these slots, but for those that left the image meanwhile.

        About 2 us each (measured): the caller hands over a large image in parts.

        Args:
            dirty: whole blocks go (R6); else held pages stay.
        """
        table = self._slots
        for slot in slots.tolist():
            if table.image[slot] != image or table.state[slot] < State.VALID:
                continue
            if not dirty:
                self._clear(slot, self.geometry.full_mask)
            else:
                self.dirty.forget(slot)
                self._drop(slot, Event.DISCARD)

    def retire(self, slot: int) -> None:
        """The slot cannot be read: what is clean in it goes, and once all has gone the slot is
        never used again."""
        self._retired.add(slot)
        if self._slots.state[slot] >= State.VALID:
            self._clear(slot, self.geometry.full_mask)

    def is_retired(self, slot: int) -> bool:
        """Whether the slot failed: nothing new is to be written to it."""
        return slot in self._retired

    def _drop(self, slot: int, event: Event) -> None:
        slots = self._slots
        state = step(slots.state[slot], event)
        image = slots.image[slot]
        self._owed.gone(image, slots.block[slot])
        self._tags.remove(slot)
        slots.state[slot] = state
        self._pages_of[image] -= slots.valid[slot].bit_count()
        self._untag(slot, image)
        self._leaving.append(slot)

    def _untag(self, slot: int, image: int) -> None:
        slots = self._slots
        slots.valid[slot] = 0
        slots.image[slot] = 0
        slots.generation[slot] = slots.generation[slot] + 1 & 0xFFFFFFFF
        self._blocks_of[image] -= 1

    # -- rows owed to the database ---------------------------------------------------------------

    @property
    def owes(self) -> bool:
        """Whether any row differs from what was last taken."""
        return bool(self._owed)

    def take_owed(self) -> Rows:
        """See ``OwedRows.take``."""
        return self._owed.take()

    def give_back_owed(self, rows: Rows) -> None:
        """See ``OwedRows.give_back``."""
        self._owed.give_back(rows)

    def take_leaving(self) -> list[int]:
        """The slots dropped since the last call; give them to ``release`` once their rows' deletion
        is stable (R3)."""
        leaving = self._leaving.tolist()
        self._leaving = array("I")
        return leaving

    def give_back_leaving(self, leaving: list[int]) -> None:
        """Undoes ``take_leaving`` when the barrier failed."""
        self._leaving = array("I", leaving) + self._leaving

    def release(self, leaving: list[int]) -> None:
        """The slots may be used again: no stable row names them any more (R3)."""
        for slot in sorted(leaving, reverse=True):
            if slot not in self._retired:
                self._free[self._free_count] = slot
                self._free_count += 1

    # -- loading and saving ----------------------------------------------------------------------

    def load(self, rows: Rows) -> None:
        """Adds rows of distinct tags and slots to an index that nothing else was done to yet.

        Raises:
            ValueError: a slot out of range or named twice, or a row without a page.
        """
        slots = self._slots
        if rows.slot.size == 0:
            return
        if int(rows.slot.max()) >= self.slot_count:
            raise ValueError("a row names a slot beyond the end of the cache device")
        if bool(slots.state_of[rows.slot].any()) or np.unique(rows.slot).size != rows.slot.size:
            raise ValueError("two rows name the same slot")
        pages = rows.valid | rows.dirty
        if not pages.all() or (pages & np.uint16(~self.geometry.full_mask & 0xFFFF)).any():
            raise ValueError("a row has no page or pages beyond its block")
        slots.state_of[rows.slot] = State.VALID
        slots.image_of[rows.slot] = rows.image
        slots.block_of[rows.slot] = rows.block
        slots.valid_of[rows.slot] = rows.valid
        slots.dirty_of[rows.slot] = rows.dirty
        self._tags.insert_many(rows.slot)
        self._count(rows)

    def _count(self, rows: Rows) -> None:
        valid, dirty = self._pages(rows.valid), self._pages(rows.dirty)
        for image in np.unique(rows.image).tolist():
            mine = rows.image == image
            blocks = int(np.count_nonzero(mine))
            self._blocks_of[image] = self._blocks_of.get(image, 0) + blocks
            self._pages_of[image] = self._pages_of.get(image, 0) + int(valid[mine].sum())
            soiled = mine & (rows.dirty != 0)
            if soiled.any():
                self.dirty.load(image, rows.slot[soiled], int(dirty[soiled].sum()))

    def _pages(self, masks: U16) -> npt.NDArray[np.uint8]:
        pages = np.zeros(masks.size, np.uint8)
        for bit in range(self.geometry.pages_per_block):
            pages += (masks >> np.uint16(bit) & np.uint16(1)).astype(np.uint8)
        return pages

    def finish_load(self, order: Iterator[tuple[int, U64]]) -> None:
        """Ends loading: ``order`` gives saved ``last_used`` ticks as (first slot, ticks)."""
        slots = self._slots
        for first, ticks in order:
            part = slots.last_used_of[first : first + ticks.size]
            part[:] = ticks[: part.size]
        # Only a damaged hint has such ticks, and the clock must be able to go on from the highest.
        slots.last_used_of[slots.last_used_of > _LAST_TICK] = 0
        self._clock[0] = int(slots.last_used_of.max(initial=np.uint64(0))) + 1
        free = np.flatnonzero(slots.state_of == State.INVALID).astype(np.uint32)
        self._free_of[: free.size] = free[::-1]
        self._free_count = int(free.size)

    def order(self, part_slots: int) -> Iterator[tuple[int, U64]]:
        """Copies of ``last_used`` as (first slot, ticks), ``part_slots`` at a time."""
        for first in range(0, self.slot_count, part_slots):
            yield first, self._slots.last_used_of[first : first + part_slots].copy()

    # -- counts ------------------------------------------------------------------------------------

    @property
    def free(self) -> int:
        """Slots that can be filled right now."""
        return self._free_count

    @property
    def leaving(self) -> int:
        """Slots that wait for a barrier before they can be filled."""
        return len(self._leaving)

    @property
    def used(self) -> int:
        """Slots with a tag."""
        return sum(self._blocks_of.values())

    @property
    def retired(self) -> int:
        """Slots taken out of use because they could not be read."""
        return len(self._retired)

    def usage(self, image: int) -> Usage:
        """Blocks and valid pages of one image."""
        return Usage(self._blocks_of.get(image, 0), self._pages_of.get(image, 0))

    def dirty_bytes(self, image: int) -> int:
        """What the origin has not of an image."""
        return self.dirty.pages(image) << self.geometry.page_shift

    def lost_ranges(self, image: int) -> list[tuple[int, int]]:
        """See ``DirtyPages.lost_ranges``."""
        return self.dirty.lost_ranges(image)

    def check(self) -> None:
        """Asserts the invariants above. Slow; for tests."""
        slots = self._slots
        tagged = np.flatnonzero(slots.state_of != State.INVALID).tolist()
        for slot in tagged:
            found = self._tags.find(slots.image[slot], slots.block[slot])
            assert found == slot, f"slot {slot} is not found under its tag"
            state, valid, dirty = slots.state[slot], slots.valid[slot], slots.dirty[slot]
            assert (valid | dirty != 0) == (state != State.RESERVED) or slots.pins[slot]
            assert (dirty != 0) == (state == State.DIRTY) or state == State.WRITEBACK
            assert not slots.cleaning[slot] or state == State.WRITEBACK
        entries = int(np.count_nonzero(self._tags.table_of))
        assert entries == len(tagged) == self.used
        free = self._free_of[: self._free_count].tolist()
        assert not set(free) & self._retired
        once = [*free, *tagged, *self._leaving]
        assert len(once) == len(set(once)), "a slot is in two places"
        for image, pages in self._pages_of.items():
            mine = slots.image_of == image
            assert pages == sum(int(v).bit_count() for v in slots.valid_of[mine].tolist())
            soiled = sum(int(d).bit_count() for d in slots.dirty_of[mine].tolist())
            assert self.dirty.pages(image) == soiled
        assert self.dirty.blocks == int(np.count_nonzero(slots.dirty_of))
