"""Fail the N-th call of each kind, for all N: no wrong byte, no hang, and the cache loads again."""

from functools import partial
from pathlib import Path

import pytest
import trio

from fusecache.config import WriteMode
from fusecache.engine.block_cache import BlockCache
from fusecache.engine.image import Image
from fusecache.errors import FusecacheError, OriginError
from tests.engine.conftest import BLOCK, BLOCKS
from tests.support.model import ImageModel
from tests.support.stamps import STAMP, stamped
from tests.support.world import World

SECTORS = BLOCKS * BLOCK // STAMP
KINDS = (
    "origin.stat",
    "origin.read",
    "origin.write",
    "origin.sync",
    "origin.truncate",
    "device.read",
    "device.write",
    "device.sync",
    "database",
)


async def _work(cache: BlockCache, image: Image, model: ImageModel) -> None:
    """A fixed piece of work in which every call may fail; what failed has not happened for sure."""
    for first, count in ((0, 8), (3, 10), (64, 64), (10, 1), (200, 40)):
        await _tolerated(_read(cache, image, model, first, count))
        data = model.begin_write(first, count)
        if await _tolerated(cache.write(image, first * STAMP, data)):
            model.end_write(first, count)
        await _tolerated(_read(cache, image, model, first, count))
        covered = model.begin_fsync()
        if await _tolerated(cache.fsync(image, metadata=False)):
            model.end_fsync(covered)
        await trio.sleep(0.7)
    model.begin_truncate(100 * STAMP)
    if await _tolerated(cache.truncate(image, 100 * STAMP)):
        model.end_truncate(100 * STAMP)
    await _tolerated(cache.evict(image))
    await trio.sleep(6)


async def _tolerated(work: object) -> bool:
    try:
        await work  # type: ignore[misc]
    except FusecacheError:
        return False
    return True


async def _read(cache: BlockCache, image: Image, model: ImageModel, first: int, count: int) -> None:
    oldest = model.begin_read()
    model.check_read(first, await cache.read(image, first * STAMP, count * STAMP), oldest)


async def _life(world: World, model: ImageModel) -> None:
    async with world.open() as cache:
        try:
            image = await cache.open(b"1", b"a", 1, write=True)
        except OriginError:
            return
        await _work(cache, image, model)
        await cache.close(image, write=True)


async def _look(world: World, model: ImageModel) -> None:
    """Everything twice: as it is, and past the cache."""
    async with world.open() as cache:
        image = await cache.open(b"1", b"a", 1, write=False)
        model.settle(await cache.read(image, 0, SECTORS * STAMP), killed=True)
        await cache.close(image, write=False)
        await cache.evict(image)
        image = await cache.open(b"1", b"a", 1, write=False)
        model.check_settled(await cache.read(image, 0, SECTORS * STAMP))
        await cache.close(image, write=False)


@pytest.mark.parametrize("mode", list(WriteMode))
@pytest.mark.parametrize("forever", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_nth_call_may_fail_for_every_n(
    tmp_path: Path, kind: str, forever: bool, mode: WriteMode
) -> None:
    for n in range(200):
        directory = tmp_path / str(n)
        directory.mkdir()
        world = World(directory, n, slots=24, block_size=BLOCK, write_mode=mode)
        world.make_file(1, stamped(1, 0, BLOCKS * BLOCK, 1))
        model = ImageModel(1, SECTORS, BLOCKS * BLOCK, 1)
        failed = False

        def fail(called: str, number: int, n: int = n) -> bool:
            nonlocal failed
            hit = called == kind and (number >= n if forever else number == n)
            failed = failed or hit
            return hit

        world.faults.fail = fail
        clock = partial(trio.testing.MockClock, autojump_threshold=0)
        try:
            trio.run(_with_limit, _life, world, model, clock=clock())
        except BaseExceptionGroup as group:
            # A cache that cannot even be recovered is refused by a sentence.
            assert group.split(FusecacheError)[1] is None, group
        except FusecacheError as exc:
            assert str(exc)
        world.faults.fail = lambda kind, number: False
        world.kill()
        world.clock_base += 10_000
        trio.run(_with_limit, _look, world, model, clock=clock())
        world.kill()
        if not failed:
            assert n > 0 or mode is WriteMode.AROUND, "this kind is never called"
            break


async def _with_limit(work: object, world: World, model: ImageModel) -> None:
    with trio.fail_after(1000):  # on the clock that skips waits: only a hang takes so long
        await work(world, model)  # type: ignore[operator]
