"""Holes: fallocate(2), which pyfuse3 cannot express (R4, R5).

A range that is freed or set to zeros goes to the origin exactly as the guest named it, and out of
the cache. What that takes depends on what the cache holds of the range:

- *Nothing dirty or settling*: it is a write-around of zeros. The regions' rows are stable and
  active (R4) before the origin is changed, so whatever brings an old row of a clean page back, a
  kill or a power cut, that page is not believed; and the guest's fsync syncs the origin. So no
  barrier and no origin sync of its own: guests free space in many small pieces.
- *Something is held*: a stable row may say that it is dirty, and would bring it back after a power
  cut over whatever came later, even from another host. So it goes in the order in which the
  cleaner makes pages clean (R5), with the hole in place of the writeback: no writeback is under
  way, the origin is changed, the origin is synced, the rows say so, a barrier makes that stable,
  and only then is it as above. The sync comes before the rows because what is dirty may be all that
  a guest's fsync has promised. Callers that wait for each other share the sync and the barrier.

A page that the range covers in part goes as well if it is clean, since the origin has the rest of
it. If it is held, that part is left out and written with zeros, as a guest would write them.

An origin that cannot do what is asked says EOPNOTSUPP, the guest is told so, and nothing has
changed: the origin comes first. Zeros are not written instead, however many gigabytes the guest
names: those who ask know how to write them in pieces, and to ask no more. Asked again, an image
answers by itself.
"""

import errno
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import trio

from fusecache.core.dirty import Writeback
from fusecache.core.geometry import REGION_BLOCKS, region_of
from fusecache.core.index import CacheIndex
from fusecache.engine.committer import Committer
from fusecache.engine.degraded import Degraded
from fusecache.engine.dirty_reads import note_unreadable
from fusecache.engine.image import Image
from fusecache.engine.intents import WriteIntents
from fusecache.engine.lasting import Lasting
from fusecache.engine.locks import END
from fusecache.engine.origin_writes import OriginWrites
from fusecache.engine.state import CacheState
from fusecache.errors import CacheDeviceError, DatabaseError, OriginError
from fusecache.store.syscalls import FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE, FALLOC_ZERO_RANGE

_RESERVES = (0, FALLOC_KEEP_SIZE)
_FREES = (
    FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE,
    FALLOC_ZERO_RANGE,
    FALLOC_ZERO_RANGE | FALLOC_KEEP_SIZE,
)
_PIECE = 32 * REGION_BLOCKS
"""Blocks at a time: 128 MiB with blocks of 64 KiB. Others get through in between, and a commit for
one names 33 regions at most."""

Put = Callable[[Image, int, bytes], Awaitable[object]]
"""See ``Writes.put``."""


@dataclass(slots=True, eq=False)
class _Piece:
    """A piece of a range, and the blocks to be locked for it. Positions in bytes of the image."""

    image: Image
    mode: int
    begin: int
    bound: int
    """Where it ends, unless the image ends before."""
    end: int
    """Where the whole range ends."""
    first: int
    last: int
    """Blocks from ``first`` up to ``last``; ``END`` if the image may end within the piece."""
    over: bool = False
    """Its turn has come while it waited for others."""
    hole: "_Hole | None" = None
    """What was done then; None: the cache is not what it was, and it has to be looked at anew."""
    error: OriginError | None = None


@dataclass(slots=True)
class _Hole:
    """What becomes of a piece, as of a moment when nobody else is at work there."""

    until: int
    """Where the next piece begins."""
    begin: int
    stop: int
    """Changed on the origin from ``begin`` on; nothing if ``stop`` is not after that."""
    regions: range
    """Those that may have lost pages, here or in the database."""
    cached: list[tuple[int, int]] = field(default_factory=list)
    """(block, mask): pages that go if they are clean."""
    held: list[tuple[int, int]] = field(default_factory=list)
    """(block, mask): pages that are dirty or settling, and not lost."""
    zeros: list[tuple[int, int]] = field(default_factory=list)
    """(begin, stop): to be written with zeros afterwards."""


