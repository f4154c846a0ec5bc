"""Discards: truncate, removal of the last name, and eviction (R6, P5).

Each excludes all other slow work on the image, takes the blocks out of the core and the
database stably, and only then lets anything past the cache.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fusecache.core.geometry import region_of
from fusecache.core.index import CacheIndex
from fusecache.engine.image import Image
from fusecache.engine.images import Images
from fusecache.engine.intents import WriteIntents
from fusecache.engine.ports import Invalidate, Threads
from fusecache.engine.state import CacheState
from fusecache.errors import DatabaseError, OriginError


class Discards:
    """What makes blocks of an image go on purpose."""

    def __init__(
        self,
        core: CacheIndex,
        state: CacheState,
        images: Images,
        intents: WriteIntents,
        threads: Threads,
        invalidate: Invalidate,
    ) -> None:
        self._core = core
        self._state = state
        self._images = images
        self._intents = intents
        self._threads = threads
        self._invalidate = invalidate

    async def truncate(self, image: Image, size: int) -> None:
        """Sets the size of an image that is open for writing.

        Origin first, origin sync, then the rows stably; nothing else happens to the image.

        Raises:
            OriginError: the origin failed; the blocks beyond ``size`` are gone all the same.
        """
        async with image.lock.everything():
            image.wrote = True
            if size >= image.size or not self._state.serves(image):
                await self._state.passable()
                await self._truncate_origin(image, size)
                return
            region = region_of(size >> self._core.geometry.block_shift)
            try:
                # The region of the new end is active, should we die between origin and rows.
                async with self._intents.writing(image, range(region, region + 1)):
                    await self._truncate_cached(image, size)
            except DatabaseError:
                await self._state.passable()
                await self._truncate_origin(image, size)

    async def _truncate_cached(self, image: Image, size: int) -> None:
        geometry = self._core.geometry
        block, tail = divmod(size, geometry.block_size)
        try:
            await self._truncate_origin(image, size)
        finally:
            # Whatever the origin said: it may have cut the file before it failed.
            if tail:
                self._core.clear(image.id, block, geometry.touched(tail, geometry.block_size))
            await self._images.drop(image, block + (1 if tail else 0))

    async def _truncate_origin(self, image: Image, size: int) -> None:
        try:
            await self._threads.run(image.origin.truncate, size, limiter=image.limiter)
            image.size = size
        except OriginError as exc:
            image.counters.failed(exc)
            raise
        finally:
            image.written += 1
        await self._intents.sync_origin(image)

    @asynccontextmanager
    async def removing(self, identity: bytes) -> AsyncIterator[bool]:
        """Around the removal of an image's last name: its blocks go, stably.

        Gives whether the image is known, so that the removal must be synced first. Handles that
        are open keep working, uncached.
        """
        image = self._images.find(identity)
        if image is None:
            yield False
            return
        async with image.opening, image.lock.everything():
            yield True
            image.detached = True
            await self._images.drop(image, 0)
            if not image.handles:
                await self._images.forget(image)

    async def evict(self, image: Image, path_fd: int | None = None) -> int:
        """Flushes an image and drops its blocks alone; returns how many were dropped.

        If it is open it is detached: uncached and written through until its last handle closes.
        Its blocks go before the first write can pass them. Then invalidation pushes out pages
        that guests changed in mappings; they arrive as writes, straight to the origin, before the
        origin sync. ``opening`` is free meanwhile, since the kernel may hold such pages back
        while it waits for an open or a truncate of the same image.

        Args:
            path_fd: a descriptor to open the image by for its sync, if nobody has it open.

        Raises:
            OriginError: the origin's sync failed; the image is detached but not evicted.
            DatabaseError: the rows could not be dropped.
        """
        async with image.opening, image.lock.everything():
            blocks = self._core.usage(image.id).blocks
            image.detached = True
            await self._images.drop(image, 0)
        await self._threads.kernel(self._invalidate, image.row.identity)
        async with image.opening:
            if self._images.find(image.row.identity) is image:
                async with image.lock.everything():
                    await self.sync(image, path_fd)
                if not image.handles:
                    await self._images.forget(image)
        if not self._state.usable:
            raise DatabaseError(f"the cache is degraded: {self._state.trouble}")
        return blocks

    async def sync(self, image: Image, path_fd: int | None = None) -> None:
        """Origin sync if anything was written since the last; see ``evict`` for ``path_fd``.

        Raises:
            OriginError: the origin failed.
        """
        if image.synced >= image.written:
            return
        if not image.origin_open:
            if path_fd is None:
                return  # the file is gone, or its last holder synced it
            await self._images.open_side(image, path_fd, write=False)
        await self._intents.sync_origin(image)
