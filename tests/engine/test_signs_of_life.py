"""Until when a change may be our own: over several lives, breaks of the cache, and readers.

See ``test_changed_elsewhere`` for what comes of it.
"""

import errno

import pytest
import trio
from trio.testing import MockClock

from fusecache.engine import truth
from fusecache.errors import (
    ChangedElsewhereError,
    DatabaseError,
    LockedElsewhereError,
    OriginError,
)
from fusecache.store.origin import Attributes
from tests.engine.conftest import BLOCK
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
    life,
    refused,
    served,
    stopped_dirty,
    theirs,
)
from tests.engine.handles import fail, on_origin, opened, tune, write
from tests.support.world import Cut, OriginDouble, World

_LOCK = OriginDouble.lock


def _locked_elsewhere(self: OriginDouble, path_fd: int) -> None:
    raise LockedElsewhereError(errno.EBUSY, "another host has it")


@STOPS
async def test_what_the_cleaner_writes_in_the_next_life_is_our_own(
    back: World, autojump_clock: MockClock, stop: Stop
) -> None:
    """Power that fails twice: nothing of the second life but what it made stable is known."""
    tune(back, dirty_age=600.0)
    await stopped_dirty(back, stop)
    await trio.sleep(LATER)
    tune(back, dirty_age=0.0)
    async with life(back):
        back.after = {"~_copy": 60.0}
        await trio.sleep(1)
        assert set(on_origin(back, BLOCK, BLOCK)) == {2}
        back.after = {}
        back.files[1].make_stable()
        back.power_cut(worst=True)
        raise Cut
    await trio.sleep(LATER)
    await served(back)


@ALL_STOPS
@pytest.mark.parametrize("chmod", [False, True], ids=["", "chmod"])
async def test_a_reader_does_not_make_it_ours_for_later_lives(
    back: World, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, stop: Stop, chmod: bool
) -> None:
    """Its guest runs elsewhere and has not written yet when somebody looks at the image here."""
    tune(back, dirty_age=600.0)
    await stopped_dirty(back, cut)
    await trio.sleep(LATER)
    monkeypatch.setattr(OriginDouble, "lock", _locked_elsewhere)
    if chmod:
        back.files[1].ctime_ns = back.tick_ns()
    async with life(back, stop) as cache:
        await trio.sleep(5)
        image = await opened(cache, write=False)
        await cache.close(image, write=False)
        await trio.sleep(5)
    await trio.sleep(LATER)
    change(back)
    monkeypatch.setattr(OriginDouble, "lock", _LOCK)
    async with life(back) as cache:
        await refused(cache)


@pytest.mark.parametrize("open_still", [False, True], ids=["closed", "open"])
async def test_a_reader_does_not_make_it_ours_in_the_same_life(
    back: World, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, open_still: bool
) -> None:
    """The cleaner gets the lock when that guest ends."""
    tune(back, dirty_age=10.0)
    await stopped_dirty(back, cut)
    await trio.sleep(LATER)
    monkeypatch.setattr(OriginDouble, "lock", _locked_elsewhere)
    async with life(back) as cache:
        await trio.sleep(5)
        image = await opened(cache, write=False)
        if not open_still:
            await cache.close(image, write=False)
        change(back)
        seen = Attributes(back.files[1].size, back.files[1].mtime_ns, back.files[1].ctime_ns)
        await cache.truth.noticed(b"id1", seen, 1)  # whoever asks for attributes is told them
        await trio.sleep(LATER)
        monkeypatch.setattr(OriginDouble, "lock", _LOCK)
        await trio.sleep(LATER)
        assert theirs(back) == OTHERS and image.changed_elsewhere
        if open_still:
            await cache.close(image, write=False)


