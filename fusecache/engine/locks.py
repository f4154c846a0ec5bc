"""SpanLock: slow work on a span of blocks is exclusive; hits take no lock.

First come, first served: a claim waits for every earlier claim it overlaps, so nobody starves
and there are no cycles.
"""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio

END = 1 << 62
"""After every block there can be."""


class _Claim:
    __slots__ = ("done", "first", "stop")

    def __init__(self, first: int, stop: int) -> None:
        self.first = first
        self.stop = stop
        self.done = trio.Event()


class SpanLock:
    """Exclusive claims on spans of block numbers of one image."""

    def __init__(self) -> None:
        self._claims: dict[_Claim, None] = {}
        self._alone = 0
        self.told: Callable[[], None] | None = None
        """Called whenever ``exclusive`` may have changed."""

    @asynccontextmanager
    async def span(self, first: int, stop: int) -> AsyncIterator[None]:
        """Holds blocks ``first`` up to, not including, ``stop``."""
        before = [claim for claim in self._claims if claim.first < stop and first < claim.stop]
        mine = _Claim(first, stop)
        self._claims[mine] = None
        try:
            for claim in before:
                await claim.done.wait()
            yield
        finally:
            del self._claims[mine]
            mine.done.set()

    @asynccontextmanager
    async def alone(self, first: int, stop: int) -> AsyncIterator[None]:
        """As ``span``, and what takes no lock otherwise has to take one meanwhile."""
        self._count_alone(1)
        try:
            async with self.span(first, stop):
                yield
        finally:
            self._count_alone(-1)

    def _count_alone(self, more: int) -> None:
        self._alone += more
        if self.told is not None:
            self.told()

    @asynccontextmanager
    async def everything(self) -> AsyncIterator[None]:
        """Holds the whole image: nothing is under way and nothing new begins (R6)."""
        async with self.alone(0, END):
            yield

    @property
    def exclusive(self) -> bool:
        """Whether somebody works alone, or waits to: then nobody may do without a lock."""
        return self._alone > 0

    def free(self, first: int, stop: int) -> bool:
        """Whether nobody holds or waits for any of these blocks."""
        return not any(claim.first < stop and first < claim.stop for claim in self._claims)

    @property
    def idle(self) -> bool:
        """Whether nobody holds or waits."""
        return not self._claims
