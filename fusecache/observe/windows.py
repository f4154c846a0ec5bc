"""History: what counters were some time ago, so that there are ratios and rates of late.

Samples are taken once a tick, whatever happens between. A sample that says the same as the last
one is not kept, so an idle image costs nothing; memory is bounded by two rings.
"""

from array import array
from bisect import bisect_right
from collections.abc import Sequence

MINUTE, HOUR = 60.0, 3600.0
_RING = 61
"""Samples of each ring: at least a minute of ticks, and an hour of minutes."""


class Ring:
    """The last samples with their times; a new one takes the place of the oldest."""

    __slots__ = ("_next", "_times", "_values", "_width")

    def __init__(self, width: int) -> None:
        self._width = width
        self._times = array("d")
        self._values = array("q")
        self._next = 0

    def add(self, now: float, values: Sequence[int]) -> None:
        """One more sample; ``now`` in seconds, later than that of the last one."""
        if len(self._times) < _RING:
            self._times.append(now)
            self._values.extend(values)
            return
        at, self._next = self._next, (self._next + 1) % _RING
        self._times[at] = now
        self._values[at * self._width : (at + 1) * self._width] = array("q", values)

    def before(self, moment: float) -> Sequence[int] | None:
        """The values of the newest sample that is not younger than ``moment``; None without."""
        times = self._times
        ordered = times[self._next :] + times[: self._next]
        found = bisect_right(ordered, moment)
        if not found:
            return None
        at = (found - 1 + self._next) % len(times)
        return self._values[at * self._width : (at + 1) * self._width]


class History:
    """Samples of ``width`` counters that only grow, each a second and each a minute."""

    __slots__ = ("_began", "_first", "_last", "_minute", "_minutes", "_seconds")

    def __init__(self, began: float, values: Sequence[int]) -> None:
        self._began = began
        self._first = tuple(values)
        self._last = self._first
        self._minute = began
        self._seconds, self._minutes = Ring(len(self._first)), Ring(len(self._first))
        self._seconds.add(began, self._first)
        self._minutes.add(began, self._first)

    def sample(self, now: float, values: Sequence[int]) -> None:
        """What the counters are now. At most one call a tick."""
        values = tuple(values)
        if values == self._last:
            return
        self._last = values
        self._seconds.add(now, values)
        if now - self._minute >= MINUTE:
            self._minute = now
            self._minutes.add(now, values)

    def over(self, now: float, seconds: float, values: Sequence[int]) -> tuple[list[int], float]:
        """How much ``values``, as they are now, grew in the last ``seconds``.

        Returns the differences and how many seconds they are of, which is less after a start. For
        more than a minute what is up to a minute older may be counted in.
        """
        moment = now - seconds
        before = self._seconds.before(moment) or self._minutes.before(moment) or self._first
        grown = [value - was for value, was in zip(values, before, strict=True)]
        return grown, max(0.0, min(seconds, now - self._began))

    def steps(self, now: float, count: int, values: Sequence[int]) -> list[list[int]]:
        """How much the counters grew in each of the last ``count`` seconds, the last one last."""
        known = [
            self._seconds.before(now - back) or self._first for back in range(count, 0, -1)
        ] + [values]
        return [
            [later - earlier for earlier, later in zip(known[at], known[at + 1], strict=True)]
            for at in range(count)
        ]


def ratio(part: int, rest: int) -> float | None:
    """The share of ``part`` in both together, 0 to 1; None of nothing."""
    return round(part / (part + rest), 4) if part + rest else None


def seconds_left(left: int, of: int, seconds: float) -> float | None:
    """How long the rest of some work takes if it goes on as it went.

    Args:
        left: bytes still to do.
        of: bytes there were to do in the beginning.
        seconds: since the beginning.

    Returns:
        Seconds; None while nothing can be said.
    """
    if left <= 0:
        return 0.0
    done = of - left
    return round(left * seconds / done, 1) if done > 0 and seconds > 0 else None
