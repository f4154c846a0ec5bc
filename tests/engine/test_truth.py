"""P3 and P5: whose blocks these are, and what is left of an image that was evicted."""

from dataclasses import replace
from functools import partial

import pytest
import trio
from trio.testing import MockClock

from fusecache.config import WriteMode
from fusecache.engine.block_cache import BlockCache
from fusecache.engine.image import Image
from fusecache.errors import OriginError
from tests.engine.conftest import BLOCK, BLOCKS
from tests.support.stamps import check_stamps, stamped
from tests.support.world import PAGE, World


async def _read_all(cache: BlockCache, image: Image, number: int) -> set[int]:
    data = await cache.read(image, 0, BLOCKS * BLOCK)
    await trio.sleep(0.1)
    return set(check_stamps(data, number, 0))


async def test_an_unchanged_image_keeps_its_blocks(world: World, autojump_clock: MockClock) -> None:
    async with world.open() as cache:
        for _ in range(3):
            image = await cache.open(b"1", b"a", 1, write=False)
            assert await _read_all(cache, image, 1) == {1}
            assert image.counters.origin_reads == 1
            await cache.close(image, write=False)


async def test_a_change_by_others_is_seen_at_the_next_open(
    world: World, autojump_clock: MockClock
) -> None:
    async with world.open() as cache:
        reader = await cache.open(b"1", b"a", 1, write=False)
        assert await _read_all(cache, reader, 1) == {1}
        world.change_outside(1, 0, stamped(1, 0, BLOCKS * BLOCK, 2))
        writer = await cache.open(b"1", b"a", 1, write=True)
        assert writer is reader
        assert await _read_all(cache, writer, 1) == {2}
        await cache.close(writer, write=True)
        await cache.close(reader, write=False)


async def test_two_changes_within_one_tick_are_both_seen(
    world: World, autojump_clock: MockClock
) -> None:
    async with world.open() as cache:
        for version in range(2, 6):
            world.change_outside(1, 0, stamped(1, 0, BLOCKS * BLOCK, version))
            image = await cache.open(b"1", b"a", 1, write=False)
            data = await cache.read(image, 0, BLOCKS * BLOCK)
            assert set(check_stamps(data, 1, 0)) == {version}
            await cache.close(image, write=False)


async def test_what_others_appended_is_not_zeros_to_those_who_read_while_it_is_noticed(
    world: World, autojump_clock: MockClock
) -> None:
    """The blocks have gone and the kernel is about to forget its own: a read in between must not
    keep the old end's zeros."""
    end = BLOCKS * BLOCK + 1024
    world.make_file(1, stamped(1, 0, end, 1))
    async with world.open() as cache:
        reader = await cache.open(b"1", b"a", 1, write=False)
        assert len(await cache.read(reader, 0, end + PAGE)) == end
        await trio.sleep(3)
        world.change_outside(1, end, stamped(1, end, 1024, 2))
        world.before = {"no_pages": 2.0}
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(cache.open, b"1", b"a", 1, write=False))
            await trio.sleep(1)
            await cache.read(reader, BLOCKS * BLOCK, PAGE)
        data = await cache.read(reader, BLOCKS * BLOCK, PAGE)
        assert check_stamps(data, 1, BLOCKS * BLOCK) == [1, 1, 2, 2]
        for _ in range(2):
            await cache.close(reader, write=False)


async def test_our_own_writes_are_trusted_once_they_are_old_enough(
    world: World, autojump_clock: MockClock
) -> None:
    async with world.open() as cache:
        image = await cache.open(b"1", b"a", 1, write=True)
        await cache.write(image, 0, stamped(1, 0, BLOCK, 2))
        await cache.closing.before_close(image)
        await cache.close(image, write=True)
        await trio.sleep(3)
        reads = image.counters.origin_reads
        again = await cache.open(b"1", b"a", 1, write=False)
        data = await cache.read(again, 0, BLOCK)
        assert set(check_stamps(data, 1, 0)) == {2}
        assert image.counters.origin_reads == reads
        await cache.close(again, write=False)


async def test_a_change_between_close_and_release_is_not_taken_for_ours(
    world: World, autojump_clock: MockClock
) -> None:
    async with world.open() as cache:
        image = await cache.open(b"1", b"a", 1, write=True)
        await cache.write(image, 0, stamped(1, 0, BLOCKS * BLOCK, 2))
        await cache.closing.before_close(image)
        world.change_outside(1, 0, stamped(1, 0, BLOCKS * BLOCK, 3))
        await cache.close(image, write=True)
        await trio.sleep(5)
        again = await cache.open(b"1", b"a", 1, write=False)
        assert await _read_all(cache, again, 1) == {3}
        await cache.close(again, write=False)


