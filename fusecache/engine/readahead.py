"""Readahead: a guest that reads an image in order finds the next blocks in the cache.

A stream is a place where somebody reads on: it is seen by its misses, block after block, and
followed once it has missed ``_RUN`` blocks in order. From then on blocks ahead of it are fetched,
``tuning.readahead`` bytes at most, twice as many each time. Half-way through what was fetched lies
its *mark*: a hit there fetches on, so that a guest that is slower than the origin never waits.
Random reads start no stream, and cost the hit path nothing as long as no mark is set.
"""

from fusecache.config import Tuning
from fusecache.core.geometry import merged
from fusecache.core.index import CacheIndex
from fusecache.engine.fills import Fills
from fusecache.engine.image import Image, Stream
from fusecache.engine.state import CacheState

_STREAMS = 8
"""Of one image; a new one takes the place of the one that was quiet for longest."""
_RUN = 3
"""Blocks that have to be missed in order."""
_FIRST = 256 << 10
_WINDOWS = 4
"""Of one image, that may be on their way from the origin."""
_PART = 512 << 10
"""Bytes of one origin read ahead: several together hide its latency, each is worth its own."""


class Readahead:
    """Watches the reads of all images and starts fetches ahead of them."""

    def __init__(self, core: CacheIndex, state: CacheState, fills: Fills) -> None:
        self._core = core
        self._geometry = core.geometry
        self._state = state
        self._fills = fills
        self._first = max(1, _FIRST >> core.geometry.block_shift)
        self._part = max(1, _PART >> core.geometry.block_shift)
        self._tick = 0
        self.apply(state.tuning)

    def apply(self, tuning: Tuning) -> None:
        """From now on this much is fetched ahead."""
        self._most = tuning.readahead >> self._geometry.block_shift

    def missed(self, image: Image, offset: int, length: int) -> None:
        """A read that was not simply a hit; its own fetches have begun."""
        if not self._most:
            return
        blocks = self._geometry.blocks(offset, length)
        self._tick += 1
        for stream in image.streams:
            if self._continues(stream, blocks):
                stream.used = self._tick
                if blocks.stop > stream.next:
                    stream.next = blocks.stop
                    if stream.next - stream.begun >= _RUN:
                        self._advance(image, stream)
                return
        self._follow(image, blocks)

    def _continues(self, stream: Stream, blocks: range) -> bool:
        if stream.ahead:  # requests of a deep queue come in any order
            return stream.next - self._most <= blocks.start <= max(stream.next, stream.ahead)
        return blocks.start == stream.next or (
            blocks.start == stream.next - 1 and blocks.stop > stream.next
        )

    def _follow(self, image: Image, blocks: range) -> None:
        if len(image.streams) >= _STREAMS:
            quiet = min(image.streams, key=lambda stream: stream.used)
            image.streams.remove(quiet)
            self._unmark(image, quiet)
        image.streams.append(Stream(blocks.start, blocks.stop, self._tick))

    def passed(self, image: Image, offset: int, length: int) -> None:
        """A hit, while the image has marks."""
        blocks = self._geometry.blocks(offset, length)
        for block in blocks:
            stream = image.marks.get(block)
            if stream is not None:
                self._tick += 1
                stream.used = self._tick
                stream.next = max(stream.next, blocks.stop)
                self._advance(image, stream)
                return

    def _advance(self, image: Image, stream: Stream) -> None:
        """Fetches up to a window ahead of the stream and sets its mark in the middle of that."""
        self._unmark(image, stream)
        stream.window = min(self._most, stream.window * 2 or self._first)
        begin = max(stream.next, stream.ahead)
        end = min(stream.next + stream.window, self._end(image))
        if begin >= end:
            if stream.ahead > stream.next:
                self._mark(image, stream)
            return
        wanted = [block for block in range(begin, end) if self._lacks(image, block)]
        scarce = self._core.free < 2 * len(wanted) or self._fills.crowded
        if scarce or len(image.fetches) > _WINDOWS * self._most:
            return  # what cannot be stored would be read twice; and an origin may stall
        for run in merged(wanted):
            for first in range(run.start, run.stop, self._part):
                part = range(first, min(first + self._part, run.stop))
                self._fills.start(image, part, ahead=True)
        image.counters.read_ahead_bytes += len(wanted) << self._geometry.block_shift
        stream.ahead = end
        self._mark(image, stream)

    def _mark(self, image: Image, stream: Stream) -> None:
        stream.mark = (stream.next + stream.ahead) // 2
        image.marks[stream.mark] = stream
        if image.gate is not None:
            image.gate.mark(image.marks)

    def _unmark(self, image: Image, stream: Stream) -> None:
        if image.marks.get(stream.mark) is stream:
            del image.marks[stream.mark]
            if image.gate is not None:
                image.gate.mark(image.marks)

    def _end(self, image: Image) -> int:
        size = image.size
        return self._geometry.blocks(0, size).stop if size else 0

    def _lacks(self, image: Image, block: int) -> bool:
        return block not in image.fetches and not self._core.valid_pages(image.id, block)
