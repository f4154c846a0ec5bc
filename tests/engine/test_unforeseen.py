"""An exception nobody foresaw, in what runs by itself beside the requests, does not end the daemon,
and what it kept from being done is done later."""

from collections.abc import Callable
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from fusecache.engine import recovery
from fusecache.engine.degraded import Degraded
from fusecache.engine.dropping import Dropping
from fusecache.errors import OriginError
from tests.engine.conftest import BLOCK
from tests.engine.handles import fail, on_origin, opened, versions, write
from tests.support.world import PAGE, OriginDouble, World


def _fails_first(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, times: int) -> None:
    """The first calls raise; what they do otherwise is as before, an ``async`` or not."""
    inner, left = getattr(owner, name), times

    def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        if left:
            left -= 1
            raise KeyError("injected")
        return inner(*args, **kwargs)

    monkeypatch.setattr(owner, name, failing)


async def test_in_a_rescue(
    back: World, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fails_first(monkeypatch, Degraded, "rescue", 2)
    async with back.open() as cache:
        image = await opened(cache)
        await write(cache, image, 0, PAGE, 2)
        fail(back, "database")
        while not image.clean_error:
            await trio.sleep(0.1)
        assert not cache.state.usable
        assert "unexpected" in image.clean_error and cache.dirty_bytes == PAGE
        await trio.sleep(100)
        assert cache.state.counters.unexpected == 2
        assert cache.state.emptied and not cache.dirty_bytes
        assert set(on_origin(back, 0, PAGE)) == {2}
        await cache.close(image, write=True)


async def test_in_the_last_fence(
    back: World, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slots still count, as far as the next start knows."""
    async with back.open() as cache:
        image = await opened(cache)
        await write(cache, image, 0, PAGE, 2)
        fail(back, "database", "origin.write")
        await trio.sleep(10)
        assert not cache.state.usable and cache.state.fenced.is_set()
        _fails_first(monkeypatch, recovery, "fence", 1)
        fail(back, "database")
        await trio.sleep(100)
        assert cache.state.counters.unexpected == 1
        assert image.rescued and not cache.state.emptied
        await write(cache, image, 0, PAGE, 3)
        assert set(await versions(cache, image, 0, PAGE)) == {3}
        back.kill()
        fail(back)
        async with back.open() as after:
            again = await opened(after)
            assert set(await versions(after, again, 0, PAGE)) == {3}
            await after.close(again, write=True)
        await cache.close(image, write=True)


async def test_while_blocks_are_dropped_after_a_failed_sync(
    world: World, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world.open() as cache:
        image = await opened(cache)
        await write(cache, image, 0, BLOCK, 2)
        _fails_first(monkeypatch, Dropping, "drop", 2)
        fail(world, "origin.sync")
        with pytest.raises(OriginError):
            await cache.fsync(image, metadata=False)
        fail(world)
        await trio.sleep(0.1)
        assert cache.state.counters.unexpected == 1 and cache.core.used
        await trio.sleep(60)
        assert cache.state.counters.unexpected == 2 and not cache.core.used
        assert set(await versions(cache, image, 0, BLOCK)) == {2}
        await cache.close(image, write=True)


async def test_in_a_sync_of_the_origin(
    world: World, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is a failed one, for all who wait for it and for what they believe of the cache."""
    async with world.open() as cache:
        image = await opened(cache)
        await write(cache, image, 0, BLOCK, 2)
        _fails_first(monkeypatch, OriginDouble, "sync", 1)
        with pytest.raises(OriginError, match="unexpected"):
            await cache.fsync(image, metadata=False)
        await trio.sleep(1)
        assert cache.state.counters.unexpected == 1 and not cache.core.used
        await cache.fsync(image, metadata=False)
        assert image.synced == image.written
        await cache.close(image, write=True)


async def test_in_a_close_of_the_origin(
    world: World, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever opens the image next does not wait for ever."""
    async with world.open() as cache:
        image = await opened(cache)
        inner, left = OriginDouble.unlocker, 1

        def unlocker(origin: OriginDouble) -> Callable[[], None]:
            unlock = inner(origin)

            def run() -> None:
                nonlocal left
                unlock()
                if left:
                    left -= 1
                    raise KeyError("injected")

            return run

        monkeypatch.setattr(OriginDouble, "unlocker", unlocker)
        await cache.close(image, write=True)
        assert cache.state.counters.unexpected == 1
        with trio.fail_after(10):
            image = await opened(cache)
        assert image.origin.locked and image.giving_up is None
        await cache.close(image, write=True)
