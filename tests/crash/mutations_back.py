"""Clauses of R1 to R7 that write-back lives by (R5 is elsewhere), each broken alone."""

from contextlib import asynccontextmanager
from typing import Any

import trio

from fusecache.core.index import CacheIndex
from fusecache.engine.cleaner import Cleaner
from fusecache.engine.committer import Committer
from fusecache.engine.dirty_writes import DirtyWrites, Part
from fusecache.engine.discards import Discards
from fusecache.engine.dropping import Dropping
from fusecache.engine.fills import Fills
from fusecache.engine.hit_path import HitPath
from fusecache.engine.image import Image
from fusecache.engine.intents import WriteIntents
from fusecache.engine.origin_writes import OriginWrites
from fusecache.engine.write_modes import WriteModes
from fusecache.engine.writes import Writes
from fusecache.errors import CacheDeviceError
from fusecache.store.block_map import WHOLE_IMAGE, Batch, BlockMap
from tests.crash.mutation import mutation, nothing, patch, together

# -- R1 --------------------------------------------------------------------------------------------


@mutation
def r1_fsync_makes_no_barrier() -> Any:
    return patch(Committer, "make_stable", nothing)


@mutation
def r1_fsync_joins_a_barrier_that_has_begun() -> Any:
    async def make_stable(self: Committer, image: Any) -> None:
        if image.stable < image.changes:
            if self._running is not None:
                await self._running.done.wait()
            else:
                await self.barrier()

    return patch(Committer, "make_stable", make_stable)


@mutation
def r1_to_overwrite_a_dirty_page_is_no_change() -> Any:
    original = HitPath.try_write

    def try_write(self: HitPath, image: Any, offset: int, data: bytes) -> bool:
        before = image._changes
        done = original(self, image, offset, data)
        image._changes = before
        return done

    return patch(HitPath, "try_write", try_write)


@mutation
def r1_the_lane_syncs_although_rows_have_changed() -> Any:
    original = Image.changed

    def changed(self: Image) -> None:
        only_data = self._only_data
        original(self)
        self._only_data = only_data
        self._tell_gate()

    return patch(Image, "changed", changed)


@mutation
def r1_the_lane_syncs_although_rows_changed_during_the_barrier() -> Any:
    original = Image.fsynced

    def fsynced(self: Image) -> None:
        self._stable = self._changes
        original(self)

    return patch(Image, "fsynced", fsynced)


@mutation
def r1_the_lane_syncs_whatever_has_changed() -> Any:
    return patch(Image, "_more_than_data", lambda self: None)


@mutation
def r1_the_lane_syncs_although_the_origin_is_not_synced() -> Any:
    original = Image.fsynced

    def fsynced(self: Image) -> None:
        synced, self.synced = self.synced, self.guest_written
        original(self)
        self.synced = synced

    return patch(Image, "fsynced", fsynced)


@mutation
def r1_a_write_that_fails_has_changed_no_row() -> Any:
    original = DirtyWrites.write

    async def write(self: DirtyWrites, image: Image, parts: list[Part]) -> None:
        before = image._changes, image._only_data
        try:
            await original(self, image, parts)
        except CacheDeviceError:
            image._changes, image._only_data = before
            image._tell_gate()
            raise

    return patch(DirtyWrites, "write", write)


@mutation
def r1_a_write_at_once_that_fails_has_changed_no_row() -> Any:
    original = Writes._together

    def _together(self: Writes, wanted: Any) -> list[bool]:
        image = wanted[0][0]
        before = image._changes, image._only_data
        done = original(self, wanted)
        if not any(done):
            image._changes, image._only_data = before
            image._tell_gate()
        return done

    return patch(Writes, "_together", _together)


@mutation
def r1_to_make_a_page_dirty_is_no_change() -> Any:
    original = DirtyWrites.write

    async def write(self: DirtyWrites, image: Any, parts: list[Part]) -> None:
        await original(self, image, parts)
        image._changes -= 1

    return patch(DirtyWrites, "write", write)


