"""Writes that come together: those that need no wait share a commit."""

import pytest
from trio.testing import MockClock

from fusecache.engine.block_cache import BlockCache
from fusecache.engine.image import Image
from fusecache.engine.writes import Write
from tests.engine.conftest import BLOCK, BLOCKS
from tests.engine.handles import fail, on_origin, opened, tune, versions, write
from tests.support.stamps import stamped
from tests.support.world import PAGE, World

WHOLE = BLOCKS * BLOCK
SECTORS = PAGE // 512


@pytest.fixture(autouse=True)
def _in_place(back: World) -> None:
    tune(back, commits_in_place=True, dirty_age=600.0)


async def ready(cache: BlockCache, number: int = 1) -> Image:
    """Everything is cached, and the first page dirty."""
    image = await opened(cache, number)
    await cache.read(image, 0, WHOLE)
    await write(cache, image, 0, PAGE, 2, number)
    return image


def wanted(image: Image, page: int, version: int, number: int = 1, pages: int = 1) -> Write:
    """One request."""
    return image, page * PAGE, stamped(number, page * PAGE, pages * PAGE, version)


async def test_they_share_one_commit(back: World, autojump_clock: MockClock) -> None:
    async with back.open() as cache:
        one, two = await ready(cache), await ready(cache, 2)
        before = cache.state.counters.light_commits
        writes = [wanted(one, 1, 3), wanted(two, 5, 4, 2), wanted(one, 9, 5, pages=2)]
        assert cache.write_at_once(writes) == [True] * 3
        assert cache.state.counters.light_commits == before + 1
        assert one.counters.writes == 3 and two.counters.writes == 2
        assert set(await versions(cache, one, PAGE, PAGE)) == {3}
        assert set(await versions(cache, two, 5 * PAGE, PAGE, 2)) == {4}
        assert await versions(cache, one, 8 * PAGE, 4 * PAGE) == [
            *[1] * SECTORS, *[5] * 2 * SECTORS, *[1] * SECTORS
        ]  # fmt: skip
        assert cache.core.dirty.mask(one.id, 0) == 0b11
        assert set(on_origin(back, 0, WHOLE)) == {1}
        await cache.flush(one)
    assert set(on_origin(back, PAGE, PAGE)) == {3}
    assert set(on_origin(back, 9 * PAGE, 2 * PAGE)) == {5}


async def test_of_two_for_one_page_the_last_one_holds(
    back: World, autojump_clock: MockClock
) -> None:
    async with back.open() as cache:
        image = await ready(cache)
        writes = [wanted(image, 1, version) for version in (3, 4, 5)]
        assert cache.write_at_once(writes) == [True] * 3
        assert set(await versions(cache, image, PAGE, PAGE)) == {5}


async def test_whatever_needs_a_wait_is_left_alone(back: World, autojump_clock: MockClock) -> None:
    async with back.open() as cache:
        image = await ready(cache)
        other = await opened(cache, 2)  # nothing of it is cached
        pages = BLOCK // PAGE
        writes = [
            wanted(image, 1, 3),
            wanted(other, 1, 3, 2),
            wanted(image, pages - 1, 3, pages=2),  # two blocks
            wanted(image, BLOCKS * pages, 3),  # past the end
            (image, 0, b""),
            wanted(image, 2, 3),
        ]
        assert cache.write_at_once(writes) == [True, False, False, False, False, True]
        assert await versions(cache, image, 0, WHOLE) == [
            *[2] * SECTORS, *[3] * 2 * SECTORS, *[1] * (WHOLE // 512 - 3 * SECTORS)
        ]  # fmt: skip
        assert cache.write_at_once([]) == []


async def test_no_more_than_may_be_written_in_place_shares_a_commit(
    back: World, autojump_clock: MockClock
) -> None:
    async with back.open() as cache:
        image = await ready(cache)
        before = cache.state.counters.light_commits
        pages = BLOCK // PAGE
        blocks = [wanted(image, block * pages, 3, pages=pages) for block in range(BLOCKS)]
        assert all(cache.write_at_once(blocks))
        assert cache.state.counters.light_commits == before + 2  # 128 KiB, and the rest
        assert set(await versions(cache, image, 0, WHOLE)) == {3}


async def test_without_their_rows_nothing_is_written(
    back: World, autojump_clock: MockClock
) -> None:
    async with back.open() as cache:
        image = await ready(cache)
        device = bytes(back.device.data)
        fail(back, "database")
        assert cache.write_at_once([wanted(image, 1, 3), wanted(image, 2, 3)]) == [False, False]
        assert bytes(back.device.data) == device
        assert not cache.state.usable


async def test_one_that_the_device_refuses_is_not_the_others_concern(
    back: World, autojump_clock: MockClock
) -> None:
    async with back.open() as cache:
        image = await ready(cache)
        calls = back.faults.calls["device.write"]
        back.faults.fail = lambda kind, number: kind == "device.write" and number == calls + 1
        writes = [wanted(image, page, 3) for page in (1, 2, 3)]
        assert cache.write_at_once(writes) == [True, False, True]
        await cache.write(*writes[1])
        assert set(await versions(cache, image, PAGE, 3 * PAGE)) == {3}
