"""Clauses of recovery and of the fence, each broken alone. See ``mutation``."""

from typing import Any

import trio

from fusecache.core.slots import NO_SLOT
from fusecache.engine import block_cache, recovery
from fusecache.engine.degraded import Degraded
from fusecache.engine.dropping import Dropping
from fusecache.engine.images import Images
from fusecache.engine.ownership import Ownership
from fusecache.engine.rescuer import Rescuer
from fusecache.engine.state import CacheState
from fusecache.engine.truth import Truth
from fusecache.store.block_map import BlockMap
from fusecache.store.packing import RegionColumns
from fusecache.store.superblock import Fence
from tests.crash.mutation import mutation, nothing, patch, together
from tests.support.world import DeviceDouble

# -- recovery --------------------------------------------------------------------------------------


@mutation
def recovery_drops_dirty_pages_with_their_region() -> Any:
    def drop(self: RegionColumns) -> None:
        self.slots[:], self.valid[:], self.dirty[:] = NO_SLOT, 0, 0

    return patch(RegionColumns, "drop_clean", drop)


@mutation
def recovery_from_a_kill_ignores_what_is_pending() -> Any:
    original = BlockMap._recover_killed

    def recover(self: BlockMap, heartbeat_ns: int) -> None:
        self._tables.delete_pending()
        original(self, heartbeat_ns)

    return patch(BlockMap, "_recover_killed", recover)


@mutation
def recovery_from_a_kill_does_not_sync_the_device() -> Any:
    original, sync = recovery.recover, DeviceDouble.sync
    recovering: list[None] = []

    def recover(*args: Any, **kwargs: Any) -> Any:
        recovering[:] = [None]
        try:
            return original(*args, **kwargs)
        finally:
            recovering.clear()

    def maybe(self: DeviceDouble) -> None:
        if not recovering:
            sync(self)

    return together(
        patch(block_cache.recovery, "recover", recover), patch(DeviceDouble, "sync", maybe)
    )


@mutation
def recovery_keeps_the_old_boot_id() -> Any:
    original = BlockMap.attach

    def attach(self: BlockMap, boot_id: str, *args: Any, **kwargs: Any) -> None:
        old = self.meta().boot_id
        original(self, boot_id, *args, **kwargs)
        if old:
            with self._transaction(stable=True):
                self._tables.now.boot_id = old

    return patch(BlockMap, "attach", attach)


@mutation
def recovery_sets_the_boot_id_before_the_rest() -> Any:
    original = BlockMap.attach

    def attach(self: BlockMap, boot_id: str, *args: Any, **kwargs: Any) -> None:
        meta = self.meta()
        with self._transaction(stable=True):
            self._tables.now.boot_id = boot_id
        self.meta = lambda: meta  # type: ignore[method-assign]  # for this call alone
        try:
            original(self, boot_id, *args, **kwargs)
        finally:
            del self.meta

    return patch(BlockMap, "attach", attach)


@mutation
def recovery_leaves_the_mark_of_a_clean_stop() -> Any:
    original = BlockMap.attach

    def attach(self: BlockMap, *args: Any, **kwargs: Any) -> None:
        clean = self.meta().clean
        original(self, *args, **kwargs)
        with self._transaction(stable=True):
            self._tables.now.clean = clean

    return patch(BlockMap, "attach", attach)


@mutation
def the_first_fsync_of_a_life_does_not_sync_the_origin() -> Any:
    original = Images._add

    def add(self: Images, row: Any) -> Any:
        image = original(self, row)
        image.synced = image.written
        return image

    return patch(Images, "_add", add)


# -- adoption --------------------------------------------------------------------------------------


@mutation
def dirty_pages_past_the_end_are_kept() -> Any:
    return patch(Dropping, "fit", nothing)


@mutation
def dirty_data_is_adopted_without_a_sync_of_the_origin() -> Any:
    adopt, check = Ownership.adopt, Truth.check

    def unsynced(original: Any) -> Any:
        async def call(self: Any, image: Any, *args: Any) -> Any:
            image.origin.sync = lambda **kwargs: None
            try:
                return await original(self, image, *args)
            finally:
                image.origin.__dict__.pop("sync", None)

        return call

    return together(
        patch(Ownership, "adopt", unsynced(adopt)), patch(Truth, "check", unsynced(check))
    )


@mutation
def the_last_page_is_not_filled_with_zeros() -> Any:
    fit, write = Dropping.fit, DeviceDouble.write
    fitting: list[None] = []

    async def flagged(self: Dropping, *args: Any) -> None:
        fitting[:] = [None]
        try:
            await fit(self, *args)
        finally:
            fitting.clear()

    def maybe(self: DeviceDouble, position: int, data: bytes | memoryview) -> None:
        if not fitting or any(bytes(data)):
            write(self, position, data)

    return together(patch(Dropping, "fit", flagged), patch(DeviceDouble, "write", maybe))


# -- the fence -------------------------------------------------------------------------------------


@mutation
def clean_pages_are_believed_after_a_broken_database() -> Any:
    return patch(block_cache.recovery, "fence", lambda *args, **kwargs: True)


@mutation
def dirty_pages_are_forgotten_after_a_broken_database() -> Any:
    original = DeviceDouble.set_fence

    def set_fence(self: DeviceDouble, fence: Fence) -> None:
        original(self, Fence.ALL if fence is Fence.CLEAN else fence)

    return patch(DeviceDouble, "set_fence", set_fence)


@mutation
def writes_do_not_wait_for_the_fence() -> Any:
    return patch(CacheState, "passable", nothing)


@mutation
def writes_past_a_broken_cache_leave_out_the_slot() -> Any:
    return patch(Degraded, "_to_slot", nothing)


@mutation
def writes_past_a_broken_cache_leave_out_the_origin() -> Any:
    original = Degraded.write

    async def write(self: Degraded, image: Any, offset: int, data: bytes) -> None:
        held = all(
            self._geometry.touched(start, stop) & ~self._core.dirty.held(image.id, block) == 0
            for block, start, stop in self._geometry.split(offset, len(data))
        )
        if held and self.holds(image):
            writes, self._origin = self._origin, _NoOrigin()  # type: ignore[assignment]  # never asked for more
            try:
                await original(self, image, offset, data)
            finally:
                self._origin = writes
        else:
            await original(self, image, offset, data)

    return patch(Degraded, "write", write)


class _NoOrigin:
    async def write(self, *args: object) -> None:
        """Nothing."""
        await trio.lowlevel.checkpoint()


@mutation
def reads_past_a_broken_cache_leave_out_what_is_dirty() -> Any:
    return patch(Degraded, "overlay", nothing)


@mutation
def a_rescue_is_over_before_everything_is_on_the_origin() -> Any:
    return patch(Rescuer, "_rescue", nothing)
