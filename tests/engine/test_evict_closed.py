"""The eviction of images that nobody has open, as a guest's stop asks for it."""

import pytest
import trio
from trio.testing import MockClock

from fusecache.engine.block_cache import BlockCache
from fusecache.engine.image import Image
from fusecache.errors import ImageOpenError, OriginError
from tests.engine.conftest import BLOCK
from tests.engine.handles import on_origin, opened, versions, write
from tests.support.world import World


async def _closed(cache: BlockCache) -> Image:
    image = await opened(cache)
    await write(cache, image, 0, BLOCK, 2)
    await cache.close(image, write=True)
    return image


async def test_a_closed_image_is_flushed_and_forgotten(
    back: World, autojump_clock: MockClock
) -> None:
    async with back.open() as cache:
        image = await _closed(cache)
        assert await cache.evict_closed(image, 1) == 1
        assert set(on_origin(back, 0, BLOCK)) == {2}
        assert not back.files[1].pages.unsynced
        assert cache.images.find(b"id1") is None and not image.origin.locked
        again = await opened(cache)
        assert again is not image and not again.detached
        await cache.close(again, write=True)


async def test_an_open_image_stays_as_it_is(back: World, autojump_clock: MockClock) -> None:
    async with back.open() as cache:
        image = await opened(cache)
        await write(cache, image, 0, BLOCK, 2)
        with pytest.raises(ImageOpenError):
            await cache.evict_closed(image, 1)
        assert not image.detached and cache.core.dirty_bytes(image.id) == BLOCK
        await cache.close(image, write=True)


async def test_whoever_opens_it_meanwhile_is_never_kept_from_the_cache(
    back: World, autojump_clock: MockClock
) -> None:
    """A guest that is started again while its disk is evicted would be uncached for its life."""
    back.before = {"~write": 0.2, "~sync": 0.5, "~unlock": 0.3}
    refused = evicted = 0
    for delay in range(24):
        async with back.open() as cache:
            image = await _closed(cache)
            outcome: list[object] = []

            async def evict(image: Image = image, outcome: list[object] = outcome) -> None:
                try:
                    outcome.append(await cache.evict_closed(image, 1))
                except ImageOpenError:
                    outcome.append(None)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(evict)
                await trio.sleep(delay / 10)
                again = await opened(cache)
                assert not again.detached
            refused += outcome == [None]
            evicted += outcome != [None]
            assert not again.detached
            assert set(await versions(cache, again, 0, BLOCK)) == {2}
            await write(cache, again, 0, BLOCK, 3)
            assert cache.core.dirty_bytes(again.id) == BLOCK, "it is cached as before"
            await cache.close(again, write=True)
        back.kill()
    assert refused > 3 and evicted > 3, (refused, evicted)


async def test_what_cannot_go_to_the_origin_stays(back: World, autojump_clock: MockClock) -> None:
    async with back.open() as cache:
        image = await _closed(cache)
        back.faults.fail = lambda kind, number: kind == "origin.write"
        with pytest.raises(OriginError):
            await cache.evict_closed(image, 1)
        back.faults.fail = lambda kind, number: False
        assert cache.core.dirty_bytes(image.id) == BLOCK
        assert cache.images.find(b"id1") is image
