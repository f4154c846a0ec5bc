"""Clauses that write-through and write-around live by, each broken alone. See ``mutation``."""

import contextlib
from collections.abc import Iterator
from contextlib import asynccontextmanager
from typing import Any

from fusecache.core.index import CacheIndex
from fusecache.core.replacement import Lru
from fusecache.engine import committer, images, writes
from fusecache.engine.committer import Committer
from fusecache.engine.dropping import Dropping
from fusecache.engine.intents import WriteIntents
from fusecache.engine.lasting import Lasting
from fusecache.engine.locks import SpanLock
from fusecache.store.block_map import Batch, BlockMap
from tests.crash.mutation import mutation, nothing, patch
from tests.support.world import DeviceDouble, OriginDouble


@mutation
def r1_rows_are_merged_without_syncing_the_device() -> Any:
    return patch(DeviceDouble, "sync", lambda self: None)


@mutation
def r1_merge_takes_rows_that_came_during_the_sync() -> Any:
    original = BlockMap.merge
    return patch(BlockMap, "merge", lambda self, mark: original(self, 1 << 62))


@mutation
def r3_a_dropped_slot_is_free_at_once() -> Any:
    original = CacheIndex._drop

    def drop(self: CacheIndex, slot: int, event: Any) -> None:
        original(self, slot, event)
        self.release(self.take_leaving())

    return patch(CacheIndex, "_drop", drop)


@mutation
def r4_no_intent_is_recorded() -> Any:
    async def activate(self: Committer, image: Any, regions: list[int], *, active: bool) -> None:
        for region in regions:
            image.intents[region].active = active
            image.intents[region].stable = True

    return patch(Committer, "activate", activate)


@mutation
def r4_intents_are_never_stable() -> Any:
    return patch(committer._Activation, "needs_stable", property(lambda self: False))


@mutation
def r4_active_is_not_written() -> Any:
    original = Committer._commit

    async def commit(self: Committer, batch: Batch, *, stable: bool) -> int:
        batch.intents = [(image, region, 0) for image, region, _ in batch.intents]
        return await original(self, batch, stable=stable)

    return patch(Committer, "_commit", commit)


@mutation
def r4_active_is_cleared_while_a_write_is_in_flight() -> Any:
    def idle(self: WriteIntents, image: Any, limit: float) -> list[int]:
        return [region for region, intent in image.intents.items() if intent.active]

    return patch(WriteIntents, "_idle", idle)


@mutation
def r4_rows_are_removed_without_an_origin_sync() -> Any:
    return patch(Lasting, "sync", nothing)


@mutation
def r6_a_truncate_leaves_the_rows() -> Any:
    original = Dropping.drop

    async def drop(self: Dropping, image: Any, from_block: int, *, dirty: bool) -> None:
        if from_block == 0:
            await original(self, image, from_block, dirty=dirty)

    return patch(Dropping, "drop", drop)


@mutation
def r6_a_truncate_keeps_the_tail_page() -> Any:
    original = CacheIndex.clear

    def clear(self: CacheIndex, image: int, block: int, pages: int) -> None:
        if pages & 0b1000 == 0 or pages == 0b1111:
            original(self, image, block, pages)

    return patch(CacheIndex, "clear", clear)


@mutation
def r6_and_r7_slow_work_is_not_exclusive() -> Any:
    @asynccontextmanager
    async def span(self: SpanLock, first: int, stop: int) -> Any:
        yield

    return patch(SpanLock, "span", span)


@mutation
def p1_a_write_is_acknowledged_without_the_origin() -> Any:
    return patch(OriginDouble, "write", lambda self, offset, data: None)


@mutation
def p2_fsync_does_not_reach_the_origin() -> Any:
    return patch(OriginDouble, "sync", lambda self, **kwargs: None)


@mutation
def around_leaves_the_pages_valid() -> Any:
    return patch(writes.Writes, "_clear", lambda self, image, offset, length: None)


@mutation
def around_clears_one_page_too_few() -> Any:
    original = writes.Writes._clear

    def clear(self: writes.Writes, image: Any, offset: int, length: int) -> None:
        if length > 4096:
            original(self, image, offset, length - 4096)

    return patch(writes.Writes, "_clear", clear)


@mutation
def through_makes_partly_written_pages_valid() -> Any:
    from fusecache.core.geometry import Geometry

    return patch(Geometry, "covered", Geometry.touched)


@mutation
def generations_are_not_compared() -> Any:
    return patch(CacheIndex, "unmoved", lambda self, located: True)


@mutation
def pins_are_ignored() -> Any:
    original = Lru._sweep

    def sweep(self: Lru, wanted: int) -> None:
        pins = self._slots.pins_of.copy()
        self._slots.pins_of[:] = 0
        original(self, wanted)
        self._slots.pins_of[:] = pins

    class Unpinned:
        def __getitem__(self, slot: int) -> int:
            return 0

    original_take = Lru._take

    def take(self: Lru, *args: Any) -> None:
        pins, self._slots.pins = self._slots.pins, Unpinned()  # type: ignore[assignment]  # nothing but what is asked
        try:
            original_take(self, *args)
        finally:
            self._slots.pins = pins

    @contextlib.contextmanager
    def both() -> Iterator[None]:
        with patch(Lru, "_sweep", sweep), patch(Lru, "_take", take):
            yield

    return both()


@mutation
def recovery_from_a_kill_keeps_active_regions() -> Any:
    original = BlockMap._recover_killed

    def recover(self: BlockMap, heartbeat_ns: int) -> None:
        self._drop_clean = lambda image, region: None  # type: ignore[method-assign]  # for this call alone
        try:
            original(self, heartbeat_ns)
        finally:
            del self._drop_clean

    return patch(BlockMap, "_recover_killed", recover)


@mutation
def recovery_from_a_cut_believes_what_was_pending() -> Any:
    original = BlockMap._recover_cut

    def recover(self: BlockMap, heartbeat_ns: int) -> None:
        self._merge(1 << 62)
        original(self, heartbeat_ns)

    return patch(BlockMap, "_recover_cut", recover)


@mutation
def recovery_takes_a_cut_for_a_kill() -> Any:
    return patch(BlockMap, "_recover_cut", lambda self, _: self._recover_killed(0))


@mutation
def recovery_from_a_cut_drops_active_regions_only() -> Any:
    original = BlockMap._recover_cut

    def recover(self: BlockMap, heartbeat_ns: int) -> None:
        for image, region, active in self.intents():
            if not active:
                self._tables.delete_intent(image, region)
        original(self, heartbeat_ns)

    return patch(BlockMap, "_recover_cut", recover)


@mutation
def recovery_trusts_an_unclean_stop() -> Any:
    original = BlockMap.meta

    def meta(self: BlockMap) -> Any:
        found = original(self)
        found.clean = 1
        return found

    return patch(BlockMap, "meta", meta)


@mutation
def p3_a_change_by_others_is_not_noticed() -> Any:
    return patch(images.Image, "matches", lambda self, seen: True)


@mutation
def evict_leaves_the_blocks() -> Any:
    original = Dropping.drop

    async def drop(self: Dropping, image: Any, from_block: int, *, dirty: bool) -> None:
        if not image.draining:
            await original(self, image, from_block, dirty=dirty)

    return patch(Dropping, "drop", drop)
