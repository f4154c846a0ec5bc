"""Readahead: who reads in order finds the next blocks in the cache, and nobody pays for it."""

from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from fusecache.engine.block_cache import BlockCache
from fusecache.engine.image import Image
from fusecache.errors import OriginError
from tests.engine.conftest import BLOCK
from tests.engine.handles import opened, tune, versions
from tests.support.stamps import stamped
from tests.support.world import World

BLOCKS = 160
AHEAD = 8 * BLOCK


@pytest.fixture
def wide(tmp_path: Path) -> World:
    """Two large images in a cache that holds both; at most 8 blocks are fetched ahead."""
    made = World(tmp_path, slots=512, block_size=BLOCK)
    for number in (1, 2):
        made.make_file(number, stamped(number, 0, BLOCKS * BLOCK, 1))
    tune(made, readahead=AHEAD)
    return made


async def read_on(cache: BlockCache, image: Image, blocks: range, pause: float = 0.1) -> int:
    """Reads block by block as a slow guest does; returns how many were there already."""
    hits = 0
    for block in blocks:
        hits += cache.core.valid_pages(image.id, block) == cache.core.geometry.full_mask
        assert set(await versions(cache, image, block * BLOCK, BLOCK)) == {1}
        await trio.sleep(pause)
    return hits


async def test_after_three_blocks_in_order_a_slow_guest_never_waits(
    wide: World, autojump_clock: MockClock
) -> None:
    async with wide.open() as cache:
        image = await opened(cache, write=False)
        assert await read_on(cache, image, range(3)) == 0
        assert await read_on(cache, image, range(3, BLOCKS)) >= (BLOCKS - 3) * 0.95
        assert image.counters.origin_read_bytes == BLOCKS * BLOCK, "nothing is read twice"
        assert image.counters.read_ahead_bytes >= (BLOCKS - 10) * BLOCK
        await cache.close(image, write=False)


async def test_it_is_never_further_ahead_than_told(wide: World, autojump_clock: MockClock) -> None:
    async with wide.open() as cache:
        image = await opened(cache, write=False)
        for block in range(BLOCKS):
            await read_on(cache, image, range(block, block + 1))
            ahead = [b for b in range(BLOCKS) if cache.core.valid_pages(image.id, b)]
            assert max(ahead) <= block + AHEAD // BLOCK
        assert not image.fetches
        await cache.close(image, write=False)


async def test_several_guests_of_one_image_are_followed_side_by_side(
    wide: World, autojump_clock: MockClock
) -> None:
    async with wide.open() as cache:
        image = await opened(cache, write=False)
        hits = []

        async def one(begin: int) -> None:
            hits.append(await read_on(cache, image, range(begin, begin + 40)))

        async with trio.open_nursery() as nursery:
            for begin in (0, 50, 100):
                nursery.start_soon(one, begin)
        assert min(hits) >= 35
        await cache.close(image, write=False)


async def test_reads_in_no_order_fetch_nothing_ahead(
    wide: World, autojump_clock: MockClock
) -> None:
    async with wide.open() as cache:
        image = await opened(cache, write=False)
        for block in wide.chance.sample(range(0, BLOCKS, 2), 60):
            await read_on(cache, image, range(block, block + 1))
        assert image.counters.read_ahead_bytes == 0 and not image.marks
        assert image.counters.origin_reads == 60
        await cache.close(image, write=False)


async def test_it_can_be_switched_off(wide: World, autojump_clock: MockClock) -> None:
    tune(wide, readahead=0)
    async with wide.open() as cache:
        image = await opened(cache, write=False)
        assert await read_on(cache, image, range(20)) == 0
        assert image.counters.read_ahead_bytes == 0
        await cache.close(image, write=False)


async def test_a_block_that_fails_ahead_fails_nobody_who_asks_for_another(
    wide: World, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reader waits for a fetch that dies of its neighbour, and asks for his own block."""
    async with wide.open() as cache:
        image = await opened(cache, write=False)
        await read_on(cache, image, range(2))
        read, failed = image.origin.read, []

        def bad_neighbour(offset: int, length: int) -> bytes:
            if length > BLOCK and not failed:
                failed.append(offset)
                raise OriginError(5, "injected: a bad block among them")
            return read(offset, length)

        monkeypatch.setattr(image.origin, "read", bad_neighbour)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(versions, cache, image, 2 * BLOCK, BLOCK)
            while 3 not in image.fetches:
                await trio.lowlevel.checkpoint()
            nursery.start_soon(versions, cache, image, 3 * BLOCK, BLOCK)
        assert failed and image.counters.errors == 1
        assert await read_on(cache, image, range(2, 30)) >= 20
        await cache.close(image, write=False)


async def test_a_full_cache_is_not_churned_by_what_it_cannot_store(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    world = World(tmp_path, slots=16, block_size=BLOCK)
    world.make_file(1, stamped(1, 0, BLOCKS * BLOCK, 1))
    async with world.open() as cache:
        image = await opened(cache, write=False)
        await read_on(cache, image, range(BLOCKS))
        assert image.counters.origin_read_bytes <= (BLOCKS + 16) * BLOCK
        await cache.close(image, write=False)


async def test_an_image_that_became_shorter_is_not_read_beyond_its_end(
    wide: World, autojump_clock: MockClock
) -> None:
    async with wide.open() as cache:
        image = await opened(cache, write=True)
        await read_on(cache, image, range(6))
        await cache.truncate(image, 7 * BLOCK)
        await read_on(cache, image, range(6, 7))
        assert await cache.read(image, 7 * BLOCK, BLOCK) == b""
        await trio.sleep(0.1)
        assert not any(cache.core.valid_pages(image.id, block) for block in range(7, BLOCKS))
        await cache.close(image, write=True)
