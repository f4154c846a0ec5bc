"""Why a request was not served by the cache alone: each reason where it belongs, and one alone."""

import pytest
import trio
from trio.testing import MockClock

from fusecache.config import WriteMode
from fusecache.engine.image import Image
from fusecache.errors import LostDataError, OriginError
from fusecache.observe.counters import Reason
from tests.engine.conftest import BLOCK
from tests.engine.handles import fail, opened, tune, versions, write
from tests.support.world import PAGE, World


def reasons(image: Image) -> dict[str, int]:
    """By name, those that occurred since the last time."""
    counts = image.counters.not_cached
    found = {reason.text: counts[reason] for reason in Reason if counts[reason]}
    for reason in Reason:
        counts[reason] = 0
    return found


async def test_reads(world: World, autojump_clock: MockClock) -> None:
    async with world.open() as cache:
        image = await opened(cache, write=False)
        await versions(cache, image, 0, BLOCK)
        await trio.sleep(1)
        await versions(cache, image, 0, BLOCK)
        assert reasons(image) == {"cold": 1}
        assert (image.counters.read_hits, image.counters.read_misses) == (1, 1)
        world.cold = True
        await versions(cache, image, 0, PAGE)
        assert (image.counters.ssd_reads, image.counters.ssd_read_bytes) == (1, PAGE)
        fail(world, "device.read")
        await versions(cache, image, 0, PAGE)
        assert reasons(image) == {"cache error": 1}
        fail(world, "origin.read")
        with pytest.raises(OriginError):
            await versions(cache, image, 4 * BLOCK, PAGE)
        assert reasons(image) == {"origin error": 1}
        fail(world)
        await cache.evict(image)
        await versions(cache, image, 0, PAGE)
        assert reasons(image) == {"detached": 1}
        assert image.counters.past_read_bytes == PAGE
        await cache.close(image, write=False)


async def test_a_read_of_lost_data_is_the_cache_device_s_fault(
    back: World, autojump_clock: MockClock
) -> None:
    async with back.open() as cache:
        image = await opened(cache)
        await write(cache, image, 0, PAGE, 2)
        reasons(image)
        back.cold = True
        fail(back, "device.read")
        with pytest.raises(LostDataError):
            await versions(cache, image, 0, PAGE)
        assert reasons(image) == {"cache error": 1}
        fail(back)
        await cache.close(image, write=True)


async def test_writes_that_go_through_or_around(world: World, autojump_clock: MockClock) -> None:
    async with world.open() as cache:
        image = await opened(cache)
        await write(cache, image, 0, BLOCK, 2)
        assert reasons(image) == {}
        assert (image.counters.through_writes, image.counters.through_write_bytes) == (1, BLOCK)
        fail(world, "device.write")
        await write(cache, image, 0, BLOCK, 3)  # storing pauses from here on
        assert reasons(image) == {"cache error": 1}
        await write(cache, image, BLOCK, BLOCK, 2)
        assert reasons(image) == {"cache error": 1}
        assert image.counters.around_writes == 2
        fail(world, "origin.write")
        with pytest.raises(OriginError):
            await write(cache, image, 0, PAGE, 4)
        assert reasons(image) == {"origin error": 1}
        fail(world)
        await cache.set_write_mode(image, WriteMode.AROUND)
        await write(cache, image, 0, PAGE, 5)
        assert reasons(image) == {"around": 1}
        fail(world, "database")
        await trio.sleep(1)
        await write(cache, image, BLOCK, PAGE, 5)
        await trio.sleep(20)
        assert not cache.state.usable
        reasons(image)
        await write(cache, image, BLOCK, PAGE, 6)
        assert reasons(image) == {"degraded": 1}
        fail(world)
        assert image.counters.writes == 6
        await cache.close(image, write=True)


async def test_writes_in_write_back_that_do_not_stay_in_the_cache(
    back: World, autojump_clock: MockClock
) -> None:
    tune(back, dirty_limit=1 / 64, max_waiting_per_image=1)
    async with back.open() as cache:
        image = await opened(cache)
        await write(cache, image, 0, BLOCK, 2)
        assert reasons(image) == {}
        assert image.counters.through_writes == image.counters.around_writes == 0
        await write(cache, image, BLOCK, BLOCK, 2)
        assert reasons(image) == {"dirty limit": 1}
        cache.drain()
        await write(cache, image, 2 * BLOCK, BLOCK, 2)
        assert reasons(image) == {"draining": 1}
        cache.undrain()
        with image.admitted(), pytest.raises(OriginError):
            await write(cache, image, 3 * BLOCK, BLOCK, 2)
        assert reasons(image) == {"waiting limit": 1}
        assert image.counters.written_back_bytes == 0
        await cache.flush(image)
        assert image.counters.written_back_bytes == BLOCK
        await cache.close(image, write=True)
