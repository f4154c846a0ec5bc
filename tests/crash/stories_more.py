"""Stories of recovery, of write intents, and of an origin or a database that fails."""

import trio

from fusecache.config import WriteMode
from tests.crash.plays import Play, story


@story()
async def origin_syncs_fail(play: Play) -> None:
    """A failed sync of the origin drops what was written before it, also for the cleaner (R5)."""
    await play.open()
    await play.write(0, 3)
    play.world.failed_syncs_lose = True
    play.world.after = {"~_copy": 0.8}
    while "origin.write" not in play.world.faults.calls:
        await trio.sleep(0.1)
    play.fail("origin.sync", 0)
    await play.fsync_fails()
    play.image.written += 1
    await play.fsync_fails()
    await trio.sleep(6)
    await play.evict()
    await play.read()


@story()
async def the_cleaner_fails(play: Play) -> None:
    """Writebacks fail, now and then; what did not get home stays dirty (R5)."""
    await play.open()
    await play.write(0, 3)
    await play.write(8, 2)
    play.fail("origin.write", 1, 3)
    play.fail("origin.sync", 0)
    await trio.sleep(12)
    await play.write(0)
    await play.evict()
    await play.read()


async def _dirty_and_clean(play: Play) -> None:
    await play.open()
    await play.read(0, 12)
    await play.write(0, 2)
    await play.write(20, 3)
    await play.fsync()
    await play.write(1)
    await play.write(25)


@story((_dirty_and_clean, "kill"), dirty_age=60.0)
async def a_killed_daemon_is_followed(play: Play) -> None:
    """Recovery after a kill, cut and run again; dirty pages go on being dirty."""
    await play.recovered()
    await play.open()
    await play.write(1)
    await play.write(21)
    await play.fsync()
    await play.write(5)


@story((_dirty_and_clean, "ooo"), dirty_age=60.0)
async def a_cut_host_comes_back(play: Play) -> None:
    """The same after a power cut."""
    await play.recovered()
    await play.open()
    await play.write(1)
    await play.write(21)
    await play.write(5)


@story((_dirty_and_clean, "oon"), dirty_age=60.0)
async def a_cut_host_comes_back_with_late_rows(play: Play) -> None:
    """Rows of which the device has no data are there, and are never believed."""
    await play.recovered()
    await play.open()
    await play.write(1)


@story((_dirty_and_clean, "clean"), dirty_age=60.0)
async def a_stopped_daemon_comes_back(play: Play) -> None:
    """The same after a clean stop that kept what was dirty."""
    await play.recovered()
    await play.open()
    await play.write(1)
    await play.write(5)


async def _through(play: Play) -> None:
    await play.open()
    await play.read(0, 12)
    await trio.sleep(20)
    await play.write(1)
    await trio.sleep(2)
    await play.write(5)


@story((_through, "ooo"), mode=WriteMode.THROUGH)
async def a_written_region_comes_back(play: Play) -> None:
    """Clean pages of regions that were written to are not believed (R4)."""
    await play.recovered()
    await play.open()
    await play.write(1)
    await play.read()


async def _cut_off_and_killed(play: Play) -> None:
    await play.open()
    await play.write(1, 4)
    await play.write(30, 3)
    await play.fsync()
    play.world.after = {"truncate": 30.0}
    size = 2 * 8 + 3
    play.model.begin_truncate(size * 512)
    with trio.move_on_after(0.5):
        await play.cache.truncate(play.image, size * 512)


@story((_cut_off_and_killed, "kill"), dirty_age=60.0)
async def a_shorter_image_is_adopted(play: Play) -> None:
    """A truncate of the last life may not be stable, nor its rows: what it cut off is gone."""
    await play.recovered()
    await play.open()
    await play.write(12)
    await play.read()
    await play.write(1)


async def _shortened_by_others(play: Play) -> None:
    await play.open()
    await play.write(1, 4)
    await play.fsync()
    size = (2 * 8 + 3) * 512
    play.model.begin_truncate(size)
    file = play.world.files[1]
    file.shorten(size)
    file.make_stable()
    play.model.end_truncate(size)


@story((_shortened_by_others, "kill"), dirty_age=60.0)
async def an_image_that_others_cut_off_is_adopted(play: Play) -> None:
    """What is dirty is kept, but not past the end, and not in the last page past it."""
    await play.recovered()
    await play.open()
    await play.write(12)
    await play.read()


@story()
async def the_database_fails(play: Play) -> None:
    """Writes go past the cache, and held pages are written in both places (failure table)."""
    await play.open()
    await play.read(0, 16)
    await play.write(0, 2)
    await play.write(9)
    await play.fsync()
    await trio.sleep(0.2)
    play.fail("database")
    play.fail("origin.sync", 0, 1)
    play.world.before = {"~fence": 0.3, "~sync": 0.7}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(play.write_fails, 4)
        nursery.start_soon(play.write_fails, 8)
        for _ in range(6):
            await trio.sleep(0.2)
            await play.write_fails(0)
            await play.read(0, 12)
    await play.fsync_fails()
    await play.write_fails(0)
    await play.write_fails(8, 2)
    await trio.sleep(3.5)


@story(mode=WriteMode.THROUGH)
async def the_database_fails_with_clean_pages(play: Play) -> None:
    """What is cached is older than the origin then."""
    await play.open()
    await play.read(0, 16)
    await trio.sleep(6)
    play.fail("database")
    await play.write_fails(4)
    await play.write_fails(0)
    await play.read(0, 12)
    await play.fsync_fails()


