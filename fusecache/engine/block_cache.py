"""BlockCache: the engine's door. Opens, reads, writes, syncs, evicts and stops.

One lives as long as its mount: ``async with open_cache(...) as cache``.
"""

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial

import trio

from fusecache.config import Tuning, WriteMode
from fusecache.core.index import CacheIndex
from fusecache.engine import recovery
from fusecache.engine.committer import Committer
from fusecache.engine.discards import Discards
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
from fusecache.errors import FusecacheError, OriginError
from fusecache.store.block_map import BlockMap
from fusecache.store.cache_device import CacheDevice
from fusecache.store.origin import OriginImage

log = logging.getLogger(__name__)

_DRAINING = 10.0
"""Seconds a clean stop waits for fetches under way."""


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
        self._nursery = nursery
        self._background = trio.CancelScope()
        self._background_ended = trio.Event()
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
            clock,
            tuning.whole_image_after,
            self.state.unusable,
        )
        self.images.committer = self.committer
        self._intents = WriteIntents(
            self.committer,
            threads,
            tuning,
            clock.monotonic,
            lambda image: nursery.start_soon(self._distrust, image),
        )
        self._reclaimer = Reclaimer(core, self.committer, self.state)
        self._fills = Fills(core, self.state, threads, nursery, self._reclaimer.wake)
        self._reads = Reads(core, self.state, self._fills, threads)
        self._writes = Writes(
            core, self.state, self._intents, threads, clock.monotonic, self._reclaimer.wake
        )
        self.housekeeping = Housekeeping(
            core, self.state, self.images, self.committer, self._intents, clock, tuning
        )
        self._discards = Discards(core, self.state, self.images, self._intents, threads, invalidate)
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

    async def flush(self, image: Image, path_fd: int | None = None) -> None:
        """Everything acknowledged for the image is on the origin, synced; rows are stable.

        Raises:
            OriginError, DatabaseError, CacheDeviceError: not so.
        """
        await self._discards.sync(image, path_fd)
        await self.committer.barrier()

    async def flush_all(self) -> None:
        """``flush`` of every image, side by side: one that stalls holds up no other (P6)."""
        async with trio.open_nursery() as nursery:
            for image in self.images.all():
                nursery.start_soon(self._sync_at_end, image)
        await self._barrier_for_guest()

    async def _sync_at_end(self, image: Image) -> None:
        try:
            await self._discards.sync(image)
        except OriginError as exc:
            log.error("the origin could not be synced: %s", exc)

    async def _distrust(self, image: Image) -> None:
        """After a failed origin sync the kernel may have dropped what was written: the cache
        would be newer than the origin, and go back in time when a block leaves it."""
        async with image.opening:
            await self.images.discard(image, 0)

    async def _barrier_for_guest(self) -> None:
        try:
            await self.committer.barrier()
        except FusecacheError as exc:
            # Clean data alone: the origin has it all, the guest's fsync stands.
            log.debug("no barrier: %s", exc)

    # -- discarding --------------------------------------------------------------------------------

    async def truncate(self, image: Image, size: int) -> None:
        """See ``Discards.truncate``."""
        await self._discards.truncate(image, size)

    async def evict(self, image: Image, path_fd: int | None = None) -> int:
        """See ``Discards.evict``."""
        return await self._discards.evict(image, path_fd)

    def removing(self, identity: bytes) -> AbstractAsyncContextManager[bool]:
        """See ``Discards.removing``."""
        return self._discards.removing(identity)

    # -- starting and stopping ---------------------------------------------------------------------

    def start(self) -> None:
        """Starts what runs beside the requests."""
        self._nursery.start_soon(self.committer.run)
        self._nursery.start_soon(self._run_background)
        self._nursery.start_soon(self._fence_when_broken)

    async def _run_background(self) -> None:
        with self._background:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._reclaimer.run)
                nursery.start_soon(self.housekeeping.run)
        self._background_ended.set()

    async def _fence_when_broken(self) -> None:
        """Once the cache is unusable: no write may pass it before the next start is warned."""
        await self.state.broken.wait()
        worked = await self.committer.fence(partial(recovery.fence, self.device, self.block_map))
        if not worked:
            # P3 takes changes for ours up to 2 s after the last heartbeat, and none after.
            await trio.sleep(self.housekeeping.until_not_ours())
        self.state.fenced.set()

    async def aclose(self) -> None:
        """The clean stop; nobody uses the cache any more. Never raises for a cache in trouble.

        First everything that makes rows ends, so that the last barrier takes in all of them.
        """
        self._background.cancel()
        await self._background_ended.wait()
        with trio.move_on_after(_DRAINING) as draining:
            await self._fills.drained()
        if draining.cancelled_caught:
            log.error("reads still wait for the origin: the cache is left as after a kill")
            return
        for image in self.images.all():
            await self.images.end(image)
            await self._sync_at_end(image)
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
        cache.start()
        yield cache
        with trio.CancelScope(shield=True):
            await cache.aclose()
        nursery.cancel_scope.cancel()
