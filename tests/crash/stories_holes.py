"""Stories of ranges that guests free or set to zeros."""

import trio

from fusecache.config import WriteMode
from tests.crash.plays import ZERO, Play, story


@story(dirty_age=60.0)
async def ranges_are_freed(play: Play) -> None:
    """Clean, dirty and never read pages, and parts of them; synced, and written again."""
    await play.open()
    await play.read(0, 12)
    await play.write(0, 3)
    await play.write(9)
    await play.write(20, 3)
    await play.fsync()
    await play.hole(1, 6)
    await play.hole(9.5, 2.25)
    await play.hole(20.25, 0.5)
    await play.read(0, 24)
    await play.write(2)
    await play.write(21.5, 1)
    await play.hole(30, 4)
    await play.fsync()
    await play.hole(0.5, 2, mode=ZERO)
    await play.write(1.25, 0.25)
    await play.read(0, 24)


@story(mode=WriteMode.THROUGH)
async def a_quiet_region_is_freed(play: Play) -> None:
    """Clean pages go without any barrier of their own (R4)."""
    await play.open()
    await play.read(0, 16)
    await trio.sleep(20)
    await play.hole(0, 2)
    await play.read(0, 4)
    await trio.sleep(2.2)
    await play.hole(4.5, 3)
    await play.fsync()
    await trio.sleep(8)
    await play.write(0)
    await play.hole(5)


@story(dirty_age=60.0, barrier_interval=600.0, intent_removal=60.0)
async def another_host_goes_on_after_a_hole(play: Play) -> None:
    """What was dirty is gone and the lock is free: what another host writes then stays (R5)."""
    await play.open()
    await play.write(0, 2)
    await play.fsync()
    await play.hole(0, 2)
    await play.close()
    while play.image.origin.locked:
        await trio.sleep(0.1)
    await trio.sleep(4)  # else a killed daemon's successor takes the change for our own (P3)
    play.others_write(0, 2)


@story(dirty_age=60.0)
async def dirty_data_is_freed(play: Play) -> None:
    """The origin has the hole, synced, before the row of what was stable goes (R5)."""
    await play.open()
    await play.read(0, 4)
    await trio.sleep(20)
    await play.write(0, 2)
    await play.write(8)
    await play.fsync()
    await play.hole(0, 2)
    await trio.sleep(6)
    await play.hole(8)
    await play.read(0, 12)


@story()
async def a_range_is_freed_while_it_is_cleaned(play: Play) -> None:
    """A writeback that is under way comes first, and never over the hole (R5)."""
    await play.open()
    await play.write(0, 2)
    await play.write(8, 8)
    play.world.before = play.world.after = {"~_copy": 2.0}
    while not play.cache.core.dirty.in_writeback:
        await trio.sleep(0.1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(play.hole, 9, 3)
        nursery.start_soon(play.hole, 0, 1.5)
        nursery.start_soon(play.hole, 13)
        await trio.sleep(0.1)
        await play.write(14)
    await play.read()
    await play.fsync()
    await trio.sleep(8)
    await play.read()


@story()
async def fills_and_writes_meet_holes(play: Play) -> None:
    """Readers fetch, and guests write, what is freed at the same moment (R7)."""
    await play.open()
    play.world.before = play.world.after = {"read": 0.5, "allocate": 0.6, "_write_both": 0.5}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(play.read, 0, 8)
        await trio.sleep(0.2)
        nursery.start_soon(play.hole, 1, 5)
        await trio.sleep(0.2)
        nursery.start_soon(play.write, 6)
        nursery.start_soon(play.read, 0, 8)
        await play.read(4, 8)
    await play.read()
    await play.fsync()
    await play.hole(6, 3)


@story(dirty_age=60.0)
async def a_hole_fails(play: Play) -> None:
    """The origin fails half-way, or its sync does: nothing of the range is believed."""
    await play.open()
    await play.read(0, 12)
    await play.write(0, 2)
    await play.fsync()
    play.fail("origin.allocate", 0)
    await play.hole_fails(4, 4)
    await play.read(0, 12)
    play.fail("origin.sync", 0)
    await play.hole_fails(0, 2)
    await play.read(0, 4)
    play.fail("origin.allocate", 0)
    await play.hole_fails(0, 3)
    await play.hole_fails(1, 3)
    await play.read(0, 12)
    await play.fsync_fails()


@story(dirty_age=60.0)
async def the_database_fails_and_ranges_are_freed(play: Play) -> None:
    """Its rows stay, so that what they name has to become zeros in its slots as well."""
    await play.open()
    await play.read(0, 16)
    await play.write(0, 3)
    await play.write(9)
    await play.fsync()
    await trio.sleep(0.2)
    play.fail("database")
    play.fail("origin.sync", 1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(play.hole_fails, 1, 1.5)
        nursery.start_soon(play.hole_fails, 12, 2)
    await play.read(0, 16)
    await play.hole_fails(0, 2)
    await play.hole_fails(9.5, 3)
    await play.read(0, 16)
    await play.fsync_fails()
    await play.write_fails(1)


@story(dirty_age=60.0)
async def a_sync_fails_before_that_of_a_hole(play: Play) -> None:
    """The hole is lost by it although its own sync works: what was dirty stays so (R5)."""
    await play.open()
    await play.write(0, 2)
    await play.fsync()
    play.world.failed_syncs_lose = True
    play.world.after = {"allocate": 1.0}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(play.hole_fails, 0, 2)
        await trio.sleep(0.5)
        play.fail("origin.sync", 0)
        play.image.written += 1
        play.image.guest_written = play.image.written
        await play.fsync_fails()
    await play.read(0, 4)
    await play.fsync_fails()
    await play.hole(0)
    await play.fsync()
    await play.read(0, 4)
