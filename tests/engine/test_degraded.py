"""Write-back when the database or the whole cache device fails: nothing acknowledged is lost."""

import logging

import pytest
import trio
from trio.testing import MockClock

from fusecache.cli.flushing import kept_by
from fusecache.config import WriteMode
from fusecache.engine.snapshot import cache_snapshot
from fusecache.errors import DatabaseError, FusecacheError, LostDataError
from tests.engine.conftest import BLOCK, BLOCKS
from tests.engine.handles import fail, on_origin, opened, remove, tune, versions, write
from tests.support.world import PAGE, World

BREAKS = [("database",), ("database", "device.fence")]


@pytest.mark.parametrize("kinds", BREAKS, ids=" and ".join)
async def test_past_a_failed_database_dirty_pages_read_right_and_writes_go_both_ways(
    back: World, autojump_clock: MockClock, kinds: tuple[str, ...]
) -> None:
    async with back.open() as cache:
        image = await opened(cache)
        await write(cache, image, 0, 2 * PAGE, 2)
        await cache.fsync(image, metadata=False)
        fail(back, *kinds, "origin.sync")  # nothing can be rescued for now
        await write(cache, image, BLOCK, PAGE, 2)
        assert not cache.state.usable
        assert set(on_origin(back, BLOCK, PAGE)) == {2}, "past the cache"
        assert set(await versions(cache, image, 0, 2 * PAGE)) == {2}
        assert set(await versions(cache, image, 2 * PAGE, 2 * PAGE)) == {1}
        await write(cache, image, 512, 512, 3)
        assert await versions(cache, image, 0, 1536) == [2, 3, 2]
        located = cache.core.locate(image.id, 0)
        assert located is not None
        slot = bytes(back.device.data[located.slot * BLOCK : located.slot * BLOCK + PAGE])
        assert on_origin(back, 512, 512) == [3]
        assert slot == await cache.read(image, 0, PAGE)
        with pytest.raises(FusecacheError):
            await cache.fsync(image, metadata=False)
        with pytest.raises(DatabaseError):
            await cache.evict(image)
        back.kill()
        fail(back)
        await trio.sleep(10)
        async with back.open() as after:
            image = await opened(after)
            found = await versions(after, image, 0, 2 * BLOCK)
            assert found[:16] == [2, 3, *[2] * 14]
            assert found[32:40] == [2] * 8
            assert set(found[16:32]) == {1}
            await after.evict(image)
            assert await versions(after, image, 0, 2 * BLOCK) == found
            await after.close(image, write=True)


@pytest.mark.parametrize("kinds", BREAKS, ids=" and ".join)
async def test_after_a_failed_database_everything_dirty_is_rescued(
    back: World, autojump_clock: MockClock, kinds: tuple[str, ...]
) -> None:
    """Of images that are open and of those that are not; the next start begins with nothing but
    what the rescue could not undo, and is right either way."""
    async with back.open() as cache:
        image, other = await opened(cache), await opened(cache, 2)
        await write(cache, image, 512, BLOCK, 2)
        await write(cache, other, 0, PAGE, 2, 2)
        await cache.fsync(image, metadata=False)
        await cache.close(other, write=True)
        fail(back, *kinds)
        await write(cache, image, 4 * BLOCK, PAGE, 2)
        await trio.sleep(10)
        assert set(on_origin(back, 512, BLOCK)) == {2}
        assert set(on_origin(back, 0, PAGE, 2)) == {2}
        assert not back.files[1].pages.unsynced and not back.files[2].pages.unsynced
        await write(cache, image, 512, 512, 3)
        await cache.fsync(image, metadata=False)
        assert await versions(cache, image, 0, 1536) == [1, 3, 2]
        await cache.close(image, write=True)
    back.power_cut()
    fail(back)
    async with back.open() as after:
        if "device.fence" not in kinds:
            assert not after.core.used
        image, other = await opened(after), await opened(after, 2)
        found = await versions(after, image, 0, BLOCKS * BLOCK)
        assert found[:3] == [1, 3, 2] and set(found[3:33]) == {2}
        assert set(await versions(after, other, 0, PAGE, 2)) == {2}
        for opened_image in (image, other):
            await after.close(opened_image, write=True)


async def test_a_rescue_is_tried_again_until_the_origin_works(
    back: World, autojump_clock: MockClock
) -> None:
    async with back.open() as cache:
        image = await opened(cache)
        await write(cache, image, 0, PAGE, 2)
        fail(back, "database", "origin.write")
        await trio.sleep(100)
        assert not cache.state.usable
        assert set(await versions(cache, image, 0, PAGE)) == {2}
        assert set(on_origin(back, 0, PAGE)) == {1}
        fail(back, "database")
        await trio.sleep(100)
        assert set(on_origin(back, 0, PAGE)) == {2}
        assert cache.state.emptied
        await cache.close(image, write=True)
        back.kill()
        fail(back)
        async with back.open() as after:
            assert not after.core.used
            image = await opened(after)
            assert set(await versions(after, image, 0, PAGE)) == {2}
            await after.close(image, write=True)


