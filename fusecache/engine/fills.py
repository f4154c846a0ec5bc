"""Fills: origin -> slot. A block is fetched once, however many readers ask for it.

The fetch answers its readers as soon as the origin has; the SSD write follows from the same
bytes, which later readers are served from until the slot is valid. How many bytes may wait for
their SSD write is bounded; beyond that a fetch is answered but not stored.
"""

import logging
from collections.abc import Callable

import trio

from fusecache.core.geometry import Geometry, merged
from fusecache.core.index import CacheIndex
from fusecache.engine.image import Image
from fusecache.engine.ports import Threads
from fusecache.engine.state import CacheState
from fusecache.engine.storing import Storing
from fusecache.errors import CacheDeviceError, OriginError
from fusecache.observe.counters import Reason
from fusecache.observe.latency import Call, timed

log = logging.getLogger(__name__)

_SHARE = 8
"""Part of what may wait for the SSD at all: with more, nothing is fetched ahead."""


class Fetch:
    """Blocks on their way from the origin. Readers wait for ``ready``, then look."""

    def __init__(self, blocks: range, *, ahead: bool = False) -> None:
        self.blocks = blocks
        self.ahead = ahead
        """Nobody asked for it yet: who comes to wait for it and sees it fail asks for himself."""
        self.ready = trio.Event()
        self.error: OriginError | None = None
        self.pages: dict[int, int] = {}
        """By block: mask of the pages this fetch brought."""
        self.ended: int | None = None
        """Where the origin ended, if that was earlier than the image's size says."""
        self._parts: list[tuple[int, bytes]] = []

    def add(self, offset: int, data: bytes) -> None:
        """Bytes the origin had at ``offset``."""
        self._parts.append((offset, data))

    def view(self, offset: int, length: int) -> memoryview | None:
        """The bytes from ``offset`` on, uncopied, if one part has all of them."""
        for begin, data in self._parts:
            if begin <= offset and offset + length <= begin + len(data):
                return memoryview(data)[offset - begin : offset - begin + length]
        return None

    def copy(self, offset: int, into: memoryview) -> int:
        """Copies what was brought from ``offset`` on, with zeros after the image's end.

        The end may have moved since: what a page that was brought holds beyond it is zeros.
        Returns fewer bytes than asked for only where the origin ended before the image's size.
        """
        whole = self.view(offset, len(into))
        if whole is None:
            self._piece_together(offset, into)
        else:
            into[:] = whole
        if self.ended is None:
            return len(into)
        return max(0, min(len(into), self.ended - offset))

    def _piece_together(self, offset: int, into: memoryview) -> None:
        into[:] = bytes(len(into))
        for begin, data in self._parts:
            first = max(offset, begin)
            last = min(offset + len(into), begin + len(data))
            if first < last:
                into[first - offset : last - offset] = data[first - begin : last - begin]


