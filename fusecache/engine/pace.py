"""Pace: how fast the cleaner may go by itself, and when it steps aside for guests."""

from collections.abc import Callable, Iterable

import trio

from fusecache.engine.image import Image

_ASIDE = 0.02
_ASIDE_MOST = 1.0
"""Seconds the cleaner steps aside for guests at most before each run: it must get on, too."""


class Pace:
    """One for all images, since all of them share the origin.

    Args:
        rate: bytes a second; 0 means no limit.
    """

    def __init__(
        self, rate: int, now: Callable[[], float], images: Callable[[], Iterable[Image]]
    ) -> None:
        self._rate = rate
        self._now = now
        self._images = images
        self._next = 0.0

    async def wait(self, size: int, *, yielding: bool) -> None:
        """Returns when ``size`` bytes may go to the origin.

        Args:
            yielding: while guests wait for the origin, wait as well.
        """
        if self._rate:
            begin = max(self._now(), self._next)
            self._next = begin + size / self._rate
            await trio.sleep(max(0.0, begin - self._now()))
        until = self._now() + _ASIDE_MOST
        while yielding and self._guests_wait():  # nobody tells when they end
            if self._now() >= until:
                break
            await trio.sleep(_ASIDE)

    def _guests_wait(self) -> bool:
        return any(image.limiter.borrowed_tokens for image in self._images())
