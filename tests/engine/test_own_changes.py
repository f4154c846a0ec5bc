"""Changes of owner, mode and times that come through the mount: whose change time that is (P3), and
what the next fsync covers (P2)."""

from collections.abc import Awaitable, Callable

import pytest
import trio
from trio.testing import MockClock

from fusecache.engine import truth
from fusecache.engine.block_cache import BlockCache
from fusecache.store.origin import Attributes
from tests.engine.conftest import BLOCK
from tests.engine.handles import opened, versions, write
from tests.support.stamps import stamped
from tests.support.world import World

_IDENTITY = b"id1"


@pytest.fixture(autouse=True)
def _attributes_of_the_world(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file's number stands for a descriptor of it."""

    def attributes_of(path_fd: int) -> Attributes:
        file = world.files[path_fd]
        return Attributes(file.size, file.mtime_ns, file.ctime_ns)

    monkeypatch.setattr(truth, "attributes_of", attributes_of)


async def _chown(cache: BlockCache, world: World) -> None:
    async with cache.truth.own_change(_IDENTITY, 1):
        world.files[1].ctime_ns = world.tick_ns()


async def _utimens(cache: BlockCache, world: World) -> None:
    with cache.truth.setting_attributes(_IDENTITY):
        world.files[1].mtime_ns, world.files[1].ctime_ns = 1, world.tick_ns()


@pytest.mark.parametrize("change", [_chown, _utimens])
@pytest.mark.parametrize("by_others", [False, True])
async def test_what_others_write_between_a_chown_and_the_release_is_not_taken_for_ours(
    world: World,
    autojump_clock: MockClock,
    change: Callable[[BlockCache, World], Awaitable[None]],
    by_others: bool,
) -> None:
    """libvirt changes the owner as soon as QEMU has closed the image, and the kernel tells of the
    end of QEMU's handle later. Times that are set are never ours."""
    async with world.open() as cache:
        image = await opened(cache)
        await write(cache, image, 0, BLOCK, 2)
        await cache.closing.before_close(image)
        await trio.sleep(0.05)
        await change(cache, world)
        await trio.sleep(0.05)
        if by_others:
            world.change_outside(1, 0, stamped(1, 0, BLOCK, 3))
        await trio.sleep(0.05)
        await cache.close(image, write=True)
        await trio.sleep(5)
        assert cache.core.used
        again = await opened(cache, write=False)
        kept = change is _chown and not by_others
        assert bool(cache.core.used) == kept
        assert set(await versions(cache, again, 0, BLOCK)) == {3 if by_others else 2}
        await cache.close(again, write=False)


@pytest.mark.parametrize("known", [False, True])
async def test_an_fsync_covers_a_change_that_was_under_way_during_the_one_before(
    world: World, autojump_clock: MockClock, known: bool
) -> None:
    """Also if the image became known only while it was under way."""
    async with world.open() as cache:
        image = None
        if known:
            image = await opened(cache)
            await cache.fsync(image, metadata=True)
        async with cache.truth.own_change(_IDENTITY, 1):
            if image is None:
                image = await opened(cache)
            await cache.fsync(image, metadata=True)
            world.files[1].ctime_ns = world.tick_ns()
        await cache.fsync(image, metadata=True)
        assert world.files[1].stable_times[1] == world.files[1].ctime_ns
        await cache.close(image, write=True)


async def test_an_fsync_covers_times_that_were_being_set_during_the_one_before(
    world: World, autojump_clock: MockClock
) -> None:
    async with world.open() as cache:
        image = await opened(cache)
        with cache.truth.setting_attributes(_IDENTITY):
            await cache.fsync(image, metadata=True)
            world.files[1].mtime_ns = 1
        await cache.fsync(image, metadata=True)
        assert world.files[1].stable_times[0] == 1
        syncs = world.faults.calls["origin.sync"]
        await cache.fsync(image, metadata=True)
        assert world.faults.calls["origin.sync"] == syncs
        await cache.close(image, write=True)


async def test_an_fsync_covers_attributes_although_data_was_synced_since_they_were_set(
    world: World, autojump_clock: MockClock
) -> None:
    """An fdatasync is a sync of data alone; what it has covered nobody syncs again."""
    async with world.open() as cache:
        image = await opened(cache)
        await cache.fsync(image, metadata=True)
        for times in (1, 2):
            with cache.truth.setting_attributes(_IDENTITY):
                world.files[1].mtime_ns = times
            await cache.fsync(image, metadata=False)
            await cache.fsync(image, metadata=True)
            assert world.files[1].stable_times[0] == times
        await cache.close(image, write=True)


async def test_an_fsync_covers_attributes_of_an_earlier_life(
    world: World, autojump_clock: MockClock
) -> None:
    world.files[1].mtime_ns = 1
    async with world.open() as cache:
        image = await opened(cache)
        await cache.fsync(image, metadata=False)
        await cache.fsync(image, metadata=True)
        assert world.files[1].stable_times[0] == 1
        await cache.close(image, write=True)
