"""The committer: the one place where the order of cache device and database is written down.

Light commits make rows survive a killed process; a barrier makes device and map survive a power
cut (R1). Everything the database learns goes through here, one transaction at a time.
"""

import logging
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import TypeVar

import trio

from fusecache.config import Tuning
from fusecache.core.dirty import SyncBegun
from fusecache.core.index import CacheIndex
from fusecache.core.rows import Rows
from fusecache.engine.image import Image
from fusecache.engine.in_place import InPlace, Proven
from fusecache.engine.ports import Clock, Threads
from fusecache.errors import CacheDeviceError, DatabaseError, FusecacheError
from fusecache.observe.counters import CacheCounters
from fusecache.observe.logs import fields
from fusecache.store.block_map import WHOLE_IMAGE, Batch, BlockMap
from fusecache.store.cache_device import CacheDevice

log = logging.getLogger(__name__)

T = TypeVar("T")

_IN_PLACE_ROWS = 256
"""Rows that a light commit may have and be made without a thread: 30 us against 100 (measured),
and far more while guests keep the event loop busy."""


class _Barrier:
    """One barrier and those who wait for it."""

    def __init__(self) -> None:
        self.done = trio.Event()
        self.joined = 0
        self.error: FusecacheError | None = None

    def fail(self, error: FusecacheError) -> None:
        """It did not happen; everybody who waits is told."""
        self.error = error
        self.done.set()


class _Activation:
    """Regions somebody wants to write to."""

    def __init__(self, image: Image, regions: list[int], *, active: bool) -> None:
        self.image = image
        self.regions = regions
        self.active = active
        self.committed = False

    @property
    def needs_stable(self) -> bool:
        """Whether a light commit would leave a region without any stable row."""
        intents = self.image.intents
        return not self.image.whole_intent and not all(intents[r].stable for r in self.regions)

    def take_effect(self, *, stable: bool) -> None:
        """The rows are committed."""
        self.committed = True
        for region in self.regions:
            intent = self.image.intents[region]
            intent.active = intent.active or self.active
            intent.stable = intent.stable or stable


class _Owner:
    """Somebody who waits for a commit of the rows that are owed now."""

    committed = False


