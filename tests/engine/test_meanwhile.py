"""What was looked up before a wait may be another thing afterwards."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from fusecache.engine.block_cache import BlockCache
from fusecache.engine.image import Image
from fusecache.engine.reads import Reads
from fusecache.errors import CacheDeviceError, LockedElsewhereError, OriginError
from tests.engine.conftest import BLOCK, BLOCKS
from tests.engine.handles import fail, on_origin, opened, remove, tune, versions, write
from tests.support.world import PAGE, DeviceDouble, OriginDouble, World


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


async def test_an_evicted_image_that_is_read_meanwhile_is_locked_no_more(
    back: World, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its data was of an earlier life and is discarded: there is nothing left to fit (P8)."""
    async with back.open() as cache:
        await write(cache, await opened(cache), 0, PAGE, 2)
        back.kill()

    lock, locked, elsewhere = OriginDouble.lock, list[int](), True

    def counted(self: OriginDouble, path_fd: int) -> None:
        if elsewhere:
            raise LockedElsewhereError(11, "another host has it")
        locked.append(path_fd)
        lock(self, path_fd)

    monkeypatch.setattr(OriginDouble, "lock", counted)
    async with back.open() as cache:
        await trio.sleep(0.3)
        image = cache.images.find(b"id1")
        assert image is not None and not image.adopted
        elsewhere = False
        back.before = {"no_pages": 30.0}
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(cache.evict, image, 1, discard_dirty=True))
            await trio.sleep(0.1)
            assert await opened(cache, write=False) is image
            other = await opened(cache, 2)
            await write(cache, other, 0, PAGE, 2, 2)  # or there were nothing to clean at all
        back.before = {}
        await trio.sleep(30)
        assert locked == [2]
        await cache.close(image, write=False)
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

        back.before = {"close": 1.0}
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(cache.evict, image, 1))
            while not (image.detached and image.opening.locked()):
                await trio.sleep(0.01)
            await trio.sleep(0.01)
            nursery.start_soon(open_again)
            await trio.sleep(0.01)
            nursery.start_soon(remove, cache, 1, partial(trio.sleep, 1))
        assert again[0] is not image
        assert again[0].gone and again[0].detached
        await cache.close(again[0], write=True)
        await trio.sleep(60)
        assert not cache.dirty_bytes and not cache.core.used and not cache.images.all()


async def test_a_read_beside_a_bad_page_is_not_older_than_what_is_written_back_meanwhile(
    back: World, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clean page cannot be read, so the block is read from the origin, which had not yet what
    is dirty; when that comes, nothing is dirty any more."""
    tune(back, dirty_age=600.0)
    back.cold = True
    past, read = Reads._past, DeviceDouble.read
    async with back.open() as cache:
        image = await opened(cache)
        await cache.read(image, 0, BLOCK)
        await trio.sleep(0.1)
        await write(cache, image, PAGE, PAGE, 2)
        located = cache.core.locate(image.id, 0)
        assert located is not None
        bad = located.slot * BLOCK

        def reads(self: DeviceDouble, position: int, length: int) -> bytes:
            if position <= bad < position + length:
                raise CacheDeviceError("a bad sector")
            return read(self, position, length)

        async def slowly(self: Reads, image: Image, offset: int, length: int) -> bytes:
            data = await past(self, image, offset, length)
            nursery.start_soon(cache.flush, image)
            await trio.sleep(5)
            return data

        monkeypatch.setattr(DeviceDouble, "read", reads)
        monkeypatch.setattr(Reads, "_past", slowly)
        async with trio.open_nursery() as nursery:
            assert await versions(cache, image, 0, 2 * PAGE) == [1] * 8 + [2] * 8
        assert on_origin(back, PAGE, PAGE) == [2] * 8
        await cache.close(image, write=True)


@pytest.mark.usefixtures("few_rescues")
@pytest.mark.parametrize("closed", [False, True])
async def test_a_removed_image_is_not_rescued_for_ever(
    back: World, autojump_clock: MockClock, closed: bool
) -> None:
    """Its rows stay in a broken database, but nobody wants its data on the origin."""
    async with back.open() as cache:
        image = await opened(cache)
        await write(cache, image, 0, PAGE, 2)
        fail(back, "database", "origin.write")
        if closed:
            await cache.close(image, write=True)
        await trio.sleep(10)
        assert not cache.state.usable
        if not closed:
            with pytest.raises(OriginError):
                async with cache.removing(b"id1"):
                    raise AssertionError("whoever has it open would lose what he wrote")
            fail(back, "database")
        await remove(cache)
        await trio.sleep(100)
        assert cache.state.emptied
        if not closed:
            assert set(await versions(cache, image, 0, PAGE)) == {2}
            await cache.close(image, write=True)


async def test_a_settling_page_keeps_the_lock_after_the_last_close(
    back: World, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P8: a power cut would bring the page back, over what another host has written since."""
    unlocker, given_up = OriginDouble.unlocker, 0
    async with back.open() as cache:
        image = await opened(cache)

        def checked(self: OriginDouble) -> Callable[[], None]:
            nonlocal given_up
            given_up += self.locked
            assert not cache.core.dirty.slots(image.id).size
            assert [row.writing for row in cache.block_map.images()] == [0]
            return unlocker(self)

        monkeypatch.setattr(OriginDouble, "unlocker", checked)
        await write(cache, image, 0, PAGE, 2)
        back.before = {"sync": 2.0}
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cache.flush, image)
            while cache.dirty_bytes:
                await trio.sleep(0.1)
            await cache.close(image, write=True)
            assert image.origin.locked
        await trio.sleep(1)
        assert given_up == 1 and not image.origin.locked
        again = await opened(cache)
        await cache.close(again, write=True)
        assert given_up == 2 and not image.origin.locked


