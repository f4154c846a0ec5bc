"""Opening: what happens before somebody gets a handle of an image."""

import errno

import trio

from fusecache.config import Tuning
from fusecache.core.index import CacheIndex
from fusecache.engine.image import Image
from fusecache.engine.images import Images
from fusecache.engine.ownership import Ownership
from fusecache.engine.ports import Clock
from fusecache.engine.truth import Truth
from fusecache.errors import OriginError
from fusecache.store.origin import Attributes


class Opening:
    """See the module; the ends of handles are in ``closing``."""

    def __init__(
        self,
        core: CacheIndex,
        images: Images,
        ownership: Ownership,
        truth: Truth,
        clock: Clock,
        tuning: Tuning,
    ) -> None:
        self._core = core
        self._images = images
        self._ownership = ownership
        self._truth = truth
        self._clock = clock
        self._tuning = tuning

    async def open(self, identity: bytes, path: bytes, path_fd: int, *, write: bool) -> Image:
        """One more handle; ends with ``close``.

        At every open while no handle is open for writing the origin is opened anew and compared
        with what was recorded (P3).

        Raises:
            OriginError: the origin refused.
        """
        while True:
            image = self._images.known(identity, path)
            async with image.opening:
                if self._images.find(identity) is not image:
                    continue  # evicted and forgotten while we waited
                try:
                    await self._open(image, path_fd, write=write)
                except OriginError:
                    await self._ownership.release(image)
                    raise
                return image

    async def _open(self, image: Image, path_fd: int, *, write: bool) -> None:
        await self._let_settle(image)
        seen: Attributes | None = None
        await self._truth.look_elsewhere(image, path_fd)
        if write and self._locks(image):
            await self._ownership.lock(image, path_fd)
        if image.writers == 0 or not image.origin.readable:
            try:
                seen = await self._truth.open_side(image, path_fd, write=False)
            except OriginError as exc:
                if not (write and exc.errno == errno.EACCES):
                    raise  # a file that may only be written is served without fills
        if write and not image.origin.writable:
            seen = await self._truth.open_side(image, path_fd, write=True)
        image.kernel_true = True
        # While the cleaner's changes are not recorded yet, its handle is one open for writing.
        if seen is not None and image.writers == 0 and not image.own_pending:
            image.kernel_true = await self._truth.check(image, seen)
        await self._ownership.adopt(image)
        if write:
            if image.writers == 0:
                image.wrote = image.own_pending
                await self._ownership.begin_writing(image)
            image.writers += 1
        else:
            image.readers += 1
        image.open_gate(self._core.gates)

    async def _let_settle(self, image: Image) -> None:
        """If much of an image is cached that was closed a moment ago, waits until the change time
        of its last write is old enough to be trusted: otherwise all of it would go.

        So it is at the end of every guest of libvirt, which opens its disk at once, to lock it.
        """
        if not image.settles or image.writers or image.own_pending or image.row.trusted:
            return
        if self._core.usage(image.id).blocks >= self._tuning.settle_worth:
            age = self._tuning.settle_age
            left = age - (self._clock.origin_ns() - image.row.ctime_ns) / 1e9
            await trio.sleep(min(max(0.0, left), age))

    def _locks(self, image: Image) -> bool:
        """Whether to open it for writing takes the lock. Those who write an evicted image go on
        without; if none of them is left, whoever opens it anew needs it again."""
        if image.detached:
            return not (image.writers or image.bypassed or image.gone)
        return True
