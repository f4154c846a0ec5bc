"""DirtyReads: dirty pages out of their slots, exactly, or the news that they cannot be read.

Clean trouble is a miss; dirty trouble is an error that names its pages (failure table).
"""

import logging

from fusecache.core.index import CacheIndex
from fusecache.engine.image import Image
from fusecache.engine.state import CacheState
from fusecache.errors import CacheDeviceError
from fusecache.observe.logs import fields

log = logging.getLogger(__name__)


class DirtyReads:
    """Blocking reads of pages of one block; call them in a thread."""

    def __init__(self, core: CacheIndex, state: CacheState) -> None:
        self._geometry = core.geometry
        self._device = state.device

    def read(self, slot: int, pages: int) -> tuple[list[tuple[int, bytes]], int]:
        """What can be read of the pages (a mask) of a slot.

        Returns:
            (start in block, bytes) in order, and the mask of the pages that failed.
        """
        geometry = self._geometry
        base = slot << geometry.block_shift
        pieces: list[tuple[int, bytes]] = []
        failed = 0
        for begin, length in geometry.page_runs(pages):
            try:
                pieces.append((begin, self._device.read(base + begin, length)))
            except CacheDeviceError:
                for at in range(begin, begin + length, geometry.page_size):
                    try:
                        pieces.append((at, self._device.read(base + at, geometry.page_size)))
                    except CacheDeviceError:
                        failed |= 1 << (at >> geometry.page_shift)
        return pieces, failed


def unreadable_ranges(core: CacheIndex, image: Image) -> list[tuple[int, int]]:
    """(offset, length) in bytes of dirty pages that failed when last asked for."""
    still = [
        (block, pages & core.dirty.mask(image.id, block))
        for block, pages in sorted(image.unreadable.items())
    ]
    return core.dirty.ranges(still)


def note_unreadable(image: Image, block: int, asked: int, failed: int) -> None:
    """Keeps what ``status`` tells: which dirty pages failed when last asked for."""
    before = image.unreadable.get(block, 0)
    now = before & ~asked | failed
    if failed & ~before:
        log.error(
            "%s: dirty pages %#x of block %d cannot be read from the cache device",
            image.name,
            failed,
            block,
            extra=fields("dirty-unreadable", image=image.name, block=block),
        )
    if now:
        image.unreadable[block] = now
    else:
        image.unreadable.pop(block, None)
