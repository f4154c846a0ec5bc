"""The hit path: no await between look-up and device, no thread, two small allocations."""

from fusecache.core.index import CacheIndex
from fusecache.engine.image import Image
from fusecache.engine.readahead import Readahead
from fusecache.engine.slot_io import SlotIO
from fusecache.engine.state import CacheState
from fusecache.errors import CacheDeviceError

_BUFFER_SIZE = 1 << 20
"""The largest read the kernel sends."""


class HitPath:
    """Reads and writes that are simply a hit."""

    def __init__(
        self, core: CacheIndex, state: CacheState, slots: SlotIO, readahead: Readahead
    ) -> None:
        self._hit = core.hit
        self._overwrite = core.dirty.overwrite
        self._state = state
        self._device = state.device
        self._slots = slots
        self._passed = readahead.passed
        self._buffer = memoryview(bytearray(_BUFFER_SIZE))

    def try_read(self, image: Image, offset: int, length: int) -> memoryview | None:
        """The bytes if every page is valid and in the page cache; None for "not simply a hit".

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
        counters = image.counters
        counters.read_hits += 1
        counters.read_hit_bytes += length
        if image.marks:
            self._passed(image, offset, length)
        return view

    def try_write(self, image: Image, offset: int, data: bytes) -> bool:
        """Writes data whose pages are all dirty already, in whatever mode (R5): no row changes,
        so nothing has to be waited for. False, and nothing is written, for anything else."""
        length = len(data)
        if (
            not length
            or offset + length > image.size
            or not self._state.serves(image)
            or image.lock.exclusive
            or not self._slots.in_place(length)
        ):
            return False
        runs = self._overwrite(image.row.id, offset, length)
        if runs is None:
            return False
        view, done = memoryview(data), 0
        try:
            for position, size in runs:
                self._slots.write_now(position, view[done : done + size])
                done += size
        except CacheDeviceError:
            return False  # the slow path meets the error again and deals with it
        finally:
            image.changed()  # in any case: the device may have some of it
        counters = image.counters
        counters.writes += 1
        counters.write_bytes += length
        return True
