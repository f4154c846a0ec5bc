"""Calls of the origin whose outcome counts also if whoever asked for them gives up."""

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from fusecache.engine.block_cache import BlockCache
from fusecache.engine.image import Image
from fusecache.errors import OriginError
from tests.engine.conftest import BLOCK
from tests.engine.handles import fail, on_origin, opened, tune, versions, write
from tests.support.world import PAGE, OriginDouble, World


@pytest.fixture(autouse=True)
def _by_hand(back: World) -> None:
    back.failed_syncs_lose = True
    tune(back, dirty_age=600.0, intent_removal=600.0)


def leave_behind(cache: BlockCache, nursery: trio.Nursery) -> None:
    """From now on a call whose caller gives up goes on, as in a thread."""
    inline = cache.threads.run

    async def run(
        fn: Callable[..., Any],
        *args: Any,
        limiter: trio.CapacityLimiter,
        abandon_on_cancel: bool = False,
    ) -> Any:
        if not abandon_on_cancel:
            return await inline(fn, *args, limiter=limiter)
        done, outcome = trio.Event(), list[Any]()

        async def work() -> None:
            try:
                outcome.append(await inline(fn, *args, limiter=limiter))
            except OriginError as exc:
                outcome.append(exc)
            done.set()

        nursery.start_soon(work)
        await done.wait()
        if isinstance(outcome[0], OriginError):
            raise outcome[0]
        return outcome[0]

    cache.threads.run = run  # type: ignore[assignment]  # it takes any function


async def flush(cache: BlockCache, image: Image) -> None:
    """Whether it works or not."""
    with suppress(OriginError):
        await cache.flush(image)


async def test_a_sync_that_fails_at_an_open_is_told_to_the_cleaner(
    back: World, autojump_clock: MockClock
) -> None:
    """A batch under way must not believe its own sync then (R5)."""
    async with back.open() as cache:
        image = await opened(cache)
        await write(cache, image, 0, PAGE, 2)
        await cache.close(image, write=True)
        failing = True
        back.faults.fail = lambda kind, number: kind == "origin.sync" and failing

        async def open_it() -> None:
            nonlocal failing
            with pytest.raises(OriginError):
                await opened(cache, write=False)
            failing = False

        async with trio.open_nursery() as nursery:
            back.before = {"~sync": 2.0, "~_copy": 0.5}
            nursery.start_soon(open_it)
            await trio.sleep(0.1)
            back.before = {"~_copy": 0.5, "~sync": 4.0}
            nursery.start_soon(flush, cache, image)
        back.before = {}
        await cache.evict(image, 1)
        image = await opened(cache, write=False)
        assert set(await versions(cache, image, 0, PAGE)) == {2}


async def test_a_sync_that_fails_at_an_open_is_told_to_the_next_fsync(
    back: World, autojump_clock: MockClock
) -> None:
    """And what was written through is not served from the cache any more: it may be gone (P2)."""
    async with back.open() as cache:
        image = await opened(cache)
        await write(cache, image, 0, PAGE, 2)
        cache.drain()
        await write(cache, image, BLOCK, BLOCK, 2)  # goes through
        cache.undrain()
        await cache.close(image, write=True)
        fail(back, "origin.sync")
        with pytest.raises(OriginError):
            await opened(cache)
        fail(back)
        image = await opened(cache)
        with pytest.raises(OriginError):
            await cache.fsync(image, metadata=True)
        assert set(await versions(cache, image, BLOCK, BLOCK)) == {1}
        assert set(on_origin(back, BLOCK, BLOCK)) == {1}


