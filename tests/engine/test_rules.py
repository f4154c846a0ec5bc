"""Images whose rules change while they are known."""

import trio
from trio.testing import MockClock

from fusecache.config import Policy, Rule, WriteMode
from fusecache.engine.block_cache import BlockCache
from tests.engine.conftest import BLOCK
from tests.engine.handles import fail, opened, write
from tests.support.world import World

BYPASSED = Policy(WriteMode.THROUGH, (Rule("1.img", bypass=True),))
CACHED = Policy(WriteMode.THROUGH)


async def _bypassed_no_more(world: World, cache: BlockCache) -> None:
    """An image was written to while it was bypassed, its sync at the last close failed, and the
    rules have changed since."""
    cache.apply(world.tuning, BYPASSED)
    image = await opened(cache)
    assert image.bypassed
    await write(cache, image, 0, BLOCK, 2)
    fail(world, "origin.sync")
    await cache.close(image, write=True)
    cache.apply(world.tuning, CACHED)
    await trio.sleep(0.01)


async def test_what_was_written_past_the_cache_is_synced_before_the_image_is_forgotten(
    world: World, autojump_clock: MockClock
) -> None:
    """A clean stop syncs what is known: there is nobody else who would."""
    async with world.open() as cache:
        await _bypassed_no_more(world, cache)
        assert cache.images.find(b"id1") is not None and world.files[1].pages.unsynced
        fail(world)
    assert not world.files[1].pages.unsynced


async def test_an_image_that_is_bypassed_no_more_is_synced_once_the_origin_can(
    world: World, autojump_clock: MockClock
) -> None:
    async with world.open() as cache:
        await _bypassed_no_more(world, cache)
        fail(world)
        await trio.sleep(10)
        assert not world.files[1].pages.unsynced
        image = await opened(cache)
        assert not image.detached
        await cache.close(image, write=True)
