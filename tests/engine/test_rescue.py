"""A cache that breaks: what was under way, what is rescued, and what the next start believes."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from fusecache.cli.flushing import kept_by
from fusecache.engine.block_cache import BlockCache
from fusecache.engine.image import Image
from fusecache.errors import CacheDeviceError, DatabaseError, FusecacheError, LostDataError
from fusecache.store.block_map import Batch, BlockMap
from fusecache.store.superblock import Fence
from tests.engine.conftest import BLOCK
from tests.engine.handles import fail, on_origin, opened, tune, versions, write
from tests.support.stamps import stamped
from tests.support.world import PAGE, DeviceDouble, World


@pytest.fixture(autouse=True)
def _by_hand(back: World) -> None:
    tune(back, dirty_age=600.0, barrier_interval=600.0)


class Kernel:
    """What the kernel does when it cannot write slots: it takes their pages for clean, and tells
    of it once."""

    def __init__(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        self._world = world
        self._owed = False
        self._sync = DeviceDouble.sync

        def sync(device: DeviceDouble) -> None:
            self._tell(device)

        monkeypatch.setattr(DeviceDouble, "sync", sync)
        monkeypatch.setattr(DeviceDouble, "set_fence", lambda *args: self._set_fence(*args))

    def loses(self) -> None:
        """Everything since the last sync."""
        self._world.device.cut(self._world.chance, 0)
        self._owed = True

    def forgets(self) -> None:
        """The daemon has ended: whoever opens the device anew is not told."""
        self._owed = False

    def _tell(self, device: DeviceDouble) -> None:
        if self._owed:
            self._owed = False
            raise CacheDeviceError("syncing the double: I/O error")
        self._sync(device)

    def _set_fence(self, device: DeviceDouble, fence: Fence) -> None:
        """The real one syncs, too, by the same descriptor."""
        self._tell(device)
        device.superblock = self._world.superblock = replace(device.superblock, fence=fence)


@pytest.fixture
def kernel(back: World, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    return Kernel(back, monkeypatch)


def slow_writeback(cache: BlockCache, seconds: float) -> None:
    """From now on one has read its slots, and the origin takes its time to write that."""
    inline = cache.threads.run

    async def run(
        fn: Callable[..., Any],
        *args: Any,
        limiter: trio.CapacityLimiter,
        abandon_on_cancel: bool = False,
    ) -> Any:
        if isinstance(fn, partial) and fn.func.__name__ == "_copy":
            late: list[tuple[int, bytes]] = []
            result = fn.func(lambda at, data: late.append((at, data)), *fn.args[1:])
            await trio.sleep(seconds)
            for at, data in late:
                fn.args[0](at, data)
            return result
        return await inline(fn, *args, limiter=limiter, abandon_on_cancel=abandon_on_cancel)

    cache.threads.run = run  # type: ignore[assignment]  # it takes any function


async def flush(cache: BlockCache, image: Image) -> None:
    with suppress(FusecacheError):
        await cache.flush(image)


async def broken(cache: BlockCache, image: Image, world: World) -> None:
    """The database fails, a write meets that, and goes to the origin."""
    fail(world, "database")
    await write(cache, image, 4 * BLOCK, PAGE, 2)
    assert not cache.state.usable


# -- a writeback that is under way when the cache breaks -------------------------------------------


@asynccontextmanager
async def broken_meanwhile(world: World) -> AsyncIterator[tuple[BlockCache, Image]]:
    """The cache breaks while a writeback of the first page, version 2, is on its way; that ends 4
    seconds later, within this context or at its end."""
    async with world.open() as cache:
        image = await opened(cache)
        await write(cache, image, 0, PAGE, 2)
        await cache.fsync(image, metadata=False)
        slow_writeback(cache, 5.0)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(flush, cache, image)
            await trio.sleep(1)
            await broken(cache, image, world)
            yield cache, image
        await cache.close(image, write=True)
        world.kill()


async def test_it_does_not_undo_a_write_past_the_broken_cache(
    back: World, autojump_clock: MockClock
) -> None:
    async with broken_meanwhile(back) as (cache, image):
        await write(cache, image, 0, PAGE, 3)
        assert set(on_origin(back, 0, PAGE)) == {3}
        await trio.sleep(5)
        assert set(await versions(cache, image, 0, PAGE)) == {3}
        await trio.sleep(100)
        await cache.fsync(image, metadata=False)
        assert cache.state.emptied
        assert set(await versions(cache, image, 0, PAGE)) == {3}
        assert set(on_origin(back, 0, PAGE)) == {3}


async def test_a_read_is_not_older_than_it(back: World, autojump_clock: MockClock) -> None:
    """The origin's answer was on its way for longer than the writeback."""
    async with broken_meanwhile(back) as (cache, image):
        back.after = {"read": 10.0}
        assert set(await versions(cache, image, 0, PAGE)) == {2}
        back.after = {}


# -- what is rescued -------------------------------------------------------------------------------


async def one_lost_one_rescued(cache: BlockCache, world: World) -> tuple[Image, Image]:
    """A sync of the device fails: the first image loses a page, and of the second, whose dirty
    data was stable, all is brought to the origin."""
    one, two = await opened(cache), await opened(cache, 2)
    await write(cache, two, 0, PAGE, 2, 2)
    await cache.fsync(two, metadata=False)
    await write(cache, one, 0, PAGE, 2)
    fail(world, "device.sync")
    with pytest.raises(FusecacheError):
        await cache.fsync(one, metadata=False)
    fail(world)
    await trio.sleep(60)
    assert two.rescued and not one.rescued and set(on_origin(world, 0, PAGE, 2)) == {2}
    return one, two


