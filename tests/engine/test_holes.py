"""What guests free, set to zeros and reserve, and where they look for data and holes."""

import errno
import os
from functools import partial

import pytest
import trio

from fusecache.config import WriteMode
from fusecache.engine.snapshot import image_snapshot, mount_snapshot
from fusecache.errors import OriginError
from fusecache.store.syscalls import FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE, FALLOC_ZERO_RANGE
from tests.engine.calls import Calls
from tests.engine.conftest import BLOCK, BLOCKS
from tests.engine.handles import fail, on_origin, opened, tune, versions, write
from tests.support.stamps import STAMP
from tests.support.world import PAGE, World

PUNCH = FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE
ZERO = FALLOC_ZERO_RANGE | FALLOC_KEEP_SIZE
SIZE = BLOCKS * BLOCK
IN_PAGE = PAGE // STAMP


@pytest.mark.parametrize("mode", [PUNCH, ZERO, FALLOC_ZERO_RANGE])
@pytest.mark.parametrize("write_mode", list(WriteMode))
async def test_a_freed_range_reads_as_zeros_and_nothing_else_does(
    world: World, write_mode: WriteMode, mode: int, autojump_clock: trio.testing.MockClock
) -> None:
    world.write_mode = write_mode
    async with world.open() as cache:
        image = await opened(cache)
        await cache.read(image, 0, 3 * BLOCK)
        await write(cache, image, BLOCK, 2 * PAGE, 2)
        await write(cache, image, 4 * BLOCK, PAGE, 2)
        # From the middle of a page over clean, dirty and missing blocks to the middle of one.
        begin, stop = BLOCK // 2 + STAMP, 4 * BLOCK + 3 * STAMP
        await cache.allocate(image, mode, begin, stop - begin)
        seen = await versions(cache, image, 0, SIZE)
        sectors = range(SIZE // STAMP)
        expected = [
            0
            if begin <= s * STAMP < stop
            else 2
            if 4 * BLOCK <= s * STAMP < 4 * BLOCK + PAGE
            else 1
            for s in sectors
        ]
        assert seen == expected
        await cache.fsync(image, metadata=False)
        assert image.size == SIZE
        cache.core.check()
        await cache.evict(image, 1)
        assert on_origin(world, 0, SIZE) == expected


async def test_what_was_cached_of_a_hole_frees_its_slots(
    back: World, autojump_clock: trio.testing.MockClock
) -> None:
    async with back.open() as cache:
        image = await opened(cache)
        await cache.read(image, 0, 4 * BLOCK)
        await write(cache, image, 0, 2 * BLOCK, 2)
        await trio.sleep(0.1)
        assert cache.core.usage(image.id).blocks == 4
        await cache.allocate(image, PUNCH, 0, 3 * BLOCK)
        assert cache.core.usage(image.id).blocks == 1
        assert not cache.dirty_bytes and not cache.core.dirty.any_held
        await trio.sleep(10)
        assert cache.core.leaving == 0 and cache.core.free == cache.core.slot_count - 1


async def test_a_hole_without_dirty_data_costs_no_sync_and_no_barrier(
    world: World, autojump_clock: trio.testing.MockClock
) -> None:
    tune(world, barrier_interval=600.0, intent_removal=600.0)
    async with world.open() as cache:
        image = await opened(cache)
        await cache.read(image, 0, SIZE)
        await trio.sleep(0.1)
        await cache.allocate(image, PUNCH, 0, PAGE)  # the region's row is stable now
        counters = cache.state.counters
        before = (counters.barriers, counters.stable_commits)
        calls = Calls(cache)
        for block in range(1, BLOCKS):
            await cache.allocate(image, PUNCH, block * BLOCK, PAGE)
        assert (counters.barriers, counters.stable_commits) == before
        assert calls.count("OriginDouble.sync") == 0
        assert calls.count("OriginDouble.allocate") == BLOCKS - 1


async def test_holes_in_dirty_data_that_wait_for_each_other_share_one_sync_and_one_barrier(
    back: World, autojump_clock: trio.testing.MockClock
) -> None:
    tune(back, dirty_age=600.0, barrier_interval=600.0)
    async with back.open() as cache:
        image = await opened(cache)
        await write(cache, image, 0, SIZE, 2)
        calls = Calls(cache)
        barriers = cache.state.counters.barriers
        async with trio.open_nursery() as nursery, image.cleaning:
            for block in range(BLOCKS):
                nursery.start_soon(cache.allocate, image, PUNCH, block * BLOCK, BLOCK // 2)
            await trio.sleep(1)
        assert calls.count("OriginDouble.allocate") == BLOCKS
        assert calls.count("OriginDouble.sync") == 1
        assert cache.state.counters.barriers == barriers + 1
        half = BLOCK // STAMP // 2
        assert await versions(cache, image, 0, SIZE) == [*[0] * half, *[2] * half] * BLOCKS
        assert image.counters.discards == BLOCKS


async def test_one_of_several_holes_that_fails_fails_alone(
    back: World, autojump_clock: trio.testing.MockClock
) -> None:
    tune(back, dirty_age=600.0)
    failed = []
    async with back.open() as cache:
        image = await opened(cache)
        await write(cache, image, 0, SIZE, 2)

        async def free(block: int) -> None:
            try:
                await cache.allocate(image, PUNCH, block * BLOCK, BLOCK)
            except OriginError:
                failed.append(block)

        back.faults.fail = lambda kind, number: kind == "origin.allocate" and number == 1
        async with trio.open_nursery() as nursery, image.cleaning:
            for block in range(3):
                nursery.start_soon(free, block)
            await trio.sleep(1)
        assert len(failed) == 1
        for block in range(3):
            seen = await versions(cache, image, block * BLOCK, BLOCK)
            assert set(seen) == ({2} if block in failed else {0})


async def test_a_caller_that_gives_up_takes_no_other_along(
    back: World, autojump_clock: trio.testing.MockClock
) -> None:
    tune(back, dirty_age=600.0)
    async with back.open() as cache:
        image = await opened(cache)
        await write(cache, image, 0, SIZE, 2)
        calls = Calls(cache)
        calls.slow["OriginDouble.sync"] = 5.0
        async with trio.open_nursery() as nursery:
            async with image.cleaning:
                gave_up = trio.CancelScope()

                async def first() -> None:
                    with gave_up:
                        await cache.allocate(image, PUNCH, 0, BLOCK)

                nursery.start_soon(first)
                await trio.sleep(0.1)
                nursery.start_soon(cache.allocate, image, PUNCH, 2 * BLOCK, BLOCK)
                await trio.sleep(0.1)
            await calls.begun("OriginDouble.sync")
            gave_up.cancel()
        assert set(await versions(cache, image, 2 * BLOCK, BLOCK)) == {0}
        assert set(await versions(cache, image, 3 * BLOCK, BLOCK)) == {2}
        cache.core.check()


async def test_an_origin_that_cannot_is_asked_once_and_nothing_changes(
    back: World, autojump_clock: trio.testing.MockClock
) -> None:
    back.unsupported = {PUNCH, ZERO}
    tune(back, dirty_age=600.0)
    async with back.open() as cache:
        image = await opened(cache)
        await cache.read(image, 0, 4 * BLOCK)
        await write(cache, image, 0, BLOCK, 2)
        await trio.sleep(0.1)
        calls = Calls(cache)
        for mode in (PUNCH, ZERO):
            for offset in (0, 2 * BLOCK, PAGE // 2):
                with pytest.raises(OriginError) as caught:
                    await cache.allocate(image, mode, offset, 2 * BLOCK)
                assert caught.value.errno == errno.EOPNOTSUPP
        assert calls.count("OriginDouble.allocate") == 2
        assert cache.core.usage(image.id).blocks == 4
        assert cache.core.dirty.pages(image.id) == BLOCK // PAGE
        half = BLOCK // STAMP
        assert await versions(cache, image, 0, 2 * BLOCK) == [*[2] * half, *[1] * half]
        assert image.counters.errors == image.counters.discards == 0
        await cache.allocate(image, FALLOC_ZERO_RANGE, 0, PAGE)  # another mode


async def test_modes_and_ranges_that_are_none(
    world: World, autojump_clock: trio.testing.MockClock
) -> None:
    async with world.open() as cache:
        image = await opened(cache)
        for mode in (FALLOC_PUNCH_HOLE, 8, 0x20, 0x40, FALLOC_ZERO_RANGE | FALLOC_PUNCH_HOLE):
            with pytest.raises(OSError, match="no mode") as caught:
                await cache.allocate(image, mode, 0, PAGE)
            assert caught.value.errno == errno.EOPNOTSUPP
        for offset, length in ((0, 0), (-1, 5), (0, -1)):
            with pytest.raises(OSError, match="not a range") as caught:
                await cache.allocate(image, PUNCH, offset, length)
            assert caught.value.errno == errno.EINVAL
        assert await versions(cache, image, 0, SIZE) == [1] * (SIZE // STAMP)


@pytest.mark.parametrize("write_mode", list(WriteMode))
async def test_space_is_reserved_past_the_end_with_and_without_a_new_size(
    world: World, write_mode: WriteMode, autojump_clock: trio.testing.MockClock
) -> None:
    world.write_mode = write_mode
    async with world.open() as cache:
        image = await opened(cache)
        await cache.truncate(image, SIZE - PAGE // 2)
        await cache.read(image, 0, SIZE)
        await cache.allocate(image, FALLOC_KEEP_SIZE, 0, 2 * SIZE)
        assert image.size == world.files[1].size == SIZE - PAGE // 2
        await cache.allocate(image, 0, 0, SIZE + BLOCK)
        assert image.size == world.files[1].size == SIZE + BLOCK
        seen = await versions(cache, image, 0, SIZE + BLOCK)
        sectors = (SIZE - PAGE // 2) // STAMP
        assert seen == [1] * sectors + [0] * (len(seen) - sectors)
        await cache.allocate(image, 0, 0, PAGE)  # and never shorter
        assert image.size == SIZE + BLOCK
        with pytest.raises(OriginError):
            fail(world, "origin.allocate")
            await cache.allocate(image, 0, SIZE, 2 * BLOCK + 2 * STAMP)
        assert image.size == world.files[1].size  # it may have grown by some of it


@pytest.mark.parametrize("mode", [PUNCH, ZERO, FALLOC_ZERO_RANGE])
@pytest.mark.parametrize("dirty", [False, True])
async def test_a_range_past_the_end_grows_the_image_only_if_its_mode_says_so(
    back: World, mode: int, dirty: bool, autojump_clock: trio.testing.MockClock
) -> None:
    tune(back, dirty_age=600.0)
    size = SIZE - PAGE // 2
    async with back.open() as cache:
        image = await opened(cache)
        await cache.truncate(image, size)
        await cache.read(image, size - PAGE, PAGE)
        if dirty:
            await write(cache, image, size - PAGE, PAGE, 2)
        begin = size - STAMP
        await cache.allocate(image, mode, begin, 1 << 40 if mode != FALLOC_ZERO_RANGE else BLOCK)
        grown = begin + BLOCK if mode == FALLOC_ZERO_RANGE else size
        assert image.size == back.files[1].size == grown
        seen = await versions(cache, image, size - PAGE, PAGE)
        assert seen[-1] == 0 and set(seen[:-1]) == {2 if dirty else 1}
        assert image.counters.discard_bytes == STAMP
        # Within the last page, dirty, and past the end by less than a page.
        await write(cache, image, begin - STAMP, 2 * STAMP, 3)
        before = image.size
        await cache.allocate(image, mode, before - STAMP, 2 * STAMP)
        grown = before + STAMP if mode == FALLOC_ZERO_RANGE else before
        assert image.size == back.files[1].size == grown
        assert (await versions(cache, image, before - STAMP, STAMP)) == [0]


async def test_a_range_with_more_blocks_than_are_freed_at_a_time(
    back: World, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fusecache.engine.holes._PIECE", 2)
    tune(back, dirty_age=600.0)
    async with back.open() as cache:
        image = await opened(cache)
        await cache.read(image, 0, SIZE)
        await write(cache, image, 5 * BLOCK, PAGE, 2)
        calls = Calls(cache)
        await cache.allocate(image, PUNCH, PAGE, SIZE)
        assert calls.count("OriginDouble.allocate") == BLOCKS // 2
        expected = [1] * IN_PAGE + [0] * (SIZE // STAMP - IN_PAGE)
        assert await versions(cache, image, 0, SIZE) == expected
        assert (image.counters.discards, image.counters.discard_bytes) == (1, SIZE - PAGE)


@pytest.mark.parametrize("mode", [PUNCH, ZERO])
async def test_a_detached_image_is_freed_past_the_cache(
    back: World, mode: int, autojump_clock: trio.testing.MockClock
) -> None:
    async with back.open() as cache:
        image = await opened(cache)
        await cache.read(image, 0, SIZE)
        await cache.evict(image, 1)
        await cache.allocate(image, mode, PAGE, PAGE)
        assert await versions(cache, image, 0, 3 * PAGE) == [1] * 8 + [0] * 8 + [1] * 8
        assert await cache.seek(image, 0, os.SEEK_HOLE) == PAGE
        assert await cache.seek(image, PAGE, os.SEEK_DATA) == 2 * PAGE
        assert image.counters.discards == 1 and cache.core.used == 0


async def test_a_failed_hole_leaves_nothing_of_its_range_that_may_be_old(
    world: World, autojump_clock: trio.testing.MockClock
) -> None:
    async with world.open() as cache:
        image = await opened(cache)
        await cache.read(image, 0, SIZE)
        await trio.sleep(0.1)
        fail(world, "origin.allocate")
        with pytest.raises(OriginError):
            await cache.allocate(image, PUNCH, 0, 2 * BLOCK)
        fail(world)
        half = BLOCK // STAMP  # of two blocks: what the origin did before it failed
        assert await versions(cache, image, 0, 2 * BLOCK) == [*[0] * half, *[1] * half]
        assert image.counters.errors == 1 and image.counters.discards == 0


async def test_lost_data_that_is_freed_can_be_read_again(
    back: World, autojump_clock: trio.testing.MockClock
) -> None:
    tune(back, dirty_age=600.0)
    async with back.open() as cache:
        image = await opened(cache)
        await write(cache, image, 0, BLOCK, 2)
        located = cache.core.locate(image.id, 0)
        assert located is not None
        cache.core.dirty.lose(located.slot, 0b0110)
        assert cache.core.lost_ranges(image.id) == [(PAGE, 2 * PAGE)]
        await cache.allocate(image, PUNCH, PAGE, 2 * PAGE)
        assert cache.core.lost_ranges(image.id) == []
        assert await versions(cache, image, 0, BLOCK) == [2] * 8 + [0] * 16 + [2] * 8
        await cache.evict(image, 1)
        assert on_origin(back, 0, BLOCK) == [2] * 8 + [0] * 16 + [2] * 8


async def test_status_counts_what_was_freed(
    world: World, autojump_clock: trio.testing.MockClock
) -> None:
    async with world.open() as cache:
        image = await opened(cache)
        await cache.allocate(image, PUNCH, 0, PAGE)
        await cache.allocate(image, ZERO, BLOCK, 3 * PAGE)
        await cache.allocate(image, 0, 0, PAGE)
        await cache.allocate(image, PUNCH, SIZE - PAGE, 5 * PAGE)
        for shown in (image_snapshot(cache, image, None, lost=False), mount_snapshot(cache)):
            assert (shown["discards"], shown["discard_bytes"]) == (3, 5 * PAGE)
        assert image.counters.writes == 0


# -- lseek -----------------------------------------------------------------------------------------


def _sparse(world: World, pages: set[int], count: int) -> None:
    """A file with data in these pages alone."""
    world.make_file(3, b"".join(bytes([page in pages]) * PAGE for page in range(count)))


async def test_data_and_holes_are_where_a_guest_reads_them(
    back: World, autojump_clock: trio.testing.MockClock
) -> None:
    tune(back, dirty_age=600.0, dirty_limit=0.9)
    count = 40
    _sparse(back, {3, 4, 5, 16, 30}, count)
    async with back.open() as cache:
        image = await cache.open(b"id3", b"3.img", 3, write=True)
        await cache.read(image, 0, count * PAGE)
        for page in (0, 6, 10, 11, 12, 13, 14, 15, 31, 39):
            await cache.write(image, page * PAGE, b"x" * PAGE)
        data = {0, 3, 4, 5, 6, 10, 11, 12, 13, 14, 15, 16, 30, 31, 39}
        for offset in range(0, count * PAGE, PAGE // 2):
            page = offset // PAGE
            after = min((other for other in data if other >= page), default=None)
            assert after is not None
            assert await cache.seek(image, offset, os.SEEK_DATA) == max(offset, after * PAGE)
            while page in data:
                page += 1
            assert await cache.seek(image, offset, os.SEEK_HOLE) == max(offset, page * PAGE)
        await cache.allocate(image, PUNCH, 30 * PAGE, 10 * PAGE)
        with pytest.raises(OSError, match="no data") as caught:
            await cache.seek(image, 30 * PAGE, os.SEEK_DATA)
        assert caught.value.errno == errno.ENXIO
        assert await cache.seek(image, 39 * PAGE + 5, os.SEEK_HOLE) == 39 * PAGE + 5


async def test_past_the_end_there_is_nothing_to_seek(
    back: World, autojump_clock: trio.testing.MockClock
) -> None:
    async with back.open() as cache:
        image = await opened(cache)
        await cache.truncate(image, SIZE - STAMP)
        await write(cache, image, SIZE - PAGE, PAGE - STAMP, 2)
        assert await cache.seek(image, 0, os.SEEK_HOLE) == SIZE - STAMP
        for whence in (os.SEEK_DATA, os.SEEK_HOLE):
            for offset in (SIZE - STAMP, SIZE, -1, 1 << 60):
                with pytest.raises(OSError, match="past the end") as caught:
                    await cache.seek(image, offset, whence)
                assert caught.value.errno == errno.ENXIO
        with pytest.raises(OSError, match="neither") as caught:
            await cache.seek(image, 0, os.SEEK_SET)
        assert caught.value.errno == errno.EINVAL
        fail(back, "origin.seek")
        with pytest.raises(OriginError):
            await cache.seek(image, 0, os.SEEK_DATA)
        assert image.counters.errors == 1


@pytest.mark.parametrize("whence", [os.SEEK_DATA, os.SEEK_HOLE])
async def test_a_page_that_is_written_back_meanwhile_is_no_hole(
    back: World, whence: int, autojump_clock: trio.testing.MockClock
) -> None:
    """The origin answers as of before the writeback: what was dirty then is data all the same."""
    tune(back, dirty_age=600.0)
    _sparse(back, set(), 8)
    async with back.open() as cache:
        image = await cache.open(b"id3", b"3.img", 3, write=True)
        await cache.write(image, 0, b"x" * PAGE)
        calls = Calls(cache)
        calls.slow["OriginDouble.seek"] = 5.0
        found: list[int] = []

        async def seek() -> None:
            found.append(await cache.seek(image, 0, whence))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(seek)
            await calls.begun("OriginDouble.seek")
            await cache.flush(image)
            assert not cache.dirty_bytes
        assert found == [0 if whence == os.SEEK_DATA else PAGE]


async def test_a_stalled_origin_is_waited_for_by_its_own_image_alone(
    world: World, autojump_clock: trio.testing.MockClock
) -> None:
    async with world.open() as cache:
        images = [await opened(cache, number) for number in (1, 2)]
        calls = Calls(cache)
        calls.stalled.add("OriginDouble.allocate")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cache.allocate, images[0], PUNCH, 0, BLOCK)
            await calls.begun("OriginDouble.allocate")
            assert images[0].waiting == 1
            nursery.start_soon(partial(cache.seek, images[0], 0, os.SEEK_HOLE))
            with trio.fail_after(5):
                assert set(await versions(cache, images[1], 0, BLOCK, 2)) == {1}
                assert set(await versions(cache, images[0], 2 * BLOCK, BLOCK)) == {1}
            calls.stalled.clear()
        assert set(await versions(cache, images[0], 0, BLOCK)) == {0}
