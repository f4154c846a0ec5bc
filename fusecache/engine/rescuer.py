"""The rescuer: fences a broken cache, and brings what is dirty in it to the origin."""

import logging
from contextlib import suppress
from functools import partial

import trio

from fusecache.core.index import CacheIndex
from fusecache.engine import recovery
from fusecache.engine.cleaner import Cleaner
from fusecache.engine.committer import Committer
from fusecache.engine.degraded import Degraded
from fusecache.engine.housekeeping import Housekeeping
from fusecache.engine.image import Image
from fusecache.engine.images import Images
from fusecache.engine.state import UNEXPECTED, CacheState
from fusecache.errors import CacheDeviceError, FusecacheError, OriginError
from fusecache.store.block_map import BlockMap

log = logging.getLogger(__name__)


class Rescuer:
    """Works once, if the cache breaks; see ``degraded`` for what guests are given meanwhile.

    Args:
        nursery: the engine's.
    """

    def __init__(
        self,
        core: CacheIndex,
        state: CacheState,
        block_map: BlockMap,
        images: Images,
        committer: Committer,
        cleaner: Cleaner,
        housekeeping: Housekeeping,
        degraded: Degraded,
        nursery: trio.Nursery,
    ) -> None:
        self._core = core
        self._state = state
        self._block_map = block_map
        self._images = images
        self._committer = committer
        self._cleaner = cleaner
        self._housekeeping = housekeeping
        self._degraded = degraded
        self._nursery = nursery
        self._rescuing = trio.CancelScope()

    async def run(self) -> None:
        """Once the cache is unusable: no write may pass it before the next start is warned.

        Then what is dirty is rescued; when all of it is on the origin, nothing in the slots
        counts any more.
        """
        await self._state.broken.wait()
        # What the device could not keep is lost from here on, and must not be rescued as it was
        # before. After a failed sync that is so already; else the fence would be told of it.
        if not isinstance(self._committer.broken, CacheDeviceError):
            with suppress(CacheDeviceError):
                await self._committer.sync_slots()
        held = self._core.dirty.any_held
        rows = self._core.take_owed()
        worked = await self._committer.fence(
            partial(
                recovery.fence,
                self._state.device,
                self._block_map,
                rows,
                dirty=held,
            )
        )
        if not worked:
            # P3 takes changes for ours up to 2 s after the last heartbeat, and none after.
            await trio.sleep(self._housekeeping.until_not_ours())
        self._state.emptied = worked and not held
        self._state.fenced.set()
        if held:
            self._nursery.start_soon(self._rescue_all)

    def cancel(self) -> None:
        """Nothing more is rescued; what is fenced stays so."""
        self._rescuing.cancel()

    async def _rescue_all(self) -> None:
        """Every image by itself, again and again with growing pauses, until the origin has
        everything."""
        with self._rescuing:
            async with trio.open_nursery() as nursery:
                for image in self._images.all():
                    if self._degraded.counts(image):
                        nursery.start_soon(self._rescue, image)
            try:
                device = self._state.device
                empty = partial(recovery.fence, device, self._block_map, None, dirty=False)
                self._state.emptied = await self._committer.fence(empty)
            except Exception as exc:
                self._state.unexpected(exc, "fencing an empty cache")
            if self._state.emptied:
                log.warning("everything that was dirty is on the origin")

    async def _rescue(self, image: Image) -> None:
        pause = self._state.tuning.clean_pause
        while not image.rescued and self._degraded.counts(image):
            try:
                await self._degraded.rescue(image)
                continue
            except FusecacheError as exc:
                self._cleaner.failed(image, exc)
            except Exception as exc:
                self._state.unexpected(exc, "rescuing what is dirty")
                self._cleaner.failed(image, OriginError(5, UNEXPECTED))
            await trio.sleep(pause)
            pause = min(self._state.tuning.clean_pause_most, pause * 2)
