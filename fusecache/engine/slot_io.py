"""SlotIO: writes to slots, in place while the device keeps up, else in a thread.

A buffered write of a few pages costs less than the way to a thread and back (about 10 us against
100, measured), and every microsecond is shared by all guests. But a device that is behind makes
writers wait: then the event loop must not be the one that waits.
"""

from collections.abc import Callable

from fusecache.engine.ports import Threads
from fusecache.store.cache_device import CacheDevice

_IN_PLACE = 128 << 10
_TOO_LONG = 0.004
_APART = 0.5
"""After a write that took longer than ``_TOO_LONG`` seconds, others go to threads for so long."""


class InPlace:
    """``with in_place:`` around short blocking work; ``allowed`` unless it took too long lately."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._apart_until = float("-inf")
        self._began = 0.0

    @property
    def allowed(self) -> bool:
        """Whether to do it without a thread now."""
        return self._now() >= self._apart_until

    def __enter__(self) -> None:
        self._began = self._now()

    def __exit__(self, *exc: object) -> None:
        ended = self._now()
        if ended - self._began > _TOO_LONG:
            self._apart_until = ended + _APART


class SlotIO:
    """See the module."""

    def __init__(self, device: CacheDevice, threads: Threads, now: Callable[[], float]) -> None:
        self._device = device
        self._threads = threads
        self._in_place = InPlace(now)

    def in_place(self, length: int) -> bool:
        """Whether to write so many bytes without a thread now."""
        return length <= _IN_PLACE and self._in_place.allowed

    def write_now(self, position: int, data: memoryview) -> None:
        """Writes without a thread. Raises CacheDeviceError."""
        with self._in_place:
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
