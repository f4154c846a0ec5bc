"""Stories of what the lane does without the engine."""

import trio

from tests.crash.plays import Play, story
from tests.support import lane


async def _synced(play: Play, *, cached: bool = False) -> None:
    """An image whose first block is dirty and stable; all others are clean, or not cached."""
    lane.admit(play.cache)
    await play.open()
    if cached:
        await play.read()
    await play.write(0, 4)
    await play.fsync()


@story(dirty_age=60.0, barrier_interval=600.0)
async def what_the_lane_overwrote_is_stable_after_an_fsync(play: Play) -> None:
    """No row changes, and yet the next fsync has something to do (R1)."""
    await _synced(play)
    await play.overwrite(1, 2)
    await play.fsync()
    await play.overwrite(1.5, 0.5)
    await play.read(0, 8)
    await play.fsync()


@story(dirty_age=60.0, barrier_interval=600.0)
async def the_lane_fsyncs_what_it_has_overwritten(play: Play) -> None:
    """No row has changed since the last fsync, so that a sync of the device is all (R1)."""
    await _synced(play)
    await play.overwrite(1, 2)
    await play.fsync_by_lane(surely=True)
    await play.overwrite(1.5, 0.5)
    await play.fsync_by_lane(surely=True)
    await play.read(0, 8)


@story(dirty_age=60.0, barrier_interval=600.0)
async def rows_change_between_fsyncs(play: Play) -> None:
    """Then the next one is not the lane's, and the one after it is again."""
    await _synced(play, cached=True)
    await play.overwrite(0)
    await play.fsync_by_lane(surely=True)
    await play.write(6)
    await play.overwrite(6)
    await play.fsync_by_lane()
    await play.overwrite(6)
    await play.fsync_by_lane(surely=True)
    await play.write(8, 0.5)
    await play.fsync_by_lane()
    await play.hole(0, 2)
    await play.fsync_by_lane()


@story(dirty_age=60.0, barrier_interval=600.0)
async def rows_change_during_an_fsync(play: Play) -> None:
    """The barrier may have missed them: the next fsync is not the lane's."""
    lane.admit(play.cache)
    await play.open()
    await play.read()
    await play.write(0, 4)
    play.world.after["sync"] = 1.0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(play.fsync)
        await trio.sleep(0.5)
        await play.write(6)
        await play.overwrite(6)
    await play.fsync_by_lane()


@story(dirty_age=60.0, barrier_interval=600.0, dirty_limit=0.1, slots=20)
async def writes_go_past_the_cache_between_fsyncs(play: Play) -> None:
    """There is no room for more that is dirty: the origin has to be synced."""
    await _synced(play)
    await play.fsync_by_lane(surely=True)
    for page in range(4, 24, 4):
        await play.write(page, 4)
        await play.overwrite(0)
        await play.fsync_by_lane()
    await play.fsync_by_lane(surely=True)


@story(dirty_age=60.0, barrier_interval=600.0, dirty_limit=0.1, slots=20)
async def a_write_goes_past_the_cache_during_an_fsync(play: Play) -> None:
    """The origin's sync may have missed it."""
    lane.admit(play.cache)
    await play.open()
    await play.write(0, 4)
    await play.write(4, 4)
    await play.write(8, 4)
    play.world.after["~sync"] = 3.0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(play.fsync)
        await trio.sleep(1)
        play.world.after = {}
        await play.write(12, 4)
        await play.cache.committer.barrier()
    await play.fsync_by_lane()


@story(dirty_age=60.0, barrier_interval=600.0)
async def a_write_fails_after_its_row_was_committed(play: Play) -> None:
    """The page is dirty then, the lane writes to it, and its row is not stable yet."""
    await _synced(play, cached=True)
    play.fail("device.write", 0)
    async with trio.open_nursery() as nursery, play.image.cleaning:
        nursery.start_soon(play.write, 5, 0.5)  # to let go of the page it waits for this
        await trio.sleep(0.2)
        await play.overwrite(5.5, 0.5)
        await play.fsync_by_lane()


@story(dirty_age=60.0, barrier_interval=600.0, commits_in_place=True)
async def a_write_at_once_fails_after_its_row_was_committed(play: Play) -> None:
    """The same without a wait."""
    await _synced(play, cached=True)
    play.fail("device.write", 0)
    await play.write_together_fails(5)
    await play.overwrite(5, 1)
    await play.fsync_by_lane()


@story(dirty_age=60.0, barrier_interval=600.0)
async def the_image_grows_between_fsyncs(play: Play) -> None:
    """Its new size is the origin's."""
    lane.admit(play.cache)
    await play.open()
    await play.truncate(play.pages - 8)
    await play.write(0, 4)
    await play.fsync()
    await play.overwrite(0)
    await play.fsync_by_lane(surely=True)
    await play.write(play.pages - 8, 2)
    await play.fsync_by_lane()


@story(dirty_age=2.0)
async def the_lane_overwrites_what_is_being_written_back(play: Play) -> None:
    """What was taken by a writeback and written again since stays dirty (R5)."""
    lane.admit(play.cache)
    await play.open()
    await play.write(0, 8)
    for _ in range(40):
        await trio.sleep(0.2)
        if not play.cache.core.dirty.mask(play.image.id, 0) & 1:
            await play.write(0)
        await play.overwrite(0)
    await play.fsync()
    await play.flush()


@story(dirty_age=60.0, barrier_interval=600.0, commits_in_place=True)
async def writes_come_together(play: Play) -> None:
    """Their rows share a commit, which comes before all their data (R2)."""
    await play.open()
    await play.read()
    await play.write(0)
    await play.write_together(1, 5, 2, 9)
    await play.write_together(3, 4)
    await play.fsync()
    await play.write_together(6, 7, 8)
