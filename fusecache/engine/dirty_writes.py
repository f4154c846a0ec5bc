"""Writes that the cache acknowledges: pages become dirty, or dirty ones are written again (R2).

The row of a page is in a commit before the write is acknowledged. Where the slot holds clean data
the row comes first, so that a killed daemon's successor cannot take new bytes for the origin's;
where it holds none the data comes first, so that a row never shows what was never written.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from fusecache.core.geometry import Geometry, region_of
from fusecache.core.index import CacheIndex
from fusecache.engine.committer import Committer
from fusecache.engine.image import Image
from fusecache.engine.intents import WriteIntents
from fusecache.engine.ports import Threads
from fusecache.engine.slot_io import SlotIO
from fusecache.engine.state import CacheState
from fusecache.errors import CacheDeviceError, LostDataError, OriginError, RetiredSlotError
from fusecache.observe.latency import Call, timed


@dataclass(slots=True)
class Part:
    """One block's share of a write. Positions in bytes within the block, pages as masks."""

    block: int
    start: int
    stop: int
    data: memoryview
    slot: int = -1
    before: int = 0
    """Valid and clean, or settling: their row comes before their data."""
    after: int = 0
    """Not valid: their data comes before their row."""
    edges: list[tuple[int, memoryview]] = field(default_factory=list)
    """(start in block, bytes): what the origin has of pages that are written in part only."""


class DirtyWrites:
    """Carries out writes for callers that hold the lock of their span; or that have seen that
    nobody does, and write at once."""

    def __init__(
        self,
        core: CacheIndex,
        state: CacheState,
        committer: Committer,
        intents: WriteIntents,
        threads: Threads,
        slots: SlotIO,
    ) -> None:
        self._core = core
        self._geometry: Geometry = core.geometry
        self._state = state
        self._committer = committer
        self._intents = intents
        self._threads = threads
        self._slots = slots

    @contextmanager
    def pinned(self, image: Image, parts: list[Part]) -> Iterator[list[Part]]:
        """Slots for these parts of a write, until the end; gives those there was no room for."""
        homeless = []
        try:
            for part in parts:
                slot = self._core.begin_store(image.id, part.block)
                if slot is None:
                    homeless.append(part)
                else:
                    part.slot = slot
            yield homeless
        finally:
            for part in parts:
                if part.slot >= 0:
                    self._core.unpin(part.slot)

    def at_once(self, length: int) -> bool:
        """Whether neither a commit nor writes of so many bytes need a thread now."""
        return self._committer.commits_now and self._slots.in_place(length)

    def soil_at_once(self, image: Image, block: int, start: int, length: int) -> int | None:
        """Makes one block's valid pages dirty; returns where to write, in slot space, or None if
        there is anything else to do. ``write_at_once`` follows before anything else can run; the
        caller has asked ``at_once`` in the same breath."""
        slot = self._core.dirty.soil_valid(image.id, block, start, start + length)
        return None if slot is None else (slot << self._geometry.block_shift) + start

    def write_at_once(self, soiled: Sequence[tuple[int, bytes]]) -> list[bool]:
        """The rows of what was just soiled, in one commit, then the data (position in slot space,
        bytes), without any await. Says which of it is written; the rest may be so in part.

        Raises:
            DatabaseError: the rows are not committed, or nobody knows; no data was written.
        """
        done = []
        with self._slots.here:
            self._committer.commit_now()
            for position, data in soiled:
                try:
                    self._slots.write_now(position, memoryview(data))
                    done.append(True)
                except CacheDeviceError:
                    done.append(False)
        return done

    async def write(self, image: Image, parts: list[Part]) -> None:
        """Writes parts whose slots are pinned; acknowledged as far as the cache goes.

        Raises:
            OriginError: a page written in part could not be completed; nothing was written.
            LostDataError: the same, because the cache device had lost the rest of it.
            DatabaseError: the rows are not committed, or nobody knows.
            RetiredSlotError: nothing was written.
            CacheDeviceError: the data is in the slots in part.
        """
        if any(self._core.is_retired(part.slot) for part in parts):
            raise RetiredSlotError("a slot that failed takes no more data")
        for part in parts:
            await self._complete_edges(image, part)
        for part in parts:
            self._classify(image, part)
        try:
            await self._rows_and_data(image, parts)
        finally:
            # Also if the data is not there: rows have changed, and the lane may write over pages
            # that are dirty now as soon as their slots are not pinned any more.
            image.changed()

    async def _rows_and_data(self, image: Image, parts: list[Part]) -> None:
        before = [part for part in parts if part.before]
        if before:
            await self._rows_first(image, before, parts)
        else:
            await self._write(parts)
        if any(part.after for part in parts):
            for part in parts:
                if part.after:
                    self._core.stored_dirty(part.slot, part.after)
            await self._committer.commit_rows()

    async def _rows_first(self, image: Image, before: list[Part], parts: list[Part]) -> None:
        committed = self._committer.rows_owed()
        regions = range(region_of(before[0].block), region_of(before[-1].block) + 1)
        async with self._intents.writing(image, regions, active=False):
            await committed()
            await self._write(parts)

    def _classify(self, image: Image, part: Part) -> None:
        """Says what becomes of which page, and makes what is valid dirty from this moment on: a
        writeback under way cannot make clean what is about to be written again (R5)."""
        touched = self._geometry.touched(part.start, part.stop)
        valid = self._core.valid_pages(image.id, part.block)
        part.before = touched & valid & ~self._core.dirty.mask(image.id, part.block)
        part.after = touched & ~valid
        if touched & valid:
            self._core.dirty.soil(part.slot, touched & valid)

    async def _complete_edges(self, image: Image, part: Part) -> None:
        """Completes pages that are not valid and are written in part."""
        geometry = self._geometry
        touched = geometry.touched(part.start, part.stop)
        partly = touched & ~geometry.covered(part.start, part.stop)
        partly &= ~self._core.valid_pages(image.id, part.block)
        if partly & self._core.dirty.lost(image.id, part.block):
            raise LostDataError("the rest of a page that is written in part was lost")
        for begin, length in geometry.page_runs(partly):
            await self._complete(image, part, begin, begin + length)

    async def _complete(self, image: Image, part: Part, begin: int, end: int) -> None:
        """Fetches what lies around the written bytes in the pages ``begin`` to ``end``."""
        base = part.block << self._geometry.block_shift
        spans: list[float] = []
        try:
            data = await self._threads.harmless(
                image.limiter, timed(image.origin.read, spans), base + begin, end - begin
            )
        except OriginError as exc:
            image.counters.failed(exc)
            raise
        finally:
            image.counters.latency.add(Call.READ, spans)
        image.counters.origin_reads += 1
        image.counters.origin_read_bytes += len(data)
        page = memoryview(bytearray(data.ljust(end - begin, b"\0")))
        if part.start > begin:
            part.edges.append((begin, page[: part.start - begin]))
        if part.stop < end:
            part.edges.append((part.stop, page[part.stop - begin :]))

    async def _write(self, parts: list[Part]) -> None:
        """The data of all parts, adjacent pieces in one call."""
        shift = self._geometry.block_shift
        pieces: list[tuple[int, memoryview]] = []
        for part in parts:
            position = part.slot << shift
            around = sorted([*part.edges, (part.start, part.data)], key=lambda piece: piece[0])
            pieces += [(position + start, data) for start, data in around]
        await self._slots.write(pieces)
        for part in parts:  # now, and not before: a sync that began meanwhile may have missed some
            pages = self._geometry.touched(part.start, part.stop)
            self._core.dirty.written(part.slot, pages)
