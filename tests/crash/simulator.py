"""Lives: random work on the real engine, ended at any step by a kill or a power cut."""

import random
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import trio
import trio.testing

from fusecache.config import WriteMode
from fusecache.engine.block_cache import BlockCache
from fusecache.engine.image import Image
from fusecache.errors import DatabaseError, OriginError
from fusecache.store.syscalls import FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE, FALLOC_ZERO_RANGE
from tests.support import lane
from tests.support.model import ImageModel
from tests.support.stamps import STAMP, stamped
from tests.support.world import Cut, World, order_follows

BLOCK = 4 * 4096
SECTORS = 40 * BLOCK // STAMP
LARGEST = 72 * BLOCK // STAMP
"""Two regions, and two rows of the block map."""
SHARED = 2
"""The image that two guests write, each in its own part."""
HOT = 64
"""Half of the writes go to the first so many sectors, so that pages are written again and again."""
IMAGES = (1, 2, 3)
FREES = (
    FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE,
    FALLOC_ZERO_RANGE | FALLOC_KEEP_SIZE,
    FALLOC_ZERO_RANGE,
)


class Simulation:
    """Several lives of one world, and a model that every one of them is held to."""

    def __init__(self, directory: Path, seed: int, *, lane: bool = False) -> None:
        """With ``lane``, writes are done as the lane and ``Requests`` do them."""
        self.lane = lane
        self.chance = random.Random(seed)
        order_follows(seed)
        modes = [WriteMode.THROUGH, WriteMode.AROUND, WriteMode.BACK, WriteMode.BACK]
        mode = self.chance.choice(modes)
        slots = self.chance.choice([16, 24, 64])
        self.world = World(directory, seed, slots=slots, block_size=BLOCK, write_mode=mode)
        self.world.tuning = replace(
            self.world.tuning,
            dirty_age=self.chance.choice([2.0, 4.0]),
            dirty_limit=self.chance.choice([0.2, 0.5, 0.9]),
            dirty_low=self.chance.choice([0.05, 0.25, 0.5]),
            clean_writes=self.chance.choice([1, 4]),
            commits_in_place=self.chance.random() < 0.5,
            whole_image_after=self.chance.choice([0, 32]),
        )
        self.world.slow = self.chance.choice([0.0, 0.02, 0.1])
        self.faulty = self.chance.random() < 0.25
        """Calls on the origin fail, now and then."""
        self.models = {}
        for number in IMAGES:
            sectors = LARGEST if number == IMAGES[-1] else SECTORS
            size = self.chance.choice([sectors, sectors, sectors // 2]) * STAMP
            self.world.make_file(number, stamped(number, 0, size, 1))
            self.models[number] = ImageModel(number, sectors, size, 1)

    def run(self, lives: int) -> int:
        """Runs that many lives; returns how many were cut in the middle."""
        cuts = 0
        for _ in range(lives):
            self.world.cut_at = self.world.steps + self.chance.randrange(400)
            self.world.faults.fail = self._fails
            cut = self._live(self._work)
            cuts += cut
            killed = self.chance.random() < 0.5
            if killed:
                self.world.kill()
            else:
                self.world.power_cut()
            while self.chance.random() < 0.3:  # recovery, cut as well
                self.world.cut_at = self.world.steps + self.chance.randrange(
                    self.chance.choice([12, 12, 80])
                )
                self._live(self._nothing)
                self.world.kill()
            self.world.faults.fail = lambda kind, number: False
            # A clean stop has synced everything: as good as a kill, whatever came after it.
            self._live(partial(self._look, killed=killed or not cut))
            self.world.kill()
        return cuts

    def _fails(self, kind: str, number: int) -> bool:
        often = {
            "origin.write": 0.01,
            "origin.sync": 0.03,
            "origin.read": 0.002,
            "origin.allocate": 0.05,
        }
        return self.faulty and self.chance.random() < often.get(kind, 0)

    def _live(self, work: Callable[[BlockCache], Awaitable[None]]) -> bool:
        """One run of the engine; True if the switch fell in it."""

        async def life() -> None:
            async with self.world.open() as cache:
                if self.lane:
                    lane.admit(cache)
                await work(cache)
                cache.core.check()
            self._end = trio.current_time()

        async def timed() -> None:
            try:
                await life()
            finally:
                self._end = trio.current_time()

        try:
            trio.run(timed, clock=trio.testing.MockClock(autojump_threshold=0))
        except (Cut, BaseExceptionGroup) as exc:
            if isinstance(exc, BaseExceptionGroup):
                # Readers whose fetch was torn down see an error, as the guests of a dying host do.
                cut, rest = exc.split((Cut, OriginError, DatabaseError))
                if rest is not None or cut is None or cut.subgroup(Cut) is None:
                    raise
            return True
        finally:
            self.world.clock_base += self._end + self.chance.choice([0.001, 1.0, 30.0])
        return False

    async def _nothing(self, cache: BlockCache) -> None:
        """Nobody opens anything; the cleaner brings home what is dirty, if it has the time."""
        await trio.sleep(self.chance.random() * self.chance.choice([3, 30]))

    # -- work --------------------------------------------------------------------------------------

    async def _work(self, cache: BlockCache) -> None:
        async with trio.open_nursery() as nursery:
            for number in IMAGES:
                nursery.start_soon(self._guest, cache, number)
            nursery.start_soon(self._guest, cache, SHARED, SECTORS * 3 // 4)
            nursery.start_soon(self._reader, cache, 1)
            nursery.start_soon(self._operator, cache)

    async def _guest(self, cache: BlockCache, number: int, begin: int = 0) -> None:
        """Opens an image now and again and works on it, from sector ``begin`` on."""
        for _ in range(self.chance.randrange(1, 4)):
            try:
                image = await cache.open(b"id%d" % number, b"%d.img" % number, number, write=True)
            except OriginError:
                assert self.faulty or self.world.is_cut
                continue
            for _ in range(self.chance.randrange(4, 16)):
                with self._tolerant():
                    await self._one(cache, image, self.models[number], begin)
            await cache.close(image, write=True)
            await trio.sleep(self.chance.choice([0, 0, 1.5, 4, 30]))

    def _tolerant(self) -> AbstractContextManager[None]:
        """Calls may fail while the origin does; what the model allows stays the same."""
        return suppress(OriginError) if self.faulty else nullcontext()

    async def _one(self, cache: BlockCache, image: Image, model: ImageModel, begin: int) -> None:
        chance = self.chance
        kind = chance.random()
        shared = model.number == SHARED
        end = SECTORS * 3 // 4 if shared and not begin else len(model.sectors)
        if kind < 0.4:
            await self._read(cache, image, model)
        elif kind < 0.78:
            first = begin + chance.randrange(chance.choice([HOT, end - begin - 1]))
            count = min(chance.choice([1, 2, 8, 8, 16, 24, 64]), end - first)
            if chance.random() < 0.6:
                first -= first % 8
            data = model.begin_write(first, count)
            if self.lane:

                def answered(offset: int, length: int) -> None:
                    model.end_write(offset // STAMP, length // STAMP)

                await lane.write(cache, image, first * STAMP, data, answered)
            else:
                await cache.write(image, first * STAMP, data)
                model.end_write(first, count)
        elif kind < 0.85:
            await self._free(cache, image, model, begin, end)
        elif kind < 0.92:
            covered = model.begin_fsync()
            metadata = chance.random() < 0.5
            if self.lane:
                await lane.fsync(cache, image, metadata=metadata)
            else:
                await cache.fsync(image, metadata=metadata)
            model.end_fsync(covered)
        elif kind < 0.95 and not shared:
            size = chance.randrange(end) * STAMP
            if size < image.size:
                model.begin_truncate(size)
                await cache.truncate(image, size)
                model.end_truncate(size)
        else:
            await trio.sleep(chance.choice([0.1, 0.6, 2.5, 5]))

    async def _free(
        self, cache: BlockCache, image: Image, model: ImageModel, begin: int, end: int
    ) -> None:
        """Some sectors become zeros, by any mode that says so."""
        chance = self.chance
        first = begin + chance.randrange(chance.choice([HOT, end - begin - 1]))
        count = min(chance.choice([1, 5, 8, 16, 32, 64, 300]), end - first)
        if chance.random() < 0.6:
            first -= first % 8
        model.begin_hole(first, count)
        await cache.allocate(image, chance.choice(FREES), first * STAMP, count * STAMP)
        model.end_write(first, count)

    async def _read(self, cache: BlockCache, image: Image, model: ImageModel) -> None:
        first = self.chance.randrange(self.chance.choice([HOT, len(model.sectors)]))
        count = self.chance.choice([1, 8, 32, 100])
        oldest = model.begin_read()
        data = await cache.read(image, first * STAMP, count * STAMP)
        model.check_read(first, data, oldest)

    async def _reader(self, cache: BlockCache, number: int) -> None:
        """A second guest that only reads the image another one writes."""
        try:
            image = await cache.open(b"id%d" % number, b"%d.img" % number, number, write=False)
        except OriginError:
            assert self.faulty or self.world.is_cut
            return
        for _ in range(20):
            with self._tolerant():
                await self._read(cache, image, self.models[number])
            await trio.sleep(self.chance.choice([0, 0.2]))
        await cache.close(image, write=False)

    async def _operator(self, cache: BlockCache) -> None:
        """Evicts, flushes, and changes write modes."""
        for _ in range(4):
            await trio.sleep(self.chance.random() * 3)
            image = cache.images.find(b"id%d" % self.chance.choice(IMAGES))
            if image is not None:
                with self._tolerant():
                    await self._operate(cache, image)

    async def _operate(self, cache: BlockCache, image: Image) -> None:
        number = int(image.row.identity[2:])
        model = self.models[number]
        kind = self.chance.random()
        if kind < 0.1:
            model.begin_discard()
            try:
                await cache.evict(image, number, discard_dirty=True)
            finally:
                model.end_discard()
            return
        covered = model.begin_fsync()
        if kind < 0.4:
            await cache.evict(image, number)
            assert cache.core.usage(image.id).blocks == 0
        elif kind < 0.7:
            await cache.flush(image)
        else:
            mode = self.chance.choice([None, *WriteMode])
            left = image.write_mode is WriteMode.BACK
            await cache.set_write_mode(image, mode)
            if not left or image.write_mode is WriteMode.BACK:
                return  # nothing was flushed
        model.end_fsync(covered)

    # -- looking -----------------------------------------------------------------------------------

    async def _look(self, cache: BlockCache, *, killed: bool) -> None:
        """Reads everything twice: as recovered, and again when nothing is cached any more."""
        await trio.sleep(self.chance.choice([0, 0, 0, 60]))  # the cleaner alone opens them
        for number, model in self.models.items():
            image = await cache.open(b"id%d" % number, b"%d.img" % number, number, write=False)
            length = len(model.sectors) * STAMP
            model.settle(await cache.read(image, 0, length), killed=killed)
            model.check_settled(await cache.read(image, 0, length))
            await cache.close(image, write=False)
        if self.chance.random() < 0.5:
            for image in cache.images.all():
                number = int(image.row.identity[2:])
                covered = self.models[number].begin_fsync()
                await cache.evict(image, number)
                self.models[number].end_fsync(covered)
        for number, model in self.models.items():
            image = await cache.open(b"id%d" % number, b"%d.img" % number, number, write=False)
            model.check_settled(await cache.read(image, 0, len(model.sectors) * STAMP))
            await cache.close(image, write=False)
