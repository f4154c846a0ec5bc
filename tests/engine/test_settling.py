"""An open soon after a close: libvirt opens a guest's disk at once when the guest has stopped."""

import pytest
import trio
from trio.testing import MockClock

from fusecache.engine.block_cache import BlockCache
from tests.engine.conftest import BLOCK, BLOCKS
from tests.engine.handles import opened, tune, versions, write
from tests.support.stamps import stamped
from tests.support.world import World

_SIZE = BLOCKS * BLOCK


async def _written_and_closed(cache: BlockCache) -> None:
    image = await opened(cache)
    await versions(cache, image, 0, _SIZE)
    await trio.sleep(0.1)
    await write(cache, image, 0, BLOCK, 2)
    await cache.closing.before_close(image)
    await cache.close(image, write=True)


@pytest.mark.parametrize("delay", [0.0, 1.0, 1.99, 5.0])
async def test_much_that_is_cached_is_waited_for(
    world: World, autojump_clock: MockClock, delay: float
) -> None:
    tune(world, settle_worth=BLOCKS)
    async with world.open() as cache:
        await _written_and_closed(cache)
        await trio.sleep(delay)
        began = trio.current_time()
        image = await opened(cache, write=False)
        assert trio.current_time() - began <= max(0.0, 2.1 - delay)
        reads = image.counters.origin_reads
        assert await versions(cache, image, 0, BLOCK) == [2] * (BLOCK // 512)
        await versions(cache, image, 0, _SIZE)
        assert image.counters.origin_reads == reads, "nothing was dropped"
        await cache.close(image, write=False)


async def test_little_is_not_waited_for(world: World, autojump_clock: MockClock) -> None:
    tune(world, settle_worth=BLOCKS + 1)
    async with world.open() as cache:
        await _written_and_closed(cache)
        began = trio.current_time()
        image = await opened(cache, write=False)
        assert trio.current_time() - began < 0.5
        assert cache.core.usage(image.id).blocks == 0, "it is not trusted"
        await cache.close(image, write=False)


@pytest.mark.parametrize("delay", [0.03, 0.5, 1.5])
async def test_what_others_wrote_meanwhile_is_seen(
    world: World, autojump_clock: MockClock, delay: float
) -> None:
    tune(world, settle_worth=1)
    async with world.open() as cache:
        await _written_and_closed(cache)

        async def change() -> None:
            await trio.sleep(delay)
            world.change_outside(1, 0, stamped(1, 0, _SIZE, 3))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(change)
            await trio.sleep(0.01)
            image = await opened(cache, write=False)
        assert set(await versions(cache, image, 0, _SIZE)) == {3}
        await cache.close(image, write=False)
