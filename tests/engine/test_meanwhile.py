"""What was looked up before a wait may be another thing afterwards."""

from functools import partial

import pytest
import trio
from trio.testing import MockClock

from fusecache.engine.image import Image
from fusecache.errors import LockedElsewhereError
from tests.engine.handles import opened, write
from tests.support.world import PAGE, OriginDouble, World


async def test_the_cleaner_takes_no_lock_of_an_image_that_was_forgotten_while_it_waited(
    back: World, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody would give it up again, and no host could open the image for writing (P8)."""
    async with back.open() as cache:
        image = await opened(cache)
        await write(cache, image, 0, PAGE, 2)
        back.kill()
    elsewhere = True
    lock = OriginDouble.lock

    def locked(self: OriginDouble, path_fd: int) -> None:
        if elsewhere:
            raise LockedElsewhereError(11, "another host has it")
        lock(self, path_fd)

    monkeypatch.setattr(OriginDouble, "lock", locked)
    async with back.open() as cache:
        found = cache.images.find(b"id1")
        assert found is not None
        await trio.sleep(0.3)
        assert found.clean_failures == 1
        elsewhere = False
        other = await opened(cache, 2)
        await write(cache, other, 0, PAGE, 2, 2)  # or there were nothing to clean at all
        back.before = {"~sync": 30.0}
        await cache.evict(found, 1, discard_dirty=True)
        back.before = {}
        await trio.sleep(5)
        assert cache.images.find(b"id1") is None
        assert not found.origin.locked and not found.origin_open
        await cache.close(other, write=True)


async def test_an_image_that_became_another_one_while_its_removal_waited_is_removed(
    back: World, autojump_clock: MockClock
) -> None:
    """It was evicted, forgotten and opened again before the removal had its turn."""
    async with back.open() as cache:
        image = await opened(cache)
        await write(cache, image, 0, PAGE, 2)
        await cache.close(image, write=True)
        again: list[Image] = []

        async def open_again() -> None:
            again.append(await opened(cache))
            await write(cache, again[0], 0, PAGE, 3)

        async def remove() -> None:
            async with cache.removing(b"id1"):
                await trio.sleep(1)

        back.before = {"close": 1.0}
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(cache.evict, image, 1))
            while not (image.detached and image.opening.locked()):
                await trio.sleep(0.01)
            for work in (open_again, remove):
                await trio.sleep(0.01)
                nursery.start_soon(work)
        assert again[0] is not image
        assert again[0].gone and again[0].detached
        await cache.close(again[0], write=True)
        await trio.sleep(60)
        assert not cache.dirty_bytes and not cache.core.used and not cache.images.all()
