"""Who gives up in the middle, as a command that is interrupted does, harms nobody else."""

from functools import partial

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from fusecache.config import WriteMode
from fusecache.store.block_map import Batch
from tests.engine.conftest import BLOCK, BLOCKS
from tests.engine.handles import opened, tune, versions, write
from tests.support.world import PAGE, World


async def test_a_commit_that_is_given_up_takes_nobodys_rows_along(
    back: World, autojump_clock: MockClock
) -> None:
    """R2: the write is acknowledged only when its row is in a commit, whoever made that."""
    async with back.open() as cache:
        image = await opened(cache)
        given_up = trio.CancelScope()

        async def verb() -> None:
            with given_up:
                await cache.committer.commit(Batch)

        async with trio.open_nursery() as nursery:
            async with cache.committer._lock:
                nursery.start_soon(verb)
                await trio.testing.wait_all_tasks_blocked()
                nursery.start_soon(write, cache, image, 0, PAGE, 2)
                await trio.testing.wait_all_tasks_blocked()
            given_up.cancel()
        back.kill()
        async with back.open() as after:
            image = await opened(after)
            assert await versions(after, image, 0, PAGE) == [2] * 8
            await after.close(image, write=True)


async def test_an_evict_that_is_given_up_leaves_no_old_data_to_come_back(
    back: World, autojump_clock: MockClock
) -> None:
    """R5: what was written past the cache and fsynced is not undone by rows that were left."""
    async with back.open() as cache:
        image = await opened(cache)
        await write(cache, image, 0, PAGE, 2)
        await cache.fsync(image, metadata=False)
        given_up = trio.CancelScope()

        async def verb() -> None:
            with given_up:
                await cache.evict(image, discard_dirty=True)

        async with trio.open_nursery() as nursery, cache.committer._lock:
            nursery.start_soon(verb)
            await trio.testing.wait_all_tasks_blocked()
            given_up.cancel()
            await trio.testing.wait_all_tasks_blocked()
        await write(cache, image, 0, PAGE, 3)
        await cache.fsync(image, metadata=False)
        back.power_cut()
        async with back.open() as after:
            image = await opened(after)
            assert await versions(after, image, 0, PAGE) == [3] * 8
            await after.evict(image)
            assert await versions(after, image, 0, PAGE) == [3] * 8
            await after.close(image, write=True)


async def test_after_a_flush_that_is_given_up_a_change_by_others_is_still_noticed(
    back: World, autojump_clock: MockClock
) -> None:
    """P3, and P8: neither the check nor the lock waits for ever for a flush that is gone."""
    async with back.open() as cache:
        image = await opened(cache)
        await write(cache, image, 0, BLOCK, 2)
        await cache.close(image, write=True)
        with trio.CancelScope() as given_up:
            back.after["sync"] = 1.0
            async with trio.open_nursery() as nursery:
                nursery.start_soon(partial(cache.flush, image))
                await trio.sleep(1.5)  # in the second barrier of its only batch
                given_up.cancel()
        back.after.clear()
        assert not cache.core.dirty.pages(image.id)
        assert image.own_pending
        await trio.sleep(10)
        assert not image.own_pending
        assert not image.origin.locked
        back.change_outside(1, 0, bytes(PAGE))
        await trio.sleep(10)
        image = await opened(cache, write=False)
        assert await versions(cache, image, 0, PAGE) == [0] * 8
        await cache.close(image, write=False)


@pytest.mark.parametrize("commits_in_place", [True, False])
async def test_a_kill_costs_a_write_back_guest_no_clean_block(
    back: World, autojump_clock: MockClock, commits_in_place: bool
) -> None:
    """Its rows say which pages are dirty, so its regions need not be active (R4)."""
    tune(back, commits_in_place=commits_in_place)
    async with back.open() as cache:
        image = await opened(cache)
        await cache.read(image, 0, BLOCKS * BLOCK)
        await trio.sleep(6)
        assert cache.core.usage(image.id).blocks == BLOCKS
        for block in (0, 3, 4):
            await write(cache, image, block * BLOCK, PAGE, 2)
        back.kill()
        async with back.open() as after:
            image = await opened(after)
            assert image.write_mode is WriteMode.BACK
            assert after.core.usage(image.id).pages == BLOCKS * BLOCK // PAGE
            assert image.counters.origin_reads == 0
            await after.close(image, write=True)


async def test_the_cleaner_lets_go_of_a_block_that_is_being_written_to(
    back: World, autojump_clock: MockClock
) -> None:
    """It looks again by the clock, and does not go round and round with a barrier each time."""
    tune(back, dirty_low=0.0, dirty_age=1000.0)
    async with back.open() as cache:
        image = await opened(cache)
        for block in (0, 1):
            await write(cache, image, block * BLOCK, PAGE, 2)
        slots = [cache.core.begin_store(image.id, block) for block in (0, 1)]
        before = cache.state.counters.barriers
        with trio.fail_after(100):
            await trio.sleep(10)
        assert cache.state.counters.barriers - before < 60
        assert cache.core.dirty.pages(image.id) == 2
        for slot in slots:
            assert slot is not None
            cache.core.unpin(slot)
        await trio.sleep(5)
        assert cache.core.dirty.blocks <= 1
        await cache.close(image, write=True)
