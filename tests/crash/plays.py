"""Plays: short scripts for one image, cut at every step and in every way, and judged by the model.

A story says what a guest and others do; a ``Cut`` at some step ends it, by a kill or by a power
cut that leaves the old or the new version of each medium. Then everything is read, grown, cut
again, brought home by the cleaner alone and evicted; whatever P1 and P2 do not allow is seen.
"""

import random
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import trio
import trio.testing

from fusecache.config import WriteMode
from fusecache.engine.block_cache import BlockCache
from fusecache.engine.image import Image
from fusecache.errors import FusecacheError
from fusecache.store.syscalls import FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE, FALLOC_ZERO_RANGE
from tests.support import lane
from tests.support.model import ImageModel
from tests.support.stamps import STAMP, stamped
from tests.support.world import PAGE, Cut, World, order_follows

IN_PAGE = PAGE // STAMP
PAGES = 4
"""Pages in a block."""
BLOCKS = 10
PUNCH = FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE
ZERO = FALLOC_ZERO_RANGE | FALLOC_KEEP_SIZE
LONG = 600.0
"""Seconds after which a life that does not end has hung."""

Stop = str
"""``kill``, or which version, old or new, each of device, origin and database has after a power
cut (``p``: all but the last commit); with a ``+``, everything is evicted at once after it was read.
"""
STOPS: tuple[Stop, ...] = ("kill", "kill+", *("".join(p) for p in product("on", repeat=3)))
STOPS = (*STOPS, "ooo+", "noo+", "non+", "nno+", "nop", "nop+", "oon+", "onn+")
_VERSIONS = {"o": 0, "n": -1, "p": -2}


