"""Writes, write-through and write-around, and what changes an image's size.

Write-through: origin, then slot, then the answer. Write-around: valid bits cleared, then origin.
Either way the origin has the data when the guest is told so (P1, P4).
"""

import logging
from collections.abc import Callable

from fusecache.config import WriteMode
from fusecache.core.geometry import region_of
from fusecache.core.index import CacheIndex
from fusecache.engine.image import Image
from fusecache.engine.intents import WriteIntents
from fusecache.engine.ports import Threads
from fusecache.engine.state import CacheState
from fusecache.engine.storing import Storing
from fusecache.errors import CacheDeviceError, DatabaseError, OriginError
from fusecache.store.cache_device import CacheDevice
from fusecache.store.origin import OriginImage

log = logging.getLogger(__name__)


class Writes:
    """Carries out writes of images that are open for writing."""

    def __init__(
        self,
        core: CacheIndex,
        state: CacheState,
        intents: WriteIntents,
        threads: Threads,
        now: Callable[[], float],
        wake_reclaimer: Callable[[], None],
    ) -> None:
        self._core = core
        self._geometry = core.geometry
        self._state = state
        self._intents = intents
        self._threads = threads
        self._now = now
        self._wake_reclaimer = wake_reclaimer

    async def write(self, image: Image, offset: int, data: bytes) -> int:
        """Writes all of ``data``; returns its length.

        Raises:
            OriginError: the origin failed. The cached copy of those pages is gone.
        """
        if not data:
            return 0
        blocks = self._geometry.blocks(offset, len(data))
        with image.admitted():
            async with image.lock.span(blocks.start, blocks.stop):
                if not await self._write_cached(image, offset, data, blocks):
                    await self._to_origin(image, offset, data, None)
            image.counters.write_bytes += len(data)
        return len(data)

    async def _write_cached(self, image: Image, offset: int, data: bytes, blocks: range) -> bool:
        """The write with the cache in the picture; False if the cache is not to be used."""
        if not self._state.serves(image):
            await self._state.passable()
            return False
        regions = range(region_of(blocks.start), region_of(blocks.stop - 1) + 1)
        try:
            async with self._intents.writing(image, regions):
                image.cached_changed = True
                if image.write_mode is WriteMode.AROUND or not self._state.stores(image):
                    self._clear(image, offset, len(data))
                    await self._to_origin(image, offset, data, None)
                else:
                    await self._through(image, offset, data)
        except DatabaseError:
            # The intent could not be recorded; the state is unusable and being fenced.
            await self._state.passable()
            return False
        return True

    async def _through(self, image: Image, offset: int, data: bytes) -> None:
        with Storing(self._core, image.id) as storing:
            self._collect(image, offset, data, storing)
            self._wake_reclaimer()
            try:
                failed = await self._to_origin(image, offset, data, storing)
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

    def _clear(self, image: Image, offset: int, length: int) -> None:
        """No page touched by the span is valid any more."""
        for block, start, stop in self._geometry.split(offset, length):
            self._core.clear(image.id, block, self._geometry.touched(start, stop))

    def _collect(self, image: Image, offset: int, data: bytes, storing: Storing) -> None:
        """Gives ``storing`` the pages that are written whole, and the pieces of valid pages.

        A page that is neither stays invalid: a small write never fetches the rest of its page.
        While the origin keeps writes waiting, no new slots are taken for them.
        """
        crowded = image.limiter.available_tokens == 0
        geometry = self._geometry
        view, done = memoryview(data), 0
        for block, start, stop in geometry.split(offset, len(data)):
            pages = geometry.covered(start, stop)
            if crowded and not self._core.valid_pages(image.id, block):
                pages = 0
            pages |= geometry.touched(start, stop) & self._core.valid_pages(image.id, block)
            for begin, length in geometry.page_runs(pages):
                first, last = max(begin, start), min(begin + length, stop)
                piece = view[done + first - start : done + last - start]
                if not storing.add(block, first, piece, geometry.touched(first, last)):
                    break
            done += stop - start

    async def _learn_size(self, image: Image) -> None:
        """After a write that failed half-way: part of it may have made the file longer."""
        try:
            seen = await self._threads.harmless(image.limiter, image.origin.attributes)
        except OriginError as exc:
            image.counters.failed(exc)
        else:
            image.size = max(image.size, seen.size)

    async def _to_origin(
        self, image: Image, offset: int, data: bytes, storing: Storing | None
    ) -> CacheDeviceError | None:
        """Origin first, then the slots, in one trip to a thread; returns the cache's error."""
        image.wrote = True
        image.last_write = self._now()
        try:
            failed = await self._threads.run(
                _write_both,
                image.origin,
                offset,
                data,
                self._state.device,
                storing,
                limiter=image.limiter,
            )
        except OriginError as exc:
            image.counters.failed(exc)
            await self._learn_size(image)
            raise
        finally:
            image.written += 1
            image.last_write = self._now()
        image.size = max(image.size, offset + len(data))
        image.counters.origin_writes += 1
        image.counters.origin_write_bytes += len(data)
        return failed


def _write_both(
    origin: OriginImage, offset: int, data: bytes, device: CacheDevice, storing: Storing | None
) -> CacheDeviceError | None:
    origin.write(offset, data)
    try:
        if storing is not None:
            storing.write(device)
    except CacheDeviceError as exc:
        return exc
    return None
