"""Stories: what the rules of write-back are about, one or two rules each. See ``plays``."""

import trio

from fusecache.config import WriteMode
from tests.crash.plays import Play, story

SLOW = {"~_copy": 0.7, "~sync": 0.7, "sync": 0.7, "merge": 0.7}
"""Every step of a writeback takes its time, and guests are between all of them."""


@story()
async def pages_become_dirty(play: Play) -> None:
    """Clean pages, pages that were never read and dirty pages are written, and synced (R1, R2)."""
    await play.open()
    await play.read(0, 8)
    await trio.sleep(20)
    await play.write(0)
    await play.write(3, 2)
    await play.write(13)
    await play.write(20.5)
    await play.fsync()
    await play.write(0)
    await play.fsync()
    await play.write(13, 2)
    await play.write(1.5, 0.25)


@story()
async def a_write_during_a_barrier(play: Play) -> None:
    """What changes while the device is synced is not covered by that barrier (R1)."""
    await play.open()
    await play.read(0, 4)
    await play.write(0)
    await trio.sleep(0.1)
    play.world.after = {"sync": 0.5}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(play.fsync)
        await trio.sleep(0.2)
        await play.write(0)
        await play.write(9)
        await play.fsync()


@story(dirty_age=60.0)
async def a_write_before_a_barrier_ends(play: Play) -> None:
    """The same, and the fsync comes when that barrier is over."""
    await play.open()
    await play.write(0, 2)
    play.world.after = {"sync": 0.5}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(play.fsync)
        await trio.sleep(0.2)
        await play.write(0)
    await play.fsync()


@story()
async def a_settling_page_is_written(play: Play) -> None:
    """The origin has a page, and no stable row says so yet, when it is written again (R2, R5)."""
    await play.open()
    await play.write(0, 2)
    await play.write(8, 2)
    play.world.before = play.world.after = {"sync": 0.4}
    for first in (0, 8):
        while play.cache.dirty_bytes:
            await trio.sleep(0.05)
        await trio.sleep(0.1)
        await play.write(first)
        await trio.sleep(0.3)
        await play.write(first + 0.5, 1)
        await trio.sleep(1.2)
    await play.fsync()


@story()
async def a_settling_page_is_written_in_another_mode(play: Play) -> None:
    """The same, past the cache if it were not held (R5)."""
    await play.open()
    await play.write(0, 4)
    play.world.before = play.world.after = {"sync": 0.4}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(play.set_mode, WriteMode.AROUND)
        await trio.sleep(0.1)
        while play.cache.dirty_bytes:
            await trio.sleep(0.05)
        await trio.sleep(0.1)
        await play.write(0)
        await play.write(1.5, 1)
        await play.read(0, 4)
        await play.fsync()


@story()
async def a_busy_page_is_cleaned(play: Play) -> None:
    """A page is written again and again while the cleaner is about to bring it home (R5)."""
    await play.open()
    await play.write(0, 2)
    await play.write(8, 2)
    play.world.before = play.world.after = SLOW
    for turn in range(14):
        await trio.sleep(0.4)
        await play.write(0)
        await play.write(8.5, 0.5)
        if turn % 4 == 3:
            await play.fsync()
    await trio.sleep(10)
    await play.write(1)
    await play.fsync()


@story()
async def a_page_rests_and_is_written_again(play: Play) -> None:
    """Clean, dirty, clean, dirty: rows, intents and slots at every turn (R2, R4, R5)."""
    await play.open()
    await play.read(0, 8)
    for turn in range(3):
        await play.write(2)
        await play.write(9 + turn)
        await trio.sleep(9)
    await play.fsync()
    await play.write(2)
    await trio.sleep(1.7)


