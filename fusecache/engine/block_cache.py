"""BlockCache: the engine's door. Opens, reads, writes, syncs, evicts and stops.

One lives as long as its mount: ``async with open_cache(...) as cache``.
"""

import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import Any

import trio

from fusecache.config import Policy, Rule, Tuning, WriteMode
from fusecache.core.index import CacheIndex
from fusecache.engine import recovery
from fusecache.engine.cleaner import Cleaner
from fusecache.engine.closing import Closing
from fusecache.engine.committer import Committer
from fusecache.engine.degraded import Degraded
from fusecache.engine.dirty_writes import DirtyWrites
from fusecache.engine.discards import Discards, Removal
from fusecache.engine.distrust import Distrust
from fusecache.engine.dropping import Dropping
from fusecache.engine.fills import Fills
from fusecache.engine.flushes import Flushes
from fusecache.engine.hit_path import HitPath
from fusecache.engine.holes import Holes
from fusecache.engine.housekeeping import Housekeeping
from fusecache.engine.image import Image
from fusecache.engine.images import Images
from fusecache.engine.in_place import InPlace
from fusecache.engine.intents import WriteIntents
from fusecache.engine.lasting import Lasting
from fusecache.engine.names import Names
from fusecache.engine.opening import Opening
from fusecache.engine.origin_writes import OriginWrites
from fusecache.engine.ownership import Ownership
from fusecache.engine.ports import Clock, Invalidate, Pin, Threads, no_image, no_pages
from fusecache.engine.readahead import Readahead
from fusecache.engine.reads import Reads
from fusecache.engine.reclaimer import Reclaimer
from fusecache.engine.rescuer import Rescuer
from fusecache.engine.rule_follower import RuleFollower
from fusecache.engine.sampler import Sampler
from fusecache.engine.seeks import Seeks
from fusecache.engine.slot_io import SlotIO
from fusecache.engine.state import CacheState
from fusecache.engine.truth import Truth
from fusecache.engine.write_modes import WriteModes
from fusecache.engine.writes import Write, Writes
from fusecache.errors import DatabaseError, FusecacheError, OriginError
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
        policy: Policy,
        tuning: Tuning,
        clock: Clock,
        threads: Threads,
        new_origin: Callable[[], OriginImage],
        invalidate: Invalidate,
        pin: Pin,
    ) -> None:
        self.core = core
        self.device = device
        self.block_map = block_map
        self.tuning = tuning
        self.threads = threads
        self.state = CacheState(device, tuning, clock.monotonic)
        self.state.shut = core.gates.shut
        self._nursery = nursery
        self._background = trio.CancelScope()
        self._background_ended = trio.Event()
        state = self.state
        self.images = images = Images(core, state, threads, tuning, policy, new_origin)
        here = InPlace(clock.monotonic)
        self.committer = committer = Committer(
            core,
            device,
            block_map,
            images.all,
            threads,
            state.counters,
            clock,
            tuning,
            here,
            state.unusable,
        )
        dropping = Dropping(core, state, committer, threads)
        distrust = Distrust(nursery, state, images, dropping)
        self.lasting = lasting = Lasting(nursery, state, threads, distrust.begin)
        self.truth = truth = Truth(
            core, images, dropping, lasting, threads, clock, tuning, invalidate
        )
        ownership = Ownership(
            core, state, images, committer, dropping, lasting, truth, threads, clock, tuning, pin
        )
        self._opening = Opening(core, images, ownership, truth, clock, tuning)
        self.closing = closing = Closing(
            core, state, images, committer, lasting, ownership, threads, clock, tuning
        )
        self.names = Names(core, images, committer)
        self._intents = intents = WriteIntents(committer, threads, tuning, clock.monotonic, lasting)
        self.reclaimer = Reclaimer(core, committer, state)
        self._fills = Fills(core, state, threads, nursery, self.reclaimer.wake)
        self._readahead = readahead = Readahead(core, state, self._fills)
        slots = SlotIO(device, threads, here)
        origin = OriginWrites(core, state, threads, clock.monotonic)
        dirty = DirtyWrites(core, state, committer, intents, threads, slots)
        degraded = Degraded(
            core, state, committer, intents, lasting, origin, threads, ownership.adopted
        )
        self._reads = Reads(core, state, self._fills, readahead, degraded, threads)
        self._writes = Writes(core, state, intents, origin, dirty, degraded, self.reclaimer.wake)
        self._holes = Holes(
            core, state, committer, intents, lasting, origin, degraded, self._writes.put
        )
        self._seeks = Seeks(core, state, threads)
        self.cleaner = cleaner = Cleaner(
            core, state, images, ownership, committer, lasting, threads, clock, tuning
        )
        self.housekeeping = housekeeping = Housekeeping(
            core, state, images, ownership, truth, closing, committer, intents, clock, tuning
        )
        self._discards = discards = Discards(
            core,
            state,
            images,
            dropping,
            lasting,
            ownership,
            truth,
            closing,
            intents,
            cleaner,
            degraded,
            threads,
            invalidate,
        )
        self._flushes = flushes = Flushes(
            core, state, images, committer, lasting, cleaner, discards, degraded, truth, threads
        )
        self._write_modes = WriteModes(images, committer, flushes.flush)
        self._follower = RuleFollower(
            state, images, closing, threads, pin, discards.evict, self._write_modes.change
        )
        self._rescuer = Rescuer(
            core, state, block_map, images, committer, cleaner, housekeeping, degraded, nursery
        )
        self.lane_counters: Callable[[], dict[str, Any]] | None = None
        """What the lane counted, if there is one; see ``Lane.counters``."""
        self.sampler = Sampler(images, state, clock)
        """Whoever serves requests has it run."""
        hits = HitPath(core, state, slots, readahead)
        self.try_read = hits.try_read
        """See ``HitPath.try_read``."""
        self.try_write = hits.try_write
        """See ``HitPath.try_write``."""

    # -- settings ----------------------------------------------------------------------------------

    @property
    def write_mode(self) -> WriteMode:
        """That of images for which neither a rule nor a setting of their own says another."""
        return self.images.policy.write_mode

    def apply(self, tuning: Tuning, policy: Policy) -> None:
        """From now on these hold. Of ``tuning`` only how much may be dirty, when and how fast it is
        written back, and readahead can change while the cache is open.

        Images are brought in line with the policy one after the other, beside the requests.
        """
        self.tuning = self.state.tuning = tuning
        self.cleaner.apply(tuning)
        self._readahead.apply(tuning)
        self._writes.apply(tuning)
        self.images.policy = policy
        self._follower.wake()

    # -- handles and data --------------------------------------------------------------------------

    async def open(self, identity: bytes, path: bytes, path_fd: int, *, write: bool) -> Image:
        """See ``Opening.open``."""
        return await self._opening.open(identity, path, path_fd, write=write)

    async def close(self, image: Image, *, write: bool) -> None:
        """Ends one ``open``."""
        await self.closing.close(image, write=write)

    async def read(self, image: Image, offset: int, length: int) -> bytes:
        """Up to ``length`` bytes at ``offset``; fewer only at the end of the image.

        Raises:
            OriginError: the origin failed.
        """
        hit = self.try_read(image, offset, length)
        return bytes(await self._reads.read(image, offset, length) if hit is None else hit)

    async def read_slowly(self, image: Image, offset: int, length: int) -> memoryview:
        """As ``read``, for a caller whose ``try_read`` just said None."""
        return await self._reads.read(image, offset, length)

    async def write(self, image: Image, offset: int, data: bytes) -> int:
        """See ``Writes.write``."""
        if self.try_write(image, offset, data):
            return len(data)
        return await self._writes.write(image, offset, data)

    def write_at_once(self, wanted: Sequence[Write]) -> list[bool]:
        """What needs no wait of writes that nobody has answered yet; those that ``try_write`` just
        refused. Says which are done; of the others nothing is written."""
        return self._writes.at_once(wanted)

    async def write_slowly(self, image: Image, offset: int, data: bytes) -> int:
        """As ``write``, for a caller whose ``try_write`` just said no."""
        return await self._writes.write(image, offset, data)

    async def allocate(self, image: Image, mode: int, offset: int, length: int) -> None:
        """See ``Holes.allocate``."""
        await self._holes.allocate(image, mode, offset, length)

    async def seek(self, image: Image, offset: int, whence: int) -> int:
        """See ``Seeks.seek``."""
        return await self._seeks.seek(image, offset, whence)

    async def lane_sync_failed(self, error: int) -> None:
        """See ``Flushes.lane_sync_failed``."""
        await self._flushes.lane_sync_failed(error)

    async def fsync(self, image: Image, *, metadata: bool) -> None:
        """See ``Flushes.fsync``."""
        await self._flushes.fsync(image, metadata=metadata)

    async def flush(
        self, image: Image, path_fd: int | None = None, *, overwrite: bool = False
    ) -> None:
        """See ``Flushes.flush``."""
        await self._flushes.flush(image, path_fd, overwrite=overwrite)

    async def flush_all(self) -> list[tuple[Image, FusecacheError]]:
        """See ``Flushes.flush_all``."""
        return await self._flushes.flush_all()

    def drain(self) -> None:
        """The mount is about to end: no page becomes dirty that was not, in any image."""
        self.state.draining = True

    def undrain(self) -> None:
        """It is not."""
        self.state.draining = False

    @property
    def dirty_bytes(self) -> int:
        """What the origin has not, of all images."""
        if self.state.usable:
            return self.core.dirty.all_pages << self.core.geometry.page_shift
        return sum(map(self.dirty_bytes_of, self.images.all()))

    def dirty_bytes_of(self, image: Image) -> int:
        """What the origin has not of an image. In a broken cache what was brought there may stay
        dirty in its slots, and counts no more."""
        return 0 if image.rescued else self.kept_bytes_of(image)

    def kept_bytes_of(self, image: Image) -> int:
        """What the next start takes for dirty, whether or not the origin has it by now."""
        return 0 if self.state.emptied else self.core.dirty_bytes(image.id)

    async def look_for_database(self) -> str | None:
        """What became of the database, if its path leads to it no more; else None.

        No start would find what it takes from then on, so the cache counts as broken: what is
        dirty is rescued to the origin.
        """
        gone = await self.threads.database(self.block_map.gone)
        if gone is not None and self.state.usable:
            self.committer.give_up(DatabaseError(f"its database {gone}"))
        return gone

    async def set_write_mode(self, image: Image, mode: WriteMode | None) -> None:
        """From now on the image is written in this mode; None means the mount's own.

        Leaving write-back flushes first; what fails of that stays dirty and is tried again.

        Raises:
            OriginError, LostDataError, DatabaseError, CacheDeviceError: not all is on the origin,
                or the mode is not stable in the database.
        """
        image = await self._write_modes.set(image, mode)
        if mode is None:
            await self._follower.follow(image)

    # -- discarding --------------------------------------------------------------------------------

    async def truncate(self, image: Image, size: int) -> None:
        """See ``Discards.truncate``."""
        await self._discards.truncate(image, size)

    async def evict(
        self,
        image: Image,
        path_fd: int | None = None,
        *,
        discard_dirty: bool = False,
    ) -> int:
        """See ``Discards.evict``."""
        return await self._discards.evict(image, path_fd, discard_dirty=discard_dirty)

    async def evict_closed(self, image: Image, path_fd: int | None = None) -> int:
        """See ``Discards.evict_closed``."""
        return await self._discards.evict_closed(image, path_fd)

    def removing(self, identity: bytes) -> AbstractAsyncContextManager[Removal | None]:
        """See ``Discards.removing``."""
        return self._discards.removing(identity)

    # -- starting and stopping ---------------------------------------------------------------------

    def start(self) -> None:
        """Starts what runs beside the requests."""
        self._nursery.start_soon(self.committer.run)
        self._nursery.start_soon(self._run_background)
        self._nursery.start_soon(self._rescuer.run)

    async def _run_background(self) -> None:
        try:
            with self._background:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self.reclaimer.run)
                    nursery.start_soon(self.housekeeping.run)
                    nursery.start_soon(self.cleaner.run)
                    nursery.start_soon(self._follower.run)
        finally:
            self._background_ended.set()

    async def aclose(self) -> None:
        """The clean stop; nobody uses the cache any more. Never raises for a cache in trouble.

        First everything that makes rows ends, so that the last barrier takes in all of them.
        """
        await self.housekeeping.settle_all()
        self._background.cancel()
        self._rescuer.cancel()
        await self._background_ended.wait()
        with trio.move_on_after(_DRAINING) as draining:
            await self._fills.drained()
        if draining.cancelled_caught:
            log.error("reads still wait for the origin: the cache is left as after a kill")
            return
        async with trio.open_nursery() as nursery:
            for image in self.images.all():
                nursery.start_soon(self._end_image, image)
        if self.state.usable:
            try:
                await self.housekeeping.save_order()
                await self.committer.heartbeat()  # nothing on the origin is changed from here on
                await self.committer.barrier()
                await self.committer.run_database(self.block_map.detach)
            except FusecacheError as exc:
                log.error("the cache could not be closed cleanly: %s", exc)
        async with trio.open_nursery() as nursery:
            for image in self.images.all():
                nursery.start_soon(self.lasting.close, image)

    async def _end_image(self, image: Image) -> None:
        await self.closing.end(image)
        await self._sync_at_end(image)
        await self._intents.remove_old(image, older_than=0)

    async def _sync_at_end(self, image: Image) -> None:
        try:
            await self._discards.sync(image)
        except OriginError as exc:
            log.error("the origin could not be synced: %s", exc)


@asynccontextmanager
async def open_cache(
    device: CacheDevice,
    block_map: BlockMap,
    *,
    pid: int,
    mountpoint: bytes,
    origin: bytes,
    write_mode: WriteMode = WriteMode.THROUGH,
    rules: tuple[Rule, ...] = (),
    tuning: Tuning | None = None,
    clock: Clock | None = None,
    threads: Threads | None = None,
    new_origin: Callable[[], OriginImage] = OriginImage,
    invalidate: Invalidate = no_pages,
    pin: Pin = no_image,
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
            policy=Policy(write_mode, rules),
            tuning=tuning,
            clock=clock or Clock(),
            threads=threads,
            new_origin=new_origin,
            invalidate=invalidate,
            pin=pin,
        )
        cache.images.load(
            await threads.database(block_map.images), await threads.database(block_map.intents)
        )
        cache.start()
        yield cache
        with trio.CancelScope(shield=True):
            await cache.aclose()
        nursery.cancel_scope.cancel()
