"""Write-back as guests and operators see it: what is acknowledged, where it lies, how it goes."""

from functools import partial

import pytest
import trio
from trio.testing import MockClock

from fusecache.config import WriteMode
from fusecache.engine.block_cache import BlockCache
from fusecache.engine.dirty_reads import unreadable_ranges
from fusecache.engine.image import Image
from fusecache.errors import CacheDeviceError, LockedElsewhereError, LostDataError
from tests.engine.calls import Calls
from tests.engine.conftest import BLOCK, BLOCKS
from tests.engine.handles import fail, on_origin, opened, remove, tune, versions, write
from tests.support.stamps import stamped
from tests.support.world import PAGE, DeviceDouble, OriginDouble, World

ORIGIN = {f"OriginDouble.{call}" for call in ("read", "write", "sync", "truncate", "attributes")}

# -- writes and fsync ------------------------------------------------------------------------------


async def test_a_write_and_its_fsync_are_acknowledged_although_the_origin_stalls(
    back: World, autojump_clock: MockClock
) -> None:
    async with back.open() as cache:
        image = await opened(cache)
        await cache.fsync(image, metadata=False)
        await cache.read(image, BLOCK, BLOCK)
        calls = Calls(cache)
        calls.stalled |= ORIGIN | {"Cleaner._copy"}
        with trio.fail_after(1):
            await write(cache, image, 0, PAGE, 2)
            await write(cache, image, BLOCK + 512, 512, 2)
            await cache.fsync(image, metadata=False)
            assert await versions(cache, image, BLOCK, 1536) == [1, 2, 1]
        calls.stalled.clear()
        assert set(on_origin(back, 0, 2 * BLOCK)) == {1}
        await cache.close(image, write=True)


async def test_a_write_of_part_of_a_page_fetches_that_page_alone(
    back: World, autojump_clock: MockClock
) -> None:
    async with back.open() as cache:
        image = await opened(cache)
        await write(cache, image, BLOCK + PAGE + 512, 512, 2)
        assert (image.counters.origin_reads, image.counters.origin_read_bytes) == (1, PAGE)
        assert cache.core.valid_pages(image.id, 1) == cache.core.dirty.mask(image.id, 1) == 0b10
        assert await versions(cache, image, BLOCK + PAGE, 1536) == [1, 2, 1]
        assert image.counters.origin_reads == 1
        await write(cache, image, 2 * BLOCK, 2 * PAGE, 2)
        assert image.counters.origin_reads == 1
        await cache.close(image, write=True)