@mutation
def r1_a_barrier_covers_what_came_during_it() -> Any:
    original = Committer._perform

    async def perform(self: Committer) -> None:
        await original(self)
        for image in self._images():
            image.stable = image.changes

    return patch(Committer, "_perform", perform)


# -- R2 --------------------------------------------------------------------------------------------


@mutation
def r2_data_before_row_for_clean_pages() -> Any:
    original = DirtyWrites._rows_first

    async def rows_first(self: DirtyWrites, image: Any, before: Any, parts: list[Part]) -> None:
        await self._write(parts)
        await original(self, image, before, parts)

    return patch(DirtyWrites, "_rows_first", rows_first)


@mutation
def r2_data_before_the_rows_of_writes_that_come_together() -> Any:
    original = DirtyWrites.write_at_once

    def write_at_once(self: DirtyWrites, soiled: Any) -> list[bool]:
        for position, data in soiled:
            self._slots.write_now(position, memoryview(data))
        return original(self, soiled)

    return patch(DirtyWrites, "write_at_once", write_at_once)


@mutation
def r2_row_before_data_for_pages_that_were_not_valid() -> Any:
    original = DirtyWrites._write

    async def write(self: DirtyWrites, parts: list[Part]) -> None:
        for part in parts:
            if part.after:
                self._core.stored_dirty(part.slot, part.after)
        await self._committer.commit_rows()
        await original(self, parts)

    return patch(DirtyWrites, "_write", write)


@mutation
def r2_acknowledged_before_the_row_of_a_new_page() -> Any:
    return patch(Committer, "commit_rows", nothing)


@mutation
def r2_acknowledged_before_the_row_of_a_clean_page() -> Any:
    async def rows_first(self: DirtyWrites, image: Any, before: Any, parts: list[Part]) -> None:
        async with self._intents.writing(image, range(1), active=False):
            await self._write(parts)

    return patch(DirtyWrites, "_rows_first", rows_first)


@mutation
def r2_settling_pages_pass_for_dirty_ones() -> Any:
    original = DirtyWrites._classify

    def classify(self: DirtyWrites, image: Any, part: Part) -> None:
        held = self._core.dirty.held(image.id, part.block)
        original(self, image, part)
        part.before &= ~held

    return patch(DirtyWrites, "_classify", classify)


# -- R4 --------------------------------------------------------------------------------------------


@mutation
def r4_no_intent_for_clean_pages_that_become_dirty() -> Any:
    original = WriteIntents.writing

    @asynccontextmanager
    async def writing(
        self: WriteIntents, image: Any, regions: range, *, active: bool = True
    ) -> Any:
        if not active:
            yield
            return
        async with original(self, image, regions):
            yield

    return patch(WriteIntents, "writing", writing)


@mutation
def r4_a_row_goes_although_a_write_began() -> Any:
    original = WriteIntents._take_removed

    def take(self: WriteIntents, image: Any, quiet: dict[int, int], begun: int) -> Batch:
        now = {region: intent.begun for region, intent in image.intents.items() if region in quiet}
        return original(self, image, now, image.begun)

    return patch(WriteIntents, "_take_removed", take)


@mutation
def r4_the_row_of_a_whole_image_goes_although_a_write_began() -> Any:
    original = WriteIntents._take_removed

    def take(self: WriteIntents, image: Any, quiet: dict[int, int], begun: int) -> Batch:
        return original(self, image, quiet, image.begun)

    return patch(WriteIntents, "_take_removed", take)


class _NoBarrier:
    """A committer whose barriers do nothing."""

    def __init__(self, committer: Committer) -> None:
        self._committer = committer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._committer, name)

    async def barrier(self) -> None:
        """Nothing."""


@mutation
def r4_rows_are_removed_without_a_barrier() -> Any:
    original = WriteIntents.remove_old

    async def remove_old(self: WriteIntents, *args: Any, **kwargs: Any) -> None:
        self._committer = _NoBarrier(self._committer)  # type: ignore[assignment]  # it passes on all else
        try:
            await original(self, *args, **kwargs)
        finally:
            self._committer = self._committer._committer  # type: ignore[attr-defined]  # the real one

    return patch(WriteIntents, "remove_old", remove_old)