class Holes:
    """See the module."""

    def __init__(
        self,
        core: CacheIndex,
        state: CacheState,
        committer: Committer,
        intents: WriteIntents,
        lasting: Lasting,
        origin: OriginWrites,
        degraded: Degraded,
        put: Put,
    ) -> None:
        self._core = core
        self._geometry = core.geometry
        self._state = state
        self._committer = committer
        self._intents = intents
        self._lasting = lasting
        self._origin = origin
        self._degraded = degraded
        self._put = put
        self._waiting: list[_Piece] = []

    async def allocate(self, image: Image, mode: int, offset: int, length: int) -> None:
        """fallocate(2) of an image that is open for writing.

        Args:
            mode: 0 or KEEP_SIZE: space is reserved. PUNCH_HOLE | KEEP_SIZE: the range reads as
                zeros, and its space is free. ZERO_RANGE, with or without KEEP_SIZE: the range
                reads as zeros, and its space is reserved.

        Raises:
            OSError: EOPNOTSUPP for any other mode, EINVAL for a range that is none.
            OriginError: the origin failed; with EOPNOTSUPP nothing was changed.
            LostDataError, CacheDeviceError, DatabaseError: it was not done, or in part.
        """
        if mode not in _RESERVES and mode not in _FREES:
            raise OSError(errno.EOPNOTSUPP, f"fallocate has no mode {mode:#x} here")
        if offset < 0 or length <= 0:
            raise OSError(errno.EINVAL, "not a range")
        if mode in image.unsupported:
            raise OriginError(errno.EOPNOTSUPP, f"the origin has no fallocate of mode {mode:#x}")
        with image.admitted():
            try:
                if mode in _RESERVES:
                    await self._reserve(image, mode, offset, length)
                else:
                    await self._free(image, mode, offset, length)
            except OriginError as exc:
                if exc.errno == errno.EOPNOTSUPP:
                    image.unsupported.add(mode)
                raise

    async def _reserve(self, image: Image, mode: int, offset: int, length: int) -> None:
        """No byte changes, so the cache is as true as it was. A truncate waits."""
        last = self._geometry.blocks(offset, length)[-1]
        async with image.lock.span(last, last + 1):
            await self._state.passable()
            await self._origin.allocate(image, mode, offset, length)

    async def _free(self, image: Image, mode: int, begin: int, length: int) -> None:
        end = begin + length
        inside = max(0, min(length, image.size - begin))
        zeros: list[tuple[int, int]] = []
        while begin < end:
            hole = await self._free_piece(self._piece(image, mode, begin, end))
            if hole is not None:
                zeros += hole.zeros
                begin = hole.until
        for first, stop in zeros:
            if mode & FALLOC_KEEP_SIZE:
                stop = min(stop, image.size)
            if first < stop:
                await self._put(image, first, bytes(stop - first))
        image.counters.discards += 1
        image.counters.discard_bytes += inside

    # -- one piece ---------------------------------------------------------------------------------

    def _piece(self, image: Image, mode: int, begin: int, end: int) -> _Piece:
        shift = self._geometry.block_shift
        first = begin >> shift
        bound = min(end, first + _PIECE << shift)
        # Past its end an image has nothing that could be cached, and the rest is one piece.
        last = END if bound >= image.size else (bound - 1 >> shift) + 1
        return _Piece(image, mode, begin, bound, end, first, last)

    def _look(self, piece: _Piece) -> _Hole:
        """What is to be done, for a caller that has the piece's blocks."""
        geometry, image, begin = self._geometry, piece.image, piece.begin
        ends = piece.bound >= image.size
        until = piece.end if ends and piece.last == END else piece.bound
        # The page that the image's end cuts is whole if all that it has of the image goes.
        after = self._up(image.size) if ends else until
        hole = _Hole(until, begin, until, range(0))
        if begin >= after:
            return hole
        if begin != self._up(begin) and self._held_at(image, begin):
            hole.begin = self._up(begin)
            hole.zeros.append((begin, min(hole.begin, until)))
        if after != self._up(after) and hole.begin < after and self._held_at(image, after):
            hole.stop = after >> geometry.page_shift << geometry.page_shift
            hole.zeros.append((hole.stop, after))
        stop = min(hole.stop, after)
        if hole.begin < stop:
            blocks = geometry.blocks(hole.begin, stop - hole.begin)
            hole.regions = range(region_of(blocks.start), region_of(blocks.stop - 1) + 1)
            if self._core.usage(image.id).blocks:
                self._look_at_pages(image, hole, stop)
        return hole

    def _up(self, offset: int) -> int:
        """The end of the page before ``offset``, or of the one it lies in."""
        return offset + self._geometry.page_size - 1 & -self._geometry.page_size

    def _held_at(self, image: Image, offset: int) -> int:
        geometry = self._geometry
        block = offset >> geometry.block_shift
        start = offset - (block << geometry.block_shift)
        return self._core.dirty.held(image.id, block) & geometry.touched(start, start + 1)

    def _look_at_pages(self, image: Image, hole: _Hole, stop: int) -> None:
        geometry, core = self._geometry, self._core
        for block, start, end in geometry.split(hole.begin, stop - hole.begin):
            pages = geometry.touched(start, end)
            if pages & core.valid_pages(image.id, block):
                hole.cached.append((block, pages))
            if not core.dirty.any_held:
                continue
            # What is lost can be read again once it was written.
            lost = pages & core.dirty.lost(image.id, block)
            for first, length in geometry.page_runs(lost):
                begin = (block << geometry.block_shift) + first
                hole.zeros.append((begin, begin + length))
            if held := pages & core.dirty.held(image.id, block) & ~lost:
                hole.held.append((block, held))

    async def _free_piece(self, piece: _Piece) -> _Hole | None:
        """Returns what was done; None: the cache broke meanwhile, and all is to be done again."""
        image = piece.image
        async with image.lock.span(piece.first, piece.last):
            hole = self._look(piece)
            if not self._state.serves(image):
                await self._past(piece, hole.until)
                hole.zeros.clear()
                return hole
            if not hole.held:
                try:
                    async with self._intents.writing(image, hole.regions):
                        await self._change_origin(piece, hole)
                        image.changed()
                except DatabaseError:
                    if self._state.usable:
                        raise
                    return None
                return hole
        return await self._in_turn(piece)

    async def _change_origin(self, piece: _Piece, hole: _Hole) -> None:
        """The origin first; then what is clean goes, also if nobody knows how far it got."""
        refused = False
        try:
            if hole.begin < hole.stop:
                length = hole.stop - hole.begin
                await self._origin.allocate(piece.image, piece.mode, hole.begin, length)
        except OriginError as exc:
            refused = exc.errno == errno.EOPNOTSUPP
            raise
        finally:
            if not refused:
                for block, pages in hole.cached:
                    self._core.clear(piece.image.id, block, pages)

    async def _past(self, piece: _Piece, until: int) -> None:
        """Past the cache. What a broken one still counts for is written with zeros, too: its rows
        stay, and the next start will believe them."""
        image, begin = piece.image, piece.begin
        await self._state.passable()
        await self._origin.allocate(image, piece.mode, begin, until - begin)
        if not self._degraded.holds(image):
            return
        geometry = self._geometry
        for block, start, stop in geometry.split(begin, min(until, image.size) - begin):
            held = geometry.touched(start, stop) & self._core.dirty.held(image.id, block)
            base = block << geometry.block_shift
            for at, length in geometry.page_runs(held):
                first, last = max(at, start), min(at + length, stop)
                await self._degraded.write(image, base + first, bytes(last - first))

    # -- pieces with something held ----------------------------------------------------------------

    async def _in_turn(self, piece: _Piece) -> _Hole | None:
        """Without any writeback under way, and together with all others that wait for that."""
        image = piece.image
        self._waiting.append(piece)
        try:
            async with image.cleaning:
                if not piece.over:
                    pieces = [other for other in self._waiting if other.image is image]
                    self._waiting = [other for other in self._waiting if other.image is not image]
                    if piece not in pieces:  # somebody took it along and gave up
                        pieces.append(piece)
                    await self._free_held(image, pieces)
        finally:
            if piece in self._waiting:
                self._waiting.remove(piece)
        if piece.error is not None:
            raise piece.error
        return piece.hole

    async def _free_held(self, image: Image, pieces: list[_Piece]) -> None:
        first, last = min(piece.first for piece in pieces), max(piece.last for piece in pieces)
        async with image.lock.alone(first, last):
            if self._state.serves(image):
                looked = [(piece, self._look(piece)) for piece in pieces]
                regions = sorted({region for _, hole in looked for region in hole.regions})
                try:
                    async with self._intents.writing(image, regions):
                        await self._supersede(image, looked)
                except (DatabaseError, CacheDeviceError):
                    # Nobody knows which row is stable: what was held stays so, and all is done
                    # again, past the cache.
                    if self._state.usable:
                        raise
        for piece in pieces:
            piece.over = True

    async def _supersede(self, image: Image, looked: list[tuple[_Piece, _Hole]]) -> None:
        """In the cleaner's order (R5), with holes in place of what is written back."""
        failed_syncs = image.failed_syncs
        done: list[tuple[_Piece, _Hole]] = []
        for piece, hole in looked:  # 1. the origin
            try:
                await self._change_origin(piece, hole)
            except OriginError as exc:
                piece.error = exc
            else:
                done.append((piece, hole))
        if not done:
            return
        try:
            await self._sync(image, failed_syncs)  # 2. synced
        except OriginError as exc:
            for piece, _ in done:
                piece.error = exc
            return
        pages: dict[int, int] = {}
        for _, hole in done:
            for block, mask in hole.held:
                pages[block] = pages.get(block, 0) | mask
        slots = self._take(image, pages)
        for slot in slots:
            self._core.dirty.cleaned(slot)  # 3. rows, then stably
        with trio.CancelScope(shield=True):  # what gave up must not settle before it is stable
            await self._committer.barrier()
        for slot in slots:
            self._core.dirty.settled(slot)
        for block, mask in pages.items():  # 4. clean, and to go as what was clean before
            self._core.clear(image.id, block, mask)
            note_unreadable(image, block, mask, 0)
        image.changed()
        for piece, hole in done:
            piece.hole = hole

    async def _sync(self, image: Image, failed_syncs: int) -> None:
        """Origin sync; none, whoever asked, has failed since there were so many failed ones."""
        await self._lasting.sync(image)
        if image.failed_syncs != failed_syncs:
            raise OriginError(errno.EIO, "a sync of the origin failed, the range stays as it was")

    def _take(self, image: Image, pages: dict[int, int]) -> list[int]:
        """Takes dirty pages as a writeback does. Nobody is at work on their slots."""
        slots = []
        for block, mask in pages.items():
            located = self._core.locate(image.id, block)
            assert located is not None
            wanted = Writeback(located.slot, located.generation, block, mask)
            taken = self._core.dirty.begin_writeback(wanted)
            assert taken == mask or not self._state.usable
            if taken:
                slots.append(located.slot)
        return slots
