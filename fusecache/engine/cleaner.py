"""The cleaner: dirty pages go back to the origin, in its order, and become clean (R5).

One batch of one image at a time:

1. what is dirty now is noted, and a barrier makes its rows stable;
2. it is read from the slots and written to the origin, neighbours together; whatever a guest
   writes again meanwhile counts no more;
3. the origin is synced, and no sync of it may have failed since step 2 began;
4. the rest is clean: rows first, a barrier makes them stable, and until then the pages settle.

Between batches nothing is held, so guests wait for no writeback.
"""

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial

import numpy as np
import trio

from fusecache.config import Tuning
from fusecache.core.dirty import Writeback
from fusecache.core.geometry import Geometry
from fusecache.core.index import CacheIndex
from fusecache.core.rows import U32
from fusecache.engine.committer import Committer
from fusecache.engine.dirty_reads import DirtyReads, note_unreadable, unreadable_ranges
from fusecache.engine.image import Image
from fusecache.engine.images import Images
from fusecache.engine.lasting import Lasting
from fusecache.engine.ownership import Ownership
from fusecache.engine.pace import Pace
from fusecache.engine.ports import Clock, Threads
from fusecache.engine.state import UNEXPECTED, CacheState
from fusecache.errors import FusecacheError, LostDataError, OriginError
from fusecache.observe.latency import Call, timed
from fusecache.observe.logs import fields

log = logging.getLogger(__name__)

_BATCH = 32 << 20
"""Bytes of one image that share two barriers and one origin sync."""
_BY_CLOCK = 8 << 20
"""The same by the clock: between batches the cleaner steps aside, and truncates get through."""
_RUN = 1 << 20
"""The largest writeback; neighbouring dirty pages up to this become one write."""
_WATCH = 0.5
_PASSES = 3
"""Passes over an image in use, before the last one keeps its guests waiting."""


