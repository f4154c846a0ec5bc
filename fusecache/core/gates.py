"""Gates: what the compiled lane is told of images that are open, and what it tells.

One entry of 128 bytes for each; ``lane/core.h`` lays it out in the same way. Whatever is written
here holds for the lane at once, and whoever closes a gate may change what lies behind it: the lane
looks once more before it answers. Without the lane nobody opens one.
"""

from collections.abc import Iterable
from threading import Lock

import numpy as np
import numpy.typing as npt

GATES = 1024
"""Images that may be open at a time and known to the lane; others are served without it."""
MARKS = 8
NO_BLOCK = 0xFFFFFFFF
_READS, _WRITES, _SYNCS = 1, 2, 4
_SOILED = 1 << 16
_WORDS32, _WORDS64 = 32, 16
_FLAGS, _IMAGE, _FIRST_MARK = 0, 1, 4
_SIZE, _CHANGES, _COUNTERS = 1, 7, 8
_BEGUN, _GOOD, _SYNCING = 0, 1, 2


def _words_of_empty() -> tuple[int, ...]:
    words = np.zeros(_WORDS64, np.uint64)
    words.view(np.uint32)[_FIRST_MARK : _FIRST_MARK + MARKS] = NO_BLOCK
    return tuple(words.tolist())


_EMPTY = _words_of_empty()
COUNTED = 6
"""Reads, their bytes, those that were not in memory, their bytes, overwrites, their bytes."""


class Gates:
    """The entries, and the slots that the lane has written to since the last sync.

    The lane syncs, too. What such a sync is to make stable is noted as long as it is under way, and
    stays so if it fails.
    """

    def __init__(self, slot_count: int) -> None:
        self.words_of: npt.NDArray[np.uint64] = np.zeros(GATES * _WORDS64, np.uint64)
        self.soiled_of: npt.NDArray[np.uint32] = np.zeros(min(_SOILED, slot_count), np.uint32)
        self.soiled_count_of: npt.NDArray[np.uint64] = np.zeros(1, np.uint64)
        self.syncing_of: npt.NDArray[np.uint32] = np.zeros(self.soiled_of.size, np.uint32)
        self.syncing_pages_of: npt.NDArray[np.uint16] = np.zeros(self.soiled_of.size, np.uint16)
        self.syncs_of: npt.NDArray[np.uint64] = np.zeros(3, np.uint64)
        """Syncs of the lane that have begun, the last one that was good, entries of
        ``syncing_of``."""
        self.clock_of: npt.NDArray[np.uint64] = np.ones(1, np.uint64)
        """The next tick of the LRU order. The lane gives them out as well; should both do so at the
        same moment, some are given twice."""
        self.words32_of = self.words_of.view(np.uint32)
        self.words32 = self.words32_of.data
        self.words64 = self.words_of.data
        self.clock = self.clock_of.data
        self._soiled_count = self.soiled_count_of.data
        self._syncs = self.syncs_of.data
        self._free = list(range(GATES - 1, -1, -1))
        self._shut = False
        self._fence = Lock()
        self.used = False
        """Whether there is a lane."""

    def open(self, image: int, size: int) -> "Gate | None":
        """A gate for an image, shut; None if all are taken or there is no lane."""
        return Gate(self, self._free.pop(), image, size) if self.used and self._free else None

    def close(self, gate: "Gate") -> None:
        """Nobody has the image open any more; ``gate.take`` has been called for the last time."""
        gate.let(reads=False, writes=False)
        self._free.append(gate.number)

    def shut(self) -> None:
        """Nothing passes any gate from now on. What the caller reads after this is what the lane
        has written before it looked at a gate for the last time."""
        self._shut = True
        self.words32_of[_FLAGS::_WORDS32] = 0
        with self._fence:  # the processor puts off no store beyond a lock
            pass

    @property
    def is_shut(self) -> bool:
        """Whether ``shut`` was called."""
        return self._shut

    def take_soiled(self) -> npt.NDArray[np.uint32]:
        """The slots that had no unsynced page before the lane wrote to them."""
        count = self._soiled_count[0]
        self._soiled_count[0] = 0
        return self.soiled_of[:count].copy()

    @property
    def syncs_begun(self) -> int:
        """How many syncs the lane has begun; none begins before its next turn."""
        return self._syncs[_BEGUN]

    @property
    def last_good_sync(self) -> int:
        """The number of the last one that has made all stable that was written before it began."""
        return self._syncs[_GOOD]

    def take_syncing(self) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint16]]:
        """Slots and pages (masks) that wait for a sync of the lane, or that one did not make
        stable."""
        count = self._syncs[_SYNCING]
        self._syncs[_SYNCING] = 0
        return self.syncing_of[:count].copy(), self.syncing_pages_of[:count].copy()


class Gate:
    """That of one image."""

    __slots__ = ("_at32", "_at64", "_gates", "_seen", "_words32", "_words64", "number")

    def __init__(self, gates: Gates, number: int, image: int, size: int) -> None:
        self._gates = gates
        self.number = number
        self._words32, self._words64 = gates.words32, gates.words64
        self._at32, self._at64 = number * _WORDS32, number * _WORDS64
        for at, word in enumerate(_EMPTY, self._at64):  # not in one piece: the lane may look at it
            self._words64[at] = word
        self._words32[self._at32 + _IMAGE] = image
        self.resize(size)
        self._seen = [0] * COUNTED

    def resize(self, size: int) -> None:
        """The image has so many bytes."""
        self._words64[self._at64 + _SIZE] = size

    def let(self, *, reads: bool, writes: bool, syncs: bool = False) -> None:
        """Whether hits may be answered, dirty pages be written over, and an fsync be answered after
        a sync of the cache device alone, without Python."""
        flags = _READS | (writes and _WRITES) | (syncs and _SYNCS) if reads else 0
        self._words32[self._at32 + _FLAGS] = 0 if self._gates.is_shut else flags

    def mark(self, blocks: Iterable[int]) -> None:
        """A hit in one of these blocks, at most ``MARKS``, is for Python. What does not fit is
        left out: nothing is cached so far out but for one last block."""
        at = self._at32 + _FIRST_MARK
        marks = [block for block in blocks if block < NO_BLOCK][:MARKS]
        for place in range(MARKS):
            self._words32[at + place] = marks[place] if place < len(marks) else NO_BLOCK

    @property
    def changes(self) -> int:
        """How often the lane wrote to the image."""
        return self._words64[self._at64 + _CHANGES]

    def take(self) -> list[int]:
        """What the lane counted since the last call: ``COUNTED`` numbers."""
        at = self._at64 + _COUNTERS
        now = self._words64[at : at + COUNTED].tolist()
        grown = [new - old for new, old in zip(now, self._seen, strict=True)]
        self._seen = now
        return grown