@pytest.mark.parametrize("written_through", [False, True])
async def test_a_sync_whose_caller_gave_up_is_told_to_all_others(
    back: World, autojump_clock: MockClock, written_through: bool
) -> None:
    async with trio.open_nursery() as nursery, back.open() as cache:
        image = await opened(cache)
        await cache.fsync(image, metadata=True)
        leave_behind(cache, nursery)
        if written_through:
            cache.drain()
        await write(cache, image, 0, BLOCK, 2)
        cache.undrain()
        back.before = {"~sync": 3.0}
        fail(back, "origin.sync")
        with trio.move_on_after(1):
            await cache.flush(image, 1)
        if not written_through:  # the next batch writes before the sync is over
            back.before = {"~sync": 5.0}
            nursery.start_soon(flush, cache, image)
        await trio.sleep(2.5)
        fail(back)
        await trio.sleep(20)
        if written_through:
            with pytest.raises(OriginError):
                await cache.fsync(image, metadata=True)
        else:  # it is not believed to be on the origin
            await cache.flush(image, 1)
        seen = set(await versions(cache, image, 0, BLOCK))
        assert seen == set(on_origin(back, 0, BLOCK)) == ({1} if written_through else {2})


async def test_syncs_that_wait_for_each_other_are_one(
    back: World, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But not the one that has begun: it may not have what was written since."""
    asked = list[bool]()
    original = OriginDouble.sync

    def sync(self: OriginDouble, *, metadata: bool = True) -> None:
        asked.append(metadata)
        original(self, metadata=metadata)

    async with back.open() as cache:
        image = await opened(cache)
        await cache.lasting.sync(image)
        monkeypatch.setattr(OriginDouble, "sync", sync)
        back.before = {"~sync": 1.0}
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(cache.lasting.sync, image, metadata=False))
            await trio.sleep(0.5)
            image.written += 1
            for metadata in (False, True, False):
                nursery.start_soon(partial(cache.lasting.sync, image, metadata=metadata))
            await trio.sleep(1)
            assert image.synced == image.written - 1
        assert asked == [False, True] and image.synced == image.written
        assert trio.current_time() - began == pytest.approx(2.0)


async def test_at_the_end_nobody_waits_for_a_sync_that_hangs(
    back: World, autojump_clock: MockClock
) -> None:
    """Neither for the one under way nor for the next."""
    failed = 0

    async def wait(cache: BlockCache, image: Image) -> None:
        nonlocal failed
        with trio.CancelScope(shield=True), pytest.raises(OriginError, match="stopping"):
            await cache.lasting.sync(image)
        failed += 1

    async with trio.open_nursery() as nursery:
        with suppress(ExceptionGroup):
            async with back.open() as cache:
                image = await opened(cache)
                back.before = {"~sync": 1e6}
                for _ in range(3):
                    nursery.start_soon(wait, cache, image)
                    await trio.sleep(1)
                raise ValueError("the end")
        back.kill()
    assert failed == 3 and trio.current_time() < 1e5


async def test_a_lock_that_is_on_its_way_out_is_waited_for(
    back: World, autojump_clock: MockClock
) -> None:
    """Or it would keep us from taking it anew, or end the new one (P8)."""
    async with trio.open_nursery() as nursery, back.open() as cache:
        image = await opened(cache)
        leave_behind(cache, nursery)
        back.before = {"unlock": 3.0}
        with trio.move_on_after(1):
            await cache.close(image, write=True)
        assert not image.origin.locked and image.giving_up is not None
        image.writers = 0
        began = trio.current_time()
        again = await opened(cache)
        assert trio.current_time() - began == pytest.approx(2.0)
        assert again.origin.locked and again.giving_up is None
        back.before = {}
        await cache.close(again, write=True)


async def test_the_origin_is_closed_after_the_sync_that_is_under_way(
    back: World, autojump_clock: MockClock
) -> None:
    async with trio.open_nursery() as nursery, back.open() as cache:
        image = await opened(cache)
        back.before = {"~sync": 3.0}
        nursery.start_soon(cache.lasting.sync, image)
        await trio.sleep(1)
        began = trio.current_time()
        await cache.lasting.close(image)
        assert trio.current_time() - began == pytest.approx(2.0)
        assert image.synced == image.written and not image.origin_open
        back.before = {}
        await cache.closing.forget(image)
