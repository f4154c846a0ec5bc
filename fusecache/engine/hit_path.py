"""The hit path: no await between look-up and read, no thread, no allocation but two small ones."""

from fusecache.core.index import CacheIndex
from fusecache.engine.image import Image
from fusecache.engine.state import CacheState

_BUFFER_SIZE = 1 << 20
"""The largest read the kernel sends."""


class HitPath:
    """Reads that are simply a hit: every page valid and in the page cache."""

    def __init__(self, core: CacheIndex, state: CacheState) -> None:
        self._hit = core.hit
        self._state = state
        self._device = state.device
        self._buffer = memoryview(bytearray(_BUFFER_SIZE))

    def try_read(self, image: Image, offset: int, length: int) -> memoryview | None:
        """The bytes, or None for "not simply a hit".

        The result lies in a buffer that the next call overwrites: use it before any await.
        Measured at 1 MiB: 35 us against 55 us with a new buffer each time.
        """
        left = image.size - offset
        if left < length:
            length = left
        if length <= 0 or length > _BUFFER_SIZE or not self._state.serves(image):
            return None
        runs = self._hit(image.row.id, offset, length)
        if runs is None:
            return None
        view = self._buffer[:length]
        try:
            if len(runs) == 1:
                if not self._device.try_read(runs[0].position, view):
                    return None
            else:
                done = 0
                for position, size in runs:
                    if not self._device.try_read(position, view[done : done + size]):
                        return None
                    done += size
        except OSError:
            return None  # the slow path meets the error again and deals with it
        image.counters.read_hit_bytes += length
        return view
