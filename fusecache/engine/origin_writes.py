"""OriginWrites: what goes to the origin because a guest wrote it, and the sizes that follow."""

import errno
from collections.abc import Callable
from contextlib import nullcontext

from fusecache.core.index import CacheIndex
from fusecache.engine.image import Image
from fusecache.engine.ports import Threads
from fusecache.engine.state import CacheState
from fusecache.engine.storing import Storing
from fusecache.errors import CacheDeviceError, OriginError
from fusecache.observe.latency import Call, timed
from fusecache.store.cache_device import CacheDevice
from fusecache.store.syscalls import FALLOC_KEEP_SIZE


class OriginWrites:
    """Writes to the origin of images that are open for writing."""

    def __init__(
        self, core: CacheIndex, state: CacheState, threads: Threads, now: Callable[[], float]
    ) -> None:
        self._core = core
        self._geometry = core.geometry
        self._state = state
        self._threads = threads
        self._now = now

    async def extend(self, image: Image, size: int) -> None:
        """The origin's file is at least ``size`` long: sizes are always the origin's.

        One at a time, so that it is never made shorter than another one just made it.

        Raises:
            OriginError: it cannot be.
        """
        if size <= image.size:
            return
        async with image.extending:
            if size <= image.size:
                return
            image.wrote = True
            try:
                image.size = await self._threads.run(
                    image.origin.extend, size, limiter=image.limiter
                )
            except OriginError as exc:
                image.counters.failed(exc)
                raise
            finally:
                image.wrote_origin(data=False)
                image.last_write = self._now()

    def storing(self, image: Image, offset: int, data: bytes) -> Storing:
        """The pages of a write that are written whole, and the pieces of valid pages.

        A page that is neither stays invalid: a small write never fetches the rest of its page.
        While the origin keeps writes waiting, no new slots are taken for them.
        """
        storing = Storing(self._core, image.id)
        crowded = image.limiter.available_tokens == 0
        geometry = self._geometry
        view, done = memoryview(data), 0
        for block, start, stop in geometry.split(offset, len(data)):
            pages = geometry.covered(start, stop)
            valid = self._core.valid_pages(image.id, block)
            if crowded and not valid:
                pages = 0
            pages |= geometry.touched(start, stop) & valid
            for begin, length in geometry.page_runs(pages):
                first, last = max(begin, start), min(begin + length, stop)
                piece = view[done + first - start : done + last - start]
                if not storing.add(block, first, piece, geometry.touched(first, last)):
                    break
            done += stop - start
        return storing

    async def write(
        self, image: Image, offset: int, data: bytes, storing: Storing | None = None
    ) -> CacheDeviceError | None:
        """Origin first, then the slots, in one trip to a thread; returns the cache's error.

        Raises:
            OriginError: the origin failed; any part may have been written.
        """
        image.wrote = True
        image.last_write = self._now()
        spans: list[float] = []
        try:
            failed = await self._threads.run(
                _write_both,
                timed(image.origin.write, spans),
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
            image.wrote_origin(data=True)
            image.last_write = self._now()
            image.counters.latency.add(Call.WRITE, spans)
        image.size = max(image.size, offset + len(data))
        image.counters.origin_writes += 1
        image.counters.origin_write_bytes += len(data)
        return failed

    async def allocate(self, image: Image, mode: int, offset: int, length: int) -> None:
        """fallocate(2) on the origin. One that may make the file longer waits for others that do.

        Raises:
            OriginError: with EOPNOTSUPP nothing was changed, else any part may have been.
        """
        keeps = mode & FALLOC_KEEP_SIZE
        async with nullcontext() if keeps else image.extending:
            refused = False
            try:
                await self._threads.run(
                    image.origin.allocate, mode, offset, length, limiter=image.limiter
                )
            except OriginError as exc:
                refused = exc.errno == errno.EOPNOTSUPP
                if not refused:
                    image.counters.failed(exc)
                    await self._learn_size(image)
                raise
            finally:
                if not refused:
                    image.wrote = True
                    image.wrote_origin(data=True)
                    image.last_write = self._now()
            if not keeps:
                image.size = max(image.size, offset + length)
            image.counters.origin_others += 1

    async def _learn_size(self, image: Image) -> None:
        """After a call that failed half-way: part of it may have made the file longer."""
        try:
            seen = await self._threads.harmless(image.limiter, image.origin.attributes)
        except OriginError as exc:
            image.counters.failed(exc)
        else:
            image.size = max(image.size, seen.size)


def _write_both(
    write: Callable[..., None],
    offset: int,
    data: bytes,
    device: CacheDevice,
    storing: Storing | None,
) -> CacheDeviceError | None:
    write(offset, data)
    try:
        if storing is not None:
            storing.write(device)
    except CacheDeviceError as exc:
        return exc
    return None
