"""DirtyExtents: where an image is dirty, as of one moment, for whoever looks for data or holes.

All at once for each question: an image may have a hundred thousand dirty blocks.
"""

import numpy as np

from fusecache.core.geometry import Geometry
from fusecache.core.rows import U16, U32


class DirtyExtents:
    """Dirty pages of an image.

    Args:
        blocks: in order, each with a dirty page at least.
        masks: the dirty pages of each.
    """

    def __init__(self, geometry: Geometry, blocks: U32, masks: U16) -> None:
        self._geometry = geometry
        self._blocks = blocks
        self._masks = masks

    def _find(self, block: int) -> tuple[int, int]:
        """Where the block or the first one after it is, and its mask: 0 if the block is clean."""
        at = int(np.searchsorted(self._blocks, block))
        if at < self._blocks.size and int(self._blocks[at]) == block:
            return at, int(self._masks[at])
        return at, 0

    def begin(self, offset: int) -> int | None:
        """The first byte at or after ``offset`` that is in a dirty page."""
        geometry = self._geometry
        block = offset >> geometry.block_shift
        at, mask = self._find(block)
        page = (offset & geometry.block_size - 1) >> geometry.page_shift
        if mask >> page:
            return max(offset, self._at(block, (mask >> page << page)))
        at += mask != 0
        if at == self._blocks.size:
            return None
        return self._at(int(self._blocks[at]), int(self._masks[at]))

    def _at(self, block: int, mask: int) -> int:
        """The first byte of the first page of a mask."""
        page = (mask & -mask).bit_length() - 1
        return (block << self._geometry.block_shift) + (page << self._geometry.page_shift)

    def end(self, offset: int) -> int:
        """The first byte at or after ``offset`` that is in no dirty page."""
        geometry = self._geometry
        block = offset >> geometry.block_shift
        at, mask = self._find(block)
        page = (offset & geometry.block_size - 1) >> geometry.page_shift
        if not mask >> page & 1:
            return offset
        clean = geometry.full_mask & ~mask >> page << page
        if clean:
            return self._at(block, clean)
        # Whole blocks that follow without a gap, then the dirty beginning of the next.
        blocks, masks = self._blocks[at + 1 :], self._masks[at + 1 :]
        wanted = np.arange(block + 1, block + 1 + blocks.size)
        whole = (blocks == wanted) & (masks == geometry.full_mask)
        block += 1 + (blocks.size if whole.all() else int(whole.argmin()))
        return self._at(block, ~self._find(block)[1])
