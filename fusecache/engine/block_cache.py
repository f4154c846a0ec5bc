"""BlockCache: the engine's door. Opens, reads, writes, syncs, evicts and stops.

One lives as long as its mount: ``async with open_cache(...) as cache``.
"""

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial

import trio

from fusecache.config import Tuning, WriteMode
from fusecache.core.geometry import region_of
from fusecache.core.index import CacheIndex
from fusecache.engine import recovery
from fusecache.engine.committer import Committer
from fusecache.engine.fills import Fills
from fusecache.engine.hit_path import HitPath
from fusecache.engine.housekeeping import Housekeeping
from fusecache.engine.image import Image
from fusecache.engine.images import Images
from fusecache.engine.intents import WriteIntents
from fusecache.engine.ports import Clock, Invalidate, Threads, no_pages
from fusecache.engine.reads import Reads
from fusecache.engine.reclaimer import Reclaimer
from fusecache.engine.state import CacheState
from fusecache.engine.writes import Writes
from fusecache.errors import DatabaseError, FusecacheError, OriginError
from fusecache.store.block_map import BlockMap
from fusecache.store.cache_device import CacheDevice
from fusecache.store.origin import OriginImage

log = logging.getLogger(__name__)


class BlockCache:
    """See the module. Built by ``open_cache`` alone."""

    def __init__(
        self,
        core: CacheIndex,
        device: CacheDevice,
        block_map: BlockMap,
        nursery: trio.Nursery,
        *,
        write_mode: WriteMode,
        tuning: Tuning,
        clock: Clock,
        threads: Threads,
        new_origin: Callable[[], OriginImage],
        invalidate: Invalidate,
    ) -> None:
        self.core = core
        self.device = device
        self.block_map = block_map
        self.write_mode = write_mode
        self.tuning = tuning
        self.threads = threads
        self.state = CacheState(device, tuning, clock.monotonic)
        self._invalidate = invalidate
        self.images = Images(
            core, self.state, threads, clock, tuning, write_mode, new_origin, invalidate
        )
        self.committer = Committer(
            core,
            device,
            block_map,
            self.images.all,
            threads,
            self.state.counters,
            tuning.whole_image_after,
            self.state.unusable,
        )
        self.images.committer = self.committer
        self._intents = WriteIntents(self.committer, threads, tuning, clock.monotonic)
        self._reclaimer = Reclaimer(core, self.committer, self.state)
        self._fills = Fills(core, self.state, threads, nursery, self._reclaimer.wake)
        self._reads = Reads(core, self.state, self._fills, threads)
        self._writes = Writes(
            core, self.state, self._intents, threads, clock.monotonic, self._reclaimer.wake
        )
        self.housekeeping = Housekeeping(
            core, self.state, self.images, self.committer, self._intents, clock, tuning
        )
        self.try_read = HitPath(core, self.state).try_read
        """See ``HitPath.try_read``."""

    # -- handles and data --------------------------------------------------------------------------

    async def open(self, identity: bytes, path: bytes, path_fd: int, *, write: bool) -> Image:
        """See ``Images.open``."""
        return await self.images.open(identity, path, path_fd, write=write)

    async def close(self, image: Image, *, write: bool) -> None:
        """Ends one ``open``."""
        await self.images.close(image, write=write)

    async def read(self, image: Image, offset: int, length: int) -> bytes:
        """Up to ``length`` bytes at ``offset``; fewer only at the end of the image.

        Raises:
            OriginError: the origin failed.
        """
        hit = self.try_read(image, offset, length)
        return bytes(hit) if hit is not None else await self._reads.read(image, offset, length)

    async def read_slowly(self, image: Image, offset: int, length: int) -> bytes:
        """As ``read``, for a caller whose ``try_read`` just said None."""
        return await self._reads.read(image, offset, length)

    async def write(self, image: Image, offset: int, data: bytes) -> int:
        """See ``Writes.write``."""
        return await self._writes.write(image, offset, data)

    async def fsync(self, image: Image, *, metadata: bool) -> None:
        """What was written and acknowledged is on stable storage (P2).

        The origin's sync and the barrier run side by side; write-through data needs only the
        first, but what changed in the cache is made stable with it (R1).

        Raises:
            OriginError: the origin's sync failed.
        """
        error: FusecacheError | None = None
        async with trio.open_nursery() as nursery:
            if image.cached_changed and self.state.usable:
                nursery.start_soon(self._barrier_for_guest)
            if metadata or image.synced < image.written:
                try:
                    await self._intents.sync_origin(image, metadata=metadata)
                except OriginError as exc:
                    error = exc
        if error is not None:
            raise error

    async def _barrier_for_guest(self) -> None:
        try:
            await self.committer.barrier()
        except FusecacheError as exc:
            # Clean data alone: the origin has it all, the guest's fsync stands.
            log.debug("no barrier: %s", exc)

    async def truncate(self, image: Image, size: int) -> None:
        """Sets the size of an image that is open for writing (R6).

        Origin first, origin sync, then the rows stably; nothing else happens to the image.
        """
        async with image.lock.everything():
            shrinks = size < image.size
            image.wrote = True
            if shrinks and self.state.serves(image):
                await self._truncate_cached(image, size)
            else:
                await self._truncate_origin(image, size)

    async def _truncate_cached(self, image: Image, size: int) -> None:
        block, tail = divmod(size, self.core.geometry.block_size)
        region = region_of(block)
        try:
            # The region of the new end is active, should we die between origin and rows.
            async with self._intents.writing(image, range(region, region + 1)):
                await self._truncate_origin(image, size)
                if tail:
                    geometry = self.core.geometry
                    self.core.clear(image.id, block, geometry.touched(tail, geometry.block_size))
                await self.images.drop(image, block + (1 if tail else 0))
        except DatabaseError:
            await self.state.fenced.wait()
            await self._truncate_origin(image, size)

    async def _truncate_origin(self, image: Image, size: int) -> None:
        image.written += 1
        run = self.threads.run
        await run(image.origin.truncate, size, limiter=image.limiter)
        image.size = size
        await self._intents.sync_origin(image)

    # -- names -------------------------------------------------------------------------------------

    @asynccontextmanager
    async def removing(self, identity: bytes) -> AsyncIterator[bool]:
        """Around the removal of an image's last name (R6): its blocks go, stably.

        Gives whether the image is known, so that the removal must be synced first. Handles that
        are open keep working, uncached.
        """
        image = self.images.find(identity)
        if image is None:
            yield False
            return
        async with image.opening, image.lock.everything():
            yield True
            image.detached = True
            await self.images.drop(image, 0)
            if not image.handles:
                await self._forget(image)

    async def _forget(self, image: Image) -> None:
        image.origin.close()
        self.images.forget(image)
        if self.state.usable:
            try:
                await self.committer.forget(image)
            except DatabaseError:
                await self.state.fenced.wait()

    async def evict(self, image: Image) -> int:
        """Flushes an image and drops its blocks alone; returns how many were dropped (P5).

        If it is open it is detached: uncached and written through until its last handle closes.
        Then invalidation pushes out pages that guests changed in mappings; they arrive as
        writes, straight to the origin, before the last origin sync.

        Raises:
            OriginError: the origin's sync failed; the image is detached but not evicted.
            DatabaseError: the rows could not be dropped.
        """
        async with image.opening:
            blocks = self.core.usage(image.id).blocks
            async with image.lock.everything():
                image.detached = True
            await self.threads.kernel(self._invalidate, image.row.identity)
            async with image.lock.everything():
                if image.synced < image.written and image.origin_open:
                    await self._intents.sync_origin(image)
                await self.images.drop(image, 0)
                image.intents.clear()
                image.whole_intent = False
            if not image.handles:
                image.detached = False
                await self._forget(image)
            if not self.state.usable:
                raise DatabaseError(f"the cache is degraded: {self.state.trouble}")
            return blocks

    async def flush(self, image: Image) -> None:
        """Everything acknowledged for the image is on the origin, synced; rows are stable."""
        if image.synced < image.written and image.origin_open:
            await self._intents.sync_origin(image)
        await self.committer.barrier()

    # -- starting and stopping ---------------------------------------------------------------------

    def start(self, nursery: trio.Nursery) -> None:
        """Starts what runs beside the requests."""
        nursery.start_soon(self.committer.run)
        nursery.start_soon(self._reclaimer.run)
        nursery.start_soon(self.housekeeping.run)
        nursery.start_soon(self._fence_when_broken)

    async def _fence_when_broken(self) -> None:
        """Once the cache is unusable: no write may pass it before the next start is warned."""
        await self.state.broken.wait()
        fence = partial(recovery.fence, self.device, self.block_map)
        worked = await self.committer.run_database(fence)
        if not worked:
            # P3 takes changes for ours up to 2 s after the last heartbeat, and none after.
            await trio.sleep(self.housekeeping.until_not_ours())
        self.state.fenced.set()

    async def aclose(self) -> None:
        """The clean stop; nobody uses the cache any more. Never raises for a cache in trouble."""
        for image in self.images.all():
            await self._intents.remove_old(image, older_than=0)
        if self.state.usable:
            try:
                await self.housekeeping.save_order()
                await self.committer.barrier()
                await self.committer.run_database(self.block_map.detach)
            except FusecacheError as exc:
                log.error("the cache could not be closed cleanly: %s", exc)
        for image in self.images.all():
            image.origin.close()