@pytest.mark.parametrize("end", ["umount", "kill", "power"])
async def test_it_does_not_come_back_over_what_was_written_elsewhere(
    back: World, autojump_clock: MockClock, end: str
) -> None:
    """Although another image cannot be rescued, and the next start believes what is dirty."""
    async with back.open() as cache:
        one, two = await one_lost_one_rescued(cache, back)
        kept = kept_by(cache)
        assert kept is not None and kept["images"] == 1 and cache.dirty_bytes_of(two) == 0
        await cache.close(one, write=True)
        await cache.close(two, write=True)
        if end == "power":
            back.power_cut(newest=True)
        else:
            back.kill()
    await trio.sleep(60)
    back.change_outside(2, 0, stamped(2, 0, PAGE, 7))
    await trio.sleep(60)
    async with back.open() as after:
        two = await opened(after, 2)
        assert set(await versions(after, two, 0, PAGE, 2)) == {7}
        await after.flush(two)
        assert set(on_origin(back, 0, PAGE, 2)) == {7}
        await after.close(two, write=True)


async def test_it_counts_as_kept_while_the_next_start_would_believe_it(
    back: World, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows cannot be taken away, because the database fails as well."""
    commit = BlockMap.commit

    def fails(block_map: BlockMap, batch: Batch, *, stable: bool) -> int:
        if batch.drops:
            raise DatabaseError("injected")
        return commit(block_map, batch, stable=stable)

    monkeypatch.setattr(BlockMap, "commit", fails)
    async with back.open() as cache:
        one, two = await one_lost_one_rescued(cache, back)
        kept = kept_by(cache)
        assert kept is not None and kept["images"] == 2
        assert cache.dirty_bytes_of(two) == 0
        await cache.close(one, write=True)
        await cache.close(two, write=True)
        back.kill()


@pytest.mark.parametrize("mended", [True, False], ids=["works again", "stays broken"])
async def test_what_the_device_lost_is_not_rescued_as_it_was_before(
    back: World, autojump_clock: MockClock, kernel: Kernel, mended: bool
) -> None:
    """The database broke first, and nobody has asked the device since."""
    async with back.open() as cache:
        image = await opened(cache)
        await cache.read(image, 0, 4 * BLOCK)
        await cache.committer.barrier()
        await write(cache, image, 0, PAGE, 2)
        kernel.loses()
        await broken(cache, image, back)
        if mended:
            fail(back)
        await trio.sleep(10)
        with pytest.raises(LostDataError):
            await cache.fsync(image, metadata=False)
        assert cache.core.lost_ranges(image.id) == [(0, PAGE)]
        with pytest.raises(LostDataError):
            await cache.read(image, 0, PAGE)
        assert not image.rescued and not cache.state.emptied
        await cache.close(image, write=True)
        back.kill()


async def test_a_second_loss_does_not_bring_older_data_back(
    back: World, autojump_clock: MockClock, kernel: Kernel
) -> None:
    """Written to the origin and to a slot, which the device then lost."""
    async with back.open() as cache:
        _, two = await one_lost_one_rescued(cache, back)
        await write(cache, two, 0, PAGE, 3, 2)
        kernel.loses()
        with suppress(FusecacheError):
            await cache.fsync(two, metadata=False)
        await cache.fsync(two, metadata=False)
        assert set(await versions(cache, two, 0, PAGE, 2)) == {3}
        back.kill()
    kernel.forgets()
    async with back.open() as after:
        two = await opened(after, 2)
        await after.flush(two)
        assert set(on_origin(back, 0, PAGE, 2)) == {3}
        await after.close(two, write=True)


async def test_a_rescue_that_is_tried_again_does_not_bring_older_data(
    back: World, autojump_clock: MockClock, kernel: Kernel
) -> None:
    """One page is lost, so that it never ends; meanwhile the device loses what a guest has written
    to the origin and to a slot."""
    async with back.open() as cache:
        image = await opened(cache)
        await write(cache, image, 0, PAGE, 2)
        await cache.fsync(image, metadata=False)
        await write(cache, image, BLOCK, PAGE, 2)
        kernel.loses()
        with pytest.raises(FusecacheError):
            await cache.fsync(image, metadata=False)
        await trio.sleep(30)
        assert set(on_origin(back, 0, PAGE)) == {2} and not image.rescued
        await write(cache, image, 0, PAGE, 3)
        assert set(on_origin(back, 0, PAGE)) == {3}
        kernel.loses()
        await trio.sleep(120)
        assert set(on_origin(back, 0, PAGE)) == {3}
        with pytest.raises(LostDataError):
            await cache.read(image, 0, PAGE)
        await cache.close(image, write=True)
        back.kill()


async def test_a_sync_that_was_under_way_when_the_database_broke_is_told_of_all_losses(
    back: World, autojump_clock: MockClock, kernel: Kernel
) -> None:
    """The kernel tells one sync: were there another one beside it, that would be a good one."""
    async with back.open() as cache:
        image = await opened(cache)
        await cache.read(image, 0, 8 * BLOCK)
        await cache.committer.barrier()
        await write(cache, image, 0, PAGE, 2)
        back.before = {"sync": 2.0}
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fsync, cache, image)
            await trio.sleep(1)  # it is about the first page
            await write(cache, image, BLOCK, PAGE, 2)
            kernel.loses()
            await broken(cache, image, back)
        back.before = {}
        await trio.sleep(10)
        assert cache.core.lost_ranges(image.id) == [(0, PAGE), (BLOCK, PAGE)]
        await cache.close(image, write=True)
        back.kill()


async def fsync(cache: BlockCache, image: Image) -> None:
    with suppress(FusecacheError):
        await cache.fsync(image, metadata=False)
