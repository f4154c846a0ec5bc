"""A failing slot or cache under write-back, and removal: no wrong byte, and no error too many."""

import pytest
import trio
from trio.testing import MockClock

from fusecache.config import WriteMode
from fusecache.engine.block_cache import BlockCache
from fusecache.engine.dirty_reads import unreadable_ranges
from fusecache.engine.image import Image
from fusecache.errors import FusecacheError, LostDataError
from tests.engine.calls import Calls
from tests.engine.conftest import BLOCK
from tests.engine.handles import fail, on_origin, opened, remove, versions, write
from tests.support.stamps import check_stamps, stamped
from tests.support.world import PAGE, OriginDouble, World

# -- a slot that fails -----------------------------------------------------------------------------


async def test_a_clean_page_that_cannot_be_read_does_no_harm_to_a_write_beside_it(
    back: World, autojump_clock: MockClock
) -> None:
    """The slot is retired while the write waits for the rest of its page."""
    async with back.open() as cache:
        image = await opened(cache)
        await cache.read(image, 0, 512)
        await trio.sleep(1)
        cache.core.clear(image.id, 0, 0b1110)
        calls = Calls(cache)
        calls.stalled.add("OriginDouble.read")
        back.cold = True
        async with trio.open_nursery() as nursery:
            nursery.start_soon(write, cache, image, PAGE, 512, 2)
            await calls.begun("OriginDouble.read")
            fail(back, "device.read")
            nursery.start_soon(cache.read, image, 0, 512)
            await trio.sleep(1)
            calls.stalled.clear()
        fail(back)
        assert await versions(cache, image, PAGE, 1024) == [2, 1]
        cache.core.check()
        await cache.close(image, write=True)


async def test_an_overwrite_while_a_page_leaves_its_failing_slot_is_not_lost(
    back: World, autojump_clock: MockClock
) -> None:
    """Another sector of the same page, written and acknowledged meanwhile."""
    async with back.open() as cache:
        image = await opened(cache)
        await write(cache, image, 0, PAGE, 2)
        calls = Calls(cache)
        calls.stalled.add("OriginDouble.sync")
        fail(back, "device.write")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(write, cache, image, 0, 512, 3)
            await calls.begun("OriginDouble.sync")
            fail(back)
            nursery.start_soon(write, cache, image, 512, 512, 4)
            await trio.sleep(1)
            calls.stalled.clear()
        assert await versions(cache, image, 0, 1536) == [3, 4, 2]
        await cache.close(image, write=True)


async def test_an_unreadable_page_is_forgotten_once_it_was_truncated(
    back: World, autojump_clock: MockClock
) -> None:
    async with back.open() as cache:
        image = await opened(cache)
        await write(cache, image, 4 * BLOCK, PAGE, 2)
        back.cold = True
        fail(back, "device.read")
        with pytest.raises(LostDataError):
            await cache.read(image, 4 * BLOCK, 512)
        fail(back)
        await cache.truncate(image, BLOCK)
        await write(cache, image, 0, PAGE, 2)
        await cache.flush(image)
        assert not unreadable_ranges(cache.core, image)
        await cache.close(image, write=True)


async def test_an_unreadable_page_is_forgotten_once_the_origin_has_newer_data(
    back: World, autojump_clock: MockClock
) -> None:
    async with back.open() as cache:
        image = await opened(cache)
        await write(cache, image, 0, PAGE, 2)
        back.cold = True
        fail(back, "device.read", "device.write")
        with pytest.raises(LostDataError):
            await cache.read(image, 0, 512)
        await write(cache, image, 0, PAGE, 3)
        fail(back)
        assert set(await versions(cache, image, 0, PAGE)) == {3}
        await trio.sleep(20)  # storing paused
        await write(cache, image, BLOCK, PAGE, 2)
        await cache.flush(image)
        assert not unreadable_ranges(cache.core, image)
        await cache.evict(image)
        await cache.close(image, write=True)


# -- a cache that fails ----------------------------------------------------------------------------


async def test_a_lost_page_that_is_written_whole_can_be_read_although_the_cache_is_degraded(
    back: World, autojump_clock: MockClock
) -> None:
    async with back.open() as cache:
        image = await opened(cache)
        await write(cache, image, 0, PAGE, 2)
        fail(back, "device.sync")
        with pytest.raises(FusecacheError):
            await cache.fsync(image, metadata=False)
        fail(back)
        with pytest.raises(LostDataError):
            await cache.read(image, 0, 512)
        await write(cache, image, 0, PAGE, 3)
        assert set(await versions(cache, image, 0, PAGE)) == {3}
        await cache.close(image, write=True)