async def test_an_evicted_image_that_is_opened_again_is_locked(
    back: World, autojump_clock: MockClock
) -> None:
    """Its last handle is closed, but it could not be synced and so is still known (P8)."""
    async with back.open() as cache:
        image = await opened(cache)
        await cache.evict(image)
        assert not image.origin.locked
        second = await opened(cache)
        assert second is image and not image.origin.locked
        await cache.close(second, write=True)
        await write(cache, image, 0, PAGE, 2)
        fail(back, "origin.sync")
        await cache.close(image, write=True)
        assert cache.images.find(b"id1") is image
        again = await opened(cache)
        assert again is image and image.origin.locked
        fail(back)
        await cache.close(again, write=True)
        assert cache.images.find(b"id1") is None and not image.origin.locked


async def test_an_image_that_is_evicted_while_its_intents_go_is_not_synced_once_it_is_closed(
    world: World, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its descriptors are closed by then: the sync would fail as an unexpected error."""
    sync = OriginDouble.sync

    def while_open(self: OriginDouble, *, metadata: bool = True) -> None:
        assert self.readable or self.writable
        sync(self, metadata=metadata)

    monkeypatch.setattr(OriginDouble, "sync", while_open)
    async with world.open() as cache:
        image = await opened(cache)
        await write(cache, image, 0, PAGE, 2)
        await cache.fsync(image, metadata=True)
        await cache.close(image, write=True)
        assert image.intents and image.origin_open
        async with trio.open_nursery() as nursery:
            world.before = {"~while_open": 2.0}
            nursery.start_soon(partial(cache._intents.remove_old, image, older_than=0))
            await trio.sleep(0.1)
            world.before = {}
            nursery.start_soon(cache.evict, image, 1)
        assert cache.images.find(b"id1") is None


@pytest.mark.parametrize("verb", ["evict", "flush", "evict_closed"])
async def test_what_an_earlier_life_wrote_is_synced_although_the_image_is_forgotten_meanwhile(
    back: World, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    """An image without blocks and handles goes by the clock, and evict promises a sync (P5)."""
    async with back.open() as cache:
        await cache.evict(await opened(cache))
        back.kill()  # what it may have written past the cache is in no row
    synced = list[OriginDouble]()
    sync = OriginDouble.sync

    def noted(self: OriginDouble, **how: bool) -> None:
        sync(self, **how)
        synced.append(self)

    async with back.open() as cache:
        image = await opened(cache, write=False)
        await cache.close(image, write=False)
        while image.origin_open:
            await trio.sleep(0.5)
        assert image.synced < image.written
        kernel = cache.threads.kernel

        async def after_forgetting(*args: Any) -> Any:
            if not image.opening.locked():
                await cache.housekeeping._forget_unused([image])
            return await kernel(*args)

        if verb == "evict":  # while it waits for the kernel
            monkeypatch.setattr(cache.threads, "kernel", after_forgetting)
        else:
            await cache.housekeeping._forget_unused([image])
        monkeypatch.setattr(OriginDouble, "sync", noted)
        await getattr(cache, verb)(image, 1)
        assert cache.images.find(b"id1") is None
        assert synced == [image.origin] and not image.origin_open


async def _closed_with_a_dirty_page(cache: BlockCache) -> Image:
    """All of its blocks are cached, and a change by others would be taken for one (P3)."""
    image = await opened(cache)
    await cache.read(image, 0, BLOCK * BLOCKS)
    await write(cache, image, 0, PAGE, 2)
    await cache.close(image, write=True)
    await trio.sleep(4)
    return image


async def test_what_the_cleaner_does_during_the_sync_of_an_open_is_nobody_elses_change(
    back: World, autojump_clock: MockClock
) -> None:
    """Clean blocks stay."""
    tune(back, dirty_age=600.0)
    async with back.open() as cache:
        image = await _closed_with_a_dirty_page(cache)
        back.before = {"~sync": 2.0, "~_copy": 1.0}
        async with trio.open_nursery() as nursery:
            nursery.start_soon(opened, cache)
            await trio.sleep(0.5)
            nursery.start_soon(cache.flush, image)
        back.before = {}
        assert cache.core.usage(image.id).blocks == BLOCKS
        await cache.close(image, write=True)


async def test_a_batch_that_begins_while_the_last_one_is_recorded_is_recorded_as_well(
    back: World, autojump_clock: MockClock
) -> None:
    tune(back, dirty_age=600.0)
    async with back.open() as cache:
        image = await _closed_with_a_dirty_page(cache)
        back.before = {"~sync": 60.0}
        with trio.move_on_after(0.3):
            await cache.flush(image)
        assert image.own_pending
        back.before = {"attributes": 1.0, "~_copy": 2.0}
        await trio.sleep(0.8)
        await cache.flush(image)
        back.before = {}
        await trio.sleep(5)
        assert not image.own_pending
        assert image.row.ctime_ns == back.files[1].ctime_ns
        await cache.close(await opened(cache), write=True)
        assert cache.core.usage(image.id).blocks == BLOCKS
