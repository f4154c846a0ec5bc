"""How long the origin takes: histograms with fixed buckets, one for each kind of call.

Calls of the origin are timed in the thread that makes them, without the wait for that thread.
Hits are not timed one by one: that would cost a tenth of a hit.
"""

import enum
import math
import time
from array import array
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

R = TypeVar("R")

BOUNDS = tuple(25e-6 * float(2**step) for step in range(22))
"""Upper bounds of the buckets in seconds: 25 us, 50 us, ... 52.4 s. One more takes the rest."""


LANE_BOUNDS = tuple(2e-9 * float(2**step) for step in range(31))
"""As ``BOUNDS``, for what the lane serves: 2 ns, 4 ns, ... 2.1 s."""


class Call(enum.IntEnum):
    """The kinds of calls of the origin that are timed."""

    READ = 0
    WRITE = 1
    SYNC = 2


class Histogram:
    """How many calls took how long."""

    __slots__ = ("counts", "seconds")

    def __init__(self) -> None:
        self.counts = array("Q", bytes(8 * (len(BOUNDS) + 1)))
        """By bucket; a call of exactly a bound belongs to that bound's bucket."""
        self.seconds = 0.0
        """All calls together."""

    def add(self, seconds: float) -> None:
        """One more call."""
        self.counts[bisect_left(BOUNDS, seconds)] += 1
        self.seconds += seconds

    @property
    def count(self) -> int:
        """Calls."""
        return sum(self.counts)


class OriginLatency:
    """A histogram for each kind of call, in the order of ``Call``."""

    __slots__ = ("calls", "total")

    def __init__(self) -> None:
        self.calls = tuple(Histogram() for _ in Call)
        self.total: OriginLatency | None = None
        """Of the whole mount: everything added here is added there, too."""

    def add(self, call: Call, spans: Sequence[float]) -> None:
        """Calls that took so many seconds each."""
        for seconds in spans:
            self.calls[call].add(seconds)
            if self.total is not None:
                self.total.calls[call].add(seconds)


def quantile(counts: Sequence[int], share: float, bounds: Sequence[float] = BOUNDS) -> float | None:
    """About how many seconds ``share`` of the calls took at most; None if there were none.

    Within a bucket calls are taken to lie evenly on a logarithmic scale, so the result is off by
    less than a factor of two. What took longer than the last bound counts as that bound.
    """
    total = sum(counts)
    if not total:
        return None
    wanted, reached = share * total, bounds[-1]
    for bucket, count in enumerate(counts):
        if not count:
            continue
        reached = bounds[min(bucket, len(bounds) - 1)]
        if wanted <= count:
            return reached * math.exp2(wanted / count - 1) if bucket < len(bounds) else reached
        wanted -= count
    return reached


def timed(
    fn: Callable[..., R], spans: list[float], now: Callable[[], float] = time.perf_counter
) -> Callable[..., R]:
    """``fn``, with the seconds of each call appended to ``spans``, also of one that fails.

    A list takes an append from any thread; whoever waits for the call adds it to a histogram.
    """

    def call(*args: Any, **kwargs: Any) -> R:
        began = now()
        try:
            return fn(*args, **kwargs)
        finally:
            spans.append(now() - began)

    named: Any = fn
    call.__name__, call.__qualname__ = named.__name__, named.__qualname__
    return call
