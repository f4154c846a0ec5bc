"""Writes: which part of a write goes to the cache and which to the origin, in every write mode.

Write-through: origin, then slot, then the answer. Write-around: valid bits cleared, then origin.
Either way the origin has the data when the guest is told so (P1, P4). Write-back: see
``dirty_writes``. In every mode a page that is held stays in the cache (R5).
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from fusecache.config import Tuning, WriteMode
from fusecache.core.geometry import region_of
from fusecache.core.index import CacheIndex
from fusecache.engine.degraded import Degraded
from fusecache.engine.dirty_writes import DirtyWrites, Part
from fusecache.engine.image import Image
from fusecache.engine.intents import WriteIntents
from fusecache.engine.origin_writes import OriginWrites
from fusecache.engine.slot_io import IN_PLACE
from fusecache.engine.state import CacheState
from fusecache.errors import CacheDeviceError, DatabaseError, OriginError, RetiredSlotError
from fusecache.observe.counters import Reason, Served

log = logging.getLogger(__name__)

Write = tuple[Image, int, bytes]
"""Image, offset, data."""


class Writes:
    """Carries out writes of images that are open for writing."""

    def __init__(
        self,
        core: CacheIndex,
        state: CacheState,
        intents: WriteIntents,
        origin: OriginWrites,
        dirty: DirtyWrites,
        degraded: Degraded,
        wake_reclaimer: Callable[[], None],
    ) -> None:
        self._core = core
        self._geometry = core.geometry
        self._state = state
        self._intents = intents
        self._origin = origin
        self._dirty = dirty
        self._degraded = degraded
        self._wake_reclaimer = wake_reclaimer
        self.apply(state.tuning)

    def apply(self, tuning: Tuning) -> None:
        """From now on this much may be dirty."""
        self._most_dirty = max(1, int(self._core.slot_count * tuning.dirty_limit))

    async def write(self, image: Image, offset: int, data: bytes) -> int:
        """Writes all of ``data``; returns its length.

        Raises:
            OriginError: the origin failed. The cached copy of those pages is gone.
            LostDataError: part of a page was written whose rest the cache device has lost.
        """
        if not data:
            return 0
        if not self.at_once([(image, offset, data)])[0]:
            served = await self.put(image, offset, data)
            image.counters.wrote(served, len(data))
        return len(data)

    async def put(self, image: Image, offset: int, data: bytes) -> Served:
        """As ``write``, of some data, and not counted as a guest's write. Returns where it went."""
        blocks = self._geometry.blocks(offset, len(data))
        torn: CacheDeviceError | None = None
        served = Served.AROUND
        with image.admitted(), _failing(image):
            async with image.lock.span(blocks.start, blocks.stop):
                try:
                    served = await self._write(image, offset, data)
                except CacheDeviceError as exc:
                    if not isinstance(exc, RetiredSlotError):
                        self._state.store_failed(exc)
                    torn = exc
            if torn is not None:
                await self._degraded.supersede(image, offset, data)
                image.counters.not_cached[Reason.CACHE_ERROR] += 1
        return served

    def at_once(self, wanted: Sequence[Write]) -> list[bool]:
        """Those that lie within one block each whose pages are all valid, in write-back, without
        any await: rows, then data (R2). Says which they are; of the others nothing is written.

        As many share a commit as may be written without a thread together.
        """
        done: list[bool] = []
        while len(done) < len(wanted):
            first = last = len(done)
            size = 0
            while last < len(wanted) and (last == first or size + len(wanted[last][2]) <= IN_PLACE):
                size += len(wanted[last][2])
                last += 1
            if self._dirty.at_once(size):
                done += self._together(wanted[first:last])
            else:
                done += [False] * (last - first)
        return done

    def _together(self, wanted: Sequence[Write]) -> list[bool]:
        done = [False] * len(wanted)
        places: list[int] = []
        soiled: list[tuple[int, bytes]] = []
        for place, write in enumerate(wanted):
            position = self._soil(*write)
            if position is not None:
                places.append(place)
                soiled.append((position, write[2]))
        if not soiled:
            return done
        try:
            written = self._dirty.write_at_once(soiled)
        except DatabaseError:
            return done  # the slow path meets the error again and deals with it
        for place, is_written in zip(places, written, strict=True):
            image, _, data = wanted[place]
            image.changed()  # in any case: its rows have
            if is_written:
                image.counters.wrote(Served.BACK, len(data))
                done[place] = True
        return done

    def _soil(self, image: Image, offset: int, data: bytes) -> int | None:
        """Where to write it at once, its pages being dirty from now on; None if it cannot be."""
        geometry = self._geometry
        block = offset >> geometry.block_shift
        start = offset - (block << geometry.block_shift)
        if (
            not data
            or len(data) > geometry.block_size - start
            or offset + len(data) > image.size
            or not image.lock.free(block, block + 1)
            or not self._state.serves(image)
            or not self._soils(image)
            or not self._intents.began(image, region_of(block))
        ):
            return None
        return self._dirty.soil_at_once(image, block, start, len(data))

    async def _write(self, image: Image, offset: int, data: bytes) -> Served:
        """In the cache's order, or past a cache that is not to be used."""
        if self._state.serves(image):
            try:
                if image.write_mode is WriteMode.BACK:
                    await self._origin.extend(image, offset + len(data))
                return await self._cached(image, offset, data)
            except DatabaseError:
                # A row could not be committed; the state is unusable and being fenced.
                log.debug("a write goes past the cache")
        await self._state.passable()
        async with image.extending:
            pass  # it might cut off what is written past the end meanwhile
        await self._degraded.write(image, offset, data)
        image.counters.not_cached[self._state.why_not(image)] += 1
        return Served.AROUND

    async def _cached(self, image: Image, offset: int, data: bytes) -> Served:
        parts = self._parts(offset, data)
        kept = self._kept_parts(image, parts)
        why = self._why_past(image, len(parts))
        if kept:
            served = await self._keep(image, parts, kept)
        else:
            served = await self._past(image, offset, data)
        if served is Served.AROUND and image.write_mode is not WriteMode.AROUND:
            why = Reason.CACHE_ERROR  # a slot could not be written
        if served is not Served.BACK and why is not None:
            image.counters.not_cached[why] += 1
        return served

    async def _keep(self, image: Image, parts: list[Part], kept: list[Part]) -> Served:
        with self._dirty.pinned(image, kept) as homeless:
            self._wake_reclaimer()
            if homeless:  # and only now: what is held has a slot
                kept = [part for part in kept if part.slot >= 0]
            served = await self._rest(image, parts, kept)
            if kept:
                await self._lengthen(image, kept)
                await self._dirty.write(image, kept)
        return served

    async def _lengthen(self, image: Image, kept: list[Part]) -> None:
        """Sizes are always the origin's. Only in write-back it is long enough already; else a last
        page that is held may grow, and what lies past the end goes to the origin as well. Never by
        ``extend``, which could cut off what another write past the end has just brought there."""
        for part in kept:
            base = part.block << self._geometry.block_shift
            first, last = max(base + part.start, image.size), base + part.stop
            if first < last:
                region = region_of(part.block)
                async with self._intents.writing(image, range(region, region + 1)):
                    await self._origin.write(image, first, bytes(part.data[first - last :]))

    def _parts(self, offset: int, data: bytes) -> list[Part]:
        view, done, parts = memoryview(data), 0, []
        for block, start, stop in self._geometry.split(offset, len(data)):
            parts.append(Part(block, start, stop, view[done : done + stop - start]))
            done += stop - start
        return parts

    def _kept_parts(self, image: Image, parts: list[Part]) -> list[Part]:
        """What of a write goes to the cache alone: all of it in write-back, else what is held."""
        if self._soils(image, len(parts)):
            return list(parts)
        if not self._core.dirty.any_held:
            return []
        kept = []
        for part in parts:
            held = self._core.dirty.held(image.id, part.block)
            for begin, length in self._geometry.page_runs(held):
                first, last = max(begin, part.start), min(begin + length, part.stop)
                if first < last:
                    data = part.data[first - part.start : last - part.start]
                    kept.append(Part(part.block, first, last, data))
        return kept

    def _soils(self, image: Image, blocks: int = 1) -> bool:
        """Whether pages of so many blocks may become dirty that were not."""
        return (
            image.write_mode is WriteMode.BACK
            and not image.draining
            and not self._state.draining
            and self._state.stores(image)
            and self._core.dirty.blocks + blocks <= self._most_dirty
        )

    def _why_past(self, image: Image, blocks: int) -> Reason | None:
        """Why a write of so many blocks also goes to the origin; None: its mode means it so."""
        if self._soils(image, blocks):
            return Reason.NO_SLOT
        if image.write_mode is WriteMode.AROUND:
            return Reason.AROUND
        if not self._state.stores(image):
            return Reason.CACHE_ERROR  # storing pauses
        if image.write_mode is WriteMode.THROUGH:
            return None
        draining = image.draining or self._state.draining
        return Reason.DRAINING if draining else Reason.DIRTY_LIMIT

    async def _rest(self, image: Image, parts: list[Part], kept: list[Part]) -> Served:
        """What is not kept goes to the origin, neighbours together. Returns where that was."""
        served = Served.BACK
        shift = self._geometry.block_shift
        taken = [
            ((part.block << shift) + part.start, (part.block << shift) + part.stop) for part in kept
        ]
        run: list[memoryview] = []
        begin = end = -1
        for part in parts:
            base = part.block << shift
            for first, last in _without(base + part.start, base + part.stop, taken):
                piece = part.data[first - base - part.start : last - base - part.start]
                if first != end and run:
                    served = await self._past(image, begin, b"".join(run))
                    run = []
                if not run:
                    begin = first
                run.append(piece)
                end = last
        if run:
            served = await self._past(image, begin, b"".join(run))
        return served

    async def _past(self, image: Image, offset: int, data: bytes) -> Served:
        """Write-through or write-around of pages that are not held."""
        blocks = self._geometry.blocks(offset, len(data))
        regions = range(region_of(blocks.start), region_of(blocks.stop - 1) + 1)
        async with self._intents.writing(image, regions):
            if image.write_mode is WriteMode.AROUND or not self._state.stores(image):
                self._clear(image, offset, len(data))
                await self._origin.write(image, offset, data)
                served = Served.AROUND
            else:
                served = await self._through(image, offset, data)
            image.changed()
        return served

    async def _through(self, image: Image, offset: int, data: bytes) -> Served:
        with self._origin.storing(image, offset, data) as storing:
            self._wake_reclaimer()
            try:
                failed = await self._origin.write(image, offset, data, storing)
            except OriginError:
                self._clear(image, offset, len(data))
                raise
            if failed is None:
                storing.done()
                self._state.counters.stored_bytes += storing.stored_bytes
        if failed is not None:
            # The slots may hold anything now; what they held before is old.
            self._clear(image, offset, len(data))
            self._state.store_failed(failed)
            return Served.AROUND
        return Served.THROUGH

    def _clear(self, image: Image, offset: int, length: int) -> None:
        """No page touched by the span is valid any more, but for what is held."""
        for block, start, stop in self._geometry.split(offset, length):
            self._core.clear(image.id, block, self._geometry.touched(start, stop))


@contextmanager
def _failing(image: Image) -> Iterator[None]:
    """Around a write: says why one that failed was not served."""
    try:
        yield
    except OriginError:
        image.counters.not_cached[Reason.ORIGIN_ERROR] += 1
        raise


def _without(first: int, last: int, taken: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The parts of ``first:last`` that no span of ``taken`` (in order) covers."""
    left = []
    for begin, end in taken:
        if begin >= last or end <= first:
            continue
        if first < begin:
            left.append((first, begin))
        first = max(first, end)
    if first < last:
        left.append((first, last))
    return left