async def test_a_failed_device_sync_loses_what_was_not_stable_and_nothing_else(
    back: World, autojump_clock: MockClock
) -> None:
    async with back.open() as cache:
        image = await opened(cache)
        await write(cache, image, 0, 2 * PAGE, 2)
        await cache.fsync(image, metadata=False)
        await write(cache, image, PAGE, 512, 3)
        await write(cache, image, BLOCK, PAGE, 3)
        fail(back, "device.sync")
        with pytest.raises(FusecacheError):
            await cache.fsync(image, metadata=False)
        fail(back)
        lost = [(PAGE, PAGE), (BLOCK, PAGE)]
        assert cache.core.lost_ranges(image.id) == lost
        assert set(await versions(cache, image, 0, PAGE)) == {2}
        for offset in (PAGE, BLOCK):
            with pytest.raises(LostDataError):
                await cache.read(image, offset, 512)
        with pytest.raises(FusecacheError):
            await cache.fsync(image, metadata=False)
        back.kill()
        await trio.sleep(10)
        async with back.open() as after:
            image = await opened(after)
            assert after.core.lost_ranges(image.id) == lost, "the next life knows as well"
            assert set(await versions(after, image, 0, PAGE)) == {2}
            with pytest.raises(LostDataError):
                await write(after, image, PAGE + 512, 512, 4)
            await write(after, image, PAGE, PAGE, 4)
            assert after.core.lost_ranges(image.id) == [(BLOCK, PAGE)]
            assert set(await versions(after, image, PAGE, PAGE)) == {4}
            await after.evict(image, discard_dirty=True)
            assert set(on_origin(back, BLOCK, PAGE)) == {1}
            await after.close(image, write=True)


@pytest.mark.parametrize("kind", ["database", "device.sync", "device.write", "device.read"])
async def test_a_guest_whose_data_is_clean_sees_no_error_when_the_cache_fails(
    back: World, autojump_clock: MockClock, kind: str
) -> None:
    tune(back, dirty_age=2.0)
    async with back.open() as cache:
        image, dirty = await opened(cache), await opened(cache, 2)
        await cache.set_write_mode(image, WriteMode.THROUGH)
        await write(cache, image, 0, 2 * BLOCK, 2)
        await write(cache, dirty, 0, 2 * BLOCK, 2, 2)
        back.cold = True
        fail(back, kind)
        for version in range(3, 9):
            await write(cache, image, PAGE, BLOCK, version)
            found = await versions(cache, image, 0, 2 * BLOCK)
            assert found[:8] == [2] * 8 and set(found[8:40]) == {version}
            await trio.sleep(3)
        await cache.close(image, write=True)
        await cache.close(dirty, write=True)


async def test_a_degraded_cache_says_so_once(
    back: World, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with back.open() as cache:
        image = await opened(cache)
        await write(cache, image, 0, PAGE, 2)
        fail(back, "database")
        with caplog.at_level(logging.WARNING):
            for version in range(3, 9):
                await write(cache, image, BLOCK, PAGE, version)
                await trio.sleep(5)
        said = [record.message for record in caplog.records]
        assert sum(text.startswith("the cache is degraded") for text in said) == 1
        assert sum("dirty is on the origin" in text for text in said) == 1
        await cache.close(image, write=True)


@pytest.mark.usefixtures("few_rescues")
async def test_what_became_dirty_after_the_fence_holds_up_no_removal_and_is_not_counted(
    back: World, autojump_clock: MockClock
) -> None:
    """The cache breaks while the first dirty write is on its way to its slot: there was nothing to
    rescue, the fence says that no slot counts, and the write goes to the origin as well."""
    tune(back, dirty_age=600.0)
    async with back.open() as cache:
        image = await opened(cache)
        back.before = {"_write_all": 3.0}
        async with trio.open_nursery() as nursery:
            nursery.start_soon(write, cache, image, 0, 10 * BLOCK, 2)
            await trio.sleep(0.1)
            fail(back, "database")
        fail(back)
        assert cache.state.emptied and cache.core.dirty_bytes(image.id) == 10 * BLOCK
        assert set(on_origin(back, 0, 10 * BLOCK)) == {2}
        assert cache.dirty_bytes == 0 and kept_by(cache) is None
        status = cache_snapshot(cache)
        assert (status["dirty_bytes"], status["dirty_age"]) == (0, None)
        await remove(cache)
        assert set(await versions(cache, image, 0, 10 * BLOCK)) == {2}
        await cache.close(image, write=True)