@story(whole_image_after=0)
async def one_row_stands_for_the_image(play: Play) -> None:
    """The whole-image row goes only when nothing is written anywhere (R4)."""
    await play.open()
    await play.read(0, 8)
    await trio.sleep(20)
    await play.write(0)
    await play.write(4)
    await trio.sleep(1)
    play.world.after = {"sync": 1.5, "~sync": 0.5}
    for page in (1, 5, 2, 6, 3, 7, 1, 5):
        await trio.sleep(2.1)
        await play.write(page)
    await play.fsync()
    await trio.sleep(4)


@story((_through, "kill"), mode=WriteMode.THROUGH)
async def a_killed_daemon_left_the_origin_unsynced(play: Play) -> None:
    """The first fsync of a life covers what the last one wrote."""
    await play.recovered()
    await play.open()
    await play.fsync()


@story(mode=WriteMode.THROUGH)
async def a_quiet_region_is_written_through(play: Play) -> None:
    """A region becomes active, quiet, and active again (R4)."""
    await play.open()
    await play.read(0, 16)
    await trio.sleep(20)
    await play.write(0, 2)
    await trio.sleep(2.2)
    await play.write(1, 2)
    await trio.sleep(8)
    await play.write(5)
    await play.fsync()


@story(mode=WriteMode.AROUND)
async def a_quiet_region_is_written_around(play: Play) -> None:
    """The same, and the pages are no longer valid."""
    await play.open()
    await play.read(0, 16)
    await trio.sleep(20)
    await play.write(0.5, 2)
    await play.read(0, 4)
    await trio.sleep(2.2)
    await play.write(1, 2)
    await play.fsync()


@story(mode=WriteMode.THROUGH, barrier_interval=600.0)
async def a_row_is_removed_in_time(play: Play) -> None:
    """No other barrier makes stable what the row of a region stood for (R4)."""
    await play.open()
    await play.read(0, 8)
    await trio.sleep(0.1)  # a read is answered before its blocks are stored
    await play.cache.committer.barrier()
    await trio.sleep(1)
    await play.write(1)
    await play.close()
    await trio.sleep(8)


async def _removed_while_written(play: Play) -> None:
    await play.open()
    await play.read(0, 8)
    await trio.sleep(0.1)  # a read is answered before its blocks are stored
    await play.cache.committer.barrier()
    await trio.sleep(1)
    await play.write(1)
    await trio.sleep(1.5)
    play.world.after = {"sync": 4.0}
    await trio.sleep(2.5)
    await play.write(2)
    await play.close()
    await trio.sleep(6)


@story(mode=WriteMode.THROUGH, barrier_interval=600.0)
async def a_row_is_removed_while_its_region_is_written(play: Play) -> None:
    """The row of a region goes only if no write began meanwhile (R4)."""
    await _removed_while_written(play)


@story(mode=WriteMode.THROUGH, barrier_interval=600.0, whole_image_after=0)
async def a_whole_row_is_removed_while_its_image_is_written(play: Play) -> None:
    """The same with the row of the whole image."""
    await _removed_while_written(play)


@story(mode=WriteMode.BACK, barrier_interval=600.0, dirty_age=60.0)
async def a_row_is_removed_while_clean_pages_become_dirty(play: Play) -> None:
    """The same in write-back."""
    await _removed_while_written(play)


@story()
async def another_host_goes_on(play: Play) -> None:
    """Nothing is dirty here and the lock is free: what another host writes then stays (R5, P8)."""
    await play.open()
    await play.write(0, 2)
    await play.close()
    while play.cache.dirty_bytes or play.cache.core.dirty.any_held or play.image.origin.locked:
        await trio.sleep(0.1)
    await trio.sleep(4)  # else a killed daemon's successor takes the change for our own (P3)
    play.others_write(0)


@story(dirty_age=60.0)
async def another_host_goes_on_at_once(play: Play) -> None:
    """What it writes as soon as the lock is free is not taken for our own (P3, P8)."""
    await play.open()
    await play.read(0, 8)
    await play.write(0)
    await play.flush()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(play.close)
        await _others_write(play)


@story(dirty_age=60.0)
async def another_host_waits_while_pages_settle(play: Play) -> None:
    """Dirty rows are stable still: were the lock free, they would come back over it (R5, P8)."""
    await play.open()
    await play.write(0, 2)
    await play.fsync()
    play.world.before = {"sync": 0.5}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(play.flush)
        while play.cache.dirty_bytes:
            await trio.sleep(0.1)
        await play.close()
        await _others_write(play)


async def _others_write(play: Play) -> None:
    """Another host waits for the lock, writes two pages and syncs them; nothing happens after."""
    while play.image.origin.locked:
        await trio.sleep(0.01)
    play.others_write(0, 2)
    play.world.cut_at = play.world.steps


@story()
async def a_sync_of_the_origin_fails_while_pages_settle(play: Play) -> None:
    """What is clean is not believed any more; what settles is held (R5)."""
    await play.open()
    await play.write(0, 2)
    await trio.sleep(1)
    play.world.before = play.world.after = {"sync": 0.5}
    while play.cache.dirty_bytes:
        await trio.sleep(0.1)
    assert play.cache.core.dirty.any_held
    play.fail("origin.sync", 0)
    play.image.written += 1
    play.image.guest_written = play.image.written
    await play.fsync_fails()
    await trio.sleep(4)
    await play.read()


@story(dirty_limit=0.05)
async def storing_pauses_at_the_limit(play: Play) -> None:
    """Nothing new is stored, and what is held is written in its slot all the same (R5)."""
    await play.open()
    await play.write(0, 2)
    play.fail("device.write", 0)
    await play.read(8, 4)
    await trio.sleep(0.1)
    await play.write(1, 2)
    await play.read(0, 4)
    await play.fsync()
