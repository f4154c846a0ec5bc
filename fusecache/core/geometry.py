"""Byte spans, blocks, pages and runs. Pure arithmetic, shared by every layer.

A block is an aligned piece of an image; a page is a piece of a block, and validity is kept per
page in a mask of at most 16 bits, bit 0 for the first page.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

MIN_PAGE_SIZE = 4096
PAGES_PER_BLOCK = 16
REGION_BLOCKS = 64
"""Consecutive blocks of one image that share a write-intent row and a packed database row."""


class Run(NamedTuple):
    """Consecutive bytes: where they begin and how many."""

    position: int
    length: int


@dataclass(frozen=True, slots=True)
class Geometry:
    """Sizes that follow from the block size.

    Args:
        block_size: bytes, a power of two from 4 KiB to 1 MiB.
    """

    block_size: int
    block_shift: int
    page_size: int
    page_shift: int
    pages_per_block: int
    full_mask: int

    @classmethod
    def of(cls, block_size: int) -> "Geometry":
        """The geometry of a block size that ``config.check_block_size`` accepted."""
        page_size = max(MIN_PAGE_SIZE, block_size // PAGES_PER_BLOCK)
        pages = block_size // page_size
        return cls(
            block_size=block_size,
            block_shift=block_size.bit_length() - 1,
            page_size=page_size,
            page_shift=page_size.bit_length() - 1,
            pages_per_block=pages,
            full_mask=(1 << pages) - 1,
        )

    def blocks(self, offset: int, length: int) -> range:
        """Block numbers touched by ``length`` > 0 bytes at ``offset``."""
        return range(offset >> self.block_shift, ((offset + length - 1) >> self.block_shift) + 1)

    def split(self, offset: int, length: int) -> Iterator[tuple[int, int, int]]:
        """(block, start in block, stop in block) for each block of the span, in order."""
        end = offset + length
        while offset < end:
            block = offset >> self.block_shift
            start = offset - (block << self.block_shift)
            stop = min(self.block_size, start + end - offset)
            yield block, start, stop
            offset += stop - start

    def touched(self, start: int, stop: int) -> int:
        """Mask of the pages that hold any byte of ``start:stop`` within a block."""
        if stop <= start:
            return 0
        first = start >> self.page_shift
        last = (stop - 1) >> self.page_shift
        return (1 << (last + 1)) - (1 << first)

    def covered(self, start: int, stop: int) -> int:
        """Mask of the pages that lie wholly in ``start:stop`` within a block."""
        first = (start + self.page_size - 1) >> self.page_shift
        after = stop >> self.page_shift
        return (1 << after) - (1 << first) if after > first else 0

    def page_runs(self, mask: int) -> Iterator[Run]:
        """Runs of set bits as (start in block, length), in bytes."""
        page = 0
        while mask >> page:
            while not mask >> page & 1:
                page += 1
            first = page
            while mask >> page & 1:
                page += 1
            yield Run(first << self.page_shift, (page - first) << self.page_shift)


def region_of(block: int) -> int:
    """The region a block lies in."""
    return block // REGION_BLOCKS


def merged(blocks: list[int]) -> Iterator[range]:
    """Ascending block numbers as ranges of neighbours."""
    i = 0
    while i < len(blocks):
        j = i
        while j + 1 < len(blocks) and blocks[j + 1] == blocks[j] + 1:
            j += 1
        yield range(blocks[i], blocks[j] + 1)
        i = j + 1
