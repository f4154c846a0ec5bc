"""A guest of a cache that fails: it tells old data from what the cache device has lost."""

from collections.abc import Awaitable

import pytest

from fusecache.config import WriteMode
from fusecache.engine.block_cache import BlockCache
from fusecache.engine.dirty_reads import unreadable_ranges
from fusecache.engine.image import Image
from fusecache.errors import FusecacheError, LostDataError
from tests.support.model import ImageModel
from tests.support.stamps import STAMP
from tests.support.world import PAGE

IN_PAGE = PAGE // STAMP


class Guest:
    """Works on one image, one call at a time, and judges each answer.

    A failed sync of the cache device loses the dirty pages written since the last good one, and
    nothing else: reading one is an error, and ``lost_ranges`` names it. Everything else is what
    the model says.

    Args:
        unharmed: no call may fail: nothing of the image is dirty, and the origin works.
        unread: reads of the cache device may fail, so that dirty pages cannot be read for now.
    """

    def __init__(
        self, number: int, model: ImageModel, *, unharmed: bool = False, unread: bool = False
    ) -> None:
        self.number = number
        self.model = model
        self.unharmed = unharmed
        self.unread = unread
        self.risked: dict[int, float] = {}
        """Pages written since they were last stable for sure: the barriers done by then."""
        self.lost: set[int] = set()
        """Pages found lost when everything was read last."""
        self.cache: BlockCache
        self.image: Image

    # -- opening and closing -----------------------------------------------------------------------

    async def open(self, cache: BlockCache, *, write: bool = True) -> bool:
        """Opens the image in a cache; whether that worked."""
        self.cache = cache
        path = b"%d.img" % self.number
        opening = cache.open(b"id%d" % self.number, path, self.number, write=write)
        try:
            self.image = await opening
        except FusecacheError:
            assert not self.unharmed
            return False
        return True

    async def close(self, *, write: bool = True) -> None:
        """Ends it."""
        await self.cache.close(self.image, write=write)

    # -- calls -------------------------------------------------------------------------------------

    async def write(self, first: int, count: int) -> bool:
        """Writes sectors; whether it was acknowledged."""
        pages = range(first // IN_PAGE, (first + count - 1) // IN_PAGE + 1)
        lost = self._now_lost()
        data = self.model.begin_write(first, count)
        self.risked.update(dict.fromkeys(pages, float("inf")))
        done = await self._call(self.cache.write(self.image, first * STAMP, data))
        lost &= self._listed(self.cache.core.lost_ranges(self.image.id))
        self.risked.update(dict.fromkeys(set(pages) - lost, self._barriers))
        if done:
            self.model.end_write(first, count)
        return done

    async def read(self, first: int, count: int) -> None:
        """Reads sectors; page by page where a page is lost."""
        oldest = self.model.begin_read()
        try:
            data = await self.cache.read(self.image, first * STAMP, count * STAMP)
        except LostDataError:
            assert not self.unharmed
            await self._read_pages(first, count, oldest)
        except FusecacheError:
            assert not self.unharmed
        else:
            self.model.check_read(first, data.ljust(count * STAMP, b"\0"), oldest)

    async def _read_pages(self, first: int, count: int, oldest: list[int]) -> None:
        for page in range(first // IN_PAGE, (first + count - 1) // IN_PAGE + 1):
            begin = max(first, page * IN_PAGE)
            length = min(first + count, (page + 1) * IN_PAGE) - begin
            data = await self._page(page, begin, length)
            if data is not None:
                self.model.check_read(begin, data.ljust(length * STAMP, b"\0"), oldest)

    async def _page(self, page: int, begin: int, length: int) -> bytes | None:
        """Sectors of one page; None if it is lost, and may be."""
        try:
            return await self.cache.read(self.image, begin * STAMP, length * STAMP)
        except LostDataError:
            if page not in self._listed(self.cache.core.lost_ranges(self.image.id)):
                assert self.unread, f"page {page} is neither lost nor unreadable"
                assert page in self._listed(unreadable_ranges(self.cache.core, self.image))
            else:
                assert self.may_lose(page), f"page {page} was stable and is lost"
        except FusecacheError:
            assert not self.unharmed
        return None

    def _listed(self, ranges: list[tuple[int, int]]) -> set[int]:
        return {
            page
            for offset, length in ranges
            for page in range(offset // PAGE, (offset + length - 1) // PAGE + 1)
        }

    async def fsync(self) -> bool:
        """Whether everything acknowledged is stable now."""
        covered, lost = self.model.begin_fsync(), self._now_lost()
        done = await self._call(self.cache.fsync(self.image, metadata=False))
        if done:
            self.model.end_fsync(covered)
            self._stable_but(lost)
        return done

    def _now_lost(self) -> set[int]:
        """Pages that are lost, all of which may be."""
        lost = self._listed(self.cache.core.lost_ranges(self.image.id))
        for page in lost:
            assert self.may_lose(page), f"page {page} was stable and is lost"
        return lost

    def _stable_but(self, lost: set[int]) -> None:
        """From now on no page may be lost but for those that are already."""
        self.risked = dict.fromkeys(lost, float("inf"))

    async def flush(self) -> None:
        """Everything acknowledged is on the origin."""
        covered = self.model.begin_fsync()
        if await self._tolerated(self.cache.flush(self.image)):
            self.model.end_fsync(covered)
            assert not self._now_lost()
            self._stable_but(set())

    async def set_write_mode(self, mode: WriteMode | None) -> None:
        """From now on written in this mode, even if it says that something of it failed."""
        await self._tolerated(self.cache.set_write_mode(self.image, mode))

    async def truncate(self, first: int) -> None:
        """Cuts everything from a sector on."""
        self.model.begin_truncate(first * STAMP)
        if await self._call(self.cache.truncate(self.image, first * STAMP)):
            self.model.end_truncate(first * STAMP)

    async def hole(self, first: int, count: int, mode: int) -> None:
        """Frees sectors, or sets them to zeros. Edges of dirty pages are written."""
        pages = range(first // IN_PAGE, (first + count - 1) // IN_PAGE + 1)
        lost = self._now_lost()
        self.model.begin_hole(first, count)
        self.risked.update(dict.fromkeys(pages, float("inf")))
        allocating = self.cache.allocate(self.image, mode, first * STAMP, count * STAMP)
        done = await self._call(allocating)
        lost &= self._listed(self.cache.core.lost_ranges(self.image.id))
        self.risked.update(dict.fromkeys(set(pages) - lost, self._barriers))
        if done:
            self.model.end_write(first, count)

    async def evict(self, *, discard_dirty: bool = False) -> None:
        """Leaves nothing of the image in the cache, if it works."""
        if discard_dirty:
            self.model.begin_discard()
        done = await self._tolerated(self.cache.evict(self.image, discard_dirty=discard_dirty))
        if done:
            assert not self.cache.core.usage(self.image.id).blocks
            self._stable_but(set())
        if discard_dirty:
            self.model.end_discard()

    async def _call(self, call: Awaitable[object]) -> bool:
        """A guest's call: without an error if nothing can have harmed this image."""
        done = await self._tolerated(call)
        assert done or not self.unharmed
        return done

    async def _tolerated(self, call: Awaitable[object]) -> bool:
        try:
            await call
        except FusecacheError:
            return False
        return True

    # -- what may be lost --------------------------------------------------------------------------

    @property
    def _barriers(self) -> int:
        return self.cache.state.counters.barriers

    def may_lose(self, page: int) -> bool:
        """Whether no barrier that began after the page was written last is known to be complete:
        one that is under way at that time does not count, the one after it does."""
        return page in self.risked and self._barriers < self.risked[page] + 2

    def stopped(self) -> None:
        """The cache is gone: from now on no barrier counts."""
        self.risked = {page: float("inf") for page in self.risked if self.may_lose(page)}

    async def settle(self, *, killed: bool) -> None:
        """Everything is there as promised, after a start that nothing disturbs."""
        self.unharmed, self.unread = False, False
        model, core = self.model, self.cache.core
        whole = b""
        self.lost = self._listed(core.lost_ranges(self.image.id))
        assert not unreadable_ranges(core, self.image)
        for page in range(len(model.sectors) // IN_PAGE):
            data = await self._page(page, page * IN_PAGE, IN_PAGE)
            assert (data is None) == (page in self.lost)
            if data is None:
                # What the guest was told may be gone: the origin's is some older version.
                for sector in model.sectors[page * IN_PAGE : (page + 1) * IN_PAGE]:
                    sector.acknowledged = sector.stable = 0
            whole += self._stand_in(page) if data is None else data.ljust(PAGE, b"\0")
        kept = {
            number: list(sector.versions)
            for number, sector in enumerate(model.sectors)
            if number // IN_PAGE in self.lost
        }
        model.settle(whole, killed=killed)
        for number, versions in kept.items():
            model.sectors[number].versions = versions
            model.sectors[number].acknowledged = model.sectors[number].stable = 0

    def _stand_in(self, page: int) -> bytes:
        """Some bytes that the model allows for a page that is lost."""
        data = b""
        for sector in self.model.sectors[page * IN_PAGE : (page + 1) * IN_PAGE]:
            sector.versions.append(0)
            data += bytes(STAMP)
        return data

    async def mend(self) -> None:
        """A lost page that is written as a whole is as good as any other. As long as there is one
        left, the image cannot be evicted; in the end it is."""
        for page in sorted(self.lost):
            with pytest.raises(LostDataError):
                await self.cache.evict(self.image)
            assert await self.write(page * IN_PAGE, IN_PAGE)
            oldest = self.model.begin_read()
            data = await self.cache.read(self.image, page * PAGE, PAGE)
            self.model.check_read(page * IN_PAGE, data, oldest)
            self.lost.discard(page)
            assert self._listed(self.cache.core.lost_ranges(self.image.id)) == self.lost
        await self.cache.evict(self.image)
        assert not self.cache.core.usage(self.image.id).blocks