class Play:
    """One image, its model, and a world around them."""

    cache: BlockCache
    image: Image

    def __init__(self, directory: Path, story: "Story") -> None:
        self.world = World(directory, 0, slots=story.slots, block_size=PAGES * PAGE)
        self.world.write_mode = story.mode
        tuning: dict[str, Any] = {"dirty_age": 2.0, **story.tuning}
        self.world.tuning = replace(self.world.tuning, **tuning)
        self.pages = story.blocks * PAGES
        self._new_file(1)
        self.removed = False
        self.killed = True
        """No power was cut since the model knew what there is."""

    def _new_file(self, number: int) -> None:
        size = self.pages * PAGE
        self.world.make_file(number, stamped(number, 0, size, 1))
        self.number, self.model = number, ImageModel(number, size // STAMP, size, 1)

    # -- what a story says -------------------------------------------------------------------------

    async def open(self, *, write: bool = True) -> None:
        """Opens the image; one handle at a time."""
        number = self.number
        self.image = await self.cache.open(b"id%d" % number, b"img", number, write=write)

    async def close(self, *, write: bool = True) -> None:
        """Closes it."""
        await self.cache.close(self.image, write=write)

    async def write(self, page: float, pages: float = 1) -> None:
        """Writes; eighths of a page are sectors."""
        first, count = int(page * IN_PAGE), int(pages * IN_PAGE)
        data = self.model.begin_write(first, count)
        await self.cache.write(self.image, first * STAMP, data)
        self.model.end_write(first, count)

    async def overwrite(self, page: float, pages: float = 1) -> None:
        """The lane writes over pages, all of which must be dirty; see ``tests/support/lane.py``."""
        first, count = int(page * IN_PAGE), int(pages * IN_PAGE)
        data = self.model.begin_write(first, count)
        assert lane.overwrite(self.cache, self.image, first * STAMP, data)
        self.model.end_write(first, count)

    async def write_together(self, *pages: int) -> None:
        """Writes that came as requests of their own, all of which must need no wait."""
        written = [
            (self.image, page * PAGE, self.model.begin_write(page * IN_PAGE, IN_PAGE))
            for page in pages
        ]
        assert all(self.cache.write_at_once(written))
        for page in pages:
            self.model.end_write(page * IN_PAGE, IN_PAGE)

    async def write_together_fails(self, page: int) -> None:
        """One such write that is not done at once."""
        data = self.model.begin_write(page * IN_PAGE, IN_PAGE)
        assert self.cache.write_at_once([(self.image, page * PAGE, data)]) == [False]

    async def write_fails(self, page: float, pages: float = 1) -> None:
        """Writes, and it does not matter whether that works."""
        first, count = int(page * IN_PAGE), int(pages * IN_PAGE)
        data = self.model.begin_write(first, count)
        try:
            await self.cache.write(self.image, first * STAMP, data)
        except FusecacheError:
            return
        self.model.end_write(first, count)

    async def read(self, page: int = 0, pages: int | None = None) -> None:
        """Reads, to the end unless told otherwise."""
        oldest = self.model.begin_read()
        length = (self.pages - page if pages is None else pages) * PAGE
        data = await self.cache.read(self.image, page * PAGE, length)
        self.model.check_read(page * IN_PAGE, data, oldest)

    async def fsync(self) -> None:
        """A guest's fsync."""
        covered = self.model.begin_fsync()
        await self.cache.fsync(self.image, metadata=True)
        self.model.end_fsync(covered)

    async def fsync_by_lane(self, *, surely: bool = False) -> None:
        """A guest's fsync, of which the lane does what it may; ``surely`` all of it."""
        covered = self.model.begin_fsync()
        done = await lane.fsync(self.cache, self.image, metadata=True)
        assert done or not surely
        self.model.end_fsync(covered)

    async def fsync_fails(self) -> None:
        """An fsync, and it does not matter whether that works."""
        covered = self.model.begin_fsync()
        try:
            await self.cache.fsync(self.image, metadata=True)
        except FusecacheError:
            return
        self.model.end_fsync(covered)

    async def truncate(self, page: float) -> None:
        """Cuts the image off."""
        size = int(page * IN_PAGE)
        self.model.begin_truncate(size * STAMP)
        await self.cache.truncate(self.image, size * STAMP)
        self.model.end_truncate(size * STAMP)

    async def hole(self, page: float, pages: float = 1, *, mode: int = PUNCH) -> None:
        """Frees a range, or sets it to zeros."""
        first, count = int(page * IN_PAGE), int(pages * IN_PAGE)
        self.model.begin_hole(first, count)
        await self.cache.allocate(self.image, mode, first * STAMP, count * STAMP)
        self.model.end_write(first, count)

    async def hole_fails(self, page: float, pages: float = 1, *, mode: int = PUNCH) -> None:
        """The same, and it does not matter whether that works."""
        first, count = int(page * IN_PAGE), int(pages * IN_PAGE)
        self.model.begin_hole(first, count)
        try:
            await self.cache.allocate(self.image, mode, first * STAMP, count * STAMP)
        except FusecacheError:
            return
        self.model.end_write(first, count)

    async def evict(self) -> None:
        """An operator's evict: all is on the origin and synced, and no block is left (P5)."""
        covered = self.model.begin_fsync()
        await self.cache.evict(self.image, self.number)
        self.model.end_fsync(covered)
        assert self.cache.core.usage(self.image.id).blocks == 0

    async def flush(self) -> None:
        """An operator's flush."""
        covered = self.model.begin_fsync()
        await self.cache.flush(self.image, self.number)
        self.model.end_fsync(covered)

    def others_write(self, page: float, pages: float = 1) -> None:
        """Another host writes past all this, and syncs."""
        first, count = int(page * IN_PAGE), int(pages * IN_PAGE)
        data = self.model.begin_write(first, count)
        self.world.change_outside(self.number, first * STAMP, data)
        self.model.end_write(first, count)
        self.model.end_fsync(self.model.begin_fsync())

    async def set_mode(self, mode: WriteMode | None) -> None:
        """Another write mode."""
        await self.cache.set_write_mode(self.image, mode)

    async def remove(self) -> None:
        """Removes the image; another one has its name then."""
        async with self.cache.removing(b"id%d" % self.number) as removal:
            del self.world.files[self.number]
            if removal is not None:
                removal.happened = True
            self._new_file(self.number + 1)
        self.removed = True

    def fail(self, kind: str, *numbers: int) -> None:
        """The next calls of a kind, by their place from now on, will fail; all if none is named."""
        faults = self.world.faults
        begun, before = faults.calls.get(kind, 0), faults.fail

        def fail(asked: str, number: int) -> bool:
            chosen = asked == kind and (not numbers or number - begun in numbers)
            return chosen or before(asked, number)

        faults.fail = fail

    def heal(self) -> None:
        """Nothing fails any more."""
        self.world.faults.fail = lambda kind, number: False

    # -- lives -------------------------------------------------------------------------------------

    def life(self, story: Callable[["Play"], Awaitable[None]], *, clean: bool = False) -> bool:
        """One life of the engine; True if it was cut, also if that was at its end."""
        order_follows(1)  # the same every time
        ended = [0.0]

        async def run() -> None:
            try:
                with trio.fail_after(LONG):
                    async with self.world.open() as self.cache:
                        await story(self)
                        self.cache.core.check()
                        if not clean:
                            raise Cut
            finally:
                ended[0] = trio.current_time()

        try:
            trio.run(run, clock=trio.testing.MockClock(autojump_threshold=0))
        except (Cut, BaseExceptionGroup) as exc:
            if isinstance(exc, BaseExceptionGroup):
                # Whoever waited for what was cut sees an error, as guests of a dying host do.
                cut, rest = exc.split((Cut, FusecacheError))
                if rest is not None or cut is None or cut.subgroup(Cut) is None:
                    raise
            return True
        finally:
            self.world.clock_base += ended[0] + 100
        return False

    def stop(self, stop: Stop) -> None:
        """What ends a life that was cut."""
        self.heal()
        self.killed = self.killed and stop.startswith("kill")
        self.world.before, self.world.after = {}, {}
        stop = stop.removesuffix("+")
        if stop == "kill":
            self.world.kill()
        else:
            device, origin, database = (_VERSIONS[version] for version in stop)
            self.world.cut_exactly(device=device, origin=origin, database=database)

    def look(self, *, evict: bool) -> None:
        """Everything is read, cut, and read again: twice, the second time after an eviction."""
        if evict:
            self.life(Play._settle_and_evict)
            self.world.kill()
            return
        self.life(Play._settle)
        self.stop("ooo")
        self.life(Play.recovered)
        self.stop("ooo")
        self.life(Play._bring_home)
        self.world.kill()

    async def _everything(self) -> bytes:
        return await self.cache.read(self.image, 0, self.pages * PAGE)

    async def recovered(self) -> None:
        """What there is after a recovery is allowed, and from now on all there is."""
        await self.open(write=False)
        self.model.settle(await self._everything(), killed=self.killed)
        self.killed = True
        self.model.check_settled(await self._everything())
        await self.close(write=False)

    async def _settle(self) -> None:
        await self.recovered()
        await self.open()
        await self.write(self.pages - 1)  # what was cut off must not come back by that
        await self.read()

    async def _settle_and_evict(self) -> None:
        await self.recovered()
        await self._evicted()

    async def _bring_home(self) -> None:
        await trio.sleep(30)  # nobody opens it; the cleaner does
        await self.open(write=False)
        self.model.check_settled(await self._everything())
        await self.close(write=False)
        await self._evicted()

    async def _evicted(self) -> None:
        await self.evict()
        await self.open(write=False)
        self.model.check_settled(await self._everything())
        await self.close(write=False)
        assert not (self.removed and self.cache.dirty_bytes), "a removed image is dirty"


Act = tuple[Callable[[Play], Awaitable[None]], Stop]


@dataclass(frozen=True)
class Story:
    """What happens in the life that is cut, what happened in earlier lives, and in which world."""

    name: str
    tell: Callable[[Play], Awaitable[None]]
    before: tuple[Act, ...]
    slots: int
    blocks: int
    mode: WriteMode
    tuning: dict[str, float]


STORIES: dict[str, Story] = {}


def story(
    *before: Act,
    slots: int = 16,
    blocks: int = BLOCKS,
    mode: WriteMode = WriteMode.BACK,
    **tuning: float,
) -> Callable[[Callable[[Play], Awaitable[None]]], Callable[[Play], Awaitable[None]]]:
    """Registers a story under its function's name."""

    def register(tell: Callable[[Play], Awaitable[None]]) -> Callable[[Play], Awaitable[None]]:
        STORIES[tell.__name__] = Story(tell.__name__, tell, before, slots, blocks, mode, tuning)
        return tell

    return register


Case = tuple[str, int | None, Stop]
"""A story, after how many steps it is cut (None: at its end), and how."""


def play(directory: Path, case: Case) -> int:
    """Plays one case; returns how many steps the life took that was to be cut."""
    told = STORIES[case[0]]
    directory.mkdir(parents=True, exist_ok=True)
    it = Play(directory, told)
    try:
        for tell, stop in told.before:
            it.life(tell, clean=stop == "clean")
            it.stop("kill" if stop == "clean" else stop)
        began = it.world.steps
        it.world.cut_at = None if case[1] is None else began + case[1]
        it.life(told.tell)
        took = it.world.steps - began
        it.stop(case[2])
        it.look(evict=case[2].endswith("+"))
    except BaseException as exc:
        exc.add_note(f"case {case!r}")
        raise
    finally:
        it.world.kill()
    return took


def cases(name: str, steps: int, count: int | None = None) -> Iterator[Case]:
    """Every case of a story that takes so many steps, or ``count`` of them, spread over all."""
    everything = [(name, step, stop) for step in (*range(steps), None) for stop in STOPS]
    if count is not None and count < len(everything):
        everything = random.Random(name).sample(everything, count)
    yield from everything
