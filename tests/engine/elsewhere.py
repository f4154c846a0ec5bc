"""A cache that stops with dirty data, others who go on meanwhile, and what comes of it."""

import errno
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import trio

from fusecache.engine.block_cache import BlockCache
from fusecache.errors import ChangedElsewhereError, FusecacheError
from tests.engine.conftest import BLOCK
from tests.engine.handles import fail, on_origin, opened, tune, versions, write
from tests.support.stamps import stamped
from tests.support.world import PAGE, Cut, World

LATER = 120.0
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


async def broken_and_written(back: World, *kinds: str) -> None:
    """The cache breaks with a dirty block of image 1, and the guest writes on, to the origin; then
    the power goes."""
    tune(back, dirty_age=600.0)
    async with life(back, cut) as cache:
        image = await opened(cache)
        await write(cache, image, BLOCK, BLOCK, 2)
        await cache.fsync(image, metadata=False)
        fail(back, *kinds, "origin.sync")
        with pytest.raises(FusecacheError):
            await cache.committer.heartbeat()
            await cache.committer.barrier()
        await trio.sleep(LATER)
        await write(cache, image, 3 * BLOCK, BLOCK, 2)
        back.files[1].make_stable()
        fail(back)
    await trio.sleep(LATER)


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


async def served(back: World) -> None:
    """As if nobody had changed it."""
    async with life(back) as cache:
        image = await opened(cache)
        assert set(await versions(cache, image, BLOCK, BLOCK)) == {2}
        await cache.close(image, write=True)
        await cache.flush(image)
        assert set(on_origin(back, BLOCK, BLOCK)) == {2}


async def decide_for_ours(cache: BlockCache) -> None:
    image = cache.images.find(b"id1")
    assert image is not None
    await cache.flush(image, overwrite=True)


async def decide_for_theirs(cache: BlockCache) -> None:
    image = cache.images.find(b"id1")
    assert image is not None
    await cache.evict(image, discard_dirty=True)