@mutation
def r4_the_row_of_a_whole_image_is_not_believed() -> Any:
    original = BlockMap._drop_clean

    def drop_clean(self: BlockMap, image: int, region: int) -> None:
        if region != WHOLE_IMAGE:
            original(self, image, region)

    return patch(BlockMap, "_drop_clean", drop_clean)


# -- R6 and R7 -------------------------------------------------------------------------------------


@mutation
def r6_a_truncate_leaves_dirty_rows() -> Any:
    original = Dropping.drop

    async def drop(self: Dropping, image: Any, from_block: int, *, dirty: bool) -> None:
        await original(self, image, from_block, dirty=dirty and from_block == 0)

    return patch(Dropping, "drop", drop)


@mutation
def r6_a_truncate_does_not_bring_home_the_new_end() -> Any:
    return patch(Cleaner, "finish_block", nothing)


@mutation
def r6_a_truncate_does_not_wait_for_a_writeback() -> Any:
    original = Discards.truncate

    async def truncate(self: Discards, image: Any, size: int) -> None:
        cleaning, image.cleaning = image.cleaning, trio.Lock()
        try:
            await original(self, image, size)
        finally:
            image.cleaning = cleaning

    return patch(Discards, "truncate", truncate)


@mutation
def r6_an_eviction_drops_dirty_data() -> Any:
    async def finish(self: Cleaner, image: Any, progress: Any = None) -> None:
        return None

    return together(patch(Cleaner, "finish", finish), patch(Cleaner, "clean", nothing))


@mutation
def r6_a_removed_image_keeps_its_rows() -> Any:
    original = Dropping.drop

    async def drop(self: Dropping, image: Any, from_block: int, *, dirty: bool) -> None:
        if not image.detached:
            await original(self, image, from_block, dirty=dirty)

    return together(patch(Dropping, "drop", drop), patch(Committer, "forget", nothing))


@mutation
def r7_a_fill_stores_over_dirty_pages() -> Any:
    original = Fills._fetch

    async def fetch(self: Fills, image: Any, fetch: Any) -> None:
        core = self._core
        self._core = _CleanOnly(core)  # type: ignore[assignment]  # it passes on all else
        coroutine = original(self, image, fetch)
        try:
            await coroutine
        finally:
            self._core = core

    return patch(Fills, "_fetch", fetch)


class _CleanOnly:
    """An index that says that dirty pages are not there."""

    def __init__(self, core: CacheIndex) -> None:
        self._index = getattr(core, "_index", core)
        self.dirty = self

    def __getattr__(self, name: str) -> Any:
        return getattr(self._index, name)

    def valid_pages(self, image: int, block: int) -> int:
        """Clean ones."""
        pages: int = self._index.valid_pages(image, block)
        return pages & ~self._index.dirty.mask(image, block)

    def held(self, image: int, block: int) -> int:
        """None."""
        return 0


# -- modes and sizes -------------------------------------------------------------------------------


@mutation
def an_image_grows_after_its_data() -> Any:
    extend, cached = OriginWrites.extend, Writes._cached

    async def late(self: Writes, image: Any, offset: int, data: bytes) -> None:
        await cached(self, image, offset, data)
        await extend(self._origin, image, offset + len(data))

    return together(
        patch(OriginWrites, "extend", nothing),
        patch(Writes, "_lengthen", nothing),
        patch(Writes, "_cached", late),
    )


@mutation
def growing_is_not_one_at_a_time() -> Any:
    async def extend(self: OriginWrites, image: Any, size: int) -> None:
        if size > image.size:
            await self._threads.run(image.origin.truncate, size, limiter=image.limiter)
            image.size = size
            image.written += 1

    return patch(OriginWrites, "extend", extend)


@mutation
def leaving_write_back_does_not_flush() -> Any:
    original = WriteModes.set

    async def set_mode(self: WriteModes, *args: Any) -> Any:
        return await original(WriteModes(self._images, self._committer, nothing), *args)

    return patch(WriteModes, "set", set_mode)