class Fills:
    """Starts and runs fetches.

    Args:
        nursery: where fetches run; they outlive the readers that asked for them.
    """

    def __init__(
        self,
        core: CacheIndex,
        state: CacheState,
        threads: Threads,
        nursery: trio.Nursery,
        wake_reclaimer: Callable[[], None],
    ) -> None:
        self._core = core
        self._geometry: Geometry = core.geometry
        self._state = state
        self._threads = threads
        self._nursery = nursery
        self._wake_reclaimer = wake_reclaimer
        self._staged = 0
        self._running = 0
        self._idle = trio.Event()
        self._idle.set()

    @property
    def crowded(self) -> bool:
        """Whether more waits for its SSD write than should be added to without need."""
        return self._staged > self._state.tuning.staging_bytes // _SHARE

    async def drained(self) -> None:
        """Returns when no fetch is under way or being stored."""
        await self._idle.wait()

    def start(self, image: Image, blocks: range, *, ahead: bool = False) -> Fetch:
        """Begins to fetch blocks of which none is being fetched already."""
        fetch = Fetch(blocks, ahead=ahead)
        for block in blocks:
            image.fetches[block] = fetch
        if not self._running:
            self._idle = trio.Event()
        self._running += 1
        self._nursery.start_soon(self._run, image, fetch)
        return fetch

    async def _run(self, image: Image, fetch: Fetch) -> None:
        try:
            async with image.lock.span(fetch.blocks.start, fetch.blocks.stop):
                await self._fetch(image, fetch)
                fetch.ready.set()
                if self._state.stores(image):
                    await trio.lowlevel.checkpoint()  # those who wait are answered first
                    await self._store(image, fetch)
                elif self._state.serves(image):
                    self._not_kept(image, Reason.CACHE_ERROR, len(fetch.pages))
        except OriginError as exc:
            image.counters.failed(exc)
            fetch.error = exc
        except Exception as exc:
            self._state.unexpected(exc, "filling blocks")
            fetch.error = OriginError(5, "an unexpected error in fusecache, see its log")
        finally:
            if not fetch.ready.is_set() and fetch.error is None:
                fetch.error = OriginError(5, "fusecache is stopping")
            fetch.ready.set()
            for block in fetch.blocks:
                del image.fetches[block]
            self._running -= 1
            if not self._running:
                self._idle.set()

    async def _fetch(self, image: Image, fetch: Fetch) -> None:
        """One origin read for each run of blocks with missing pages."""
        geometry = self._geometry
        missing: dict[int, int] = {}
        for block in fetch.blocks:
            in_block = min(geometry.block_size, image.size - (block << geometry.block_shift))
            pages = geometry.touched(0, in_block)
            have = self._core.valid_pages(image.id, block) | self._core.dirty.held(image.id, block)
            lacking = pages & ~have
            if lacking:
                missing[block] = lacking
        for run in merged(list(missing)):
            first, last = missing[run.start], missing[run.stop - 1]
            begin = (run.start << geometry.block_shift) + (
                ((first & -first).bit_length() - 1) << geometry.page_shift
            )
            end = ((run.stop - 1) << geometry.block_shift) + (
                last.bit_length() << geometry.page_shift
            )
            size = image.size
            data = await self._read(image, begin, min(end, size) - begin)
            fetch.add(begin, data)
            # Short of the end of the image: somebody else cut it; only whole pages count.
            got = begin + len(data)
            if got < min(end, size):
                fetch.ended = got
            complete = end if got >= size else got - got % geometry.page_size
            for block in run:
                start = block << geometry.block_shift
                brought = geometry.covered(0, max(0, min(geometry.block_size, complete - start)))
                fetch.pages[block] = missing[block] & brought

    async def _read(self, image: Image, offset: int, length: int) -> bytes:
        spans: list[float] = []
        try:
            read = timed(image.origin.read, spans)
            data = await self._threads.harmless(image.limiter, read, offset, length)
        finally:
            image.counters.latency.add(Call.READ, spans)
        image.counters.origin_reads += 1
        image.counters.origin_read_bytes += len(data)
        return data

    async def _store(self, image: Image, fetch: Fetch) -> None:
        size = sum(mask.bit_count() for mask in fetch.pages.values()) << self._geometry.page_shift
        counters = self._state.counters
        if not size or self._staged + size > self._state.tuning.staging_bytes:
            self._not_kept(image, Reason.STAGING_LIMIT, len(fetch.pages) if size else 0)
            return
        self._staged += size
        try:
            with Storing(self._core, image.id) as storing:
                self._not_kept(image, Reason.NO_SLOT, self._collect(fetch, storing))
                self._wake_reclaimer()
                await self._threads.storing(storing.write, self._state.device)
                storing.done()
            counters.stored_bytes += storing.stored_bytes
        except CacheDeviceError as exc:
            self._not_kept(image, Reason.CACHE_ERROR, len(fetch.pages))
            self._state.store_failed(exc)
        finally:
            self._staged -= size

    def _not_kept(self, image: Image, reason: Reason, blocks: int) -> None:
        self._state.counters.not_stored += blocks
        image.counters.not_kept[reason] += blocks

    def _collect(self, fetch: Fetch, storing: Storing) -> int:
        """Gives the brought pages to ``storing``; returns how many blocks found no slot."""
        geometry, left_out = self._geometry, 0
        for block, pages in fetch.pages.items():
            for begin, length in geometry.page_runs(pages):
                at = (block << geometry.block_shift) + begin
                data = fetch.view(at, length)
                if data is None:  # the image's last page: zeros after its end
                    data = memoryview(bytearray(length))
                    fetch.copy(at, data)
                mask = geometry.covered(begin, begin + length)
                if not storing.add(block, begin, data, mask):
                    left_out += 1
                    break
        return left_out
