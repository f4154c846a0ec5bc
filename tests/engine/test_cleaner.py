"""The cleaner: when dirty pages go to the origin, in which order, how fast; what stays dirty."""

from itertools import pairwise

import pytest
import trio
from trio.testing import MockClock

from fusecache.engine.block_cache import BlockCache
from fusecache.engine.image import Image
from fusecache.errors import OriginError
from tests.engine.calls import Calls
from tests.engine.conftest import BLOCK
from tests.engine.handles import fail, on_origin, opened, tune, versions, write
from tests.support.stamps import STAMP
from tests.support.world import PAGE, OriginDouble, World

COPY = "Cleaner._copy"


async def _scattered(cache: BlockCache, image: Image, count: int, version: int = 2) -> None:
    """Dirty blocks that are not neighbours: each is a writeback of its own."""
    for block in range(count):
        await write(cache, image, 2 * block * BLOCK, BLOCK, version)


def _recorded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(offset, length) of every write to an origin from now on."""
    writes: list[tuple[int, int]] = []
    unrecorded = OriginDouble.write

    def recorded(self: OriginDouble, offset: int, data: bytes | memoryview) -> None:
        writes.append((offset, len(data)))
        unrecorded(self, offset, data)

    monkeypatch.setattr(OriginDouble, "write", recorded)
    return writes


async def test_slots_that_went_to_another_image_during_a_flush_are_not_its_own_any_more(
    back: World, autojump_clock: MockClock
) -> None:
    """Between two of its batches a truncate frees some of them, and another image takes these."""
    tune(back, dirty_age=600.0)
    async with back.open() as cache:
        cache.cleaner._batch_blocks = 2
        one, two = await opened(cache), await opened(cache, 2)
        await write(cache, one, 0, 4 * BLOCK, 2)
        chosen = set(cache.core.dirty.slots(one.id).tolist())
        back.before = {"~_copy": 5.0}
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cache.flush, one)
            await trio.sleep(1)
            nursery.start_soon(cache.truncate, one, 2 * BLOCK)
            await trio.sleep(1)
            async with one.cleaning:  # after the truncate, and before the second batch
                await cache.committer.barrier()  # what the truncate dropped can be used again
                await write(cache, two, 2 * BLOCK, 8 * BLOCK, 3, number=2)
                assert chosen & set(cache.core.dirty.slots(two.id).tolist())
        back.before = {}
        assert on_origin(back, 0, 2 * BLOCK) == [2] * (2 * BLOCK // STAMP)
        assert len(back.files[1].pages.data) == 2 * BLOCK, "the other image's data is not here"
        await cache.flush(two)
        assert on_origin(back, 2 * BLOCK, 8 * BLOCK, 2) == [3] * (8 * BLOCK // STAMP)
        await cache.close(one, write=True)
        await cache.close(two, write=True)


@pytest.mark.parametrize("fails", [False, True])
async def test_a_flush_waits_for_what_another_one_is_bringing_home(
    back: World, autojump_clock: MockClock, fails: bool
) -> None:
    """And if that one fails it does so itself."""
    tune(back, dirty_age=600.0)
    async with back.open() as cache:
        image = await opened(cache)
        await write(cache, image, 0, 2 * PAGE, 2)
        back.before = {"~_copy": 5.0}
        back.faults.fail = lambda kind, number: (
            fails and kind == "origin.write" and trio.current_time() < 6
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_refused if fails else BlockCache.flush, cache, image)
            await trio.sleep(1)
            assert cache.core.dirty.in_writeback
            await cache.flush(image)
            assert on_origin(back, 0, 2 * PAGE) == [2] * 16
            assert not back.files[1].pages.unsynced and not cache.dirty_bytes
        await cache.close(image, write=True)


# -- when ------------------------------------------------------------------------------------------


async def test_pages_are_written_back_once_they_are_old_enough_and_not_before(
    back: World, autojump_clock: MockClock
) -> None:
    tune(back, dirty_age=20.0)
    async with back.open() as cache:
        image = await opened(cache)
        await write(cache, image, 0, BLOCK, 2)
        await trio.sleep(12)
        await write(cache, image, 4 * BLOCK, BLOCK, 2)
        await write(cache, image, 0, PAGE, 3)  # written again: no younger for that
        await trio.sleep(7.9)
        assert not image.counters.origin_writes
        await trio.sleep(5)  # ages count in periods of 2 s
        assert on_origin(back, 0, 2 * PAGE) == [3] * 8 + [2] * 8
        assert not cache.core.dirty.mask(image.id, 0) and cache.core.dirty.mask(image.id, 4)
        await trio.sleep(12)
        assert not cache.core.dirty.any_held
        await cache.close(image, write=True)


async def test_above_the_low_water_mark_younger_pages_go_as_well(
    back: World, autojump_clock: MockClock
) -> None:
    tune(back, dirty_age=1000.0, dirty_low=3 / 64)
    async with back.open() as cache:
        image = await opened(cache)
        await _scattered(cache, image, 3)
        await trio.sleep(100)
        assert not image.counters.origin_writes
        await write(cache, image, BLOCK, PAGE, 2)
        await trio.sleep(1)
        assert image.counters.origin_writes
        assert cache.core.dirty.blocks <= 3
        await cache.close(image, write=True)


# -- in which order --------------------------------------------------------------------------------


async def test_rows_are_stable_before_and_the_origin_is_synced_before_pages_are_clean(
    back: World, autojump_clock: MockClock
) -> None:
    async with back.open() as cache:
        image = await opened(cache)
        await write(cache, image, 0, PAGE, 2)
        calls = Calls(cache)
        await cache.cleaner.flush(image)
        barrier = ["BlockMap.commit", "DeviceDouble.sync", "BlockMap.merge"]
        order = calls.order(*barrier, COPY, "OriginDouble.sync")
        # The row is in a commit since the write was acknowledged: the first barrier makes none.
        assert order[:7] == [*barrier[1:], COPY, "OriginDouble.sync", *barrier]
        await cache.close(image, write=True)


async def test_a_page_whose_row_came_too_late_for_the_barrier_waits_for_the_next_writeback(
    back: World, autojump_clock: MockClock
) -> None:
    async with back.open() as cache:
        image = await opened(cache)
        await write(cache, image, 0, PAGE, 2)
        calls = Calls(cache)
        calls.stalled.add("DeviceDouble.sync")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cache.cleaner.flush, image)
            await calls.begun("DeviceDouble.sync")
            await write(cache, image, PAGE, PAGE, 2)
            calls.stalled.clear()
        assert set(on_origin(back, 0, PAGE)) == {2}
        assert set(on_origin(back, PAGE, PAGE)) == {1}
        assert cache.core.dirty.mask(image.id, 0) == 0b10
        await cache.close(image, write=True)


@pytest.mark.parametrize("length", [PAGE, 512])
async def test_a_page_that_is_written_again_during_its_writeback_stays_dirty(
    back: World, autojump_clock: MockClock, length: int
) -> None:
    async with back.open() as cache:
        image = await opened(cache)
        await write(cache, image, 0, 2 * PAGE, 2)
        calls = Calls(cache)
        calls.stalled.add("OriginDouble.sync")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cache.cleaner.flush, image)
            await calls.begun("OriginDouble.sync")
            await write(cache, image, 0, length, 3)
            calls.stalled.clear()
        assert cache.core.dirty.mask(image.id, 0) == 0b01
        assert set(on_origin(back, 0, 2 * PAGE)) == {2}
        await cache.flush(image)
        assert on_origin(back, 0, length) == [3] * (length // 512)
        await cache.close(image, write=True)


async def test_neighbouring_pages_of_many_blocks_become_one_write(
    back: World, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with back.open() as cache:
        image = await opened(cache)
        for page in (6, 3, 7, 5, 4, 8, 11):
            await write(cache, image, page * PAGE, PAGE, 2)
        writes = _recorded(monkeypatch)
        await cache.flush(image)
        assert sorted(writes) == [(3 * PAGE, 6 * PAGE), (11 * PAGE, PAGE)]
        assert image.counters.origin_writes == 2
        assert image.counters.origin_write_bytes == 7 * PAGE
        await cache.close(image, write=True)


async def test_a_failed_origin_sync_after_the_writeback_keeps_its_pages_dirty(
    back: World, autojump_clock: MockClock
) -> None:
    """A guest's sync fails between a writeback and the cleaner's own sync, which succeeds: the
    kernel may have dropped what was written (R5)."""
    back.failed_syncs_lose = True
    tune(back, clean_writes=1, dirty_limit=2 / 64)
    async with back.open() as cache:
        image = await opened(cache)
        await cache.fsync(image, metadata=False)
        await _scattered(cache, image, 2)
        calls = Calls(cache)
        calls.slow[COPY] = 10.0
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_refused, cache, image)
            await trio.sleep(15)  # the first writeback is done, the second under way
            assert calls.count(COPY) == 2 and not calls.count("OriginDouble.sync")
            await write(cache, image, 8 * BLOCK, PAGE, 2)  # beyond the limit: to the origin
            fail(back, "origin.sync")
            with pytest.raises(OriginError):
                await cache.fsync(image, metadata=False)
            fail(back)
        assert cache.core.dirty.pages(image.id) == 8
        assert set(await versions(cache, image, 0, BLOCK)) == {2}
        calls.forget()
        await cache.flush(image)
        assert calls.count(COPY) == 2, "written again, not only synced again"
        back.power_cut(worst=True)
        for block in (0, 2):
            assert set(on_origin(back, block * BLOCK, BLOCK)) == {2}
        await cache.close(image, write=True)


async def _refused(cache: BlockCache, image: Image) -> None:
    with pytest.raises(OriginError):
        await cache.flush(image)


# -- how fast --------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [1, 3])
async def test_no_more_writebacks_of_an_image_run_at_a_time_than_allowed(
    back: World, autojump_clock: MockClock, most: int
) -> None:
    tune(back, clean_writes=most)
    async with back.open() as cache:
        image = await opened(cache)
        await _scattered(cache, image, 6)
        calls = Calls(cache)
        calls.slow[COPY] = 0.1
        await cache.flush(image)
        assert calls.most[COPY] == most and calls.count(COPY) == 6
        await cache.close(image, write=True)


async def test_the_clock_keeps_to_the_rate_and_a_flush_does_not(
    back: World, autojump_clock: MockClock
) -> None:
    tune(back, clean_rate=BLOCK // 4, dirty_age=1.0)
    async with back.open() as cache:
        image = await opened(cache)
        calls = Calls(cache)
        await _scattered(cache, image, 5)  # 20 s at this rate
        while cache.core.dirty.any_held:
            await trio.sleep(0.1)
        began = calls.times[COPY][0]
        calls.forget()
        await _scattered(cache, image, 5, 3)
        await trio.sleep(100)
        assert not cache.core.dirty.any_held
        assert 19.9 < calls.times[COPY][0] - began < 30
        await _scattered(cache, image, 5, 4)
        began = trio.current_time()
        await cache.flush(image)
        assert trio.current_time() - began < 0.5
        await cache.close(image, write=True)


async def test_the_cleaner_steps_aside_while_a_guest_waits_for_the_origin_but_gets_on(
    back: World, autojump_clock: MockClock
) -> None:
    tune(back, dirty_age=4.0)
    delays = []
    for stalled in (False, True):
        async with back.open() as cache:
            image = await opened(cache)
            calls = Calls(cache)
            await trio.sleep(1)
            began = trio.current_time()
            await write(cache, image, 0, BLOCK, 2)
            async with trio.open_nursery() as nursery:
                if stalled:
                    calls.stalled.add("OriginDouble.read")
                    nursery.start_soon(cache.read, image, BLOCK, BLOCK)
                await trio.sleep(30)
                calls.stalled.clear()
            delays.append(calls.times[COPY][0] - began)
            await cache.evict(image)
            await cache.close(image, write=True)
        back.kill()
    assert 0.9 < delays[1] - delays[0] < 2.0


async def test_a_guest_is_answered_from_the_cache_while_the_cleaner_waits_for_the_origin(
    back: World, autojump_clock: MockClock
) -> None:
    tune(back, dirty_age=2.0)
    async with back.open() as cache:
        image = await opened(cache)
        await cache.fsync(image, metadata=False)
        await _scattered(cache, image, 6)
        calls = Calls(cache)
        calls.stalled |= {COPY, "OriginDouble.sync"}
        await calls.begun(COPY)
        with trio.fail_after(1):
            await write(cache, image, 0, PAGE, 3)
            await write(cache, image, 5 * BLOCK, BLOCK, 3)
            await cache.fsync(image, metadata=False)
            assert await versions(cache, image, 0, 2 * PAGE) == [3] * 8 + [2] * 8
        calls.stalled.clear()
        await trio.sleep(20)
        assert on_origin(back, 0, 2 * PAGE) == [3] * 8 + [2] * 8
        assert not cache.core.dirty.any_held
        await cache.close(image, write=True)


# -- trouble ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["origin.write", "origin.sync"])
async def test_pauses_grow_while_the_origin_fails_and_end_once_it_works(
    back: World, autojump_clock: MockClock, kind: str
) -> None:
    tune(back, dirty_age=2.0, clean_pause=2.0, clean_pause_most=8.0)
    async with back.open() as cache:
        image = await opened(cache)
        calls = Calls(cache)
        await write(cache, image, 0, PAGE, 2)
        fail(back, kind)
        await trio.sleep(60)
        times = calls.times[COPY]
        pauses = [after - before for before, after in pairwise(times)]
        assert len(pauses) > 5
        for pause, least in zip(pauses, [2, 4, 8, 8, 8, 8, 8, 8], strict=False):
            assert least <= pause < least + 1
        assert image.clean_error and cache.core.dirty.pages(image.id) == 1
        assert set(await versions(cache, image, 0, PAGE)) == {2}
        fail(back)
        await trio.sleep(10)
        assert not image.clean_error and not image.clean_failures
        assert not cache.core.dirty.any_held
        await cache.close(image, write=True)


async def test_an_image_whose_origin_fails_holds_up_no_other(
    back: World, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    tune(back, dirty_age=2.0)
    async with back.open() as cache:
        images = [await opened(cache, number) for number in (1, 2)]
        for number, image in enumerate(images, 1):
            await write(cache, image, 0, PAGE, 2, number)

        def broken(self: object, offset: int, data: object) -> None:
            raise OriginError(5, "this one alone")

        broken_origin = type("Broken", (type(images[0].origin),), {"write": broken})
        monkeypatch.setattr(images[0].origin, "__class__", broken_origin)
        await trio.sleep(10)
        assert cache.core.dirty.pages(images[0].id) == 1
        assert not cache.core.dirty.pages(images[1].id)
        assert set(on_origin(back, 0, PAGE, 2)) == {2}
        for image in images:
            await cache.close(image, write=True)
