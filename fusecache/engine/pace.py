"""Pace: how fast the cleaner may go by itself, and when it steps aside for guests."""

from collections.abc import Callable, Iterable

import trio

from fusecache.engine.image import Image

_ASIDE = 0.02
_ASIDE_MOST = 1.0
"""Seconds the cleaner steps aside for guests at most before a batch: it must get on, too."""


class Pace:
    """One for all images, since all of them share the origin."""

    def __init__(self, now: Callable[[], float], images: Callable[[], Iterable[Image]]) -> None:
        self.rate = 0
        """Bytes a second; 0 means no limit. A wait that has begun ends as it was meant."""
        self._now = now
        self._images = images
        self._next = 0.0
        self._stuck: dict[int, int] = {}

    async def wait(self, size: int, *, yielding: bool) -> None:
        """Returns when ``size`` bytes may go to the origin. Hold no lock meanwhile.

        Args:
            yielding: while guests wait for the origin, wait as well.
        """
        if self.rate:
            begin = max(self._now(), self._next)
            self._next = begin + size / self.rate
            await trio.sleep(max(0.0, begin - self._now()))
        until = self._now() + _ASIDE_MOST
        while yielding and (busy := self._guests_waiting()):
            if self._now() >= until:
                self._stuck = busy
                break
            await trio.sleep(_ASIDE)

    def _guests_waiting(self) -> dict[int, int]:
        """Images whose guests wait for the origin, with how much it did for them so far. One that
        got nothing in all the time we waited for it is stalled, and not worth waiting for."""
        return {
            image.id: done
            for image in self._images()
            if image.limiter.borrowed_tokens
            and self._stuck.get(image.id)
            != (done := image.counters.origin_reads + image.counters.origin_writes)
        }