async def test_a_killed_daemons_own_writes_keep_their_cache(
    world: World, autojump_clock: MockClock
) -> None:
    async with world.open() as cache:
        image = await cache.open(b"1", b"a", 1, write=True)
        assert await _read_all(cache, image, 1) == {1}
        await cache.write(image, 0, stamped(1, 0, 4096, 2))
        await trio.sleep(3)  # rows committed, the region's active flag cleared
        world.kill()
        async with world.open() as next_cache:
            again = await next_cache.open(b"1", b"a", 1, write=True)
            data = await next_cache.read(again, 0, BLOCKS * BLOCK)
            assert check_stamps(data, 1, 0)[:9] == [2] * 8 + [1]
            assert again.counters.origin_reads == 0
            await next_cache.close(again, write=True)


async def test_a_change_long_after_a_kill_is_not_taken_for_ours(
    world: World, autojump_clock: MockClock
) -> None:
    async with world.open() as cache:
        image = await cache.open(b"1", b"a", 1, write=True)
        await _read_all(cache, image, 1)
        await trio.sleep(3)
        world.kill()
        await trio.sleep(4)
        world.change_outside(1, 0, stamped(1, 0, BLOCKS * BLOCK, 7))
        async with world.open() as next_cache:
            again = await next_cache.open(b"1", b"a", 1, write=True)
            assert await _read_all(next_cache, again, 1) == {7}
            await next_cache.close(again, write=True)


async def test_eviction_of_one_image_leaves_the_others_blocks(
    world: World, autojump_clock: MockClock
) -> None:
    async with world.open() as cache:
        images = [await cache.open(b"%d" % n, b"x", n, write=False) for n in (1, 2)]
        for number, image in enumerate(images, 1):
            await _read_all(cache, image, number)
        assert await cache.evict(images[0]) == BLOCKS
        assert cache.core.usage(images[0].id).blocks == 0
        assert cache.core.usage(images[1].id).blocks == BLOCKS
        assert await _read_all(cache, images[1], 2) == {1}
        assert images[1].counters.origin_reads == 1
        for image in images:
            await cache.close(image, write=False)


async def test_a_write_during_an_eviction_is_never_hidden_by_an_old_hit(
    world: World, autojump_clock: MockClock
) -> None:
    async with world.open() as cache:
        image = await cache.open(b"1", b"a", 1, write=True)
        await _read_all(cache, image, 1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cache.evict, image)
            for version in range(2, 12):
                await cache.write(image, 0, stamped(1, 0, BLOCK, version))
                assert set(check_stamps(await cache.read(image, 0, BLOCK), 1, 0)) == {version}
        assert image.detached
        await cache.close(image, write=True)
        assert cache.images.find(b"1") is None


async def test_an_eviction_whose_sync_fails_says_so_and_leaves_no_block(
    world: World, autojump_clock: MockClock
) -> None:
    async with world.open() as cache:
        image = await cache.open(b"1", b"a", 1, write=True)
        await cache.write(image, 0, stamped(1, 0, BLOCK, 2))
        world.faults.fail = lambda kind, number: kind == "origin.sync"
        with pytest.raises(OriginError):
            await cache.evict(image)
        world.faults.fail = lambda kind, number: False
        assert cache.core.usage(image.id).blocks == 0
        assert await cache.evict(image) == 0
        await cache.close(image, write=True)


async def test_evict_syncs_an_image_nobody_has_open(
    world: World, autojump_clock: MockClock
) -> None:
    async with world.open() as cache:
        image = await cache.open(b"1", b"a", 1, write=True)
        await _read_all(cache, image, 1)
        await cache.write(image, 0, stamped(1, 0, BLOCK, 2))
        world.kill()
        async with world.open() as next_cache:
            known = next_cache.images.find(b"1")
            assert known is not None
            assert world.files[1].pages.unsynced
            await next_cache.evict(known, 1)
            assert not world.files[1].pages.unsynced


async def test_an_fsync_never_counts_a_write_that_was_still_on_its_way(
    world: World, autojump_clock: MockClock
) -> None:
    async with world.open() as cache:
        image = await cache.open(b"1", b"a", 1, write=True)
        async with trio.open_nursery() as nursery:
            for version in range(2, 30):
                nursery.start_soon(partial(cache.fsync, image, metadata=False))
                await cache.write(image, 0, stamped(1, 0, BLOCK, version))
                await cache.fsync(image, metadata=False)
                stable = world.files[1].pages.unsynced.get(0, [world.files[1].pages.page(0)])[0]
                assert set(check_stamps(stable, 1, 0)) == {version}
        await cache.close(image, write=True)