async def test_it_is_seen_although_it_comes_while_a_reader_looks(
    back: World, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody has the lock here, and the first attributes are older than what is recorded."""
    tune(back, dirty_age=600.0)
    await stopped_dirty(back, cut)
    await trio.sleep(LATER)
    monkeypatch.setattr(OriginDouble, "lock", _locked_elsewhere)
    async with life(back) as cache, trio.open_nursery() as nursery:
        await trio.sleep(1)

        async def look() -> None:
            with pytest.raises(ChangedElsewhereError):
                await opened(cache, write=False)

        back.before = {"~sync": 5.0}
        nursery.start_soon(look)
        await trio.sleep(1)
        change(back)
    back.before = {}
    monkeypatch.setattr(OriginDouble, "lock", _LOCK)
    async with life(back) as cache:
        await refused(cache)


async def test_no_lock_stays_from_before_it_was_changed(
    back: World, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cleaner had it when the origin could not be opened for writing."""
    tune(back, dirty_age=10.0)
    await stopped_dirty(back, cut)
    await trio.sleep(LATER)
    opening = OriginDouble.open

    def only_to_read(self: OriginDouble, path_fd: int, *, write: bool) -> Attributes:
        if write:
            raise OriginError(errno.EIO, "injected")
        return opening(self, path_fd, write=write)

    monkeypatch.setattr(OriginDouble, "open", only_to_read)
    async with life(back) as cache:
        await trio.sleep(3)
        known = cache.images.find(b"id1")
        assert known is not None and known.origin.locked
        change(back)
        await trio.sleep(300)
        assert known.changed_elsewhere and not known.origin.locked


async def test_a_killed_daemons_last_writes_may_come_after_a_clean_stop_too(
    back: World, autojump_clock: MockClock
) -> None:
    """The file server was away all the time, and then this kernel brings them."""
    tune(back, dirty_age=600.0)
    await stopped_dirty(back, World.kill)
    fail(back, "origin.stat")
    async with life(back):
        await trio.sleep(10)
    fail(back)
    await trio.sleep(LATER)
    back.files[1].mtime_ns = back.files[1].ctime_ns = back.tick_ns()
    await served(back)


async def test_a_cache_that_was_emptied_of_clean_pages_says_nothing_of_the_rest(
    back: World, autojump_clock: MockClock
) -> None:
    """Where the device cannot be marked the map is wiped, and everything goes to the origin."""
    await broken_and_written(back, "device.sync", "device.fence")
    async with life(back) as cache:
        image = await opened(cache)
        await cache.close(image, write=True)


async def test_what_was_refused_stays_so_if_the_cache_breaks(
    back: World, autojump_clock: MockClock
) -> None:
    """Nobody here has written it, whatever else a broken cache did."""
    tune(back, dirty_age=10.0)
    await stopped_dirty(back, cut)
    await trio.sleep(LATER)
    change(back)
    async with life(back) as cache:
        await refused(cache)
        await trio.sleep(1)
        fail(back, "database")
        with pytest.raises(DatabaseError):
            await cache.committer.heartbeat()
        await trio.sleep(LATER)
        fail(back)
    assert theirs(back) == OTHERS
    async with life(back) as cache:
        await trio.sleep(LATER)
        assert theirs(back) == OTHERS
        await refused(cache)


async def test_there_are_signs_of_life_while_the_cache_device_takes_its_time(
    back: World, autojump_clock: MockClock
) -> None:
    """Then guests write past the dirty limit, on to the origin."""
    tune(back, dirty_age=600.0, dirty_limit=0.02)
    async with life(back) as cache:
        image = await opened(cache)
        await write(cache, image, BLOCK, BLOCK, 2)
        await cache.fsync(image, metadata=False)
        back.before = {"sync": 150.0}
        for _ in range(100):
            await trio.sleep(1)
            await write(cache, image, 5 * BLOCK, BLOCK, 2)
        assert trio.current_time() - cache.committer.last_heartbeat < 3
        back.before = {}
        back.files[1].make_stable()
        cut(back)
        raise Cut
    await trio.sleep(LATER)
    await served(back)


async def test_a_decision_outlives_a_power_cut(back: World, autojump_clock: MockClock) -> None:
    """What is written then is the operator's will."""
    tune(back, dirty_age=600.0)
    await stopped_dirty(back, cut)
    await trio.sleep(LATER)
    change(back)
    async with life(back) as cache:
        await refused(cache)
        back.before = {"~sync": 600.0}
        with trio.move_on_after(5):
            await decide_for_ours(cache)
        back.before = {}
        back.files[1].make_stable()
        back.power_cut(worst=True)
        raise Cut
    await trio.sleep(LATER)
    await served(back)


async def test_a_file_that_may_only_be_written_is_looked_at_without_reading(
    back: World, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    tune(back, dirty_age=600.0)
    await stopped_dirty(back, cut)
    await trio.sleep(LATER)
    opening = OriginDouble.open

    def only_to_write(self: OriginDouble, path_fd: int, *, write: bool) -> Attributes:
        if not write:
            raise OriginError(errno.EACCES, "injected")
        return opening(self, path_fd, write=write)

    def attributes_of(path_fd: int) -> Attributes:
        file = back.file(path_fd)
        return Attributes(file.size, file.mtime_ns, file.ctime_ns)

    monkeypatch.setattr(truth, "attributes_of", attributes_of)
    monkeypatch.setattr(OriginDouble, "open", only_to_write)
    async with life(back) as cache:
        image = await opened(cache)
        await cache.close(image, write=True)
    await trio.sleep(LATER)
    change(back)
    async with life(back) as cache:
        with pytest.raises(ChangedElsewhereError):
            await opened(cache)


async def test_dirty_data_is_ours_to_write_soon_though_somebody_reads_the_image_first(
    back: World, autojump_clock: MockClock
) -> None:
    """The origin was away for a moment, and then libvirt looked at all disks. The lock must not
    wait until the data is old enough to be written back (P8)."""
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
        assert (image.row.writing, image.row.ours_until_ns) == (1, 0)
    await trio.sleep(LATER)
    change(back)
    async with life(back) as cache:
        await refused(cache)
