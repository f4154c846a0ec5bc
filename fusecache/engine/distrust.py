"""Distrust: after a failed origin sync the kernel may have dropped what was written: the cache
would be newer than the origin, and go back in time when a block leaves it."""

import trio

from fusecache.engine.dropping import Dropping
from fusecache.engine.image import Image
from fusecache.engine.images import Images
from fusecache.engine.state import CacheState


class Distrust:
    """Drops the clean blocks of such images, again and again with growing pauses, until it works.

    Args:
        nursery: the engine's.
    """

    def __init__(
        self, nursery: trio.Nursery, state: CacheState, images: Images, dropping: Dropping
    ) -> None:
        self._nursery = nursery
        self._state = state
        self._images = images
        self._dropping = dropping

    def begin(self, image: Image) -> None:
        """A sync of the image failed."""
        self._nursery.start_soon(self._drop, image)

    async def _drop(self, image: Image) -> None:
        pause = self._state.tuning.clean_pause
        while True:
            try:
                async with image.opening, image.lock.everything():
                    await self._dropping.drop(image, 0, dirty=False)
                return
            except Exception as exc:
                self._state.unexpected(exc, "dropping blocks after a failed sync")
            await trio.sleep(pause)
            pause = min(self._state.tuning.clean_pause_most, pause * 2)
            if self._images.find(image.row.identity) is not image:
                return