async def test_a_failed_sync_that_no_guest_asked_for_fails_the_next_fsync_once(
    world: World, autojump_clock: MockClock
) -> None:
    """The kernel tells of it once and forgets what it could not write: the next sync works, and
    what the guest had written is not there (P2)."""
    world.failed_syncs_lose = True
    async with world.open() as cache:
        image = await cache.open(b"1", b"a", 1, write=True)
        await cache.write(image, 0, stamped(1, 0, BLOCK, 2))
        world.faults.fail = lambda kind, number: kind == "origin.sync"
        while not image.failed_syncs:  # write intents are about to go
            await trio.sleep(0.1)
        world.faults.fail = lambda kind, number: False
        await trio.sleep(20)
        with pytest.raises(OriginError):
            await cache.fsync(image, metadata=False)
        await cache.fsync(image, metadata=False)
        await cache.write(image, 0, stamped(1, 0, BLOCK, 3))
        await cache.fsync(image, metadata=False)
        assert not world.files[1].pages.unsynced
        assert await _read_all(cache, image, 1) == {1, 3}
        await cache.close(image, write=True)


async def test_a_failed_sync_after_the_last_close_leaves_nothing_newer_than_the_origin(
    world: World, autojump_clock: MockClock
) -> None:
    """The old data would come back when a block leaves the cache."""
    world.failed_syncs_lose = True
    world.tuning = replace(world.tuning, intent_removal=600.0, settle_age=0.0)
    async with world.open() as cache:
        image = await cache.open(b"1", b"a", 1, write=True)
        await cache.write(image, 0, stamped(1, 0, BLOCK, 2))
        await cache.closing.before_close(image)
        await cache.close(image, write=True)
        image.intents.clear()
        world.faults.fail = lambda kind, number: kind == "origin.sync"
        while not image.failed_syncs:
            await trio.sleep(0.1)
        await trio.sleep(5)
        assert not cache.core.used
        world.faults.fail = lambda kind, number: False
        again = await cache.open(b"1", b"a", 1, write=True)
        assert await _read_all(cache, again, 1) == {1}
        with pytest.raises(OriginError):
            await cache.fsync(again, metadata=False)
        await cache.close(again, write=True)


@pytest.mark.parametrize("grows", [False, True])
async def test_a_failed_writeback_fails_no_fsync_of_a_guest_whose_data_is_dirty(
    world: World, autojump_clock: MockClock, grows: bool
) -> None:
    """Nothing is lost: it is written back again. Nor is the chown at a guest's start its data."""
    world.write_mode = WriteMode.BACK
    world.failed_syncs_lose = True
    async with world.open() as cache:
        image = await cache.open(b"1", b"a", 1, write=True)
        with cache.truth.setting_attributes(b"1"):
            pass
        first = (BLOCKS if grows else 0) * BLOCK
        await cache.write(image, first, stamped(1, first, BLOCK, 2))
        world.faults.fail = lambda kind, number: kind == "origin.sync"
        with pytest.raises(OriginError):
            await cache.cleaner.flush(image)
        world.faults.fail = lambda kind, number: False
        await cache.fsync(image, metadata=False)
        await cache.flush(image)
        stable = world.files[1].pages
        assert not stable.unsynced
        assert set(check_stamps(bytes(stable.data[first : first + BLOCK]), 1, first)) == {2}
        await cache.close(image, write=True)


async def test_a_truncate_whose_sync_fails_leaves_no_old_data(
    world: World, autojump_clock: MockClock
) -> None:
    async with world.open() as cache:
        image = await cache.open(b"1", b"a", 1, write=True)
        await _read_all(cache, image, 1)
        world.faults.fail = lambda kind, number: kind == "origin.sync"
        with pytest.raises(OriginError):
            await cache.truncate(image, BLOCK + 512)
        world.faults.fail = lambda kind, number: False
        await cache.write(image, 3 * BLOCK, stamped(1, 3 * BLOCK, 512, 2))
        data = await cache.read(image, 0, 4 * BLOCK)
        assert set(check_stamps(data[: BLOCK + 512], 1, 0)) == {1}
        assert not any(data[BLOCK + 512 : 3 * BLOCK])
        await cache.close(image, write=True)


async def test_a_write_that_failed_half_way_leaves_the_size_the_origin_has(
    world: World, autojump_clock: MockClock
) -> None:
    async with world.open() as cache:
        image = await cache.open(b"1", b"a", 1, write=True)
        calls = world.faults.calls.get("origin.write", 0)
        world.faults.fail = lambda kind, number: kind == "origin.write" and number == calls + 1
        with pytest.raises(OriginError):
            await cache.write(image, BLOCKS * BLOCK, stamped(1, BLOCKS * BLOCK, 2 * 4096, 2))
        world.faults.fail = lambda kind, number: False
        assert image.size == world.files[1].size == BLOCKS * BLOCK + 4096
        await cache.close(image, write=True)
