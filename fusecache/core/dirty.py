"""DirtyPages: the pages that the cache has and the origin has not, and how they become clean.

Each page of a slot is in one of these conditions, told by two bits:

    dirty  cleaning
      0       0      clean (or not valid)
      1       0      dirty
      1       1      dirty, taken by a writeback and not written again since
      0       1      settling: the origin has it, synced; the row that says so is not stable yet

Whatever is dirty or settling is *held*: a stable row may say that it is dirty, and would bring
the slot's data back after a power cut. So a held page stays in the cache in every write mode,
and is never dropped but on purpose (R5). A page that is dirty and not valid is *lost*: the cache
device lost what a guest had written.

Time comes as seconds on any steady clock, through ``advance``.
"""

from array import array
from collections.abc import Callable
from math import ceil
from typing import NamedTuple

import numpy as np

from fusecache.core.extents import DirtyExtents
from fusecache.core.gates import Gates
from fusecache.core.geometry import Geometry, Run
from fusecache.core.rows import U16, U32
from fusecache.core.slots import SlotTable
from fusecache.core.states import Event, State, step
from fusecache.errors import IllegalStep

PERIOD = 2.0
"""Seconds. Ages are kept in 16 bits, in periods: 36 hours, after which they only grow less."""
_LAST = 0xFFFF


class SyncBegun(NamedTuple):
    """A sync of the cache device, as of when it began."""

    slots: U32
    pages: U16
    """Masks of what it is to make stable."""
    of_lane: int
    """Syncs that the lane had begun before."""


class Writeback:
    """Dirty pages of one block on their way to the origin.

    ``generation`` tells whether the slot still holds that block.
    """

    __slots__ = ("block", "generation", "pages", "slot")

    def __init__(self, slot: int, generation: int, block: int, pages: int) -> None:
        self.slot = slot
        self.generation = generation
        self.block = block
        self.pages = pages


