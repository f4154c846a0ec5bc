"""Fail the N-th call of each kind, for all N: no wrong byte, no hang, and the cache loads again."""

import dataclasses
import random
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from pathlib import Path

import pytest
import trio

from fusecache.config import WriteMode
from fusecache.engine.block_cache import BlockCache
from fusecache.errors import FusecacheError
from fusecache.store.syscalls import FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE, FALLOC_ZERO_RANGE
from tests.engine.conftest import BLOCK, BLOCKS
from tests.engine.lossy import Guest
from tests.support.model import ImageModel
from tests.support.stamps import STAMP, stamped
from tests.support.world import World

PUNCH = FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE
ZERO = FALLOC_ZERO_RANGE | FALLOC_KEEP_SIZE
SECTORS = (BLOCKS + 2) * BLOCK // STAMP
KINDS = (
    "origin.stat",
    "origin.read",
    "origin.write",
    "origin.sync",
    "origin.truncate",
    "origin.allocate",
    "device.read",
    "device.write",
    "device.sync",
    "database",
)
OFTEN = ("origin.sync", "device.write", "device.sync", "database")
"""What a write-back cache relies on: more of these calls are tried."""


class _Killed(Exception):
    """The daemon ends here, without a word to anybody."""


class _Fixed:
    """A fixed piece of work in which every call may fail; what failed has not happened for sure.

    Two guests: the first does what a guest can do, and in write-back is dirty while it does; the
    second is written through and stays clean all the time.
    """

    def __init__(self, mode: WriteMode, kind: str, seed: int) -> None:
        self.mode = mode
        works = not kind.startswith("origin")
        self.busy, self.clean = (
            Guest(
                number,
                ImageModel(number, SECTORS, BLOCKS * BLOCK, 1),
                unharmed=works and (number == 2 or mode is not WriteMode.BACK),
                unread=kind == "device.read",
            )
            for number in (1, 2)
        )
        self.version = 0

    async def first_life(self, cache: BlockCache) -> None:
        """Ends without a stop, with dirty data."""
        if not await self._begin(cache):
            return
        busy = self.busy
        for part in (
            self.pages,
            self.ends,
            self.by_the_clock,
            self.holes,
            self.modes,
            self.truncated,
        ):
            await part()
            await self._beside()
        await busy.write(3, 2)
        await busy.fsync()
        await busy.write(40, 20)
        await self._beside()
        cache.core.check()
        assert not cache.state.counters.unexpected
        raise _Killed

    async def second_life(self, cache: BlockCache) -> None:
        """With what the first left; ends in a clean stop."""
        if not await self._begin(cache):
            return
        busy = self.busy
        await busy.read(0, 64)
        await busy.write(4, 1)
        await busy.flush()
        await busy.write(8, 60)
        await busy.fsync()
        await self._beside()
        await busy.evict()
        await busy.write(9, 3)
        await busy.read(0, 80)
        await busy.close()
        if await busy.open(cache):
            await busy.write(10, 30)
            await busy.fsync()
            await busy.write(30, 12)
            await busy.read(0, 64)
            await busy.evict(discard_dirty=True)
            await busy.read(0, 64)
            await busy.close()
        if await busy.open(cache):
            await busy.write(16, 16)
            await busy.fsync()
            await busy.write(20, 1)
            await self._beside()
            await busy.close()
        await trio.sleep(2)
        await self.clean.close()
        cache.core.check()
        assert not cache.state.counters.unexpected

    async def _begin(self, cache: BlockCache) -> bool:
        opened = await self.clean.open(cache)
        if opened and self.mode is WriteMode.BACK:
            await self.clean.set_write_mode(WriteMode.THROUGH)
        return opened and await self.busy.open(cache)

    async def _beside(self) -> None:
        """What the other guest does meanwhile, and a look at all that the first one wrote."""
        clean = self.clean
        self.version += 7
        first = self.version % 60
        await clean.read(first, 12)
        await clean.write(first + 3, 4)
        await clean.read(first, 12)
        await clean.write(64 + first, 1)
        await clean.fsync()
        await self.busy.read(0, 130)
        await self.busy.read(190, 60)
        await self.busy.read(370, 50)

    async def pages(self) -> None:
        """Parts of pages that are not cached, clean and dirty ones; the same ones again."""
        busy = self.busy
        await busy.write(3, 2)
        await busy.fsync()
        await busy.read(32, 32)
        await busy.write(34, 10)
        await busy.write(36, 4)
        await busy.fsync()
        await busy.write(36, 4)
        await busy.write(0, 8)
        await self._beside()
        await busy.flush()
        await busy.write(34, 10)
        await busy.fsync()

    async def ends(self) -> None:
        """The file grows, twice in the same page."""
        busy = self.busy
        await busy.write(380, 9)
        await busy.write(391, 7)
        await busy.read(376, 40)
        await busy.fsync()

    async def by_the_clock(self) -> None:
        """Whole blocks, written back by the clock, and written again."""
        busy = self.busy
        await busy.write(64, 64)
        await busy.write(200, 40)
        await trio.sleep(5)
        await busy.write(60, 30)
        await trio.sleep(2)

    async def holes(self) -> None:
        """Of what is clean, dirty and not cached; whole pages and parts."""
        busy = self.busy
        await busy.write(128, 24)
        await busy.hole(60, 30, ZERO)
        await busy.hole(136, 12, PUNCH)
        await busy.fsync()
        await busy.hole(126, 4, PUNCH)
        await self.clean.hole(32, 16, PUNCH)
        await self.clean.read(24, 32)
        await busy.write(140, 2)

    async def modes(self) -> None:
        """Out of the mode and back, with something dirty each time."""
        busy = self.busy
        await busy.set_write_mode(WriteMode.THROUGH)
        await busy.write(66, 4)
        await busy.write(100, 3)
        await busy.fsync()
        await busy.set_write_mode(None)
        await busy.write(67, 20)

    async def truncated(self) -> None:
        """A dirty end goes, and what grows in its place is zeros but for what is written."""
        busy = self.busy
        await busy.write(96, 40)
        await busy.truncate(100)
        await busy.write(150, 3)
        await busy.read(96, 60)
        await busy.fsync()