@story()
async def write_back_ends(play: Play) -> None:
    """A change of mode flushes, and guests write through meanwhile and afterwards (R5)."""
    await play.open()
    await play.write(0, 3)
    await play.write(8)
    await trio.sleep(0.3)
    play.world.before = play.world.after = SLOW
    async with trio.open_nursery() as nursery:
        nursery.start_soon(play.set_mode, WriteMode.THROUGH)
        for _ in range(11):
            await trio.sleep(0.5)
            await play.write(0)
        await play.write(0, 4)
        await play.fsync()
    await play.write(1)
    await play.fsync()


@story()
async def write_back_becomes_around(play: Play) -> None:
    """The same, with writes that clear what is cached."""
    await play.open()
    await play.write(0, 3)
    play.world.before = play.world.after = SLOW
    async with trio.open_nursery() as nursery:
        nursery.start_soon(play.set_mode, WriteMode.AROUND)
        for _ in range(9):
            await trio.sleep(0.5)
            await play.write(0.5)
            await play.write(2.5)
            await play.read(0, 4)
    await play.write(0, 2)
    await play.fsync()


@story(dirty_limit=0.1, slots=20)
async def more_is_dirty_than_may_be(play: Play) -> None:
    """At the limit new pages go through, and held ones stay in the cache (R5)."""
    await play.open()
    await play.read(0, 8)
    await play.write(0)
    await play.write(8)
    await play.write(12)
    await play.fsync()
    await play.write(0, 2)
    await play.write(7, 6)
    await play.write(8)
    await play.fsync()
    await trio.sleep(4)
    await play.write(0, 2)


@story()
async def an_image_is_cut_off(play: Play) -> None:
    """Truncate: past the new end nothing comes back, before it nothing is lost (R6)."""
    await play.open()
    await play.read(0, 12)
    await play.write(1, 4)
    await play.write(6)
    await play.write(30, 6)
    await trio.sleep(0.6)
    await play.fsync()
    await play.write(9)
    await play.write(6, 1)
    await play.truncate(6.5)
    await play.write(12)
    await play.read()
    await play.fsync()


@story()
async def an_image_is_cut_off_while_it_is_cleaned(play: Play) -> None:
    """Truncate excludes a writeback that is under way (R6)."""
    await play.open()
    await play.write(0, 2)
    await play.write(8, 8)
    play.world.before = play.world.after = {"~_copy": 2.0}
    while not play.cache.core.dirty.in_writeback:
        await trio.sleep(0.1)
    await play.truncate(8)
    await play.read()
    await play.write(30)
    await play.read()
    await play.fsync()
    await trio.sleep(8)


@story()
async def an_image_is_evicted(play: Play) -> None:
    """Evict brings home what is dirty, also what is written meanwhile (P5)."""
    await play.open()
    await play.read(0, 4)
    await play.write(2, 3)
    await play.fsync()
    play.world.after = {"~_copy": 0.5, "sync": 0.5}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(play.evict)
        for _ in range(5):
            await trio.sleep(0.3)
            await play.write(2)
    await play.write(9)
    await play.close()
    await play.open()
    await play.write(2)


@story(dirty_age=60.0)
async def an_image_is_evicted_at_rest(play: Play) -> None:
    """The same when nobody has it open, and with what only the cache has."""
    await play.open()
    await play.write(2, 3)
    await play.close()
    await play.evict()
    await play.open()
    await play.read()
    await play.write(4)


@story()
async def fills_meet_writes(play: Play) -> None:
    """Readers fetch blocks in which guests write at the same moment (R7)."""
    await play.open()
    play.world.before = play.world.after = {"read": 0.5, "~_copy": 0.6, "write": 0.5}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(play.write, 1)
        await trio.sleep(0.1)
        nursery.start_soon(play.read, 0, 4)
        await trio.sleep(0.2)
        nursery.start_soon(play.write, 2)
        nursery.start_soon(play.read, 4, 8)
        await trio.sleep(0.2)
        await play.write(5, 2)
        await play.write(8, 4)
    await play.read()
    await trio.sleep(5)
    await play.read()