class Committer:
    """Commits, barriers and their grouping.

    Args:
        failed: called once with the first error that makes the cache unusable.
    """

    def __init__(
        self,
        core: CacheIndex,
        device: CacheDevice,
        block_map: BlockMap,
        images: Callable[[], Iterable[Image]],
        threads: Threads,
        counters: CacheCounters,
        clock: Clock,
        tuning: Tuning,
        here: InPlace,
        failed: Callable[[FusecacheError], None],
    ) -> None:
        self._core = core
        self._device = device
        self._block_map = block_map
        self._images = images
        self._threads = threads
        self._counters = counters
        self._clock = clock
        self._tuning = tuning
        self._report = failed
        self._in_place = here
        self._syncs = Proven(clock.monotonic, allowed=tuning.commits_in_place)
        self._merges = Proven(clock.monotonic, allowed=tuning.commits_in_place)
        self.broken: FusecacheError | None = None
        """The error after which nothing is committed any more."""
        self._lock = trio.Lock()
        self._alone = trio.Lock()
        self._wanted: list[_Activation] = []
        self._owners: list[_Owner] = []
        self._barrier = _Barrier()
        self._barrier_wanted = trio.Event()
        self._running: _Barrier | None = None
        self.anything_since_barrier = False
        self.last_heartbeat = clock.monotonic()

    def _failed(self, error: FusecacheError) -> None:
        """From here on nothing is committed any more but the fence: what the database holds
        must not grow again from rows that belong to no state of the cache."""
        if self.broken is None:
            self.broken = error
        self._report(error)

    def give_up(self, error: DatabaseError) -> None:
        """Somebody else found out that the database cannot be relied on."""
        self._failed(error)

    def _check(self) -> None:
        if self.broken is not None:
            raise DatabaseError(f"the cache is out of use: {self.broken}")

    # -- transactions ------------------------------------------------------------------------------

    async def _commit(self, batch: Batch, *, stable: bool) -> int:
        """One transaction with ``batch`` and all that is owed. The lock is held.

        What is owed is taken without an await before the call: the rows are those of one moment.
        """
        self._check()
        owners, self._owners = self._owners, []
        rows = batch.rows = self._core.take_owed()
        owing = [image for image in self._images() if image.row_owed]
        for image in owing:
            image.row_owed = False
        batch.images = [image.row.copy() for image in owing]
        if rows.slot.size:
            self.anything_since_barrier = True
        try:
            if stable or rows.slot.size > _IN_PLACE_ROWS or not self._commits_in_place:
                mark = await self._database(partial(self._block_map.commit, batch, stable=stable))
            else:
                with self._in_place:
                    mark = self._block_map.commit(batch, stable=False)
        except Exception as exc:
            for image in owing:
                image.row_owed = True
            raise self._not_committed(rows, exc) from exc
        self._committed(owners)
        if stable:
            self._counters.stable_commits += 1
        else:
            self._counters.light_commits += 1
        return mark

    def _committed(self, owners: list[_Owner]) -> None:
        for owner in owners:
            owner.committed = True

    def _not_committed(self, rows: Rows, exc: Exception) -> DatabaseError:
        self._core.give_back_owed(rows)
        error = exc if isinstance(exc, DatabaseError) else _unforeseen(exc)
        self._failed(error)
        return error

    @property
    def commits_now(self) -> bool:
        """Whether ``commit_now`` may be called: nobody is at the database, which is quick."""
        return not self._lock.locked() and self.broken is None and self._commits_in_place

    @property
    def _commits_in_place(self) -> bool:
        return self._tuning.commits_in_place and self._in_place.allowed

    def commit_now(self) -> None:
        """Commits the rows that are owed, lightly, before anything else can run.

        Raises:
            DatabaseError: the rows are not committed, or nobody knows.
        """
        assert not self._lock.locked()
        self._check()
        owners, self._owners = self._owners, []
        rows = self._core.take_owed()
        self.anything_since_barrier = True
        try:
            with self._in_place:
                self._block_map.append(rows)
        except Exception as exc:
            raise self._not_committed(rows, exc) from exc
        self._committed(owners)
        self._counters.light_commits += 1

    async def commit(self, batch: Callable[[], Batch], *, stable: bool = False) -> None:
        """Commits all that is owed, and what ``batch`` gives at the very moment it is taken."""
        async with self._lock:
            await self._commit(batch(), stable=stable)

    def rows_owed(self) -> Callable[[], Awaitable[None]]:
        """Rows were just owed: what this gives returns once they are in a commit (R2), whoever
        made it. Callers share commits."""
        mine = _Owner()
        self._owners.append(mine)

        async def committed() -> None:
            async with self._lock:
                if not mine.committed:
                    await self._commit(Batch(), stable=False)

        return committed

    async def commit_rows(self) -> None:
        """Returns once the rows that are owed now are in a commit."""
        await self.rows_owed()()

    async def commit_owed(self) -> None:
        """A light commit, if anything is owed."""
        if self._owing():
            await self.commit(Batch)

    def _owing(self) -> bool:
        return self._core.owes or any(image.row_owed for image in self._images())

    async def heartbeat(self, *, stable: bool = False) -> None:
        """A sign of life: a change up to now, and shortly after, may be our own (P3)."""
        beat = Batch(heartbeat_ns=self._clock.origin_ns())
        at = self._clock.monotonic()
        await self.commit(lambda: beat, stable=stable)
        self.last_heartbeat = at

    async def activate(self, image: Image, regions: list[int], *, active: bool) -> None:
        """The regions' rows are there, and stable unless a whole-image row is (R4).

        Callers that wait at the same time share a transaction.
        """
        mine = _Activation(image, regions, active=active)
        self._wanted.append(mine)
        async with self._lock:
            if mine.committed:
                return
            wanted, self._wanted = self._wanted, []
            if mine not in wanted:  # a commit that would have served it failed
                wanted.append(mine)
            # Decided under the lock: the whole-image row may have gone while we waited.
            escalated = [item.image for item in wanted if self._escalates(item.image)]
            stable = bool(escalated) or any(item.needs_stable for item in wanted)
            intents = [
                (item.image.id, region, int(item.active or item.image.intents[region].active))
                for item in wanted
                for region in item.regions
            ]
            intents += [(grown.id, WHOLE_IMAGE, 1) for grown in escalated]
            await self._commit(Batch(intents=intents), stable=stable)
            for item in wanted:
                item.take_effect(stable=stable)
            for grown in escalated:
                grown.whole_intent = True

    def _escalates(self, image: Image) -> bool:
        return not image.whole_intent and len(image.intents) > self._tuning.whole_image_after

    async def drop(self, image: Image, from_block: int) -> None:
        """The image's blocks from ``from_block`` on are gone from the database, stably (R6).

        The core has dropped them already; rows that only the database still has go as well.
        """
        await self.commit(lambda: Batch(drops=[(image.id, from_block)]), stable=True)

    async def forget(self, image: Image) -> None:
        """The image and all its rows are gone from the database, stably."""
        batch = Batch(drops=[(image.id, 0)], forgotten=[image.id])
        image.row_owed = False
        await self.commit(lambda: batch, stable=True)

    # -- barriers ----------------------------------------------------------------------------------

    async def barrier(self) -> None:
        """Returns once a barrier that began after this call is complete (R1).

        Callers share a barrier as long as it has not begun.

        Raises:
            CacheDeviceError, DatabaseError: the cache cannot be made stable any more.
        """
        joined = self._barrier
        joined.joined += 1
        self._barrier_wanted.set()
        await joined.done.wait()
        if joined.error is not None:
            raise joined.error

    async def make_stable(self, image: Image) -> None:
        """Returns once all that was acknowledged for the image in the cache is stable (R1).

        Waits for the barrier that runs if that covers it, and not for the next.

        Raises:
            CacheDeviceError, DatabaseError: it cannot be made stable any more.
        """
        if image.stable >= image.changes:
            return
        running = self._running
        if running is not None and image.covered >= image.changes:
            await running.done.wait()
            if running.error is not None:
                raise running.error
        else:
            await self.barrier()

    async def run(self) -> None:
        """Runs the barriers, one after another, until cancelled."""
        try:
            while True:
                await self._barrier_wanted.wait()
                await self._gathered()
                self._barrier_wanted = trio.Event()
                current, self._barrier = self._barrier, _Barrier()
                await self._run_one(current)
        finally:
            # Whoever waits, or asks from now on, is told at once.
            self._barrier.fail(DatabaseError("no barrier: fusecache is stopping"))

    async def _gathered(self) -> None:
        """Lets others join as long as they come one after the other: a turn of the event loop
        costs less than another barrier."""
        joined = 0
        while joined < self._barrier.joined:
            joined = self._barrier.joined
            await trio.lowlevel.checkpoint()

    async def _run_one(self, barrier: _Barrier) -> None:
        self._running = barrier
        try:
            await self._perform()
        except (CacheDeviceError, DatabaseError) as exc:
            self._failed(exc)
            barrier.fail(exc)
        except Exception as exc:
            error = _unforeseen(exc)
            self._failed(error)
            barrier.fail(error)
        except BaseException:
            barrier.fail(DatabaseError("no barrier: fusecache is stopping"))
            raise
        else:
            barrier.done.set()
        finally:
            self._running = None

    async def _perform(self) -> None:
        async with self._lock:
            self._check()
            leaving = self._core.take_leaving()
            changed = [image for image in self._images() if image.stable < image.changes]
            for image in changed:
                image.barrier_begins()
            self.anything_since_barrier = False
            try:
                mark = self._block_map.mark  # 1. rows owed, and the mark
                if self._owing():
                    mark = await self._commit(Batch(), stable=False)
            except DatabaseError:
                self._core.give_back_leaving(leaving)
                raise
        try:
            await self._sync_device()  # 2. data
            async with self._lock:
                merge = partial(self._block_map.merge, mark)
                await self._merges.run(merge, self._database)  # 3. rows, stably
        except Exception:
            self._core.give_back_leaving(leaving)
            for image in changed:
                image.barrier_failed()
            self.anything_since_barrier = True
            raise
        for image in changed:
            image.barrier_done()
        self._core.release(leaving)  # 4. nothing stable names these slots any more (R3)
        self._counters.barriers += 1

    async def _sync_device(self) -> None:
        began = self._core.dirty.sync_begins()
        try:
            await self._syncs.run(self._device.sync, self._threads.device)
            self._core.dirty.sync_worked(began)
        except CacheDeviceError:
            self.sync_failed(began)
            raise

    async def sync_slots(self) -> None:
        """In a broken cache, which has no barriers any more: what is in the slots is stable.

        Raises:
            CacheDeviceError: what was dirty and not stable is lost.
        """
        async with self._alone:  # the kernel tells of what it could not write once
            if (running := self._running) is not None:
                await running.done.wait()
            await self._sync_device()

    def sync_failed(self, began: SyncBegun) -> None:
        """A sync of the device that began so has failed: what was dirty and not stable is lost."""
        self._core.gates.shut()  # first: the lane answers no fsync for what is lost now
        if lost := self._core.dirty.sync_failed(began):
            log.error(
                "the cache device lost %d pages that the origin has not",
                lost,
                extra=fields("dirty-lost", pages=lost),
            )

    async def checkpoint(self) -> None:
        """Moves the write-ahead log into the database, so that it does not grow for ever."""
        await self.run_database(self._block_map.checkpoint)

    async def run_database(self, work: Callable[[], T]) -> T:
        """A call on the block map that is not a commit, in its turn."""
        async with self._lock:
            self._check()
            return await self._database(work)

    async def fence(self, work: Callable[[], T]) -> T:
        """A call on the block map that a broken cache still makes."""
        async with self._lock:
            return await self._database(work)

    async def drop_rescued(self, image: Image) -> None:
        """In a broken cache: all blocks of an image are gone from the database, stably, if that
        still works. Raises DatabaseError."""
        batch = Batch(drops=[(image.id, 0)])
        await self.fence(partial(self._block_map.commit, batch, stable=True))

    async def _database(self, work: Callable[[], T]) -> T:
        """In the database's thread. A caller that gives up does so afterwards: what was taken
        for a transaction must not be lost before it began."""
        results: list[T] = []
        with trio.CancelScope(shield=True):
            results.append(await self._threads.database(work))
        return results[0]


def _unforeseen(exc: Exception) -> DatabaseError:
    """What nobody foresaw leaves nobody knowing what is stable: the cache is out of use."""
    log.error("unexpected error in a commit", exc_info=exc)
    return DatabaseError(f"an unexpected error in a commit: {exc!r}")
