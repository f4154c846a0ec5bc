"""Degraded: guests' data when a slot or the whole cache fails (failure table).

Once the map or the device cannot be relied on, everything goes to the origin. But the rows of
held pages are still there, and the next start will believe them: so what is written to such a
page goes to the origin *and* to its slot, and what is read of it comes from the slot. Meanwhile
all dirty data is rescued to the origin; when all of it is there, the fence is drawn tighter and
the next start believes nothing.
"""

import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress

import trio

from fusecache.core.dirty import Writeback
from fusecache.core.geometry import region_of
from fusecache.core.index import CacheIndex
from fusecache.engine.committer import Committer
from fusecache.engine.dirty_reads import DirtyReads, note_unreadable
from fusecache.engine.image import Image
from fusecache.engine.intents import WriteIntents
from fusecache.engine.lasting import Lasting
from fusecache.engine.origin_writes import OriginWrites
from fusecache.engine.ports import Threads
from fusecache.engine.state import CacheState
from fusecache.errors import CacheDeviceError, DatabaseError, LostDataError

log = logging.getLogger(__name__)


class Degraded:
    """What is done about held pages when the cache fails.

    Args:
        opened: makes sure that an image can be written on the origin although nobody has it open.
    """

    def __init__(
        self,
        core: CacheIndex,
        state: CacheState,
        committer: Committer,
        intents: WriteIntents,
        lasting: Lasting,
        origin: OriginWrites,
        threads: Threads,
        opened: Callable[[Image], Awaitable[None]],
    ) -> None:
        self._core = core
        self._geometry = core.geometry
        self._state = state
        self._committer = committer
        self._intents = intents
        self._lasting = lasting
        self._origin = origin
        self._threads = threads
        self._opened = opened
        self._dirty_reads = DirtyReads(core, state)

    def holds(self, image: Image) -> bool:
        """Whether slots still count for the image although the cache is broken."""
        return not self._state.emptied and self._core.dirty.any_held and not image.detached

    def counts(self, image: Image) -> bool:
        """Whether any slot of this image still does."""
        return self.holds(image) and self._core.dirty.holds(image.id)

    # -- guests ------------------------------------------------------------------------------------

    async def write(self, image: Image, offset: int, data: bytes) -> None:
        """To the origin, and to the slots of held pages. The caller holds the span's lock.

        Raises:
            OriginError: the origin failed.
            CacheDeviceError: a held page's slot failed: it may come back, older, at a next start.
        """
        await self._origin.write(image, offset, data)
        if not self.holds(image):
            return
        view, done = memoryview(data), 0
        for block, start, stop in self._geometry.split(offset, len(data)):
            held = self._core.dirty.held(image.id, block)
            for begin, length in self._geometry.page_runs(held):
                first, last = max(begin, start), min(begin + length, stop)
                if first < last:
                    piece = view[done + first - start : done + last - start]
                    await self._to_slot(image, block, first, piece)
            done += stop - start

    async def _to_slot(self, image: Image, block: int, start: int, piece: memoryview) -> None:
        located = self._core.locate(image.id, block)
        if located is None:
            return
        position = (located.slot << self._geometry.block_shift) + start
        touched = self._geometry.touched(start, start + len(piece))
        # A writeback that was under way when the cache broke may bring its older copy after ours:
        # it must not make the page clean. Dirty, it is read from its slot, and rescued after that.
        self._core.dirty.soil(located.slot, touched)
        try:
            await self._threads.device(self._state.device.write, position, piece)
            whole = self._geometry.covered(start, start + len(piece))
            self._core.rewritten(located.slot, whole)
        except CacheDeviceError as exc:
            self._state.device_failed(exc)
            self._core.dirty.lose(located.slot, touched)
            raise
        self._core.dirty.written(
            located.slot, touched
        )  # a sync that ran meanwhile may have missed it

    async def overlay(self, image: Image, offset: int, into: memoryview) -> None:
        """Puts what is held over bytes read from the origin. The caller holds the span's lock.

        Raises:
            LostDataError: some of it is lost or cannot be read.
        """
        if not self.holds(image):
            return
        done = 0
        for block, start, stop in self._geometry.split(offset, len(into)):
            need = self._geometry.touched(start, stop)
            await self._overlay_block(image, block, need, start, into[done : done + stop - start])
            done += stop - start

    async def _overlay_block(
        self, image: Image, block: int, need: int, start: int, into: memoryview
    ) -> None:
        # Also what a writeback that is under way has made clean since the origin was read.
        held = self._core.dirty.held(image.id, block) & need
        if not held:
            return
        if self._core.dirty.lost(image.id, block) & need:
            raise LostDataError(f"block {block}: the cache device lost what was written")
        located = self._core.locate(image.id, block)
        assert located is not None
        pieces, failed = await self._threads.device(self._dirty_reads.read, located.slot, held)
        note_unreadable(image, block, held, failed)
        if failed:
            raise LostDataError(f"block {block}: dirty data cannot be read from the cache device")
        for begin, data in pieces:
            first, last = max(begin, start), min(begin + len(data), start + len(into))
            if first < last:
                into[first - start : last - start] = data[first - begin : last - begin]

    # -- one slot that cannot be written -----------------------------------------------------------

    async def supersede(self, image: Image, offset: int, data: bytes) -> None:
        """A write whose slots failed goes to the origin, and stably out of the cache.

        Origin first, origin sync, then the rows: whatever is left of an old row must not come
        back over what the guest was told. No writeback is under way meanwhile: it might bring
        older data after ours. Until the rows are stable the pages stay held, as in a writeback:
        if that fails, what is written later must not go past them.

        Raises:
            OriginError, LostDataError, DatabaseError, CacheDeviceError: it is not written.
        """
        blocks = self._geometry.blocks(offset, len(data))
        async with image.cleaning, image.lock.alone(blocks.start, blocks.stop):
            regions = range(region_of(blocks.start), region_of(blocks.stop - 1) + 1)
            async with self._intents.writing(image, regions):
                touched = await self._past(image, offset, data)
                await self._let_go(image, touched)

    async def _let_go(self, image: Image, touched: list[tuple[int, int]]) -> None:
        """The origin has the pages (block, mask), synced: they leave the cache, stably."""
        dirty, taken = self._core.dirty, []
        for block, pages in touched:
            located = self._core.locate(image.id, block)
            if located is not None:
                wanted = Writeback(located.slot, located.generation, block, pages)
                if dirty.begin_writeback(wanted):
                    taken.append(located.slot)
                    dirty.cleaned(located.slot)
        with trio.CancelScope(shield=True):  # what gave up must not settle before it is stable
            await self._committer.barrier()
        for slot in taken:
            dirty.settled(slot)
        left = any(dirty.held(image.id, block) & pages for block, pages in touched)
        for block, pages in touched:
            self._core.supersede(image.id, block, pages)
        if left:  # what was lost before could not be taken
            await self._committer.barrier()

    async def _past(self, image: Image, offset: int, data: bytes) -> list[tuple[int, int]]:
        """Writes to the origin and syncs it; returns what the cache has of it: (block, mask)."""
        geometry = self._geometry
        view, done = memoryview(data), 0
        touched: list[tuple[int, int]] = []
        for block, start, stop in geometry.split(offset, len(data)):
            pages = geometry.touched(start, stop)
            begin = start >> geometry.page_shift << geometry.page_shift
            end = (stop + geometry.page_size - 1) >> geometry.page_shift << geometry.page_shift
            base = block << geometry.block_shift
            whole = memoryview(bytearray(end - begin))
            # Only pages that are written in part have something around what is written.
            partly = pages & ~geometry.covered(start, stop)
            await self._overlay_block(image, block, partly, begin, whole)
            dirty_part = self._core.dirty.mask(image.id, block) & partly
            whole[start - begin : stop - begin] = view[done : done + stop - start]
            first, last = self._widened(dirty_part, start, stop)
            last = min(last, max(image.size, base + stop) - base)
            piece = bytes(whole[first - begin : last - begin])
            await self._origin.write(image, base + first, piece)
            touched.append((block, pages))
            done += stop - start
        await self._lasting.sync(image)
        return touched

    def _widened(self, dirty_part: int, start: int, stop: int) -> tuple[int, int]:
        """What to write of a block: the bytes written, and all of a dirty page they are part of."""
        first, last = start, stop
        for begin, length in self._geometry.page_runs(dirty_part):
            first, last = min(first, begin), max(last, begin + length)
        return first, last

    # -- the whole cache ---------------------------------------------------------------------------

    async def rescue(self, image: Image) -> None:
        """Everything dirty of an image is on the origin, synced, and leaves the cache if the
        database can still be told: else it stays in its slots as well.

        Raises:
            OriginError: not so.
            LostDataError: not so for ever: some of it cannot be read.
        """
        await self._opened(image)
        async with image.cleaning:
            if image.rescued or not self.holds(image):
                return
            with suppress(CacheDeviceError):  # what is lost with it must not be copied
                await self._committer.sync_slots()
            slots = self._core.dirty.slots(image.id).tolist()
            lost = 0
            for slot in slots:
                lost += await self._rescue_slot(image, slot)
            await self._lasting.bring(image)
            if lost:
                raise LostDataError(f"{lost} dirty pages cannot be read from the cache device")
            image.rescued = True
            await self._leave(image)

    async def _leave(self, image: Image) -> None:
        """No row of a rescued image is left for the next start to believe: it may have changed
        elsewhere by then, and others, which cannot be rescued, keep the fence from being tighter.
        """
        async with image.lock.everything():
            try:
                await self._committer.drop_rescued(image)
            except DatabaseError as exc:
                log.warning("the rows of %s stay, which is on the origin: %s", image.name, exc)
            else:
                self._core.drop(image.id, self._core.slots_of(image.id), dirty=True)

    async def _rescue_slot(self, image: Image, slot: int) -> int:
        """Returns how many pages are lost."""
        block, _ = self._core.dirty.place(slot)
        base = block << self._geometry.block_shift
        async with image.lock.span(block, block + 1):
            _, pages = self._core.dirty.place(slot)
            pieces, failed = await self._threads.device(self._dirty_reads.read, slot, pages)
            note_unreadable(image, block, pages, failed)
            for begin, data in pieces:
                length = min(len(data), image.size - base - begin)
                if length > 0:
                    await self._origin.write(image, base + begin, data[:length])
            return failed.bit_count() + self._core.dirty.lost(image.id, block).bit_count()