class Cleaner:
    """Writes back by the clock (``run``) and on demand (``flush``)."""

    def __init__(
        self,
        core: CacheIndex,
        state: CacheState,
        images: Images,
        ownership: Ownership,
        committer: Committer,
        lasting: Lasting,
        threads: Threads,
        clock: Clock,
        tuning: Tuning,
    ) -> None:
        self._core = core
        self._geometry: Geometry = core.geometry
        self._dirty = core.dirty
        self._state = state
        self._images = images
        self._ownership = ownership
        self._committer = committer
        self._lasting = lasting
        self._threads = threads
        self._clock = clock
        self._tuning = tuning
        self._pace = Pace(clock.monotonic, images.all)
        self._reads = DirtyReads(core, state)
        self._batch_blocks = max(1, _BATCH >> core.geometry.block_shift)
        self._clock_blocks = max(1, _BY_CLOCK >> core.geometry.block_shift)
        self._busy: set[int] = set()
        self.apply(tuning)

    def apply(self, tuning: Tuning) -> None:
        """From now on these ages, limits and rates hold."""
        self._tuning = tuning
        self._low = max(1, int(self._core.slot_count * tuning.dirty_low))
        self._pace.rate = tuning.clean_rate

    # -- by the clock ------------------------------------------------------------------------------

    async def run(self) -> None:
        """Looks around every so often, until cancelled or the cache is unusable."""
        async with trio.open_nursery() as nursery:
            while self._state.usable:
                self._dirty.advance(self._clock.monotonic())
                for image in self._due():
                    self._busy.add(image.id)
                    nursery.start_soon(self._clean_by_clock, image)
                await trio.sleep(_WATCH)

    @property
    def _crowded(self) -> bool:
        """Whether younger data has to go as well."""
        return self._dirty.blocks > self._low or self._state.draining

    @property
    def _age(self) -> float:
        return 0 if self._crowded else self._tuning.dirty_age

    def _due_bytes(self, image: Image) -> int:
        """How much the next batch by the clock is at most."""
        slots = self._dirty.due(image.id, self._clock_blocks, older_than=self._age)
        pages = sum(item.pages.bit_count() for item in self._dirty.snapshot(image.id, slots))
        return pages << self._geometry.page_shift

    def _due(self) -> list[Image]:
        if not self._dirty.blocks:
            return []
        now = self._clock.monotonic()
        due = set(self._dirty.due_images(self._age))
        return [
            image
            for image in self._images.all()
            if (image.id in due or self._not_owned(image))
            and image.id not in self._busy
            and now >= image.clean_after
        ]

    def _not_owned(self, image: Image) -> bool:
        """Whether it has dirty data of an earlier life and nobody has taken the lock yet, which is
        done at once, however young that data is (P8)."""
        return not image.row.writing and self._dirty.pages(image.id) > 0

    async def _clean_by_clock(self, image: Image) -> None:
        """Batches until nothing of the image is due; pauses, longer each time, after an error."""
        try:
            async with self._recorded(image):
                while self._state.usable and (size := self._due_bytes(image)):
                    await self._pace.wait(size, yielding=not self._crowded)
                    async with image.cleaning:
                        slots = self._dirty.due(image.id, self._clock_blocks, older_than=self._age)
                        skipped = await self._batch(image, slots)
                    if len(skipped) == slots.size:
                        break  # guests are writing to all of it: later
        except FusecacheError as exc:
            self.failed(image, exc)
        except Exception as exc:
            self._state.unexpected(exc, "writing back")
            self.failed(image, OriginError(5, UNEXPECTED))
        finally:
            self._busy.discard(image.id)

    def failed(self, image: Image, error: FusecacheError) -> None:
        """Dirty data stays where it is; it is tried again after a pause that grows."""
        tuning = self._tuning
        pause = min(tuning.clean_pause_most, tuning.clean_pause * 2.0**image.clean_failures)
        if not image.clean_failures:
            log.error(
                "%s cannot be written back, its data stays dirty: %s",
                image.name,
                error,
                extra=fields(
                    "writeback-failing",
                    image=image.name,
                    dirty_bytes=self._core.dirty_bytes(image.id),
                ),
            )
        image.clean_failures = min(image.clean_failures + 1, 30)
        image.clean_error = str(error)
        image.clean_after = self._clock.monotonic() + pause

    def due_in(self, image: Image) -> float:
        """Seconds until the image is tried again after a failure; 0: at once."""
        return max(0.0, image.clean_after - self._clock.monotonic())

    # -- on demand ---------------------------------------------------------------------------------

    async def flush(self, image: Image) -> None:
        """Everything that is dirty now is on the origin, synced; rows are stable.

        What a guest writes again meanwhile may be dirty afterwards.

        Raises:
            OriginError, LostDataError, DatabaseError, CacheDeviceError: not so.
        """
        async with self._recorded(image):
            await self._pass(image)
        self._refuse_lost(image)

    async def clean(self, image: Image) -> None:
        """As ``flush``, while the image is draining: a few passes leave little that is dirty."""
        async with self._recorded(image):
            for _ in range(_PASSES):
                if self._dirty.pages(image.id):
                    await self._pass(image)

    @asynccontextmanager
    async def _recorded(self, image: Image) -> AsyncIterator[None]:
        """Around batches: the image can be written on the origin, and afterwards what this made
        of its attributes is recorded as ours (P3)."""
        await self._ownership.adopted(image)
        try:
            yield
        finally:
            await self._ownership.cleaned(image)

    async def finish(self, image: Image) -> None:
        """The rest, for a caller that holds ``cleaning`` and all of ``lock``: nobody writes.

        Raises:
            OriginError, LostDataError, DatabaseError, CacheDeviceError: some of it stays dirty.
        """
        await self._pass(image, alone=True)
        self._refuse_lost(image)
        assert not self._dirty.pages(image.id) or not self._state.usable

    async def finish_block(self, image: Image, block: int) -> None:
        """As ``finish``, one block alone."""
        slots = self._dirty.slots(image.id)
        mine = [slot for slot in slots.tolist() if self._dirty.place(slot)[0] == block]
        if mine:
            await self._batch(image, slots[slots == mine[0]])
        if self._dirty.mask(image.id, block):
            raise LostDataError("dirty data cannot be read from the cache device")

    def _refuse_lost(self, image: Image) -> None:
        lost = self._dirty.lost_ranges(image.id)
        unreadable = unreadable_ranges(self._core, image)
        if lost or unreadable:
            offset, length = (lost or unreadable)[0]
            raise LostDataError(
                f"{len(lost) + len(unreadable)} ranges of '{image.name}' cannot be read from the "
                f"cache device, the first at {offset}, {length} bytes long"
            )

    async def _pass(self, image: Image, *, alone: bool = False) -> None:
        """Once over all that is dirty now.

        Args:
            alone: the caller holds ``cleaning`` and all of ``lock``; else each batch takes what
                it needs, so that a truncate gets through in between.

        Raises:
            OriginError, DatabaseError, CacheDeviceError: at once; what is left stays dirty.
            LostDataError: at the end; all that can be read is on the origin.
        """
        if alone:
            slots = self._dirty.due(image.id, 1 << 32)
        else:
            # Nothing is on its way then: what another batch has taken may fail there.
            async with image.cleaning:
                slots = self._dirty.due(image.id, 1 << 32)
        lost: LostDataError | None = None
        for first in range(0, slots.size, self._batch_blocks):
            try:
                await self._part(image, slots[first : first + self._batch_blocks], alone=alone)
            except LostDataError as exc:
                lost = exc
        if lost is not None:
            raise lost

    async def _part(self, image: Image, slots: U32, *, alone: bool) -> None:
        """One batch of a pass, and what it left out because somebody was just writing there."""
        if alone:
            await self._batch(image, slots)
            return
        async with image.cleaning:
            skipped = await self._batch(image, slots)
            for item in skipped:
                async with image.lock.span(item.block, item.block + 1):
                    await self._batch(image, np.array([item.slot], np.uint32))

    # -- one batch ---------------------------------------------------------------------------------

    async def _batch(self, image: Image, slots: U32) -> list[Writeback]:
        """Steps 1 to 4 for some slots of one image, in the order of their blocks.

        A slot that was chosen before a wait may have gone to another block, even of another image,
        since: ``snapshot`` and ``begin_writeback`` leave it out.

        Returns what was left out because somebody was writing to it.
        """
        noted = self._dirty.snapshot(image.id, slots)
        await self._committer.barrier()  # 1. rows stable
        failed_syncs = image.failed_syncs
        taken: list[int] = []
        skipped: list[Writeback] = []
        errors: list[FusecacheError] = []
        settling = False
        try:
            image.own_pending = True
            await self._write_runs(image, noted, taken, skipped, errors)  # 2.
            if taken:
                await self._lasting.bring(image)  # 3.
            if image.failed_syncs != failed_syncs:
                raise OriginError(5, "a sync of the origin failed, all is written again")
            for slot in taken:
                self._dirty.cleaned(slot)  # 4. rows, then stably
            settling = True
            with trio.CancelScope(shield=True):  # what gave up must not settle before it is stable
                await self._committer.barrier()
        finally:
            if image.writers:
                image.own_pending = False  # recorded when the last of them closes
            # After a barrier that failed nobody knows which row is stable: the pages stay held.
            if not settling or self._state.usable:
                for slot in taken:
                    (self._dirty.settled if settling else self._dirty.kept)(slot)
        if errors:
            raise errors[0]
        if image.clean_failures:
            log.warning(
                "%s is written back again",
                image.name,
                extra=fields("writeback-recovered", image=image.name),
            )
        image.clean_failures = 0
        image.clean_error = ""
        return skipped

    async def _write_runs(
        self,
        image: Image,
        noted: list[Writeback],
        taken: list[int],
        skipped: list[Writeback],
        errors: list[FusecacheError],
    ) -> None:
        """All runs of a batch, some at a time; what failed is left out of ``taken``."""
        runs = iter(self._runs(noted))

        async def work() -> None:
            for run in runs:
                try:
                    await self._write_run(image, run, taken, skipped, errors)
                except FusecacheError as exc:
                    errors.append(exc)
                if any(isinstance(error, OriginError) for error in errors):
                    break

        async with trio.open_nursery() as nursery:
            for _ in range(self._tuning.clean_writes):
                nursery.start_soon(work)

    def _runs(self, noted: list[Writeback]) -> list[list[Writeback]]:
        """Neighbouring blocks together, up to ``_RUN`` bytes."""
        most = max(1, _RUN >> self._geometry.block_shift)
        runs: list[list[Writeback]] = []
        for item in noted:
            if runs and len(runs[-1]) < most and item.block == runs[-1][-1].block + 1:
                runs[-1].append(item)
            else:
                runs.append([item])
        return runs

    async def _write_run(
        self,
        image: Image,
        run: list[Writeback],
        taken: list[int],
        skipped: list[Writeback],
        errors: list[FusecacheError],
    ) -> None:
        begun = [(item, pages) for item in run if (pages := self._dirty.begin_writeback(item))]
        started = {item.slot for item, _ in begun}
        skipped += [item for item in run if item.slot not in started]
        done = False
        spans: list[float] = []
        try:
            copy = partial(self._copy, timed(image.origin.write, spans), begun, image.size)
            failed, count = await self._threads.run(copy, limiter=image.cleaner_limiter)
            written = sum(
                (pages & ~failed.get(item.block, 0)).bit_count() << self._geometry.page_shift
                for item, pages in begun
            )
            image.counters.origin_writes += count
            image.counters.origin_write_bytes += written
            image.counters.written_back_bytes += written
            done = True
        except OriginError as exc:
            image.counters.failed(exc)
            raise
        finally:
            image.written += 1
            image.wrote = True
            image.last_write = self._clock.monotonic()
            image.counters.latency.add(Call.WRITE, spans)
            if not done:
                for item, _ in begun:
                    self._dirty.kept(item.slot)
        for item, pages in begun:
            bad = failed.get(item.block, 0)
            note_unreadable(image, item.block, pages, bad)
            if bad:
                errors.append(LostDataError("dirty data cannot be read from the cache device"))
                self._dirty.keep_pages(item.slot, bad)
            taken.append(item.slot)

    def _copy(
        self, write: Callable[..., None], begun: list[tuple[Writeback, int]], size: int
    ) -> tuple[dict[int, int], int]:
        """Slots to origin, in a thread: contiguous pages in one write each.

        Returns the pages that could not be read, by block, and how many writes it took.
        """
        failed: dict[int, int] = {}
        writes: list[tuple[int, list[bytes]]] = []
        end = -1
        for item, pages in begun:
            pieces, bad = self._reads.read(item.slot, pages)
            if bad:
                failed[item.block] = bad
            base = item.block << self._geometry.block_shift
            for start, data in pieces:
                at = base + start
                piece = data[: max(0, size - at)]
                if at == end:
                    writes[-1][1].append(piece)
                else:
                    writes.append((at, [piece]))
                end = at + len(piece)
        for at, parts in writes:
            write(at, parts[0] if len(parts) == 1 else b"".join(parts))
        return failed, len(writes)
