"""Flushing before an end: dirty data goes to the origin while a mount still serves, or after."""

import logging
import time
from typing import Any

import trio

from fusecache.cli.cache import hinted
from fusecache.cli.progress import Progress, left_text
from fusecache.engine.block_cache import BlockCache
from fusecache.engine.image import Image
from fusecache.errors import ChangedElsewhereError, FusecacheError, LostDataError
from fusecache.observe.windows import seconds_left

log = logging.getLogger("fusecache")

_LOOK = 0.2
_LOG_INTERVAL = 10.0
_FIRST_PAUSE = 1.0
_LONGEST_PAUSE = 30.0

HOPELESS = (LostDataError, ChangedElsewhereError)
"""Nothing of it is mended by waiting."""

Failures = list[tuple[Image, FusecacheError]]


class Flushing:
    """Every image's dirty data on its way to the origin, until it is there or given up.

    It runs in a task of its own and whoever waits for it waits for ``ended``: a call that hangs
    on a stalled origin cannot be cancelled, and must not hold up the end.

    Args:
        patience: seconds without any sign of progress after which the rest is kept.
        persistent: tries again, with pauses, what the origin refused.
    """

    def __init__(self, cache: BlockCache, *, patience: float, persistent: bool) -> None:
        self._cache = cache
        self._patience = patience
        self._persistent = persistent
        self._scope = trio.CancelScope()
        self._began = time.monotonic()
        self._of = cache.dirty_bytes
        self.ended = trio.Event()
        self.stalled = False
        """Given up because the origin made no progress."""
        self.kept = False
        """Given up, for whatever reason; what is dirty stays on the cache."""
        self.failures: Failures = []
        """What could not be brought to the origin, as of the last attempt."""

    async def run(self) -> None:
        """Returns when it is done, or was given up and no call of it hangs any more."""
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._watch)
                    await self._try()
                    nursery.cancel_scope.cancel()
        except Exception as exc:
            self._cache.state.unexpected(exc, "flushing")
            self.kept = True
        finally:
            self.ended.set()

    def give_up(self) -> None:
        """What is still dirty stays on the cache."""
        if not self.ended.is_set():
            self.kept = True
            self._scope.cancel()
            self.ended.set()

    @property
    def progress(self) -> dict[str, Any]:
        """For ``status`` and for clients."""
        left, seconds = self._cache.dirty_bytes, round(time.monotonic() - self._began, 1)
        return {
            "left": left,
            "of": self._of,
            "seconds": seconds,
            "seconds_left": seconds_left(left, self._of, seconds),
            "error": str(self.failures[0][1]) if self.failures else "",
        }

    async def _try(self) -> None:
        pause = _FIRST_PAUSE
        while True:
            self.failures = await self._cache.flush_all()
            left = unflushed(self._cache, self.failures)
            hopeful = [exc for _, exc in left if not isinstance(exc, HOPELESS)]
            if not hopeful or not self._persistent:
                break
            log.warning("flushing: %s; trying again in %.0f s", hopeful[0], pause)
            await trio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        # Else the next mount's first open would have to drop what these images have cached.
        await self._cache.housekeeping.settle_all()

    async def _watch(self) -> None:
        """Tells how it goes, and gives up when it does not go."""
        last, signs = time.monotonic(), self._signs()
        logged = last
        with Progress() as line:
            while True:
                await trio.sleep(_LOOK)
                now, seen = time.monotonic(), self._signs()
                if seen != signs:
                    last, signs = now, seen
                if now - last >= self._patience:
                    log.error("the origin makes no progress: ending without it")
                    self.stalled = True
                    self.give_up()
                    return
                left = self._cache.dirty_bytes
                if now - logged >= _LOG_INTERVAL:
                    logged = now
                    log.info("flushing: %s", left_text(left, self._of))
                line.write_back("fusecache", left, self._of)

    def _signs(self) -> tuple[int, ...]:
        """What changes when the origin takes something."""
        images = self._cache.images.all()
        return (
            self._cache.dirty_bytes,
            sum(image.counters.origin_writes for image in images),
            sum(image.synced for image in images),
        )


def unflushed(cache: BlockCache, failures: Failures) -> Failures:
    """The failures that leave data on the cache which the origin does not have."""
    return [
        (image, exc)
        for image, exc in failures
        if isinstance(exc, LostDataError) or cache.dirty_bytes_of(image)
    ]


def kept_by(cache: BlockCache) -> dict[str, Any] | None:
    """What stays on the cache at an end, for ``kept_text``; None if nothing does."""
    dirty = [size for image in cache.images.all() if (size := cache.kept_bytes_of(image))]
    if not dirty:
        return None
    return {
        "bytes": sum(dirty),
        "images": len(dirty),
        "cache": str(cache.device.path),
        "named": hinted(cache.device.path, cache.block_map.path, cache.device.superblock),
    }
