"""CacheState: whether the cache may be used, and what happens when it may not.

Trouble with the cache never reaches a guest while its data is clean: a failed SSD write pauses
storing, a failed database or sync ends caching until the next mount (failure table). Before the
first write after that, the next start is kept from trusting what it will find (``Fence``).
"""

import logging
from collections.abc import Callable

import trio

from fusecache.config import Tuning
from fusecache.engine.image import Image
from fusecache.errors import CacheDeviceError, FusecacheError
from fusecache.observe.counters import CacheCounters, Reason
from fusecache.observe.logs import fields
from fusecache.store.cache_device import CacheDevice

log = logging.getLogger(__name__)

UNEXPECTED = "an unexpected error in fusecache, see its log"
"""What is told of an exception that nobody foresaw."""


class CacheState:
    """Flags of one running cache."""

    def __init__(self, device: CacheDevice, tuning: Tuning, now: Callable[[], float]) -> None:
        self.device = device
        self.tuning = tuning
        self.counters = CacheCounters()
        self.usable = True
        self.draining = False
        """The mount is about to end: no page becomes dirty that was not."""
        self.emptied = False
        """The next start will believe nothing of the cache: no slot counts any more."""
        self.trouble = ""
        """Why the cache is not usable, or what went wrong last."""
        self.broken = trio.Event()
        """Set with the first error that makes the cache unusable."""
        self.shut: Callable[[], None] | None = None
        """Called when the cache is not usable any more, before anybody can act on it."""
        self.fenced = trio.Event()
        """Set once writes may go on past an unusable cache."""
        self.store_failures = 0
        """SSD writes that failed in a row; who watches says when they work again."""
        self._now = now
        self._store_after = float("-inf")

    def serves(self, image: Image) -> bool:
        """Whether blocks of the image may be read from the cache."""
        return self.usable and not image.detached

    def why_not(self, image: Image) -> Reason:
        """Why blocks of an image that is not served are not."""
        if not self.usable:
            return Reason.DEGRADED
        return Reason.BYPASS if image.bypassed else Reason.DETACHED

    def stores(self, image: Image) -> bool:
        """Whether blocks of the image may be written to the cache."""
        return self.serves(image) and self._now() >= self._store_after

    async def passable(self) -> None:
        """Returns once a write may go past the cache: at once, unless it is being fenced."""
        if not self.usable:
            await self.fenced.wait()

    def unusable(self, error: FusecacheError) -> None:
        """The map or the device cannot be relied on: everything goes past the cache."""
        self.device_failed(error)
        if self.usable:
            self.usable = False
            if self.shut is not None:
                self.shut()
            log.error(
                "the cache is degraded, all goes to the origin: %s",
                error,
                extra=fields("cache-degraded", cache=self.device.path),
            )
        self.broken.set()

    def store_failed(self, error: CacheDeviceError) -> None:
        """An SSD write failed (full, or worse): nothing is stored for a while."""
        first = not self.store_failures
        self.device_failed(error)
        self.store_failures += 1
        self._store_after = self._now() + self.tuning.store_pause
        if first:
            log.error(
                "storing on the cache pauses for %.0f s, reads and writes go on: %s",
                self.tuning.store_pause,
                error,
                extra=fields("cache-not-storing", cache=self.device.path),
            )

    @property
    def stores_again(self) -> float:
        """When the pause after the last failed SSD write ends, or ended."""
        return self._store_after

    def device_failed(self, error: FusecacheError) -> None:
        """Counts an error of the cache device or its database."""
        self.counters.device_errors += 1
        self.trouble = str(error)

    def unexpected(self, error: BaseException, doing: str) -> None:
        """An exception nobody foresaw: logged with where it came from, counted, survived."""
        self.counters.unexpected += 1
        log.error(
            "unexpected error while %s",
            doing,
            exc_info=error,
            extra=fields("unexpected-error", doing=doing),
        )

    @property
    def name(self) -> str:
        """``ok``, ``paused`` or ``degraded``, for status."""
        if not self.usable:
            return "degraded"
        return "paused" if self._now() < self._store_after else "ok"