async def test_rows_come_before_the_data_of_clean_pages_and_after_that_of_others(
    back: World, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R2: a killed daemon's successor takes no new bytes for the origin's, nor rows for data."""
    async with back.open() as cache:
        image = await opened(cache)
        await cache.read(image, 0, BLOCK)
        await trio.sleep(0.1)
        calls = Calls(cache)
        written = DeviceDouble.write

        def noted(self: DeviceDouble, position: int, data: bytes | memoryview) -> None:
            calls.names.append("data")
            written(self, position, data)

        monkeypatch.setattr(DeviceDouble, "write", noted)
        for offset, length, expected in (
            (0, PAGE, ["BlockMap.commit", "data"]),  # clean
            (PAGE + 512, 512, ["BlockMap.commit", "data"]),
            (0, PAGE, ["data"]),  # dirty
            (BLOCK, PAGE, ["data", "BlockMap.commit"]),  # not valid
            (BLOCK, 512, ["data"]),
        ):
            await trio.sleep(0.2)
            calls.forget()
            await write(cache, image, offset, length, 2)
            order = calls.order("BlockMap.commit", "data")
            assert order[-len(expected) :] == expected
            assert order.count("data") == 1
        await cache.close(image, write=True)


async def test_a_write_past_the_end_makes_the_origins_file_longer_at_once(
    back: World, autojump_clock: MockClock
) -> None:
    async with back.open() as cache:
        image = await opened(cache)
        end = BLOCKS * BLOCK
        await write(cache, image, end + PAGE, 512, 2)
        assert image.size == back.files[1].size == end + PAGE + 512
        assert set(on_origin(back, end, PAGE + 512)) == {0}
        assert await versions(cache, image, end - 512, PAGE + 1024) == [1, *[0] * 8, 2]
        await cache.close(image, write=True)


async def test_beyond_the_dirty_limit_new_writes_go_through_and_dirty_pages_stay(
    back: World, autojump_clock: MockClock
) -> None:
    tune(back, dirty_limit=4 / 64)
    async with back.open() as cache:
        image = await opened(cache)
        for block in range(4):
            await write(cache, image, block * BLOCK, PAGE, 2)
        assert image.counters.origin_writes == 0
        await write(cache, image, 4 * BLOCK, PAGE, 2)
        assert set(on_origin(back, 4 * BLOCK, PAGE)) == {2}
        assert cache.core.dirty.blocks == 4 and not cache.core.dirty.mask(image.id, 4)
        written = image.counters.origin_writes
        await write(cache, image, 0, PAGE, 3)
        await write(cache, image, BLOCK + 512, 512, 3)
        assert image.counters.origin_writes == written
        assert set(on_origin(back, 0, 2 * BLOCK)) == {1}
        # One write over a dirty page and a clean one: each goes its way.
        await write(cache, image, 3 * BLOCK, BLOCK, 4)
        assert set(on_origin(back, 3 * BLOCK, PAGE)) == {1}
        assert set(on_origin(back, 3 * BLOCK + PAGE, BLOCK - PAGE)) == {4}
        assert set(await versions(cache, image, 3 * BLOCK, BLOCK)) == {4}
        await cache.close(image, write=True)


async def test_fsyncs_of_many_writers_share_barriers(
    back: World, autojump_clock: MockClock
) -> None:
    async with back.open() as cache:
        image = await opened(cache)
        await cache.fsync(image, metadata=False)
        calls = Calls(cache)

        async def writer(number: int) -> None:
            await write(cache, image, number * PAGE, PAGE, 2)
            await cache.fsync(image, metadata=False)

        async with trio.open_nursery() as nursery:
            for number in range(16):
                nursery.start_soon(writer, number)
        # The first writer's, under way before the others wrote, and at most two for the rest.
        assert 1 <= calls.count("DeviceDouble.sync") <= 3
        assert not calls.count("OriginDouble.sync")
        await cache.close(image, write=True)


async def test_an_fsync_makes_a_barrier_only_if_something_changed(
    back: World, autojump_clock: MockClock
) -> None:
    async with back.open() as cache:
        image = await opened(cache)
        await write(cache, image, 0, PAGE, 2)
        await cache.fsync(image, metadata=False)
        calls = Calls(cache)
        await cache.fsync(image, metadata=False)
        await cache.read(image, 0, BLOCK)
        await cache.fsync(image, metadata=False)
        assert not calls.order("DeviceDouble.sync", "BlockMap.merge", "OriginDouble.sync")
        await write(cache, image, 0, PAGE, 3)  # a dirty page again: no row, but data
        await cache.fsync(image, metadata=False)
        assert calls.count("DeviceDouble.sync") == 1
        await cache.close(image, write=True)


# -- what goes on purpose --------------------------------------------------------------------------


async def test_truncate_drops_a_dirty_tail_and_what_grows_there_is_zeros(
    back: World, autojump_clock: MockClock
) -> None:
    async with back.open() as cache:
        image = await opened(cache)
        await write(cache, image, BLOCK, 3 * BLOCK, 2)
        await cache.truncate(image, BLOCK + PAGE + 512)
        assert image.size == back.files[1].size == BLOCK + PAGE + 512
        await cache.truncate(image, 5 * BLOCK)
        found = await versions(cache, image, BLOCK, 4 * BLOCK)
        assert set(found[:9]) == {2} and set(found[9:]) == {0}
        await cache.flush(image)
        assert on_origin(back, BLOCK, 4 * BLOCK) == found
        await cache.close(image, write=True)


async def test_unlink_drops_dirty_data(back: World, autojump_clock: MockClock) -> None:
    async with back.open() as cache:
        image = await opened(cache)
        await write(cache, image, 0, BLOCK, 2)
        await cache.close(image, write=True)
        await remove(cache)
        del back.files[1]
        assert cache.images.find(b"id1") is None
        assert not cache.core.dirty.any_held and not cache.core.used
        assert not image.counters.origin_writes
        assert cache.block_map.cached(image.id) == (0, False)


async def test_unlink_with_an_open_handle_keeps_what_was_written_readable(
    back: World, autojump_clock: MockClock
) -> None:
    async with back.open() as cache:
        image = await opened(cache)
        await write(cache, image, 512, BLOCK, 2)
        await remove(cache)
        assert await versions(cache, image, 0, 1024) == [1, 2]
        await write(cache, image, 0, 512, 3)
        assert await versions(cache, image, 0, 1024) == [3, 2]
        assert not cache.core.used
        await cache.close(image, write=True)


@pytest.mark.parametrize("open_meanwhile", [True, False])
async def test_evict_leaves_nothing_here_and_everything_on_the_origin(
    back: World, autojump_clock: MockClock, open_meanwhile: bool
) -> None:
    async with back.open() as cache:
        image = await opened(cache)
        other = await opened(cache, 2)
        await write(cache, image, 512, 2 * BLOCK, 2)
        await write(cache, other, 0, BLOCK, 2, 2)
        if not open_meanwhile:
            await cache.close(image, write=True)
        assert await cache.evict(image, 1) == 3
        assert not cache.core.usage(image.id).blocks
        assert cache.block_map.cached(image.id) == (0, False)
        assert set(on_origin(back, 512, 2 * BLOCK)) == {2}
        assert not back.files[1].pages.unsynced
        assert cache.core.dirty.pages(other.id) == 4
        if open_meanwhile:
            await write(cache, image, 0, 512, 3)
            assert on_origin(back, 0, 512) == [3]
            await cache.close(image, write=True)
        await cache.close(other, write=True)


async def test_evict_with_discard_dirty_leaves_the_origin_as_it_was(
    back: World, autojump_clock: MockClock
) -> None:
    async with back.open() as cache:
        image = await opened(cache)
        await write(cache, image, 0, 2 * BLOCK, 2)
        await cache.fsync(image, metadata=False)
        await cache.evict(image, discard_dirty=True)
        assert not cache.core.used and not cache.core.dirty.any_held
        assert set(await versions(cache, image, 0, BLOCK)) == {1}
        await cache.close(image, write=True)
        back.kill()
        async with back.open() as after:
            image = await opened(after)
            assert set(await versions(after, image, 0, BLOCKS * BLOCK)) == {1}
            await after.close(image, write=True)


# -- modes -----------------------------------------------------------------------------------------


async def test_a_write_mode_that_was_set_stays_over_restarts_and_an_eviction(
    back: World, autojump_clock: MockClock
) -> None:
    async with back.open() as cache:
        image = await opened(cache)
        await cache.set_write_mode(image, WriteMode.AROUND)
        await cache.close(image, write=True)
    back.kill()
    async with back.open() as cache:
        image = await opened(cache)
        assert image.write_mode is WriteMode.AROUND
        await cache.evict(image)
        await cache.close(image, write=True)
        image = await opened(cache)
        assert image.write_mode is WriteMode.AROUND
        await cache.close(image, write=True)
    back.power_cut(newest=True)
    async with back.open() as cache:
        image = await opened(cache)
        assert image.write_mode is WriteMode.AROUND
        await cache.set_write_mode(image, None)
        assert image.row.write_mode == ""
        await cache.close(image, write=True)
    back.kill()
    async with back.open() as cache:
        image = await opened(cache)
        assert image.write_mode is WriteMode.BACK
        await cache.close(image, write=True)
        other = await opened(cache, 2)
        assert other.write_mode is WriteMode.BACK
        await cache.close(other, write=True)


async def test_leaving_write_back_brings_everything_to_the_origin_first(
    back: World, autojump_clock: MockClock
) -> None:
    async with back.open() as cache:
        image = await opened(cache)
        await write(cache, image, 0, BLOCK, 2)
        await cache.set_write_mode(image, WriteMode.THROUGH)
        assert not cache.core.dirty.pages(image.id)
        assert set(on_origin(back, 0, BLOCK)) == {2}
        await write(cache, image, 0, PAGE, 3)
        assert set(on_origin(back, 0, PAGE)) == {3}
        await cache.close(image, write=True)


# -- over a stop -----------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [False, True])
async def test_dirty_data_of_an_image_nobody_opens_is_written_back_after_a_restart(
    back: World, autojump_clock: MockClock, power: bool
) -> None:
    tune(back, dirty_age=10.0)
    async with back.open() as cache:
        image = await opened(cache)
        await write(cache, image, 512, 2 * BLOCK, 2)
        await cache.fsync(image, metadata=False)
        back.power_cut() if power else back.kill()
        async with back.open() as after:
            await trio.sleep(20)
            assert not after.core.dirty.any_held
            assert set(on_origin(back, 512, 2 * BLOCK)) == {2}
            assert not back.files[1].pages.unsynced
            known = after.images.find(b"id1")
            assert known is not None and not known.handles and not known.origin.locked


@pytest.mark.parametrize("mode", [WriteMode.THROUGH, WriteMode.AROUND])
@pytest.mark.parametrize("begin", [100, 700])
@pytest.mark.parametrize("killed", [False, True])
async def test_a_last_page_that_is_held_grows_in_every_mode(
    back: World, autojump_clock: MockClock, mode: WriteMode, begin: int, killed: bool
) -> None:
    """It stays in the cache (R5), and what makes it longer makes the origin's file longer."""
    tune(back, dirty_age=600.0)
    back.make_file(1, b"a" * 100)
    async with back.open() as cache:
        image = await opened(cache)
        await cache.write(image, 0, b"b" * 100)
        if killed:
            back.kill()
        else:
            back.before = {"sync": 5.0}
            async with trio.open_nursery() as nursery:
                nursery.start_soon(cache.set_write_mode, image, mode)
                await trio.sleep(1)  # it flushes
                await _grow(cache, image, begin)
                back.before = {}
            await cache.close(image, write=True)
    if killed:
        back.write_mode = mode
        async with back.open() as cache:
            image = await opened(cache)
            await _grow(cache, image, begin)
            await cache.fsync(image, metadata=True)
            await cache.close(image, write=True)
            await cache.flush(image, 1)
    grown = b"b" * 100 + bytes(begin - 100) + b"c" * 100
    assert bytes(back.files[1].pages.data) == grown


async def _grow(cache: BlockCache, image: Image, begin: int) -> None:
    assert image.write_mode is not WriteMode.BACK and cache.core.dirty.mask(image.id, 0) == 1
    await cache.write(image, begin, b"c" * 100)
    grown = b"b" * 100 + bytes(begin - 100) + b"c" * 100
    assert await cache.read(image, 0, PAGE) == grown


async def test_dirty_data_past_the_origins_end_is_dropped_and_zeros_grow_there(
    back: World, autojump_clock: MockClock
) -> None:
    async with back.open() as cache:
        image = await opened(cache)
        await write(cache, image, 0, 3 * BLOCK, 2)
        await cache.fsync(image, metadata=False)
        back.kill()
        del back.files[1].pages.data[BLOCK + PAGE + 512 :]
        back.change_outside(1, 4 * PAGE, stamped(1, 4 * PAGE, 512, 9))
        async with back.open() as after:
            image = await opened(after)
            assert image.size == BLOCK + PAGE + 512
            assert set(await versions(after, image, 0, 3 * BLOCK)) == {2}
            await after.truncate(image, 3 * BLOCK)
            found = await versions(after, image, 0, 3 * BLOCK)
            assert set(found[:41]) == {2} and set(found[41:]) == {0}
            await after.flush(image)
            assert on_origin(back, 0, 3 * BLOCK) == found
            await after.close(image, write=True)


@pytest.mark.parametrize("kind", ["device.sync", "device.read", "device.write"])
async def test_a_page_that_was_stable_is_not_lost_by_fitting_it_to_the_origins_end(
    back: World, autojump_clock: MockClock, kind: str
) -> None:
    """The file ends within a dirty page, with zeros after it. No guest writes to it; the next
    start looks at it while the cache device is in trouble, which may pass."""
    back.make_file(1, stamped(1, 0, BLOCK + 512, 1))
    async with back.open() as cache:
        image = await opened(cache)
        await write(cache, image, BLOCK, 512, 2)
        await cache.fsync(image, metadata=False)
        back.kill()
        async with back.open() as after:
            fail(back, kind)
            image = await opened(after)
            fail(back)
            assert after.core.lost_ranges(image.id) == []
            assert await versions(after, image, BLOCK, 512) == [2]
            await after.close(image, write=True)


# -- dirty data that cannot be read ----------------------------------------------------------------


class BadPages:
    """Pages of the cache device that cannot be read until they are written again."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.bad: set[int] = set()
        read, written = DeviceDouble.read, DeviceDouble.write

        def failing(device: DeviceDouble, position: int, length: int) -> bytes:
            if self.bad & set(range(position // PAGE, (position + length - 1) // PAGE + 1)):
                raise CacheDeviceError("bad sectors")
            return read(device, position, length)

        def mending(device: DeviceDouble, position: int, data: bytes | memoryview) -> None:
            written(device, position, data)
            if position % PAGE == 0:
                self.bad -= set(range(position // PAGE, (position + len(data)) // PAGE))

        patch.setattr(DeviceDouble, "read", failing)
        patch.setattr(DeviceDouble, "write", mending)
        patch.setattr(DeviceDouble, "try_read", lambda *args: False)


async def test_a_dirty_page_that_cannot_be_read_is_an_error_listed_exactly_and_can_be_overwritten(
    back: World, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = BadPages(monkeypatch)
    async with back.open() as cache:
        image = await opened(cache)
        await cache.read(image, 0, 2 * BLOCK)
        await trio.sleep(0.1)
        await write(cache, image, PAGE, 2 * PAGE, 2)
        located = cache.core.locate(image.id, 0)
        assert located is not None
        pages.bad = {located.slot * 4 + 1, located.slot * 4 + 3}  # a dirty one and a clean one
        with pytest.raises(LostDataError):
            await versions(cache, image, 0, BLOCK)
        assert unreadable_ranges(cache.core, image) == [(PAGE, PAGE)]
        assert set(await versions(cache, image, 0, PAGE)) == {1}
        assert set(await versions(cache, image, 2 * PAGE, PAGE)) == {2}
        assert set(await versions(cache, image, 3 * PAGE, PAGE)) == {1}
        with pytest.raises(LostDataError):
            await cache.flush(image)
        with pytest.raises(LostDataError):
            await cache.evict(image)
        assert set(on_origin(back, PAGE, PAGE)) == {1}
        assert set(on_origin(back, 2 * PAGE, PAGE)) == {2}, "what can be read is brought home"
        await write(cache, image, PAGE, PAGE, 3)
        assert set(await versions(cache, image, PAGE, PAGE)) == {3}
        await cache.flush(image)
        assert unreadable_ranges(cache.core, image) == []
        assert set(on_origin(back, PAGE, PAGE)) == {3}
        await cache.close(image, write=True)


# -- locks -----------------------------------------------------------------------------------------


async def test_an_image_locked_elsewhere_opens_for_reading_alone(
    back: World, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(self: OriginDouble, path_fd: int) -> None:
        raise LockedElsewhereError(11, "another host has it")

    async with back.open() as cache:
        with monkeypatch.context() as patch:
            patch.setattr(OriginDouble, "lock", refused)
            with pytest.raises(LockedElsewhereError):
                await opened(cache)
            reader = await opened(cache, write=False)
            assert set(await versions(cache, reader, 0, BLOCK)) == {1}
            assert reader.counters.errors == 0, "the origin has not failed"
        writer = await opened(cache)
        assert writer is reader and writer.origin.locked
        await cache.close(writer, write=True)
        await cache.close(reader, write=False)


async def test_the_lock_is_held_while_dirty_after_the_close_and_given_up_once_clean(
    back: World, autojump_clock: MockClock
) -> None:
    tune(back, dirty_age=30.0)
    async with back.open() as cache:
        image = await opened(cache)
        assert image.origin.locked
        await write(cache, image, 0, PAGE, 2)
        await cache.close(image, write=True)
        await trio.sleep(20)
        assert cache.core.dirty.pages(image.id) and image.origin.locked
        await trio.sleep(20)
        assert not cache.core.dirty.pages(image.id) and not image.origin.locked


@pytest.mark.parametrize("discard", [False, True])
async def test_evict_gives_up_the_lock_of_a_closed_and_of_an_open_image(
    back: World, autojump_clock: MockClock, discard: bool
) -> None:
    async with back.open() as cache:
        images = [await opened(cache, number) for number in (1, 2)]
        for number, image in enumerate(images, 1):
            await write(cache, image, 0, PAGE, 2, number)
        await cache.close(images[0], write=True)
        for number, image in enumerate(images, 1):
            assert image.origin.locked
            await cache.evict(image, number, discard_dirty=discard)
            assert not image.origin.locked
        await cache.close(images[1], write=True)


async def test_writers_of_many_images_are_all_stable_after_their_fsyncs(
    back: World, autojump_clock: MockClock
) -> None:
    for number in range(3, 9):
        back.make_file(number, stamped(number, 0, BLOCK, 1))
    async with back.open() as cache:

        async def writer(number: int) -> None:
            image = await opened(cache, number)
            for version in range(2, 6):
                await write(cache, image, 0, PAGE, version, number)
                await cache.fsync(image, metadata=False)

        async with trio.open_nursery() as nursery:
            for number in range(1, 9):
                nursery.start_soon(partial(writer, number))
        back.power_cut()
        async with back.open() as after:
            for number in range(1, 9):
                image = await opened(after, number)
                assert set(await versions(after, image, 0, PAGE, number)) == {5}
                await after.close(image, write=True)
