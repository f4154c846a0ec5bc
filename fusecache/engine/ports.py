"""What the engine needs from outside and tests replace: clocks, threads, the kernel's pages."""

import itertools
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar, TypeVarTuple

import trio

from fusecache.config import Tuning

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class RunSync(Protocol):
    """Runs a blocking call elsewhere; ``trio.to_thread.run_sync`` is the real one."""

    def __call__(
        self,
        fn: Callable[[*Ts], T],
        *args: *Ts,
        limiter: trio.CapacityLimiter,
        abandon_on_cancel: bool = False,
    ) -> Awaitable[T]:
        """Awaits ``fn(*args)``; a cancelled caller leaves it behind only if told to."""
        ...


def _in_thread(
    fn: Callable[[*Ts], T],
    *args: *Ts,
    limiter: trio.CapacityLimiter,
    abandon_on_cancel: bool = False,
) -> Awaitable[T]:
    return trio.to_thread.run_sync(fn, *args, limiter=limiter, abandon_on_cancel=abandon_on_cancel)


class Threads:
    """Blocking calls, each kind with its own limit, so that one kind cannot starve another (P6)."""

    def __init__(self, tuning: Tuning, run_sync: RunSync = _in_thread) -> None:
        self.run = run_sync
        self._per_image = tuning.threads_per_image
        self._metadata = trio.CapacityLimiter(tuning.metadata_threads)
        self._device = trio.CapacityLimiter(tuning.device_threads)
        self._storing = trio.CapacityLimiter(1)
        self._database = trio.CapacityLimiter(1)
        self._kernel = trio.CapacityLimiter(tuning.metadata_threads)
        self._numbers = itertools.count()
        self._asking: set[int] = set()

    def new_image_limiter(self) -> trio.CapacityLimiter:
        """A limiter for the origin calls of one image."""
        return trio.CapacityLimiter(self._per_image)

    async def harmless(
        self, limiter: trio.CapacityLimiter, fn: Callable[[*Ts], T], *args: *Ts
    ) -> T:
        """An origin call that changes no data there: its caller may give up and leave it behind, so
        that a stalled origin cannot hold up an unmount. See ``Lasting`` for those whose outcome
        counts all the same."""
        return await self.run(fn, *args, limiter=limiter, abandon_on_cancel=True)

    async def metadata(self, fn: Callable[[*Ts], T], *args: *Ts) -> T:
        """Lookups, listings and attributes on the origin."""
        return await self.run(self._asked, fn, args, limiter=self._metadata)

    def _asked(self, fn: Callable[[*Ts], T], args: tuple[*Ts]) -> T:
        number = next(self._numbers)
        self._asking.add(number)
        try:
            return fn(*args)
        finally:
            self._asking.discard(number)

    def asking(self) -> list[int]:
        """The metadata calls that the origin has been asked and has not answered yet: a number for
        each, never given again."""
        return list(self._asking)

    async def device(self, fn: Callable[[*Ts], T], *args: *Ts) -> T:
        """The cache device."""
        return await self.run(fn, *args, limiter=self._device)

    async def storing(self, fn: Callable[[*Ts], T], *args: *Ts) -> T:
        """Writes of fetched blocks, one after another: writes to one file exclude each other in
        the kernel, and those who wait there spin (a third of all time, measured)."""
        return await self.run(fn, *args, limiter=self._storing)

    async def database(self, fn: Callable[[*Ts], T], *args: *Ts) -> T:
        """The block map."""
        return await self.run(fn, *args, limiter=self._database)

    async def kernel(self, fn: Callable[[*Ts], T], *args: *Ts) -> T:
        """Notifications to the kernel, which may wait for requests to be answered."""
        return await self.run(fn, *args, limiter=self._kernel)


@dataclass(frozen=True, slots=True)
class Clock:
    """Time as the engine sees it."""

    monotonic: Callable[[], float] = time.monotonic
    """Seconds; for periods."""
    origin_ns: Callable[[], int] = time.time_ns
    """Nanoseconds by the origin's clock; for P3."""


Pin = Callable[[bytes, bytes], int | None]
"""A new descriptor of the image at a path with this identity; None if it is not there. Blocks;
raises OSError."""


def no_image(path: bytes, identity: bytes) -> int | None:
    """The ``Pin`` of an engine that opens nothing by itself."""
    return None


Invalidate = Callable[[bytes], None]
"""Makes the kernel forget the pages and attributes of the image with this identity. Blocks."""


def no_pages(identity: bytes) -> None:
    """The ``Invalidate`` of an engine without a mount."""
