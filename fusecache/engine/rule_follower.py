"""RuleFollower: brings images that are known in line with the rules, one after the other.

A rule acts at once on an image that becomes known while it holds. For one that was known before,
also from an earlier mount, there may be something to do first: what is dirty goes to the origin
when an image leaves write-back, and all blocks leave the cache, as by an eviction, before an image
is bypassed. Until that has worked the image stays as it was.
"""

import logging
import math
import os
from collections.abc import Awaitable, Callable
from typing import Protocol

import trio

from fusecache.config import WriteMode
from fusecache.engine.closing import Closing
from fusecache.engine.image import Image
from fusecache.engine.images import Images
from fusecache.engine.ports import Pin, Threads
from fusecache.engine.state import CacheState
from fusecache.errors import FusecacheError
from fusecache.observe.logs import fields

log = logging.getLogger(__name__)

_PAUSE = 2.0
_PAUSE_MOST = 60.0


class Evict(Protocol):
    """See ``Discards.evict``."""

    def __call__(self, image: Image, path_fd: int | None = None) -> Awaitable[int]: ...


class RuleFollower:
    """Works whenever the rules may have changed, and again later on what failed.

    Args:
        change_mode: gives an image another write mode, and flushes it if it leaves write-back.
    """

    def __init__(
        self,
        state: CacheState,
        images: Images,
        closing: Closing,
        threads: Threads,
        pin: Pin,
        evict: Evict,
        change_mode: Callable[[Image, WriteMode], Awaitable[None]],
    ) -> None:
        self._state = state
        self._images = images
        self._closing = closing
        self._threads = threads
        self._pin = pin
        self._evict = evict
        self._change_mode = change_mode
        self._changed = trio.Event()
        self._busy: set[int] = set()
        self._failures: dict[int, int] = {}
        """By image id, in a row."""
        self._after: dict[int, float] = {}
        """By image id: not tried again before then."""

    def wake(self) -> None:
        """The rules may have changed: all is looked at anew, also what failed before."""
        self._after.clear()
        self._failures.clear()
        self._changed.set()

    async def run(self) -> None:
        """Until cancelled. One task an image: its origin may stall (P6)."""
        async with trio.open_nursery() as nursery:
            while True:
                self._changed = trio.Event()
                now = trio.current_time()
                for image in filter(self._differs, self._images.all()):
                    if image.id not in self._busy and now >= self._after.get(image.id, now):
                        self._busy.add(image.id)
                        nursery.start_soon(self._try, image)
                waiting = (at for at in self._after.values() if at > now)
                with trio.move_on_at(min(waiting, default=math.inf)):
                    await self._changed.wait()

    async def _try(self, image: Image) -> None:
        try:
            await self.follow(image)
        except (FusecacheError, OSError) as exc:
            self._failed(image, exc)
        except Exception as exc:
            self._state.unexpected(exc, "following the rules")
            self._failed(image, exc)
        else:
            self._failures.pop(image.id, None)
            self._after.pop(image.id, None)
        finally:
            self._busy.discard(image.id)
            self._changed.set()  # they may have changed again meanwhile

    def _failed(self, image: Image, exc: Exception) -> None:
        failures = self._failures.get(image.id, 0)
        if not failures:
            log.warning(
                "%s does not follow the rules yet, and is tried again: %s",
                image.name,
                exc,
                extra=fields("rule-waits", image=image.name),
            )
        self._failures[image.id] = failures + 1
        self._after[image.id] = trio.current_time() + min(_PAUSE_MOST, _PAUSE * 2.0**failures)

    def _differs(self, image: Image) -> bool:
        """Whether there is anything to do for an image. One that is detached follows the rules
        when it becomes known anew, after its last handle closed."""
        if image.row.write_mode or not self._state.usable:
            return False
        policy, path = self._images.policy, image.row.path
        if policy.bypasses(path):
            return not image.detached
        if image.bypassed:
            return not image.handles
        return not image.detached and image.write_mode is not policy.mode_of(path)

    async def follow(self, image: Image) -> None:
        """Brings one image in line with the rules, if it is not.

        Raises:
            FusecacheError, OSError: it stays as it was.
        """
        if not self._differs(image):
            return
        if self._images.policy.bypasses(image.row.path):
            await self._bypass(image)
        elif image.bypassed:
            async with image.opening:
                if self._images.find(image.row.identity) is image and not image.handles:
                    await self._closing.end_detached(image)
        else:
            await self._change_mode(image, self._images.policy.mode_of(image.row.path))

    async def _bypass(self, image: Image) -> None:
        """All of it is on the origin and no block left; from then on it is as if evicted, and
        once nobody has it open it is forgotten, to become known anew as a bypassed one."""
        path_fd = None
        if not image.origin_open:
            path_fd = await self._threads.harmless(
                image.limiter, self._pin, image.row.path, image.row.identity
            )
        try:
            await self._evict(image, path_fd)
            image.bypassed = True
        finally:
            if path_fd is not None:
                os.close(path_fd)