class DirtyPages:
    """The dirty part of a ``CacheIndex``, which alone makes it and owns the slot table.

    Args:
        find: the slot of a tag, or None.
        owe: the row of a slot changed.
        touch: the slot was used.
        invalidate: valid pages (a mask) of a slot are so no longer.
        returned: nothing in the slot is dirty any more.
        gates: what the lane has written to, and made stable.
    """

    def __init__(
        self,
        geometry: Geometry,
        slots: SlotTable,
        find: Callable[[int, int], int | None],
        owe: Callable[[int], None],
        touch: Callable[[int], None],
        invalidate: Callable[[int, int], None],
        returned: Callable[[int], None],
        gates: Gates,
    ) -> None:
        self._geometry = geometry
        self._slots = slots
        self._find = find
        self._owe = owe
        self._touch = touch
        self._invalidate = invalidate
        self._returned = returned
        self._gates = gates
        self._pages_of: dict[int, int] = {}
        self.blocks = 0
        """Slots with a dirty page."""
        self.in_writeback = 0
        """Slots in WRITEBACK: their pages may be settling."""
        self._stamp = 1
        self._base: float | None = None
        self._unsynced = array("I")

    # -- looking -----------------------------------------------------------------------------------

    def mask(self, image: int, block: int) -> int:
        """The block's dirty pages."""
        slot = self._find(image, block)
        return 0 if slot is None else self._slots.dirty[slot]

    def held(self, image: int, block: int) -> int:
        """The block's pages that must stay in the cache."""
        slot = self._find(image, block)
        return 0 if slot is None else self._slots.dirty[slot] | self._slots.cleaning[slot]

    def lost(self, image: int, block: int) -> int:
        """The block's pages whose data is lost."""
        slot = self._find(image, block)
        return 0 if slot is None else self._slots.dirty[slot] & ~self._slots.valid[slot]

    def pages(self, image: int) -> int:
        """How many pages of an image are dirty."""
        return self._pages_of.get(image, 0)

    @property
    def all_pages(self) -> int:
        """How many pages are dirty."""
        return sum(self._pages_of.values())

    @property
    def any_held(self) -> bool:
        """Whether any page of any image is dirty or settling."""
        return self.blocks > 0 or self.in_writeback > 0

    def holds(self, image: int) -> bool:
        """Whether any page of an image is dirty or settling."""
        return self.any_held and bool(self.slots(image).size)

    def images(self) -> list[int]:
        """Images that have dirty pages."""
        return [image for image, pages in self._pages_of.items() if pages]

    def lost_ranges(self, image: int) -> list[tuple[int, int]]:
        """(offset, length) in bytes of what was lost, in order."""
        slots = self._slots
        if not self._pages_of.get(image):
            return []
        found = np.flatnonzero(slots.state_of >= State.DIRTY)
        found = found[slots.image_of[found] == image]
        found = found[(slots.dirty_of[found] & ~slots.valid_of[found]) != 0]
        by_block = sorted(
            (slots.block[s], slots.dirty[s] & ~slots.valid[s]) for s in found.tolist()
        )
        return self.ranges(by_block)

    def ranges(self, pages: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """(block, mask) in order as (offset, length) in bytes, neighbours merged."""
        ranges: list[tuple[int, int]] = []
        for block, mask in pages:
            base = block << self._geometry.block_shift
            for begin, length in self._geometry.page_runs(mask):
                if ranges and sum(ranges[-1]) == base + begin:
                    ranges[-1] = (ranges[-1][0], ranges[-1][1] + length)
                else:
                    ranges.append((base + begin, length))
        return ranges

    # -- becoming dirty ----------------------------------------------------------------------------

    def advance(self, seconds: float) -> None:
        """The time now; ages count from it."""
        if self._base is None:
            self._base = seconds
        stamp = 1 + int((seconds - self._base) / PERIOD)
        while stamp > _LAST:  # once in 18 hours: forget how old the older half is
            half = _LAST // 2
            dirtied = self._slots.dirtied_of
            dirtied[:] = np.where(dirtied > half, dirtied - half, 0)
            self._base += half * PERIOD
            stamp -= half
        self._stamp = stamp

    def soil(self, slot: int, pages: int) -> None:
        """The pages (a mask) are dirty from now on, which is a use of the slot; a row is owed if
        they were not before.

        The caller has the slot pinned, or writes before anything else can run. Whatever a
        writeback has taken of them counts no more.
        """
        slots = self._slots
        before = slots.dirty[slot]
        slots.state[slot] = step(slots.state[slot], Event.SOIL)
        slots.cleaning[slot] &= ~pages & 0xFFFF
        self.written(slot, pages)
        self._touch(slot)
        added = pages & ~before
        if added:
            slots.dirty[slot] = before | added
            self._count(slots.image[slot], added.bit_count())
            if not before:
                self.blocks += 1
                slots.dirtied[slot] = self._stamp
            self._owe(slot)

    def _count(self, image: int, pages: int) -> None:
        self._pages_of[image] = self._pages_of.get(image, 0) + pages

    def overwrite(self, image: int, offset: int, length: int) -> list[Run] | None:
        """Where bytes of an image may be written at once: every page of them is dirty, and nobody
        has the slots pinned, so that their rows are committed (R2). None otherwise.

        The caller writes before anything else can run.
        """
        geometry, slots = self._geometry, self._slots
        shift = geometry.block_shift
        places: list[tuple[int, int]] = []
        runs: list[Run] = []
        for block, start, stop in geometry.split(offset, length):
            slot = self._find(image, block)
            if slot is None or slots.pins[slot]:
                return None
            need = geometry.touched(start, stop)
            if slots.dirty[slot] & slots.valid[slot] & need != need:
                return None
            places.append((slot, need))
            runs.append(Run((slot << shift) + start, stop - start))
        for slot, need in places:
            slots.cleaning[slot] &= ~need & 0xFFFF
            self.written(slot, need)
            self._touch(slot)
        return runs

    def soil_valid(self, image: int, block: int, start: int, stop: int) -> int | None:
        """Makes the pages of ``start:stop`` of a block dirty if all of them are valid and nobody
        has the slot pinned; returns the slot. None, and nothing is changed, otherwise."""
        slot = self._find(image, block)
        if slot is None or self._slots.pins[slot]:
            return None
        pages = self._geometry.touched(start, stop)
        if self._slots.valid[slot] & pages != pages:
            return None
        self.soil(slot, pages)
        return slot

    # -- going back --------------------------------------------------------------------------------

    def _dirty_slots(self) -> U32:
        """Slots with dirty pages that no writeback has. About 0.3 ms a million slots."""
        return np.flatnonzero(self._slots.state_of == State.DIRTY).astype(np.uint32)

    def _since(self, older_than: float) -> int:
        """The youngest stamp that is at least so many seconds old; negative if there is none."""
        return self._stamp - ceil(older_than / PERIOD) - 1 if older_than > 0 else _LAST

    def due_images(self, older_than: float) -> list[int]:
        """Images with pages that have been dirty for at least ``older_than`` seconds."""
        if not self.blocks:
            return []
        slots = self._slots
        found = self._dirty_slots()
        due = slots.dirtied_of[found].astype(np.int32) <= self._since(older_than)
        return [int(image) for image in np.unique(slots.image_of[found[due]])]

    def due(self, image: int, count: int, *, older_than: float = 0.0) -> U32:
        """Up to ``count`` slots of an image with dirty pages that can be read, those dirty for
        longest and for at least ``older_than`` seconds, in the order of their blocks."""
        slots = self._slots
        found = self._dirty_slots()
        found = found[slots.image_of[found] == image]
        readable = (slots.dirty_of[found] & slots.valid_of[found]) != 0
        old = slots.dirtied_of[found].astype(np.int32) <= self._since(older_than)
        found = found[readable & old]
        if found.size > count:
            order = np.argsort(slots.dirtied_of[found], kind="stable")[:count]
            found = found[order]
        return self._in_order(found)

    def slots(self, image: int) -> U32:
        """Every slot of an image with dirty or settling pages, in the order of their blocks."""
        slots = self._slots
        found = np.flatnonzero(slots.state_of >= State.DIRTY).astype(np.uint32)
        mine: U32 = found[slots.image_of[found] == image]
        return self._in_order(mine)

    def extents(self, image: int, from_block: int) -> DirtyExtents:
        """Where an image is dirty now, from a block on."""
        slots = self._slots
        found = np.flatnonzero(slots.state_of >= State.DIRTY).astype(np.uint32)
        mine = (slots.image_of[found] == image) & (slots.block_of[found] >= from_block)
        found = self._in_order(found[mine & (slots.dirty_of[found] != 0)])
        return DirtyExtents(self._geometry, slots.block_of[found], slots.dirty_of[found])

    def _in_order(self, found: U32) -> U32:
        ordered: U32 = found[np.argsort(self._slots.block_of[found], kind="stable")]
        return ordered

    def place(self, slot: int) -> tuple[int, int]:
        """The block a slot holds, and its dirty pages that can be read."""
        slots = self._slots
        return slots.block[slot], slots.dirty[slot] & slots.valid[slot]

    def oldest(self, image: int) -> float | None:
        """Seconds since the image's oldest dirty page became so; None if it has none."""
        if not self._pages_of.get(image):
            return None
        slots = self._slots
        found = np.flatnonzero(slots.state_of >= State.DIRTY)
        found = found[slots.image_of[found] == image]
        stamps = slots.dirtied_of[found[slots.dirty_of[found] != 0]]
        return (self._stamp - int(stamps.min())) * PERIOD

    def ages(self) -> dict[int, float]:
        """``oldest`` of every image that has dirty pages, in one pass over the slots."""
        if not any(self._pages_of.values()):
            return {}
        slots = self._slots
        found = np.flatnonzero(slots.state_of >= State.DIRTY)
        found = found[slots.dirty_of[found] != 0]
        images, of = np.unique(slots.image_of[found], return_inverse=True)
        stamps = np.full(images.size, _LAST, np.int64)
        np.minimum.at(stamps, of, slots.dirtied_of[found].astype(np.int64))
        ages = (self._stamp - stamps) * PERIOD
        return dict(zip(images.tolist(), ages.tolist(), strict=True))

    def losers(self) -> set[int]:
        """Images for which ``lost_ranges`` gives something, in one pass over the slots."""
        if not any(self._pages_of.values()):
            return set()
        slots = self._slots
        found = np.flatnonzero(slots.state_of >= State.DIRTY)
        lost = (slots.dirty_of[found] & ~slots.valid_of[found]) != 0
        return set(np.unique(slots.image_of[found[lost]]).tolist())

    def snapshot(self, image: int, slots: U32) -> list[Writeback]:
        """What of an image is dirty in these slots now: once this is stable it may be written back
        (R5). Slots that hold another image's block by now are left out."""
        table = self._slots
        return [
            Writeback(
                slot,
                table.generation[slot],
                table.block[slot],
                table.dirty[slot] & table.valid[slot],
            )
            for slot in slots.tolist()
            if table.state[slot] == State.DIRTY and table.image[slot] == image
        ]

    def begin_writeback(self, wanted: Writeback) -> int:
        """Takes the pages of a snapshot that are still dirty; returns their mask.

        0, and nothing is taken, if somebody writes to the slot right now, or if it was given to
        another block. Ends with ``cleaned`` and ``settled``, or with ``kept``.
        """
        slots = self._slots
        slot = wanted.slot
        if slots.generation[slot] != wanted.generation:
            return 0
        pages = wanted.pages & slots.dirty[slot] & slots.valid[slot]
        if slots.pins[slot] or slots.state[slot] != State.DIRTY or not pages:
            return 0
        slots.state[slot] = step(slots.state[slot], Event.WRITE_BACK)
        self.in_writeback += 1
        slots.cleaning[slot] = pages
        return pages

    def cleaned(self, slot: int) -> int:
        """The origin has, synced, what was taken: what was not written again since is no longer
        dirty, and a row is owed. Returns those pages; they are settling until ``settled``."""
        slots = self._slots
        pages = slots.cleaning[slot] & slots.dirty[slot]
        if pages:
            self._unsoil(slot, pages)
            self._owe(slot)
        return pages

    def _unsoil(self, slot: int, pages: int) -> None:
        slots = self._slots
        slots.dirty[slot] &= ~pages & 0xFFFF
        self._count(slots.image[slot], -pages.bit_count())
        if not slots.dirty[slot]:
            self.blocks -= 1

    def keep_pages(self, slot: int, pages: int) -> None:
        """These pages (a mask) were taken and did not get to the origin."""
        self._slots.cleaning[slot] &= ~pages & 0xFFFF

    def settled(self, slot: int) -> None:
        """The row that says so is stable. What is dirty still was written to meanwhile."""
        self._end(slot)
        self._slots.dirtied[slot] = self._stamp

    def kept(self, slot: int) -> None:
        """The writeback did not happen: all of it stays dirty, as old as it is."""
        self._end(slot)

    def _end(self, slot: int) -> None:
        slots = self._slots
        if slots.state[slot] != State.WRITEBACK:
            raise IllegalStep(f"no writeback of slot {slot} is under way")
        event = Event.KEEP if slots.dirty[slot] else Event.SETTLE
        slots.state[slot] = step(slots.state[slot], event)
        slots.cleaning[slot] = 0
        self.in_writeback -= 1
        if event is Event.SETTLE:
            self._returned(slot)

    # -- going on purpose --------------------------------------------------------------------------

    def discard(self, slot: int, pages: int) -> None:
        """Dirty pages (a mask) are dirty no more: the origin has newer data, or they are to go.

        The caller clears them as well, and makes the row stable.
        """
        slots = self._slots
        slots.cleaning[slot] &= ~pages & 0xFFFF
        gone = slots.dirty[slot] & pages
        if gone:
            self._unsoil(slot, gone)
            self._owe(slot)
        if slots.state[slot] == State.DIRTY and not slots.dirty[slot]:
            slots.state[slot] = step(slots.state[slot], Event.SETTLE)
            self._returned(slot)

    def forget(self, slot: int) -> None:
        """The whole block goes."""
        slots = self._slots
        if gone := slots.dirty[slot]:
            self._unsoil(slot, gone)
        if slots.state[slot] == State.WRITEBACK:
            self.in_writeback -= 1
        slots.cleaning[slot] = 0

    # -- what the cache device has made stable -----------------------------------------------------

    def written(self, slot: int, pages: int) -> None:
        """These pages (a mask) change on the device: unsynced until the next sync of it."""
        unsynced = self._slots.unsynced
        before = unsynced[slot]
        if not before:
            self._unsynced.append(slot)
        unsynced[slot] = before | pages

    def sync_begins(self) -> SyncBegun:
        """Just before a sync of the device; hand what this gives to ``sync_worked`` or
        ``sync_failed``.

        Slots that are pinned stay unsynced: what is on its way there may arrive after this sync,
        and may be what the next one fails for before whoever writes it can say so.
        """
        slots = np.concatenate((np.array(self._unsynced, np.uint32), self._gates.take_soiled()))
        pages: U16 = self._slots.unsynced_of[slots]
        pinned = self._slots.pins_of[slots] != 0
        self._slots.unsynced_of[slots[~pinned]] = 0
        self._unsynced = array("I", slots[pinned].tolist())
        return SyncBegun(slots, pages, self._gates.syncs_begun)

    def sync_worked(self, began: SyncBegun) -> None:
        """All is stable that was written before, also what a sync of the lane is about, if that
        began before ours: it may fail yet."""
        if self._gates.syncs_begun == began.of_lane:
            self._gates.take_syncing()

    def sync_failed(self, began: SyncBegun) -> int:
        """The kernel may have dropped all that was written since the last good sync: what is
        dirty of it is lost. Returns how many pages.

        A sync of the lane that began after ours, and was good, has made ours stable.
        """
        now = self.sync_begins()
        gone = [(now.slots, now.pages), self._gates.take_syncing()]
        if self._gates.last_good_sync <= began.of_lane:
            gone.append((began.slots, began.pages))
        lost = 0
        for slots, pages in gone:
            for slot, mask in zip(slots.tolist(), pages.tolist(), strict=True):
                lost += self.lose(slot, mask)
        return lost

    def lose(self, slot: int, pages: int) -> int:
        """The data of these dirty pages cannot be read any more; returns how many pages."""
        slots = self._slots
        gone = pages & slots.dirty[slot] & slots.valid[slot]
        slots.cleaning[slot] &= ~gone & 0xFFFF
        if gone:
            self._invalidate(slot, gone)
        return gone.bit_count()

    # -- loading -----------------------------------------------------------------------------------

    def load(self, image: int, slots: U32, pages: int) -> None:
        """Slots of one image with dirty pages, just loaded; how old these are is not known."""
        self._slots.state_of[slots] = State.DIRTY
        self.blocks += int(slots.size)
        self._count(image, pages)
