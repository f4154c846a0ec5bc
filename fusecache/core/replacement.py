"""Who leaves next.

A policy sees the slot table and answers with victims; that protocol is all the index knows of
it. ``Lru`` is exact: it takes the slots with the lowest ``last_used`` in one sweep, and hands
them out in order as long as they were not used since. A slot used after the sweep has a
higher tick than any candidate; only a slot that could not leave at the sweep and now can, without
a use in between, may be older, and ``returned`` tells of it. That makes a touch one store into an
array, where a linked list needs six.
"""

from heapq import heappop, heappush
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fusecache.core.slots import SlotTable
from fusecache.core.states import State

_SAMPLE = 1 << 16
_SHARE = 64
_MINIMUM = 256
_LATE = 4096
"""Returned slots that are kept in order; with more of them the next sweep comes early."""


class Replacement(Protocol):
    """Chooses victims among the slots of a table."""

    def victims(self, count: int) -> list[int]:
        """Up to ``count`` distinct VALID, unpinned slots that should leave, the first one first."""
        ...

    def returned(self, slot: int) -> None:
        """The slot was dirty or pinned, may leave now, and was not necessarily used since."""
        ...


class Lru:
    """Least recently used first, to the last slot."""

    def __init__(self, slots: SlotTable) -> None:
        self._slots = slots
        self._candidates: npt.NDArray[np.uint32] = np.empty(0, np.uint32)
        self._ticks: npt.NDArray[np.uint64] = np.empty(0, np.uint64)
        self._next = 0
        self._last = -1
        self._late: list[tuple[int, int]] = []

    def returned(self, slot: int) -> None:
        """See ``Replacement.returned``."""
        tick = self._slots.last_used[slot]
        if tick > self._last:
            return  # younger than all candidates
        if len(self._late) < _LATE:
            heappush(self._late, (tick, slot))
        else:
            self._next, self._last, self._late = self._candidates.size, -1, []

    def victims(self, count: int) -> list[int]:
        """See ``Replacement.victims``. One sweep costs about 2 ms a million slots."""
        found: list[int] = []
        chosen: set[int] = set()
        for sweep in (False, True):
            if sweep:
                self._sweep(count)  # those in ``found`` are still in the table and come again
            self._take(count, found, chosen)
            if len(found) == count:
                break
        return found

    def _take(self, count: int, found: list[int], chosen: set[int]) -> None:
        slots = self._slots
        while len(found) < count and (self._next < self._candidates.size or self._late):
            tick, slot = self._pop()
            unused = slots.last_used[slot] == tick and slots.state[slot] == State.VALID
            if unused and not slots.pins[slot] and slot not in chosen:
                found.append(slot)
                chosen.add(slot)

    def _pop(self) -> tuple[int, int]:
        """(tick, slot) of the oldest candidate left, or of an older one that returned."""
        if self._next < self._candidates.size:
            tick = int(self._ticks[self._next])
            if not self._late or tick <= self._late[0][0]:
                self._next += 1
                return tick, int(self._candidates[self._next - 1])
        return heappop(self._late)

    def _sweep(self, wanted: int) -> None:
        """Collects at least ``wanted`` of the oldest unpinned VALID slots, if there are so many."""
        slots = self._slots
        evictable = (slots.state_of == State.VALID) & (slots.pins_of == 0)
        total = int(np.count_nonzero(evictable))
        wanted = min(total, max(_MINIMUM, wanted, total // _SHARE))
        if wanted < total:
            evictable &= slots.last_used_of <= self._threshold(evictable, wanted, total)
        chosen = np.flatnonzero(evictable).astype(np.uint32)
        ticks = slots.last_used_of[chosen]
        # No more than wanted: where many share a tick (loaded without an order) the rest are no
        # older, and 12 bytes for each of them would be too much memory.
        order = np.argsort(ticks, kind="stable")[:wanted]
        self._candidates, self._ticks, self._next = chosen[order], ticks[order], 0
        self._last = int(self._ticks[-1]) if self._ticks.size else -1
        self._late = []

    def _threshold(self, evictable: npt.NDArray[np.bool_], wanted: int, total: int) -> np.uint64:
        """A tick that about ``wanted`` slots do not exceed, and never fewer than that."""
        ticks = self._slots.last_used_of
        stride = max(1, ticks.size // _SAMPLE)
        sample = np.sort(ticks[::stride][evictable[::stride]])
        rank = min(sample.size - 1, 1 + sample.size * wanted * 5 // (total * 4))
        while sample.size and rank < sample.size - 1:
            threshold: np.uint64 = sample[rank]
            if np.count_nonzero(evictable & (ticks <= threshold)) >= wanted:
                return threshold
            rank = min(sample.size - 1, rank * 2)
        return np.uint64(np.iinfo(np.uint64).max)
