"""A host stopped with dirty data, and its guests were started elsewhere: nothing is written back
or served before the operator has said whose data is kept."""

import errno
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import trio
from trio.testing import MockClock

from fusecache.engine.block_cache import BlockCache
from fusecache.engine.image import Image
from fusecache.engine.ownership import Ownership
from fusecache.errors import ChangedElsewhereError, DatabaseError, OriginError
from tests.engine.conftest import BLOCK, BLOCKS
from tests.engine.handles import fail, on_origin, opened, tune, versions, write
from tests.support.stamps import stamped
from tests.support.world import PAGE, Cut, OriginDouble, OriginFile, World

_LATER = 120.0
"""Seconds until somebody else has the guest; what may be our own is over by then."""


Stop = Callable[[World], None] | None
"""How a life ends; None: cleanly."""


def cut(back: World) -> None:
    """A power cut, of which the database is as new as can be."""
    back.power_cut(newest=True)


STOPS = pytest.mark.parametrize("stop", [cut, None], ids=["power cut", "clean"])
ALL_STOPS = pytest.mark.parametrize(
    "stop", [cut, World.kill, None], ids=["power cut", "killed", "clean"]
)


@asynccontextmanager
async def life(back: World, stop: Stop = None) -> AsyncIterator[BlockCache]:
    """One life of the engine."""
    try:
        async with back.open() as cache:
            yield cache
            if stop is not None:
                stop(back)
                raise Cut
    except* Cut:
        pass
    else:
        back.kill()  # nothing runs any more; this closes the database


async def stopped_dirty(back: World, stop: Stop) -> None:
    """Both images have a dirty block of version 2 when the life ends."""
    async with life(back, stop) as cache:
        for number in (1, 2):
            image = await opened(cache, number)
            await write(cache, image, BLOCK, BLOCK, 2, number)
            await cache.fsync(image, metadata=False)
            await cache.close(image, write=True)


def change(back: World) -> None:
    """The guest of image 1 goes on elsewhere, from what the origin had."""
    back.change_outside(1, BLOCK + PAGE, stamped(1, BLOCK + PAGE, PAGE, 3))


async def refused(cache: BlockCache) -> None:
    """Nobody gets the image, and it is nobody else's loss."""
    for write_too in (False, True):
        with pytest.raises(ChangedElsewhereError) as caught:
            await opened(cache, write=write_too)
        assert caught.value.errno == errno.EBUSY
    known = cache.images.find(b"id1")
    assert known is not None and not known.handles and not known.origin.locked
    assert known.changed_elsewhere and cache.dirty_bytes_of(known) == BLOCK


OTHERS = [1, 3, 1, 1]
"""By page of block 1, what somebody else made of it."""


def theirs(back: World) -> list[int]:
    return on_origin(back, BLOCK, BLOCK)[:: PAGE // 512]


@STOPS
async def test_it_is_neither_served_nor_written_back_and_other_images_are(
    back: World, autojump_clock: MockClock, stop: Stop, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Nor is it locked for a moment: its guest may be about to be started elsewhere again."""
    tune(back, dirty_age=10.0)
    await stopped_dirty(back, stop)
    await trio.sleep(_LATER)
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
    await trio.sleep(_LATER)
    for look in (False, True, True):
        change(back)
        async with life(back, stop) as cache:
            if not look:
                fail(back, "origin.stat")
            await trio.sleep(_LATER)
            fail(back)
            if look:
                await refused(cache)
        await trio.sleep(_LATER)
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
    await trio.sleep(_LATER)
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
    await trio.sleep(_LATER)
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


async def decide_for_ours(cache: BlockCache) -> None:
    image = cache.images.find(b"id1")
    assert image is not None
    await cache.flush(image, overwrite=True)


async def decide_for_theirs(cache: BlockCache) -> None:
    image = cache.images.find(b"id1")
    assert image is not None
    await cache.evict(image, discard_dirty=True)


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
    await trio.sleep(_LATER)
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
    await trio.sleep(_LATER)
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


async def served(back: World) -> None:
    """As if nobody had changed it."""
    async with life(back) as cache:
        image = await opened(cache)
        assert set(await versions(cache, image, BLOCK, BLOCK)) == {2}
        await cache.close(image, write=True)
        await cache.flush(image)
        assert set(on_origin(back, BLOCK, BLOCK)) == {2}


@ALL_STOPS
async def test_owners_links_and_attributes_are_no_data(
    back: World, autojump_clock: MockClock, stop: Stop
) -> None:
    tune(back, dirty_age=600.0)
    await stopped_dirty(back, stop)
    await trio.sleep(_LATER)
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
    await trio.sleep(_LATER)
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
    await trio.sleep(_LATER)
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
    await trio.sleep(_LATER)
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
    await trio.sleep(_LATER)
    if later:
        back.files[1].ctime_ns = back.tick_ns()
    await served(back)


async def test_a_broken_cache_writes_on_without_a_sign_of_life(
    back: World, autojump_clock: MockClock
) -> None:
    """What it wrote past the database then is its own, and what it kept is written back."""
    tune(back, dirty_age=600.0)
    async with life(back, cut) as cache:
        image = await opened(cache)
        await write(cache, image, BLOCK, BLOCK, 2)
        await cache.fsync(image, metadata=False)
        fail(back, "database", "origin.sync")
        with pytest.raises(DatabaseError):
            await cache.committer.heartbeat()
        await trio.sleep(_LATER)
        await write(cache, image, 3 * BLOCK, BLOCK, 2)
        back.files[1].make_stable()
        fail(back)
    await trio.sleep(_LATER)
    await served(back)


async def test_dirty_data_is_ours_to_write_soon_though_somebody_reads_the_image_first(
    back: World, autojump_clock: MockClock
) -> None:
    """The origin was away for a moment, and then libvirt looked at all disks. The lock, and the sign
    that a change may be ours, must not wait until the data is old enough to be written back (P8)."""
    tune(back, dirty_age=600.0)
    await stopped_dirty(back, cut)
    async with life(back, cut) as cache:
        fail(back, "origin.stat")
        await trio.sleep(0.2)
        fail(back)
        image = await opened(cache, write=False)
        await cache.close(image, write=False)
        await trio.sleep(60)
        assert image.origin.locked and cache.dirty_bytes_of(image)
    await trio.sleep(_LATER)
    change(back)
    async with life(back) as cache:
        await refused(cache)
