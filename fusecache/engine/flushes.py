"""Flushes: fsync, and what operators and the end of a mount ask for besides (P2)."""

import logging
from contextlib import suppress

import trio

from fusecache.core.index import CacheIndex
from fusecache.engine.cleaner import Cleaner
from fusecache.engine.committer import Committer
from fusecache.engine.degraded import Degraded
from fusecache.engine.discards import Discards
from fusecache.engine.image import Image
from fusecache.engine.images import Images
from fusecache.engine.lasting import Lasting
from fusecache.engine.ports import Threads
from fusecache.engine.state import CacheState
from fusecache.engine.truth import Truth
from fusecache.errors import FusecacheError, OriginError

log = logging.getLogger(__name__)


class Flushes:
    """What makes things stable, in the cache or on the origin."""

    def __init__(
        self,
        core: CacheIndex,
        state: CacheState,
        images: Images,
        committer: Committer,
        lasting: Lasting,
        cleaner: Cleaner,
        discards: Discards,
        degraded: Degraded,
        truth: Truth,
        threads: Threads,
    ) -> None:
        self._core = core
        self._state = state
        self._images = images
        self._committer = committer
        self._lasting = lasting
        self._cleaner = cleaner
        self._discards = discards
        self._degraded = degraded
        self._truth = truth
        self._threads = threads
        self._lane_failed = False

    async def lane_sync_failed(self, error: int) -> None:
        """A sync of the cache device by the lane failed with this errno. It tells so with every
        fsync that waited for that sync, and begins no other.

        What was not stable yet is lost. So is the cache: the next sync of ours fails, too.
        """
        if self._lane_failed:
            return
        self._lane_failed = True
        usable = self._state.usable
        # Before anything is awaited: if the database fails as well, no barrier gets as far as the
        # device, and what is lost would be taken for rescued.
        self._committer.sync_failed(self._core.dirty.sync_begins())
        if usable:
            self._state.device.owe(error)
            with suppress(FusecacheError):  # told as every failed barrier is
                await self._committer.barrier()

    async def fsync(self, image: Image, *, metadata: bool) -> None:
        """What was written and acknowledged is on stable storage (P2).

        The origin's sync and the barrier run side by side: the one for what went to the origin,
        the other for what changed in the cache (R1).

        Raises:
            OriginError: the origin's sync failed, or one that no guest asked for since the last.
            CacheDeviceError, DatabaseError, LostDataError: what the cache alone has is not stable.
        """
        errors: list[FusecacheError] = []
        if image.synced >= image.guest_written:
            await self._make_stable(image, errors)
        else:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._make_stable, image, errors)
                try:
                    await self._lasting.sync(image, metadata=metadata)
                except OriginError as exc:
                    errors.append(exc)
        if image.sync_error_owed:
            image.sync_error_owed = False
            errors.append(OriginError(5, "a sync of the origin failed since the last fsync"))
        if errors:
            raise errors[0]
        image.fsynced()

    async def _make_stable(self, image: Image, errors: list[FusecacheError]) -> None:
        try:
            if self._state.usable and not image.detached:
                await self._committer.make_stable(image)
        except FusecacheError as exc:
            # Of clean data the origin has all, and the guest's fsync stands.
            log.debug("no barrier: %s", exc)
            if self._state.usable and self._core.dirty.holds(image.id):
                errors.append(exc)
        try:
            if not self._state.usable:
                await self._stable_without_map(image)
        except FusecacheError as exc:
            errors.append(exc)

    async def _stable_without_map(self, image: Image) -> None:
        """The cache is broken: what is dirty is brought to the origin, and the slots are synced
        if the next start may believe them."""
        await self._state.passable()
        if self._degraded.counts(image):
            await self._degraded.rescue(image)
            if self._degraded.counts(image):
                await self._committer.sync_slots()

    async def flush(
        self, image: Image, path_fd: int | None = None, *, overwrite: bool = False
    ) -> None:
        """Everything acknowledged for the image is on the origin, synced; rows are stable.

        Args:
            overwrite: also over what others changed, see ``Truth.look_elsewhere``.

        Raises:
            OriginError, LostDataError, DatabaseError, CacheDeviceError: not so.
        """
        if overwrite and self._truth.may_be_changed_elsewhere(image):
            self._truth.overrule(image)
            await self._committer.heartbeat(stable=True)  # nobody is asked again
        if not self._state.usable:
            await self._stable_without_map(image)
            await self._discards.sync(image, path_fd)
            return
        if self._core.dirty.pages(image.id):
            flush = self._discards.drain if self._state.draining else self._cleaner.flush
            await flush(image)
        await self._discards.sync(image, path_fd)
        await self._committer.barrier()

    async def flush_all(self) -> list[tuple[Image, FusecacheError]]:
        """``flush`` of every image, side by side: one that stalls holds up no other (P6).

        Returns what failed.
        """
        failed: list[tuple[Image, FusecacheError]] = []
        async with trio.open_nursery() as nursery:
            for image in self._images.all():
                nursery.start_soon(self._flush_one, image, failed)
        return failed

    async def _flush_one(self, image: Image, failed: list[tuple[Image, FusecacheError]]) -> None:
        try:
            await self.flush(image)
        except FusecacheError as exc:
            if self._core.dirty.holds(image.id):
                self._cleaner.failed(image, exc)
            else:
                log.error("%s could not be synced: %s", image.name, exc)
            failed.append((image, exc))
