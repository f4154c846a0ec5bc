"""Blocking work of the cache in the event loop, as long as it is quick, else in a thread.

The way to a thread and back costs more than a buffered write or a commit of a few rows (100 us
and, while guests keep the event loop busy, far more, against 10 to 30), and every microsecond is
shared by all guests. But a device that is behind makes callers wait: then the event loop must not
be the one that waits.
"""

import resource
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeVar

T = TypeVar("T")

_TOO_LONG = 0.004
_APART = 0.5
"""After work that took longer than ``_TOO_LONG`` seconds, all goes to threads for so long."""
_QUICK = 0.0005
_PROVEN = 16
"""So many syncs in a row, in a thread, have to be quicker than that."""


def _waits() -> int:
    """How often this thread has given up its processor by itself, as whoever waits for I/O does."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw


class InPlace:
    """``with in_place:`` around short blocking work; ``allowed`` unless it took too long lately.

    One within another counts as part of it.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._apart_until = float("-inf")
        self._depth = 0
        self._began = 0.0
        self._waits = 0

    @property
    def allowed(self) -> bool:
        """Whether to do it without a thread now."""
        return self._now() >= self._apart_until

    def __enter__(self) -> None:
        self._depth += 1
        if self._depth == 1:
            self._began = self._now()
            self._waits = _waits()

    def __exit__(self, *exc: object) -> None:
        self._depth -= 1
        if self._depth:
            return
        ended = self._now()
        # On a busy host work takes long because others run; only if we waited was it the device.
        if ended - self._began > _TOO_LONG and _waits() > self._waits:
            self._apart_until = ended + _APART


class Proven:
    """Work that may well be slow, like a sync: in the event loop only after it was quick in a
    thread many times in a row, and not after it was slow once.

    Args:
        allowed: False means always in a thread.
    """

    def __init__(self, now: Callable[[], float], *, allowed: bool) -> None:
        self._now = now
        self._allowed = allowed
        self._quick = 0

    async def run(
        self, work: Callable[[], T], in_thread: Callable[[Callable[[], T]], Awaitable[T]]
    ) -> T:
        """Does the work, here or by ``in_thread``."""
        if self._allowed and self._quick >= _PROVEN:
            return self._timed(work)
        return await in_thread(partial(self._timed, work) if self._allowed else work)

    def _timed(self, work: Callable[[], T]) -> T:
        began = self._now()
        result = work()
        self._quick = 0 if self._now() - began > _QUICK else self._quick + 1
        return result
