"""RuleFollower: brings images that are known in line with the rules, one after the other.

A rule acts at once on an image that becomes known while it holds. For one that was known before,
also from an earlier mount, there may be something to do first: what is dirty goes to the origin
when an image leaves write-back, and all blocks leave the cache, as by an eviction, before an image
is bypassed. Until that has worked the image stays as it was.
"""

import logging
import os
from collections.abc import Awaitable, Callable
from typing import Protocol

import trio

from fusecache.config import WriteMode
from fusecache.engine.image import Image
from fusecache.engine.images import Images
from fusecache.engine.ports import Pin, Threads
from fusecache.engine.state import CacheState
from fusecache.errors import FusecacheError

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
        threads: Threads,
        pin: Pin,
        evict: Evict,
        change_mode: Callable[[Image, WriteMode], Awaitable[None]],
    ) -> None:
        self._state = state
        self._images = images
        self._threads = threads
        self._pin = pin
        self._evict = evict
        self._change_mode = change_mode
        self._changed = trio.Event()
        self._changed.set()

    def wake(self) -> None:
        """The rules may have changed."""
        self._changed.set()

    async def run(self) -> None:
        """Until cancelled."""
        pause = _PAUSE
        while True:
            await self._changed.wait()
            self._changed = trio.Event()
            failed: list[tuple[Image, Exception]] = []
            async with trio.open_nursery() as nursery:  # an origin may stall for one of them (P6)
                for image in filter(self._differs, self._images.all()):
                    nursery.start_soon(self._try, image, failed)
            if not failed:
                pause = _PAUSE
                continue
            image, exc = failed[0]
            log.warning(
                "%d images do not follow the rules yet and are tried again; %s: %s",
                len(failed),
                image.name,
                exc,
            )
            with trio.move_on_after(pause):
                await self._changed.wait()
            pause = min(2 * pause, _PAUSE_MOST)
            self._changed.set()

    async def _try(self, image: Image, failed: list[tuple[Image, Exception]]) -> None:
        try:
            await self.follow(image)
        except (FusecacheError, OSError) as exc:
            failed.append((image, exc))
        except Exception as exc:
            self._state.unexpected(exc, "following the rules")

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
                    await self._images.forget(image)
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
