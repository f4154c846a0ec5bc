"""Hits, misses and how many origin reads they cost."""

import pytest
import trio
from trio.testing import MockClock

from fusecache.errors import OriginError
from tests.engine.conftest import BLOCK, BLOCKS
from tests.support.stamps import check_stamps, stamped
from tests.support.world import World


async def test_many_readers_of_a_block_cost_one_origin_read(
    world: World, autojump_clock: MockClock
) -> None:
    async with world.open() as cache:
        image = await cache.open(b"1", b"a", 1, write=False)
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(cache.read, image, 4096, 4096)
        assert image.counters.origin_reads == 1
        assert image.counters.origin_read_bytes == BLOCK
        await cache.close(image, write=False)


async def test_neighbouring_missing_blocks_are_one_origin_read(
    world: World, autojump_clock: MockClock
) -> None:
    async with world.open() as cache:
        image = await cache.open(b"1", b"a", 1, write=False)
        await cache.read(image, 5 * BLOCK, BLOCK)
        await trio.sleep(0.1)
        data = await cache.read(image, 0, BLOCKS * BLOCK)
        assert set(check_stamps(data, 1, 0)) == {1}
        assert image.counters.origin_reads == 3, "one, and one on each side of the cached block"
        assert image.counters.origin_read_bytes == BLOCKS * BLOCK
        await cache.close(image, write=False)


async def test_a_reader_is_answered_before_the_ssd_write(
    world: World, autojump_clock: MockClock
) -> None:
    async with world.open() as cache:
        image = await cache.open(b"1", b"a", 1, write=False)
        data = await cache.read(image, 0, BLOCK)
        assert set(check_stamps(data, 1, 0)) == {1}
        assert cache.core.valid_pages(image.id, 0) == 0, "not stored yet"
        await trio.sleep(0.1)
        assert cache.core.valid_pages(image.id, 0) == 0b1111
        await cache.close(image, write=False)


async def test_reads_stop_at_the_end_of_the_image(world: World, autojump_clock: MockClock) -> None:
    world.make_file(3, stamped(3, 0, BLOCK + 512, 1))
    async with world.open() as cache:
        image = await cache.open(b"3", b"c", 3, write=False)
        for _ in range(2):
            assert len(await cache.read(image, 0, 4 * BLOCK)) == BLOCK + 512
            assert await cache.read(image, BLOCK + 512, 512) == b""
            await trio.sleep(0.1)
        await cache.close(image, write=False)


async def test_a_fetch_of_the_old_end_shows_zeros_when_the_image_has_grown(
    world: World, autojump_clock: MockClock
) -> None:
    """What a fetch brought of the last page stands for zeros after it, and for nothing else."""
    world.make_file(3, stamped(3, 0, 3 * 4096 + 512, 1))
    world.device.data[:] = b"S" * len(world.device.data)
    async with world.open() as cache:
        image = await cache.open(b"3", b"c", 3, write=True)
        await cache.read(image, 0, 512)
        assert image.fetches, "its SSD write is still to come"
        await cache.write(image, 2 * BLOCK, stamped(3, 2 * BLOCK, 512, 2))
        data = await cache.read(image, 0, BLOCK)
        assert len(data) == BLOCK
        assert set(check_stamps(data[: 3 * 4096 + 512], 3, 0)) == {1}
        assert not any(data[3 * 4096 + 512 :])
        await cache.close(image, write=True)


async def test_a_small_write_does_not_fetch_the_rest_of_its_page(
    world: World, autojump_clock: MockClock
) -> None:
    async with world.open() as cache:
        image = await cache.open(b"1", b"a", 1, write=True)
        await cache.write(image, 512, stamped(1, 512, 512, 2))
        assert image.counters.origin_reads == 0
        data = await cache.read(image, 0, 4096)
        assert check_stamps(data, 1, 0) == [1, 2, 1, 1, 1, 1, 1, 1]
        await cache.close(image, write=True)


async def test_a_stalled_origin_does_not_hold_up_hits_or_other_images(
    world: World, autojump_clock: MockClock
) -> None:
    """P6, and the bound on what may wait for one image."""
    async with world.open() as cache:
        one = await cache.open(b"1", b"a", 1, write=False)
        two = await cache.open(b"2", b"b", 2, write=False)
        await cache.read(one, 0, BLOCK)
        await trio.sleep(0.1)
        tokens = [object() for _ in range(int(one.limiter.total_tokens))]
        for token in tokens:  # every thread of this image hangs on its origin
            one.limiter.acquire_on_behalf_of_nowait(token)
        done: list[bytes] = []

        async def miss() -> None:
            done.append(await cache.read(one, 3 * BLOCK, 512))

        async with trio.open_nursery() as nursery:
            for _ in range(200):
                nursery.start_soon(miss)
            await trio.sleep(1)
            assert one.waiting == 200 and not done
            with trio.fail_after(1):
                assert await cache.read(one, 0, BLOCK)
                assert await cache.read(two, 0, BLOCKS * BLOCK)
            one.max_waiting = 200
            with pytest.raises(OriginError):
                await cache.read(one, 7 * BLOCK, 512)
            for token in tokens:
                one.limiter.release_on_behalf_of(token)
        assert len(done) == 200
        for image in (one, two):
            await cache.close(image, write=False)


async def test_a_clean_page_that_cannot_be_read_comes_from_the_origin(
    world: World, autojump_clock: MockClock
) -> None:
    """Failure table: the slot is retired and counted, the guest sees nothing."""
    async with world.open() as cache:
        image = await cache.open(b"1", b"a", 1, write=False)
        await cache.read(image, 0, BLOCK)
        await trio.sleep(0.1)
        world.faults.fail = lambda kind, number: kind == "device.read"
        world.cold = True  # what is in memory needs no device
        for _ in range(30):
            assert set(check_stamps(await cache.read(image, 0, BLOCK), 1, 0)) == {1}
            await trio.sleep(0.05)
        assert cache.core.retired >= 1
        assert cache.state.counters.device_errors >= 1
        world.faults.fail = lambda kind, number: False
        await cache.close(image, write=False)
