"""What is done by the clock: heartbeat, commits, barriers, write intents, records, LRU order."""

import logging
from functools import partial

import trio

from fusecache.config import Tuning
from fusecache.core.index import CacheIndex
from fusecache.engine.closing import Closing
from fusecache.engine.committer import Committer
from fusecache.engine.image import Image
from fusecache.engine.images import Images
from fusecache.engine.intents import WriteIntents
from fusecache.engine.ownership import Ownership
from fusecache.engine.ports import Clock
from fusecache.engine.state import CacheState
from fusecache.engine.truth import Truth
from fusecache.errors import CacheDeviceError, DatabaseError
from fusecache.store.block_map import Batch

log = logging.getLogger(__name__)

_PART = 1 << 16
_FORGOTTEN_AT_ONCE = 16
_HEARTBEAT = 1.0
_OURS = 2.0
_SLACK = 0.5


class Housekeeping:
    """One task that looks around every ``commit_interval`` seconds."""

    def __init__(
        self,
        core: CacheIndex,
        state: CacheState,
        images: Images,
        ownership: Ownership,
        truth: Truth,
        closing: Closing,
        committer: Committer,
        intents: WriteIntents,
        clock: Clock,
        tuning: Tuning,
    ) -> None:
        self._core = core
        self._state = state
        self._images = images
        self._ownership = ownership
        self._truth = truth
        self._closing = closing
        self._committer = committer
        self._intents = intents
        self._clock = clock
        self._tuning = tuning
        now = clock.monotonic()
        self._last_barrier = now
        self._last_order = now
        self._last_checkpoint = now
        self._busy: set[int] = set()
        self._in_barrier = False

    async def run(self) -> None:
        """Runs until cancelled or the cache is unusable."""
        async with trio.open_nursery() as nursery:
            while self._state.usable:
                await trio.sleep(self._tuning.commit_interval)
                try:
                    await self._tick(nursery)
                except (DatabaseError, CacheDeviceError) as exc:
                    log.debug("housekeeping ends: %s", exc)
                except Exception as exc:
                    self._state.unexpected(exc, "keeping house")

    async def _tick(self, nursery: trio.Nursery) -> None:
        now = self._clock.monotonic()
        images = self._images.all()
        since = now - self._committer.last_heartbeat
        if since >= _HEARTBEAT and any(image.row.writing for image in images):
            await self._committer.heartbeat()
        else:
            await self._committer.commit_owed()
        await self._intents.clear_idle(images)
        # Everything that asks an origin runs beside, one task an image: one may stall (P6).
        for image in images:
            if image.id not in self._busy and self._needs_a_look(image):
                self._busy.add(image.id)
                nursery.start_soon(self._look_after, image)
        changed = self._committer.anything_since_barrier or self._core.leaving
        changed = changed or any(image.stable < image.changes for image in images)
        if changed and now - self._last_barrier >= self._tuning.barrier_interval:
            self._last_barrier = now
            if not self._in_barrier:
                self._in_barrier = True
                nursery.start_soon(self._barrier)
        if now - self._last_checkpoint >= self._tuning.barrier_interval:
            # On its own clock: heartbeats and intents make the log grow without any barrier.
            self._last_checkpoint = now
            await self._committer.checkpoint()
            await self._forget_unused(images)
        if now - self._last_order >= self._tuning.order_interval:
            self._last_order = now
            nursery.start_soon(self._save_order_now)

    async def _barrier(self) -> None:
        """Beside the rest: there are signs of life while the cache device takes its time (P3)."""
        try:
            await self._committer.barrier()
        except (DatabaseError, CacheDeviceError) as exc:
            log.debug("no barrier by the clock: %s", exc)
        except Exception as exc:
            self._state.unexpected(exc, "keeping house")
        finally:
            self._in_barrier = False

    def _needs_a_look(self, image: Image) -> bool:
        return bool(image.intents or image.origin_open or image.origin.locked)

    async def _look_after(self, image: Image) -> None:
        try:
            await self._intents.remove_old(image)
            if image.own_pending and not image.cleaning.locked():
                await self._ownership.cleaned(image)  # a flush that was given up left this
            await self._truth.settle(image)
            await self._closing.close_idle(image)
        except Exception as exc:
            self._state.unexpected(exc, "looking after an image")
        finally:
            self._busy.discard(image.id)

    async def _forget_unused(self, images: list[Image]) -> None:
        """Files that were opened once and have nothing cached do not stay for ever.

        A few at a time: each one costs a stable commit.
        """
        unused = [image for image in images if self._images.unused(image)]
        for image in unused[:_FORGOTTEN_AT_ONCE]:
            if not image.opening.locked():
                async with image.opening:
                    if self._images.unused(image):
                        await self._closing.forget(image)

    async def _save_order_now(self) -> None:
        try:
            await self.save_order()
        except DatabaseError as exc:
            log.debug("the order is not saved: %s", exc)

    async def save_order(self) -> None:
        """The LRU order as it is now goes to the database, in parts."""
        for part in self._core.order(_PART):
            await self._committer.commit(partial(Batch, order=[part]))

    async def settle_all(self) -> None:
        """Waits, at a stop, until the records of our own writes can be trusted: at most 2 s.

        Otherwise the next mount's first open would have to drop what those images have cached.
        """
        with trio.move_on_after(self._tuning.settle_age + _SLACK):
            while waiting := [image for image in self._images.all() if image.settles]:
                for image in waiting:
                    await self._truth.settle(image)
                    if image.settles and not image.origin_open:
                        image.settles = False
                await trio.sleep(0.05)

    def until_not_ours(self) -> float:
        """Seconds until no change can be taken for a killed daemon's own any more (P3)."""
        since = self._clock.monotonic() - self._committer.last_heartbeat
        return max(0.0, _HEARTBEAT + _OURS + _SLACK - since)
