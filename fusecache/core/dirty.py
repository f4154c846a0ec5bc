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

import numpy as np

from fusecache.core.geometry import Geometry, Run
from fusecache.core.rows import U32
from fusecache.core.slots import SlotTable
from fusecache.core.states import Event, State, step

PERIOD = 2.0
"""Seconds. Ages are kept in 16 bits, in periods: 36 hours, after which they only grow less."""
_LAST = 0xFFFF


class Writeback:
    """Dirty pages of one block on their way to the origin."""

    __slots__ = ("block", "pages", "slot")

    def __init__(self, slot: int, block: int, pages: int) -> None:
        self.slot = slot
        self.block = block
        self.pages = pages


class DirtyPages:
    """The dirty part of a ``CacheIndex``, which alone makes it and owns the slot table.

    Args:
        find: the slot of a tag, or None.
        owe: the row of a slot changed.
        touch: the slot was used.
        invalidate: valid pages (a mask) of a slot are so no longer.
    """

    def __init__(
        self,
        geometry: Geometry,
        slots: SlotTable,
        find: Callable[[int, int], int | None],
        owe: Callable[[int], None],
        touch: Callable[[int], None],
        invalidate: Callable[[int, int], None],
    ) -> None:
        self._geometry = geometry
        self._slots = slots
        self._find = find
        self._owe = owe
        self._touch = touch
        self._invalidate = invalidate
        self._pages_of: dict[int, int] = {}
        self.blocks = 0
        """Slots with a dirty page."""
        self._stamp = 1
        self._base: float | None = None
        self._epoch = 1
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
        return self.blocks > 0 or bool(self._slots.cleaning_of.any())

    def images(self) -> list[int]:
        """Images that have dirty pages."""
        return [image for image, pages in self._pages_of.items() if pages]

    def lost_ranges(self, image: int) -> list[tuple[int, int]]:
        """(offset, length) in bytes of what was lost, in order."""
        slots = self._slots
        if not self._pages_of.get(image):
            return []
        lost = (slots.image_of == image) & ((slots.dirty_of & ~slots.valid_of) != 0)
        found = np.flatnonzero(lost)
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
        if stamp > _LAST:  # once in 18 hours: forget how old the older half is
            half = _LAST // 2
            dirtied = self._slots.dirtied_of
            dirtied[:] = np.where(dirtied > half, dirtied - half, 0)
            self._base += half * PERIOD
            stamp -= half
        self._stamp = min(stamp, _LAST)

    def soil(self, slot: int, pages: int) -> None:
        """The pages (a mask) are dirty from now on; a row is owed if they were not before.

        The caller has the slot pinned. Whatever a writeback has taken of them counts no more.
        """
        slots = self._slots
        before = slots.dirty[slot]
        slots.state[slot] = step(slots.state[slot], Event.SOIL)
        slots.cleaning[slot] &= ~pages & 0xFFFF
        self.written(slot)
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
        """Where bytes of an image may be written at once: every page of them is dirty, its row
        committed, and nobody else is at work on the slots. None otherwise.

        The caller writes before anything else can run.
        """
        geometry, slots = self._geometry, self._slots
        shift = geometry.block_shift
        places: list[tuple[int, int]] = []
        runs: list[Run] = []
        for block, start, stop in geometry.split(offset, length):
            slot = self._find(image, block)
            if slot is None or slots.pins[slot] or slots.owed[slot]:
                return None
            need = geometry.touched(start, stop)
            if slots.dirty[slot] & slots.valid[slot] & need != need:
                return None
            places.append((slot, need))
            runs.append(Run((slot << shift) + start, stop - start))
        for slot, need in places:
            slots.cleaning[slot] &= ~need & 0xFFFF
            self.written(slot)
            self._touch(slot)
        return runs

    # -- going back --------------------------------------------------------------------------------

    def due(self, image: int, count: int, *, older_than: float = 0.0) -> U32:
        """Up to ``count`` slots of an image with dirty pages that can be read, those dirty for
        longest, in the order of their blocks; at least ``older_than`` seconds (if positive)."""
        slots = self._slots
        wanted = (slots.image_of == image) & (slots.state_of == State.DIRTY)
        wanted &= (slots.dirty_of & slots.valid_of) != 0
        if older_than > 0:
            newest = self._stamp - max(1, int(older_than / PERIOD))
            if newest < 0:
                return np.empty(0, np.uint32)
            wanted &= slots.dirtied_of <= newest
        found = np.flatnonzero(wanted).astype(np.uint32)
        if found.size > count:
            order = np.argsort(slots.dirtied_of[found], kind="stable")[:count]
            found = found[order]
        return found[np.argsort(slots.block_of[found], kind="stable")]

    def oldest(self, image: int) -> float | None:
        """Seconds since the image's oldest dirty page became so; None if it has none."""
        slots = self._slots
        mine = (slots.image_of == image) & (slots.dirty_of != 0)
        if not self._pages_of.get(image) or not mine.any():
            return None
        return (self._stamp - int(slots.dirtied_of[mine].min())) * PERIOD

    def snapshot(self, slots: U32) -> list[Writeback]:
        """What is dirty in these slots now: once this is stable it may be written back (R5)."""
        table = self._slots
        return [
            Writeback(slot, table.block[slot], table.dirty[slot] & table.valid[slot])
            for slot in slots.tolist()
            if table.state[slot] == State.DIRTY
        ]

    def begin_writeback(self, wanted: Writeback) -> int:
        """Takes the pages of a snapshot that are still dirty; returns their mask.

        0, and nothing is taken, if somebody writes to the slot right now. Ends with ``cleaned``
        and ``settled``, or with ``kept``.
        """
        slots = self._slots
        slot = wanted.slot
        pages = wanted.pages & slots.dirty[slot] & slots.valid[slot]
        if slots.pins[slot] or slots.state[slot] != State.DIRTY or not pages:
            return 0
        slots.state[slot] = step(slots.state[slot], Event.WRITE_BACK)
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

    def settled(self, slot: int) -> None:
        """The row that says so is stable. What is dirty still was written to meanwhile."""
        self._slots.dirtied[slot] = self._stamp
        self._end(slot)

    def kept(self, slot: int) -> None:
        """The writeback did not happen: all of it stays dirty, as old as it is."""
        self._end(slot)

    def _end(self, slot: int) -> None:
        slots = self._slots
        slots.cleaning[slot] = 0
        event = Event.KEEP if slots.dirty[slot] else Event.SETTLE
        slots.state[slot] = step(slots.state[slot], event)

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

    def forget(self, slot: int) -> None:
        """The whole block goes."""
        if gone := self._slots.dirty[slot]:
            self._unsoil(slot, gone)
        self._slots.cleaning[slot] = 0

    # -- what the cache device has made stable -----------------------------------------------------

    def written(self, slot: int) -> None:
        """Dirty pages of the slot change on the device: unsynced until the next sync of it."""
        unsynced = self._slots.unsynced
        if not unsynced[slot] & self._epoch:
            unsynced[slot] |= self._epoch
            self._unsynced.append(slot)

    def sync_begins(self) -> tuple[int, "array[int]"]:
        """Just before a sync of the device; end it with ``synced`` or ``sync_failed``."""
        began = self._epoch, self._unsynced
        self._epoch, self._unsynced = 3 - self._epoch, array("I")
        return began

    def synced(self, began: tuple[int, "array[int]"]) -> None:
        """It succeeded."""
        epoch, slots = began
        for slot in slots:
            self._slots.unsynced[slot] &= ~epoch & 0xFF

    def sync_failed(self, began: tuple[int, "array[int]"]) -> int:
        """It failed: the kernel may have dropped any of it. Dirty pages of slots written to since
        the last good sync are lost; returns how many."""
        lost = 0
        for slot in {*began[1], *self._unsynced}:
            lost += self.lose(slot, self._slots.dirty[slot])
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
