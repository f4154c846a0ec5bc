"""Seeks: lseek(2) for data and holes, which pyfuse3 cannot express."""

import errno
import os

from fusecache.core.extents import DirtyExtents
from fusecache.core.index import CacheIndex
from fusecache.engine.image import Image
from fusecache.engine.locks import END
from fusecache.engine.ports import Threads
from fusecache.engine.state import CacheState
from fusecache.errors import OriginError


class Seeks:
    """Where a guest would read data, and where zeros that take no space."""

    def __init__(self, core: CacheIndex, state: CacheState, threads: Threads) -> None:
        self._core = core
        self._geometry = core.geometry
        self._state = state
        self._threads = threads

    async def seek(self, image: Image, offset: int, whence: int) -> int:
        """SEEK_DATA and SEEK_HOLE of lseek(2) over what a guest would read: where a page is dirty
        there is data, whatever the origin has there.

        What is dirty is noted before the origin is asked: a page that is written back in between
        is then data twice, and never a hole.

        Raises:
            OSError: ENXIO past the end, or if no data follows; EINVAL for anything but these two.
            OriginError: the origin failed.
        """
        if whence not in (os.SEEK_DATA, os.SEEK_HOLE):
            raise OSError(errno.EINVAL, "neither SEEK_DATA nor SEEK_HOLE")
        end = image.size if self._state.serves(image) else END
        if not 0 <= offset < end:
            raise OSError(errno.ENXIO, "past the end")
        dirty: DirtyExtents | None = None
        if self._core.dirty.pages(image.id):
            dirty = self._core.dirty.extents(image.id, offset >> self._geometry.block_shift)
        with image.admitted():
            if whence == os.SEEK_HOLE:
                return min(end, await self._hole_after(image, offset, dirty))
            found = await self._ask(image, offset, whence)
        begin = None if dirty is None else dirty.begin(offset)
        places = [place for place in (found, begin) if place is not None and place < end]
        if not places:
            raise OSError(errno.ENXIO, "no data follows")
        return min(places)

    async def _hole_after(self, image: Image, offset: int, dirty: DirtyExtents | None) -> int:
        """There is always one: past the end of the image is a hole, too."""
        found = await self._ask(image, offset, os.SEEK_HOLE)
        if found is None:
            raise OSError(errno.ENXIO, "past the end")
        while dirty is not None and found is not None:
            offset = dirty.end(found)
            if offset == found or offset >= image.size:
                return min(offset, image.size)
            found = await self._ask(image, offset, os.SEEK_HOLE)
        return offset if found is None else found

    async def _ask(self, image: Image, offset: int, whence: int) -> int | None:
        try:
            found = await self._threads.harmless(image.limiter, image.origin.seek, offset, whence)
        except OriginError as exc:
            image.counters.failed(exc)
            raise
        image.counters.origin_others += 1
        return found