@story(slots=8, dirty_low=0.1)
async def slots_change_hands(play: Play) -> None:
    """Cleaned blocks leave, and their slots are used for others (R3)."""
    await play.open()
    for first in (0, 4, 0, 2):
        for block in range(first, first + 5):
            await play.write(block * 4 + 1, 2)
        await trio.sleep(4)
        await play.read()
    await play.fsync()


@story(blocks=4)
async def an_image_grows(play: Play) -> None:
    """Sizes are the origin's: it is made longer before the data of the new end is dirty."""
    await play.open()
    await play.truncate(3)
    await play.write(6)
    await play.fsync()
    play.world.before = {"extend": 6.0, "truncate": 6.0}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(play.write, 14)
        await trio.sleep(0.1)
        nursery.start_soon(play.write, 9)
    await play.read()
    await play.fsync()
    await play.fsync()
    await trio.sleep(6)
    await play.read()


@story(mode=WriteMode.THROUGH)
async def a_write_during_a_sync_of_the_origin(play: Play) -> None:
    """What is written while the origin is synced is not covered by that (R5)."""
    await play.open()
    await play.write(0)
    play.world.after = {"~sync": 1.0}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(play.fsync)
        await trio.sleep(0.3)
        await play.write(0, 2)
    await play.fsync()


@story(dirty_age=60.0)
async def write_back_ends_in_peace(play: Play) -> None:
    """A mode that is left leaves nothing dirty (P4)."""
    await play.open()
    await play.write(0, 3)
    await play.set_mode(WriteMode.THROUGH)
    assert not play.cache.dirty_bytes, "dirty in write-through"
    await play.write(1)


@story(dirty_age=60.0)
async def an_image_is_removed(play: Play) -> None:
    """Of its data nothing stays, in the cache or in the database (R6)."""
    await play.open()
    await play.write(0, 3)
    await play.close()
    await play.remove()
    await trio.sleep(1)
    await play.open()
    await play.write(0, 3)
    await play.read()


@story(mode=WriteMode.THROUGH, slots=8)
async def fills_need_slots(play: Play) -> None:
    """Blocks leave while the barrier that forgets them takes long (R3)."""
    await play.open()
    await play.read(0, 16)
    await trio.sleep(6)
    play.world.before = {"sync": 3.0}
    for _ in range(3):
        await play.read(16)
        await play.read(0, 16)
        await trio.sleep(0.5)


async def _until_written_back(play: Play) -> None:
    before = play.world.faults.calls.get("origin.write", 0)
    while play.world.faults.calls.get("origin.write", 0) == before:
        await trio.sleep(0.1)


@story()
async def a_page_is_written_while_it_is_cleaned(play: Play) -> None:
    """What the origin was given is old by then: the page stays dirty (R5)."""
    await play.open()
    await play.write(0, 2)
    await play.write(4)
    play.world.before = play.world.after = {"~_copy": 1.0}
    await _until_written_back(play)
    await play.write(0)
    await trio.sleep(6)
    await play.write(4)
    await _until_written_back(play)
    await play.write(3, 2)
    await trio.sleep(0.5)
    await play.fsync()
    await trio.sleep(10)
    await play.evict()
    await play.read()


@story(dirty_age=60.0, dirty_limit=0.9)
async def a_slot_is_written_to_when_it_is_cleaned(play: Play) -> None:
    """A long write has pages in hand whose data comes later: they are not taken (R5)."""
    await play.open()
    await play.write(0, 36)
    play.world.before = {"_write_all": 4.0}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(play.write, 0, 36)
        await trio.sleep(0.5)
        await play.flush()
    await trio.sleep(3)
    await play.evict()
    await play.read()


@story(dirty_age=60.0)
async def two_guests_write_one_page(play: Play) -> None:
    """A page whose row is not committed yet is not simply written again (R2)."""
    await play.open()
    await play.read(0, 8)
    await trio.sleep(8)
    play.world.before = {"~commit": 0.5}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(play.write, 1, 0.5)
        await trio.sleep(0.1)
        await play.write(1.5, 0.5)
