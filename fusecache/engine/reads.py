"""Reads that are not simply a hit: cold hits, misses, mixtures, and reads past the cache."""

from collections.abc import Iterator
from contextlib import contextmanager

import trio

from fusecache.core.geometry import merged
from fusecache.core.index import CacheIndex, Located
from fusecache.engine.degraded import Degraded
from fusecache.engine.dirty_reads import DirtyReads, note_unreadable
from fusecache.engine.fills import Fetch, Fills
from fusecache.engine.image import Image
from fusecache.engine.ports import Threads
from fusecache.engine.readahead import Readahead
from fusecache.engine.state import CacheState
from fusecache.errors import CacheDeviceError, LostDataError, OriginError
from fusecache.observe.counters import Reason
from fusecache.observe.latency import Call, timed

_ATTEMPTS = 16
_TURNS = 8
"""Of the event loop, for an SSD to bring what was asked of it before a thread is taken."""


class Reads:
    """The slow half of reading."""

    def __init__(
        self,
        core: CacheIndex,
        state: CacheState,
        fills: Fills,
        readahead: Readahead,
        degraded: Degraded,
        threads: Threads,
    ) -> None:
        self._core = core
        self._geometry = core.geometry
        self._state = state
        self._fills = fills
        self._readahead = readahead
        self._degraded = degraded
        self._dirty_reads = DirtyReads(core, state)
        self._threads = threads

    async def read(self, image: Image, offset: int, length: int) -> memoryview:
        """Up to ``length`` bytes; fewer only at the end of the image.

        Raises:
            OriginError: the origin failed, or too many requests of this image wait for it.
            LostDataError: dirty data cannot be read from the cache device.
        """
        if not self._state.serves(image):
            with image.admitted(), _missed(image, self._state.why_not(image)):
                return memoryview(await self._beside(image, offset, length))
        length = min(length, image.size - offset)
        if length <= 0:
            return memoryview(b"")
        into = memoryview(bytearray(length))
        if await self._cold_hit(image, offset, into):
            counters = image.counters
            counters.read_hits += 1
            counters.read_hit_bytes += length
            counters.ssd_reads += 1
            counters.ssd_read_bytes += length
            if image.marks:
                self._readahead.passed(image, offset, length)
            return into
        with image.admitted(), _missed(image, self._start_missing(image, offset, length)):
            self._readahead.missed(image, offset, length)
            # Held from here on: what is not stored is gone once it was fetched.
            blocks = self._geometry.blocks(offset, length)
            coming = {block: image.fetches.get(block) for block in blocks}
            whole = await self._brought(coming[blocks.start], offset, length)
            if whole is not None:
                image.counters.read_miss_bytes += length
                return whole
            done = 0
            for block, start, stop in self._geometry.split(offset, length):
                view = into[done : done + stop - start]
                got = await self._block(image, block, start, view, coming[block])
                done += got
                if got < stop - start:
                    break
            return into[:done]

    async def _brought(self, fetch: Fetch | None, offset: int, length: int) -> memoryview | None:
        """All of a read, uncopied, if this one fetch brings every page of it."""
        if fetch is None:
            return None
        await fetch.ready.wait()
        for block, start, stop in self._geometry.split(offset, length):
            if self._geometry.touched(start, stop) & ~fetch.pages.get(block, 0):
                return None  # by another one, or it failed
        return fetch.view(offset, length)

    async def _past(self, image: Image, offset: int, length: int) -> bytes:
        """Straight from the origin: the image is detached or the cache cannot be used."""
        spans: list[float] = []
        try:
            read = timed(image.origin.read, spans)
            data = await self._threads.harmless(image.limiter, read, offset, length)
        except OriginError as exc:
            image.counters.failed(exc)
            raise
        finally:
            image.counters.latency.add(Call.READ, spans)
        image.counters.origin_reads += 1
        image.counters.origin_read_bytes += len(data)
        image.counters.read_miss_bytes += len(data)
        image.counters.past_read_bytes += len(data)
        return data

    async def _beside(self, image: Image, offset: int, length: int) -> bytes:
        """As ``_past``, with what is dirty in the slots of a broken cache put over it."""
        if image.rescued or not self._degraded.holds(image):
            return await self._past(image, offset, length)
        blocks = self._geometry.blocks(offset, length)
        async with image.lock.span(blocks.start, blocks.stop):
            data = bytearray(await self._past(image, offset, length))
            if data:
                await self._degraded.overlay(image, offset, memoryview(data))
            return bytes(data)

    async def _cold_hit(self, image: Image, offset: int, into: memoryview) -> bool:
        """Everything is in slots but not in memory: one trip to a thread for all of it."""
        geometry = self._geometry
        located: list[Located] = []
        reads: list[tuple[int, int, int]] = []
        done = 0
        for block, start, stop in geometry.split(offset, len(into)):
            found = self._core.locate(image.id, block)
            need = geometry.touched(start, stop)
            if found is None or found.valid & need != need:
                return False
            located.append(found)
            position = (found.slot << geometry.block_shift) + start
            if reads and reads[-1][0] + reads[-1][2] == position:
                reads[-1] = (reads[-1][0], reads[-1][1], reads[-1][2] + stop - start)
            else:
                reads.append((position, done, stop - start))
            done += stop - start
        try:
            if not await self._arrived(reads, into):
                await self._threads.device(self._read_slots, reads, into)
        except (CacheDeviceError, OSError):
            return False  # block by block, to find the one that fails
        return all(self._core.unmoved(found) for found in located)

    async def _arrived(self, reads: list[tuple[int, int, int]], into: memoryview) -> bool:
        """Whether the device brings the pages within a few turns of the event loop.

        The attempt that found them missing has made the kernel fetch them, and an SSD takes less
        time for that than the way to a thread and back does.
        """
        left = list(reads)
        for _ in range(_TURNS):
            await trio.lowlevel.checkpoint()
            while left:
                position, at, length = left[-1]
                if not self._state.device.try_read(position, into[at : at + length]):
                    break
                left.pop()
            if not left:
                return True
        return False

    def _read_slots(self, reads: list[tuple[int, int, int]], into: memoryview) -> None:
        for position, at, length in reads:
            into[at : at + length] = self._state.device.read(position, length)

    def _start_missing(self, image: Image, offset: int, length: int) -> Reason:
        """Begins all fetches the span needs at once, one for each run of missing blocks.

        Returns why the cache cannot serve the span alone.
        """
        lacking = [
            block
            for block, start, stop in self._geometry.split(offset, length)
            if self._lacks(image, block, start, stop)
        ]
        for run in merged([block for block in lacking if block not in image.fetches]):
            self._fills.start(image, run)
        return Reason.COLD if lacking else Reason.CACHE_ERROR

    def _lacks(self, image: Image, block: int, start: int, stop: int) -> bool:
        need = self._geometry.touched(start, stop)
        return self._core.valid_pages(image.id, block) & need != need

    async def _block(
        self, image: Image, block: int, start: int, into: memoryview, fetch: Fetch | None
    ) -> int:
        """The bytes of one block from ``start`` on; returns how many there were.

        Args:
            fetch: that brings the block, if one was under way when the read began.
        """
        geometry = self._geometry
        for _ in range(_ATTEMPTS):
            need = geometry.touched(start, start + len(into))
            if self._core.dirty.lost(image.id, block) & need:
                raise LostDataError(f"block {block}: the cache device lost what was written")
            located = self._core.locate(image.id, block)
            if located is not None and located.valid & need == need:
                if await self._from_slot(image, located, start, into):
                    image.counters.read_hit_bytes += len(into)
                    image.counters.ssd_read_bytes += len(into)
                    return len(into)
                continue
            if fetch is None:
                fetch = image.fetches.get(block) or self._fills.start(
                    image, range(block, block + 1)
                )
            await fetch.ready.wait()
            if fetch.error is not None:
                if not fetch.ahead:
                    raise fetch.error
                fetch = None  # it may have been another block's
                continue
            got = await self._from_fetch(image, fetch, block, start, into)
            if got is not None:
                image.counters.read_miss_bytes += got
                return got
            fetch = None
        # Reclaimed again and again between fetch and copy, or beside a page that cannot be read:
        # read it where it cannot move, nor anything become clean between origin and slot.
        async with image.cleaning, image.lock.span(block, block + 1):
            base = block << geometry.block_shift
            data = await self._past(image, base + start, len(into))
            into[: len(data)] = data
            await self._degraded.overlay(image, base + start, into[: len(data)])
            return len(data)

    async def _from_slot(
        self, image: Image, located: Located, start: int, into: memoryview
    ) -> bool:
        """False if the slot moved or failed: clean trouble is a miss.

        Raises:
            LostDataError: dirty trouble is an error.
        """
        position = (located.slot << self._geometry.block_shift) + start
        try:
            data = await self._threads.device(self._state.device.read, position, len(into))
        except CacheDeviceError as exc:
            self._state.device_failed(exc)
            if self._core.unmoved(located):
                await self._slot_failed(image, located.slot, start, start + len(into))
            return False
        if not self._core.unmoved(located):
            return False
        into[:] = data
        return True

    async def _slot_failed(self, image: Image, slot: int, start: int, stop: int) -> None:
        """The slot is never used again: the origin has what is clean in it. What is dirty stays."""
        block, dirty = self._core.dirty.place(slot)
        self._core.retire(slot)
        asked = dirty & self._geometry.touched(start, stop)
        _, failed = await self._threads.device(self._dirty_reads.read, slot, asked)
        note_unreadable(image, block, asked, failed)
        if failed:
            raise LostDataError(f"block {block}: dirty data cannot be read from the cache device")

    async def _from_fetch(
        self, image: Image, fetch: Fetch, block: int, start: int, into: memoryview
    ) -> int | None:
        """Copies from a finished fetch, page by page where some pages were valid before it."""
        geometry = self._geometry
        base = block << geometry.block_shift
        need = geometry.touched(start, start + len(into))
        brought = fetch.pages.get(block, 0)
        located = self._core.locate(image.id, block)
        valid = 0 if located is None else located.valid
        ended = fetch.ended is not None and base + start + len(into) > fetch.ended
        if need & ~brought == 0 or (ended and not need & valid):
            return fetch.copy(base + start, into)
        if need & ~(brought | valid):
            return None  # gone from the cache meanwhile
        if located is None or not await self._from_slot(image, located, start, into):
            return None
        for begin, length in geometry.page_runs(need & brought):
            first, last = max(begin, start), min(begin + length, start + len(into))
            fetch.copy(base + first, into[first - start : last - start])
        return len(into)


@contextmanager
def _missed(image: Image, reason: Reason) -> Iterator[None]:
    """Around a read that the cache cannot serve alone: counts it and says why."""
    image.counters.read_misses += 1
    try:
        yield
    except OriginError:
        reason = Reason.ORIGIN_ERROR
        raise
    except LostDataError:
        reason = Reason.CACHE_ERROR
        raise
    finally:
        image.counters.not_cached[reason] += 1
