"""Directed traces: short stories for rules that random walks seldom put to the test."""

from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import trio
import trio.testing

from fusecache.config import WriteMode
from fusecache.engine.block_cache import BlockCache
from fusecache.engine.image import Image
from tests.support.stamps import check_stamps, stamped
from tests.support.world import Cut, World

BLOCK = 4 * 4096
BLOCKS = 40

Story = Callable[[World, BlockCache], Awaitable[None]]


def _end(world: World, story: Story) -> None:
    """Runs a story in one life, which the switch ends."""

    async def life() -> None:
        async with world.open() as cache:
            await story(world, cache)
            raise Cut

    try:
        trio.run(life, clock=trio.testing.MockClock(autojump_threshold=0))
    except (Cut, BaseExceptionGroup) as exc:
        if isinstance(exc, BaseExceptionGroup) and exc.split(Cut)[0] is None:
            raise
    world.faults.fail = lambda kind, number: False
    world.before = {}
    world.after = {}
    world.clock_base += 100


def _look(world: World) -> None:
    """Recovers, reads everything, and is killed."""
    trio.run(partial(_read, world), clock=trio.testing.MockClock(autojump_threshold=0))
    world.kill()


async def _read(world: World) -> None:
    """What is read after the recovery is what the origin has, and nothing is foreign."""
    async with world.open() as cache:
        image = await cache.open(b"id1", b"a", 1, write=False)
        first = await cache.read(image, 0, BLOCKS * BLOCK)
        await cache.close(image, write=False)
        await cache.evict(image, 1)
        image = await cache.open(b"id1", b"a", 1, write=False)
        second = await cache.read(image, 0, BLOCKS * BLOCK)
        await cache.close(image, write=False)
    assert set(check_stamps(first, 1, 0)) <= {1, 2}
    assert first == second, "the old data came back"


def _world(directory: Path, seed: int, slots: int = 64) -> World:
    directory = directory / str(seed)
    directory.mkdir()
    world = World(directory, seed, slots=slots, block_size=BLOCK)
    world.make_file(1, stamped(1, 0, BLOCKS * BLOCK, 1))
    return world


async def _write_to_a_quiet_region(world: World, cache: BlockCache) -> None:
    image = await cache.open(b"id1", b"a", 1, write=True)
    await cache.read(image, 0, BLOCK)
    await trio.sleep(20)  # row and record stable, no intent left
    await cache.write(image, 0, stamped(1, 0, 4096, 2))


async def _write_that_takes_long(world: World, cache: BlockCache) -> None:
    image = await cache.open(b"id1", b"a", 1, write=True)
    await cache.read(image, 0, BLOCK)
    await trio.sleep(20)
    world.before = {"_write_both": 4.0}

    def fail(kind: str, number: int) -> bool:
        if kind == "device.write":
            raise Cut
        return False

    world.faults.fail = fail
    await cache.write(image, 0, stamped(1, 0, 4096, 2))


async def _fill_during_a_barrier(world: World, cache: BlockCache) -> None:
    image = await cache.open(b"id1", b"a", 1, write=True)
    await cache.read(image, 0, BLOCK)
    await trio.sleep(0.2)
    world.after = {"sync": 3.0}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(cache.committer.barrier)
        await trio.sleep(0.5)
        await cache.read(image, 5 * BLOCK, BLOCK)


def a_first_write_is_cut_off(directory: Path) -> None:
    """R4: the intent is stable before the origin may have the data."""
    for seed in range(6):
        world = _world(directory, seed)
        _end(world, _write_to_a_quiet_region)
        world.power_cut(worst=True)
        _look(world)


def a_long_write_is_killed(directory: Path) -> None:
    """R4: a region stays active while a write is in flight, however long that takes."""
    for seed in range(6):
        world = _world(directory, seed)
        _end(world, _write_that_takes_long)
        world.kill()
        _look(world)


def a_fill_ends_during_a_barrier(directory: Path) -> None:
    """R1: rows that came during the device's sync wait for the next barrier."""
    for seed in range(20):
        world = _world(directory, seed)
        _end(world, _fill_during_a_barrier)
        world.power_cut(worst=True)
        _look(world)


async def _write_while_rows_are_removed(seconds: float, world: World, cache: BlockCache) -> None:
    image = await cache.open(b"id1", b"a", 1, write=True)
    await cache.read(image, 0, BLOCK)
    await trio.sleep(20)
    await cache.write(image, BLOCK, stamped(1, BLOCK, 4096, 2))
    world.after = {"sync": 4.0}  # the barrier between the origin's sync and the removal
    await trio.sleep(5)
    await cache.write(image, 0, stamped(1, 0, 4096, 2))
    await trio.sleep(seconds)