@pytest.mark.parametrize("mode", list(WriteMode))
@pytest.mark.parametrize("kind", ["device.sync", "database"])
async def test_a_changed_image_opens_although_the_cache_fails_at_that_moment(
    back: World, autojump_clock: MockClock, kind: str, mode: WriteMode
) -> None:
    """Nothing of it is dirty; its end lies within a block."""
    back.write_mode = mode
    back.make_file(1, stamped(1, 0, BLOCK + 512, 1))
    for nth in range(4):
        async with back.open() as cache:
            image = await opened(cache, write=False)
            await cache.read(image, 0, BLOCK + 512)
            await trio.sleep(6)
            await cache.close(image, write=False)
            back.change_outside(1, 0, stamped(1, 0, 512, 2 + nth))
            first = back.faults.calls.get(kind, 0) + nth

            def fails(called: str, number: int, first: int = first) -> bool:
                return called == kind and number >= first

            back.faults.fail = fails
            image = await opened(cache, write=False)
            assert await versions(cache, image, 0, 1024) == [2 + nth, 1]
            await cache.close(image, write=False)
            fail(back)
        back.kill()
        await trio.sleep(100)


async def test_what_was_truncated_does_not_come_back_although_the_cache_cannot_be_fenced(
    back: World, autojump_clock: MockClock
) -> None:
    """The row that says the page is clean was never stable: the next start may believe the old."""
    async with back.open() as cache:
        image = await opened(cache)
        await write(cache, image, 0, PAGE, 2)
        await cache.fsync(image, metadata=False)
        calls = Calls(cache)
        calls.stalled.add("OriginDouble.sync")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_refused, cache, image)
            await calls.begun("OriginDouble.sync")
            fail(back, "database", "device.fence")
            calls.stalled.clear()
        assert not cache.core.dirty.pages(image.id) and cache.core.dirty.held(image.id, 0)
        try:
            await cache.truncate(image, 0)
        except FusecacheError:
            expected = {2}
        else:
            await cache.truncate(image, BLOCK)
            expected = {0}
        back.kill()
        fail(back)
        async with back.open() as after:
            again = await opened(after)
            data = await after.read(again, 0, PAGE)
            assert (set(check_stamps(data, 1, 0)) if any(data) else {0}) == expected
            await after.close(again, write=True)


async def _refused(cache: BlockCache, image: Image) -> None:
    with pytest.raises(FusecacheError):
        await cache.flush(image)


@pytest.mark.parametrize("first", range(6))
async def test_a_write_past_a_failing_slot_is_not_undone_although_the_database_fails_as_well(
    back: World, autojump_clock: MockClock, first: int
) -> None:
    """The rows of its pages could not be made clean: what comes later does not go past them."""
    async with back.open() as cache:
        image = await opened(cache)
        await write(cache, image, 0, PAGE, 2)
        await write(cache, image, BLOCK, PAGE, 2)  # stays dirty: the next start believes such rows
        await cache.fsync(image, metadata=False)
        begun = back.faults.calls.get("database", 0) + first
        back.faults.fail = lambda kind, number: (
            kind in ("device.write", "device.fence") or (kind == "database" and number >= begun)
        )
        expected = {3}
        try:
            await write(cache, image, 0, PAGE, 3)
        except FusecacheError:
            expected = {2, 3}
        back.faults.fail = lambda kind, number: (
            kind == "device.fence" or (kind == "database" and number >= begun)
        )
        if not cache.state.usable:
            await write(cache, image, 0, PAGE, 4)
            expected = {4}
        back.kill()
        fail(back)
        async with back.open() as after:
            again = await opened(after)
            assert set(await versions(after, again, 0, PAGE)) <= expected
            await after.flush(again)
            assert set(on_origin(back, 0, PAGE)) <= expected
            await after.close(again, write=True)


# -- removal ---------------------------------------------------------------------------------------


async def test_unlink_with_a_handle_for_reading_brings_an_earlier_lifes_data_to_the_origin(
    back: World, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The origin must be open for writing by then: the double would not notice."""
    unchecked = OriginDouble.write

    def checked(self: OriginDouble, offset: int, data: bytes | memoryview) -> None:
        assert self.writable, "EBADF"
        unchecked(self, offset, data)

    monkeypatch.setattr(OriginDouble, "write", checked)
    async with back.open() as cache:
        image = await opened(cache)
        await write(cache, image, 0, PAGE, 2)
        await cache.fsync(image, metadata=False)
        back.kill()
        async with back.open() as after:
            again = await opened(after, write=False)
            await remove(after)
            assert set(await versions(after, again, 0, PAGE)) == {2}
            await after.close(again, write=False)
