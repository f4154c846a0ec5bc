"""Write modes of images that are known: given by an operator, or by a rule that changed."""

from collections.abc import Awaitable, Callable

from fusecache.config import WriteMode
from fusecache.engine.committer import Committer
from fusecache.engine.image import Image
from fusecache.engine.images import Images
from fusecache.store.block_map import Batch


class WriteModes:
    """Leaving write-back flushes; what fails of that stays dirty and is tried again.

    Args:
        flush: see ``Flushes.flush``.
    """

    def __init__(
        self, images: Images, committer: Committer, flush: Callable[[Image], Awaitable[None]]
    ) -> None:
        self._images = images
        self._committer = committer
        self._flush = flush

    async def set(self, image: Image, mode: WriteMode | None) -> Image:
        """From now on the image is written in this mode, which is a setting of its own and stable
        in the database; None ends such a setting. Raises also what ``flush`` does.

        Returns the image, made known anew if it was evicted and forgotten meanwhile.

        Raises:
            CacheDeviceError, DatabaseError: the mode is not stable.
        """
        while True:
            async with image.opening:
                known = self._images.known(image.row.identity, image.row.path)
                if known is not image:
                    image = known  # it was evicted and forgotten while we waited
                    continue
                async with image.cleaning, image.lock.everything():
                    leaving = image.write_mode is WriteMode.BACK
                    image.write_mode = mode or self._images.policy.mode_of(image.row.path)
                    image.row.write_mode = "" if mode is None else mode.value
                    image.row_owed = True
                    if mode is not None and image.bypassed and not image.handles:
                        image.bypassed = image.detached = False
                await self._committer.commit(Batch, stable=True)
                break
        if leaving and image.write_mode is not WriteMode.BACK:
            await self._flush(image)
        return image

    async def change(self, image: Image, mode: WriteMode) -> None:
        """As ``set``, where a rule asks for it; raises what ``flush`` does."""
        async with image.opening, image.cleaning, image.lock.everything():
            leaving = image.write_mode is WriteMode.BACK
            image.write_mode = mode
        if leaving and mode is not WriteMode.BACK:
            await self._flush(image)
