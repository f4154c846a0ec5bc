"""Storing: pages on their way into slots. Begun, awaited and finished in one task."""

from types import TracebackType

from fusecache.core.index import CacheIndex
from fusecache.store.cache_device import CacheDevice


class Storing:
    """Collects pieces of consecutive blocks, then ``write`` puts them on the device.

    As a context manager it settles every slot exactly once: ``done`` makes the pages valid;
    leaving without it, by whatever exception, leaves no page valid that may be spoiled.
    """

    def __init__(self, core: CacheIndex, image: int) -> None:
        self._core = core
        self._image = image
        self._slots: list[tuple[int, int]] = []
        self._writes: list[tuple[int, list[memoryview]]] = []
        self._end = -1
        self.stored_bytes = 0

    def __enter__(self) -> "Storing":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        slots, self._slots = self._slots, []
        for slot, pages in slots:
            self._core.not_stored(slot, pages)

    def add(self, block: int, start: int, data: memoryview, pages: int) -> bool:
        """``data`` goes to the block at ``start`` and makes ``pages`` (a mask) valid.

        Returns:
            False if there is no slot for the block; nothing was added.
        """
        slot = self._core.begin_store(self._image, block)
        if slot is None:
            return False
        self._slots.append((slot, pages))
        position = (slot << self._core.geometry.block_shift) + start
        if position == self._end:
            self._writes[-1][1].append(data)
        else:
            self._writes.append((position, [data]))
        self._end = position + len(data)
        self.stored_bytes += len(data)
        return True

    def write(self, device: CacheDevice) -> None:
        """Writes all pieces, adjacent ones in one call. Blocks; raises CacheDeviceError."""
        for position, parts in self._writes:
            device.write(position, parts[0] if len(parts) == 1 else b"".join(parts))

    def done(self) -> None:
        """The pieces are on the device: their pages are valid from now on."""
        slots, self._slots = self._slots, []
        for slot, pages in slots:
            self._core.stored(slot, pages)