async def _with_limit(life: Callable[[], Awaitable[None]]) -> None:
    with trio.fail_after(1000):  # on the clock that skips waits: only a hang takes so long
        await life()


def _run(life: Callable[[], Awaitable[None]]) -> None:
    trio.run(_with_limit, life, clock=trio.testing.MockClock(autojump_threshold=0))


def _work(world: World, work: _Fixed) -> None:
    """Both lives. A cache that cannot even be recovered is refused by a sentence."""
    for life in (work.first_life, work.second_life):

        async def live(life: Callable[[BlockCache], Awaitable[None]] = life) -> None:
            async with world.open() as cache:
                await life(cache)

        try:
            _run(live)
        except BaseExceptionGroup as group:
            rest = group.split((FusecacheError, _Killed))[1]
            if rest is not None:
                raise rest from None
        except FusecacheError as exc:
            assert str(exc)
        for guest in (work.busy, work.clean):
            if hasattr(guest, "cache"):
                guest.stopped()
        world.kill()
        world.clock_base += 100


async def _look(world: World, work: _Fixed, killed: bool) -> None:
    """Everything twice: as it is, and past the cache."""
    async with world.open() as cache:
        for guest in (work.clean, work.busy):
            assert await guest.open(cache)
            await guest.settle(killed=killed)
            assert not guest.lost or guest is work.busy
            await guest.mend()
            await guest.close()
            assert await guest.open(cache, write=False)
            data = await cache.read(guest.image, 0, SECTORS * STAMP)
            guest.model.check_settled(data)
            await guest.close(write=False)
        cache.core.check()


def _one(directory: Path, kind: str, mode: WriteMode, n: int, *, forever: bool) -> int:
    """One world in which the N-th call of a kind fails; how many such calls there were."""
    directory.mkdir()
    world = World(directory, n, slots=24, block_size=BLOCK, write_mode=mode)
    world.tuning = dataclasses.replace(world.tuning, dirty_age=1.0)
    for number in (1, 2):
        world.make_file(number, stamped(number, 0, BLOCKS * BLOCK, 1))
    work = _Fixed(mode, kind, n)
    world.faults.fail = lambda called, number: (
        called == kind and (number >= n if forever else number == n)
    )
    _work(world, work)
    calls = world.faults.calls.get(kind, 0)
    world.faults.fail = lambda called, number: False
    killed = n % 2 == 0
    if not killed:
        world.power_cut()
    world.clock_base += 10_000
    _run(partial(_look, world, work, killed))
    world.kill()
    return calls


def _every(tmp_path: Path, kind: str, mode: WriteMode, forever: bool, most: int) -> None:
    """Up to ``most`` of all N, spread over the work; the first ones always."""
    calls = _one(tmp_path / "none", kind, mode, 1 << 30, forever=forever)
    if not calls:
        assert mode is not WriteMode.BACK, "this kind is never called"
        return
    chosen: Iterable[int] = range(calls)
    if calls > most:
        chance = random.Random(f"{kind} {mode} {forever}")
        chosen = sorted({0, 1, *chance.sample(range(calls), most - 2)})
    for n in chosen:
        try:
            _one(tmp_path / str(n), kind, mode, n, forever=forever)
        except BaseException as exc:
            exc.add_note(f"call {n} of {calls}, {kind}")
            raise


@pytest.mark.parametrize("mode", list(WriteMode))
@pytest.mark.parametrize("forever", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_nth_call_may_fail(tmp_path: Path, kind: str, forever: bool, mode: WriteMode) -> None:
    most = 3 if mode is not WriteMode.BACK else 10 if kind in OFTEN else 5
    _every(tmp_path, kind, mode, forever, most)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("mode", list(WriteMode))
@pytest.mark.parametrize("forever", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_nth_call_may_fail_for_every_n(
    tmp_path: Path, kind: str, forever: bool, mode: WriteMode
) -> None:
    _every(tmp_path, kind, mode, forever, 1 << 30)
