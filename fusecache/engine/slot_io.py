"""SlotIO: writes to slots, in place while the device keeps up, else in a thread."""

from fusecache.engine.in_place import InPlace
from fusecache.engine.ports import Threads
from fusecache.store.cache_device import CacheDevice

IN_PLACE = 128 << 10
"""The most that is written without a thread at a time."""


class SlotIO:
    """See the module; ``here`` is told how long the device makes the event loop wait."""

    def __init__(self, device: CacheDevice, threads: Threads, here: InPlace) -> None:
        self._device = device
        self._threads = threads
        self.here = here

    def in_place(self, length: int) -> bool:
        """Whether to write so many bytes without a thread now."""
        return length <= IN_PLACE and self.here.allowed

    def write_now(self, position: int, data: memoryview) -> None:
        """Writes without a thread. Raises CacheDeviceError."""
        with self.here:
            self._device.write(position, data)

    async def write(self, pieces: list[tuple[int, memoryview]]) -> None:
        """Writes (position in slot space, data), one after another.

        Raises:
            CacheDeviceError: any of it may have been written.
        """
        if self.in_place(sum(len(data) for _, data in pieces)):
            for position, data in pieces:
                self.write_now(position, data)
        else:
            await self._threads.device(self._write_all, pieces)

    def _write_all(self, pieces: list[tuple[int, memoryview]]) -> None:
        for position, data in pieces:
            self._device.write(position, data)
