"""A host stopped with dirty data, and its guests were started elsewhere: nothing is written back
or served before the operator has said whose data is kept."""

import logging
from collections.abc import Awaitable, Callable

import pytest
import trio
from trio.testing import MockClock

from fusecache.engine.block_cache import BlockCache
from fusecache.engine.image import Image
from fusecache.engine.ownership import Ownership
from fusecache.errors import ChangedElsewhereError, OriginError
from tests.engine.conftest import BLOCK, BLOCKS
from tests.engine.elsewhere import (
    ALL_STOPS,
    LATER,
    OTHERS,
    STOPS,
    Stop,
    broken_and_written,
    change,
    cut,
    decide_for_ours,
    decide_for_theirs,
    life,
    refused,
    served,
    stopped_dirty,
    theirs,
)
from tests.engine.handles import fail, on_origin, opened, tune, versions, write
from tests.support.world import PAGE, Cut, OriginDouble, OriginFile, World


@STOPS
async def test_it_is_neither_served_nor_written_back_and_other_images_are(
    back: World, autojump_clock: MockClock, stop: Stop, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Nor is it locked for a moment: its guest may be about to be started elsewhere again."""
    tune(back, dirty_age=10.0)
    await stopped_dirty(back, stop)
    await trio.sleep(LATER)
    change(back)
    locked: list[OriginFile] = []
    lock = OriginDouble.lock

    def noted(self: OriginDouble, path_fd: int) -> None:
        locked.append(back.file(path_fd))
        lock(self, path_fd)

    monkeypatch.setattr(OriginDouble, "lock", noted)
    with caplog.at_level(logging.ERROR, "fusecache"):
        async with life(back) as cache:
            await refused(cache)
            await trio.sleep(1000)
            assert theirs(back) == OTHERS
            assert set(on_origin(back, BLOCK, BLOCK, 2)) == {2}
            await refused(cache)
    assert back.files[1] not in locked and back.files[2] in locked
    events = [getattr(record, "fields", {}).get("event") for record in caplog.records]
    assert events.count("image-conflict") == 1, events


@ALL_STOPS
async def test_later_lives_do_not_forget_it(
    back: World, autojump_clock: MockClock, stop: Stop
) -> None:
    """Also if they never came to look, since the origin did not let them."""
    tune(back, dirty_age=10.0)
    await stopped_dirty(back, cut)
    await trio.sleep(LATER)
    for look in (False, True, True):
        change(back)
        async with life(back, stop) as cache:
            if not look:
                fail(back, "origin.stat")
            await trio.sleep(LATER)
            fail(back)
            if look:
                await refused(cache)
        await trio.sleep(LATER)
    assert theirs(back) == OTHERS


async def test_a_kill_before_the_power_cut_does_not_hide_it(
    back: World, autojump_clock: MockClock
) -> None:
    """The life between them never came to look."""
    await stopped_dirty(back, World.kill)
    async with life(back, cut):
        fail(back, "origin.stat")
        await trio.sleep(10)
        fail(back)
    await trio.sleep(LATER)
    change(back)
    async with life(back) as cache:
        await refused(cache)


@pytest.mark.parametrize("who", ["guest", "cleaner"])
async def test_it_is_seen_although_it_comes_at_the_last_moment(
    back: World, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, who: str
) -> None:
    """Between the first look and the lock."""
    tune(back, dirty_age=600.0)
    await stopped_dirty(back, cut)
    await trio.sleep(LATER)
    lock = Ownership.lock

    async def late(self: Ownership, image: Image, path_fd: int) -> None:
        change(back)
        await lock(self, image, path_fd)

    monkeypatch.setattr(Ownership, "lock", late)
    async with life(back) as cache:
        if who == "guest":
            with pytest.raises(ChangedElsewhereError):
                await opened(cache)
        await trio.sleep(10)
        known = cache.images.find(b"id1")
        assert known is not None and known.changed_elsewhere and not known.origin.locked
        monkeypatch.setattr(Ownership, "lock", lock)
        await refused(cache)
        assert theirs(back) == OTHERS


@pytest.mark.parametrize(
    ("decide", "expected"),
    [(decide_for_ours, [2, 2, 2, 2]), (decide_for_theirs, OTHERS)],
    ids=["ours", "theirs"],
)
@STOPS
async def test_the_operator_decides(
    back: World, autojump_clock: MockClock, stop: Stop,
    decide: Callable[[BlockCache], Awaitable[None]], expected: list[int],
) -> None:  # fmt: skip
    tune(back, dirty_age=600.0)
    await stopped_dirty(back, stop)
    await trio.sleep(LATER)
    change(back)
    async with life(back) as cache:
        await refused(cache)
        await decide(cache)
        image = await opened(cache)
        assert (await versions(cache, image, BLOCK, BLOCK))[:: PAGE // 512] == expected
        assert theirs(back) == expected and not cache.dirty_bytes_of(image)
        await write(cache, image, 0, PAGE, 4)
        await cache.close(image, write=True)
    async with life(back) as cache:
        image = await opened(cache)
        assert set(await versions(cache, image, 0, PAGE)) == {4}
        await cache.close(image, write=True)


async def test_a_decision_outlives_a_cut_before_all_is_written_back(
    back: World, autojump_clock: MockClock
) -> None:
    """Whoever gives up a flush, or whose origin fails, is not asked again."""
    tune(back, dirty_age=600.0)
    await stopped_dirty(back, cut)
    await trio.sleep(LATER)
    change(back)
    async with life(back, World.kill) as cache:
        fail(back, "origin.stat")
        with pytest.raises(OriginError):
            await decide_for_ours(cache)
        await trio.sleep(10)
    fail(back)
    async with life(back) as cache:
        image = await opened(cache)
        assert set(await versions(cache, image, BLOCK, BLOCK)) == {2}
        await cache.close(image, write=True)


# -- what is not somebody else's data --------------------------------------------------------------


@ALL_STOPS
async def test_owners_links_and_attributes_are_no_data(
    back: World, autojump_clock: MockClock, stop: Stop
) -> None:
    tune(back, dirty_age=600.0)
    await stopped_dirty(back, stop)
    await trio.sleep(LATER)
    back.files[1].ctime_ns = back.tick_ns()
    await served(back)


async def test_without_dirty_data_a_change_is_no_conflict(
    back: World, autojump_clock: MockClock
) -> None:
    """Of an image that was open for writing when the power went."""
    async with life(back, cut) as cache:
        image = await opened(cache)
        await write(cache, image, BLOCK, BLOCK, 2)
        await cache.flush(image)
    await trio.sleep(LATER)
    change(back)
    async with life(back) as cache:
        image = await opened(cache)
        assert (await versions(cache, image, BLOCK, BLOCK))[:: PAGE // 512] == [2, 3, 2, 2]


@STOPS
async def test_nor_are_they_if_the_file_claims_to_be_of_the_future(
    back: World, autojump_clock: MockClock, stop: Stop
) -> None:
    tune(back, dirty_age=600.0)
    back.files[1].mtime_ns = back.files[1].ctime_ns + 10**18
    await stopped_dirty(back, stop)
    await trio.sleep(LATER)
    back.files[1].ctime_ns = back.tick_ns()
    await served(back)


async def test_a_clean_stop_gives_its_last_sign_of_life_after_all_it_did(
    back: World, autojump_clock: MockClock
) -> None:
    tune(back, dirty_age=600.0)
    async with life(back) as cache:
        image = await opened(cache)
        await write(cache, image, BLOCK, BLOCK, 2)
        await cache.write(image, BLOCKS * BLOCK, b"longer")  # the origin's file is, at once
        back.before = {"~sync": 30.0}
    stopped_ns = back.now_ns()
    back.before = {}
    async with life(back) as cache:
        known = cache.images.find(b"id1")
        assert known is not None and known.row.ours_until_ns <= -stopped_ns


async def test_a_killed_daemons_writes_may_reach_the_origin_late(
    back: World, autojump_clock: MockClock
) -> None:
    """They are in this kernel's pages of an NFS file, and get their times at the server."""
    tune(back, dirty_age=600.0)
    await stopped_dirty(back, World.kill)
    await trio.sleep(LATER)
    back.files[1].mtime_ns = back.files[1].ctime_ns = back.tick_ns()
    await served(back)


@pytest.mark.parametrize("later", [False, True], ids=["", "chmod later"])
async def test_what_the_cleaner_wrote_last_is_our_own(
    back: World, autojump_clock: MockClock, later: bool
) -> None:
    """Its change was not recorded before the power went, nor a stable sign of life after it."""
    tune(back, dirty_age=600.0, barrier_interval=100.0)
    async with life(back) as cache:
        image = await opened(cache)
        await write(cache, image, BLOCK, BLOCK, 2)
        await write(cache, image, 2 * BLOCK, BLOCK, 2)
        await cache.fsync(image, metadata=False)
        await trio.sleep(30)
        back.before = {"~_copy": 20.0, "~sync": 100.0}
        with trio.move_on_after(30):
            await cache.flush(image)
        back.before = {}
        back.files[1].make_stable()
        back.power_cut(worst=True)
        raise Cut
    await trio.sleep(LATER)
    if later:
        back.files[1].ctime_ns = back.tick_ns()
    await served(back)


async def test_a_broken_cache_writes_on_without_a_sign_of_life(
    back: World, autojump_clock: MockClock
) -> None:
    """What it wrote past the database then is its own, and what it kept is written back."""
    await broken_and_written(back, "database")
    await served(back)