@asynccontextmanager
async def open_cache(
    device: CacheDevice,
    block_map: BlockMap,
    *,
    pid: int,
    mountpoint: bytes,
    origin: bytes,
    write_mode: WriteMode = WriteMode.THROUGH,
    tuning: Tuning | None = None,
    clock: Clock | None = None,
    threads: Threads | None = None,
    new_origin: Callable[[], OriginImage] = OriginImage,
    invalidate: Invalidate = no_pages,
    boot_id: str | None = None,
) -> AsyncIterator[BlockCache]:
    """Recovers and opens a cache; closes it cleanly at the end unless the body raised.

    Raises:
        CacheDeviceError, DatabaseError: the cache cannot be recovered; nothing was harmed.
    """
    tuning = tuning or Tuning()
    threads = threads or Threads(tuning)
    core = await threads.device(
        partial(
            recovery.recover,
            device,
            block_map,
            boot_id=boot_id or recovery.boot_id(),
            pid=pid,
            mountpoint=mountpoint,
            origin=origin,
        )
    )
    async with trio.open_nursery() as nursery:
        cache = BlockCache(
            core,
            device,
            block_map,
            nursery,
            write_mode=write_mode,
            tuning=tuning,
            clock=clock or Clock(),
            threads=threads,
            new_origin=new_origin,
            invalidate=invalidate,
        )
        cache.images.load(
            await threads.database(block_map.images), await threads.database(block_map.intents)
        )
        cache.start(nursery)
        yield cache
        with trio.CancelScope(shield=True):
            await cache.aclose()
        nursery.cancel_scope.cancel()