def a_write_begins_while_its_row_is_removed(directory: Path) -> None:
    """R4: a row goes only if no write began in its region since."""
    for seed in range(24):
        world = _world(directory, seed)
        _end(world, partial(_write_while_rows_are_removed, seed / 4))
        world.power_cut(worst=True, newest=True)
        _look(world)


async def _alive(world: World, story: Story) -> None:
    async with world.open() as cache:
        await story(world, cache)


async def _others_change(world: World, cache: BlockCache) -> None:
    for version in (1, 2):
        image = await cache.open(b"id1", b"a", 1, write=False)
        data = await cache.read(image, 0, BLOCK)
        assert set(check_stamps(data, 1, 0)) == {version}
        await cache.close(image, write=False)
        await trio.sleep(3)
        world.change_outside(1, 0, stamped(1, 0, BLOCK, 2))


async def _slot_changes_hands(world: World, cache: BlockCache) -> None:
    image = await cache.open(b"id1", b"a", 1, write=True)
    await cache.read(image, 0, BLOCK)
    await trio.sleep(1)
    world.cold = True
    world.before = {"_read_slots": 30.0}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_checked, cache, image, 0)
        await trio.sleep(1)
        for block in range(1, BLOCKS):
            nursery.start_soon(_checked, cache, image, block)
            await trio.sleep(0.5)


async def _checked(cache: BlockCache, image: Image, block: int) -> None:
    data = await cache.read(image, block * BLOCK, BLOCK)
    assert set(check_stamps(data, 1, block * BLOCK)) <= {1, 2}


async def _slot_is_being_written(world: World, cache: BlockCache) -> None:
    image = await cache.open(b"id1", b"a", 1, write=True)
    await cache.read(image, 0, BLOCK)
    await trio.sleep(1)
    world.before = {"_write_both": 30.0}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(cache.write, image, 0, stamped(1, 0, BLOCK, 2))
        await trio.sleep(1)
        for block in range(1, BLOCKS):
            await _checked(cache, image, block)
            await trio.sleep(0.5)
    for block in reversed(range(BLOCKS)):
        await _checked(cache, image, block)


def while_it_lives(directory: Path) -> None:
    """P3, generations and pins: what a running cache must not serve."""
    for seed, story in enumerate((_others_change, _slot_changes_hands, _slot_is_being_written)):
        world = _world(directory, seed, slots=16)
        alive = partial(_alive, world, story)
        trio.run(alive, clock=trio.testing.MockClock(autojump_threshold=0))
        world.kill()


async def _flush_waits_for_a_truncate(world: World, cache: BlockCache) -> None:
    """Between the two batches of a flush a truncate frees slots, and another image's blocks become
    dirty there."""
    one = await cache.open(b"id1", b"a", 1, write=True)
    two = await cache.open(b"id2", b"b", 2, write=True)
    await cache.write(one, 0, stamped(1, 0, 4 * BLOCK, 2))
    cache.cleaner._batch_blocks = 2
    world.before = {"~_copy": 5.0}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(cache.flush, one)
        await trio.sleep(1)
        nursery.start_soon(cache.truncate, one, 2 * BLOCK)
        await trio.sleep(1)
        async with one.cleaning:  # after the truncate, and before the second batch
            await cache.committer.barrier()  # what was freed can be used
            await cache.write(two, 2 * BLOCK, stamped(2, 2 * BLOCK, 8 * BLOCK, 2))
    world.before = {}
    await cache.flush(two)
    for number, begin, end in ((1, 0, 2 * BLOCK), (2, 2 * BLOCK, 10 * BLOCK)):
        on_origin = bytes(world.files[number].pages.data)
        assert set(check_stamps(on_origin[begin:end], number, begin)) == {2}
    assert len(world.files[1].pages.data) == 2 * BLOCK, "somebody else's data is there"


def slots_change_hands_between_two_batches(directory: Path) -> None:
    """R5: what a writeback chose before it had to wait may hold another image's block since."""
    world = _world(directory, 0)
    world.write_mode = WriteMode.BACK
    world.tuning = replace(world.tuning, dirty_age=600.0)
    world.make_file(2, stamped(2, 0, BLOCKS * BLOCK, 1))
    alive = partial(_alive, world, _flush_waits_for_a_truncate)
    trio.run(alive, clock=trio.testing.MockClock(autojump_threshold=0))
    world.kill()


TRACES = (
    a_first_write_is_cut_off,
    a_long_write_is_killed,
    a_fill_ends_during_a_barrier,
    a_write_begins_while_its_row_is_removed,
    while_it_lives,
    slots_change_hands_between_two_batches,
)
