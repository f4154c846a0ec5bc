"""Stories of what the lane does without the engine."""

import trio

from tests.crash.plays import Play, story
from tests.support import lane


@story(dirty_age=60.0, barrier_interval=600.0)
async def what_the_lane_overwrote_is_stable_after_an_fsync(play: Play) -> None:
    """No row changes, and yet the next fsync has something to do (R1)."""
    lane.admit(play.cache)
    await play.open()
    await play.write(0, 4)
    await play.fsync()
    await play.overwrite(1, 2)
    await play.fsync()
    await play.overwrite(1.5, 0.5)
    await play.read(0, 8)
    await play.fsync()


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
