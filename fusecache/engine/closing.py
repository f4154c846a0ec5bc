"""Closing: the ends of handles, and images that nobody needs any more."""

import logging

import trio

from fusecache.config import Tuning
from fusecache.core.index import CacheIndex
from fusecache.engine.committer import Committer
from fusecache.engine.image import Image
from fusecache.engine.images import Images
from fusecache.engine.lasting import Lasting
from fusecache.engine.ownership import Ownership
from fusecache.engine.ports import Clock, Threads
from fusecache.engine.state import CacheState
from fusecache.errors import DatabaseError, OriginError
from fusecache.store.origin import Attributes

log = logging.getLogger(__name__)


class Closing:
    """See the module; how handles begin is in ``opening``."""

    def __init__(
        self,
        core: CacheIndex,
        state: CacheState,
        images: Images,
        committer: Committer,
        lasting: Lasting,
        ownership: Ownership,
        threads: Threads,
        clock: Clock,
        tuning: Tuning,
    ) -> None:
        self._core = core
        self._state = state
        self._images = images
        self._committer = committer
        self._lasting = lasting
        self._ownership = ownership
        self._threads = threads
        self._clock = clock
        self._tuning = tuning

    async def before_close(self, image: Image) -> None:
        """At a guest's close(2): waits until a change made after it cannot share our last change
        time, and notes the attributes as of now.

        Two changes within one tick of the origin's clock look the same (P3). At most one tick.
        """
        if not image.writers or not image.wrote:
            return
        since = self._clock.monotonic() - image.last_write
        if since < self._tuning.tick:
            await trio.sleep(self._tuning.tick - since)
        written = image.data_written
        try:
            seen = await self._threads.harmless(image.limiter, image.origin.attributes)
        except OriginError as exc:
            image.counters.failed(exc)
        else:
            image.closing = (written, seen)

    async def close(self, image: Image, *, write: bool) -> None:
        """One handle less. After the last writer the image's attributes are recorded."""
        async with image.opening:
            if write:
                image.writers -= 1
                if image.writers == 0:
                    await self._end_writing(image)
            else:
                image.readers -= 1
            if image.handles == 0:
                image.close_gate(self._core.gates)
            if image.handles == 0 and image.detached:
                try:
                    await self.end_detached(image)
                except OriginError as exc:
                    log.warning("%s could not be synced at its last close: %s", image.name, exc)

    def close_reader(self, image: Image) -> bool:
        """``close`` of one who only reads, if nothing is to be waited for; else False."""
        if image.opening.locked() or image.detached:
            return False
        image.readers -= 1
        if image.handles == 0:
            image.close_gate(self._core.gates)
        return True

    async def _end_writing(self, image: Image) -> None:
        # What we did not write is not taken for ours: the next open will see it (P3).
        if image.wrote:
            try:
                seen = await self._attributes_at_close(image)
            except OriginError as exc:
                image.counters.failed(exc)  # the old record stays: the next open will drop
            else:
                image.record(seen, self._clock.origin_ns(), self._tuning.settle_age, own=True)
        image.closing = None
        image.row_owed = True
        await self._ownership.release(image)

    async def _attributes_at_close(self, image: Image) -> Attributes:
        """As of the last close(2). The kernel tells us of the end of a handle only later, and
        what others did in between must not be taken for ours."""
        if image.closing is not None and image.closing[0] == image.data_written:
            return image.closing[1]
        return await self._threads.harmless(image.limiter, image.origin.attributes)

    async def end(self, image: Image) -> None:
        """At a clean stop: what is still open for writing is recorded like at a close."""
        async with image.opening:
            if image.writers:
                await self._end_writing(image)
        if image.own_pending:
            await self._ownership.cleaned(image)

    async def end_detached(self, image: Image) -> None:
        """Nobody has an evicted, bypassed or unlinked image open any more: nothing is kept of it.

        What was written past the cache is synced: once it is forgotten nobody would do so. For a
        caller that holds ``image.opening``.

        Raises:
            OriginError: that failed. The image stays as it is, for ``close_idle``, a flush or a
                clean stop to try again.
        """
        covered = image.written
        if image.origin_open and image.synced < covered:
            try:
                await self._lasting.sync(image)
            except OriginError:
                if covered > 1 and not image.gone:
                    raise
        await self.forget(image, gone=image.gone)

    async def close_idle(self, image: Image) -> None:
        """Closes the origin's descriptors of an image that nobody has open or needs."""
        if self._needs_origin(image) or image.settles:
            return
        if image.opening.locked() or not (image.origin_open or image.origin.locked):
            return
        async with image.opening:
            if self._needs_origin(image):
                return
            try:
                if image.detached:
                    await self.end_detached(image)
                    return
                if image.synced < image.written and image.written > 1:
                    await self._lasting.sync(image)  # nobody could do so later
            except OriginError:
                return
            if not self._needs_origin(image):
                await self._lasting.close(image)

    def _needs_origin(self, image: Image) -> bool:
        dirty = self._core.dirty.pages(image.id) or image.own_pending
        unsettled = image.intents or image.whole_intent
        return bool(image.handles or dirty or unsettled or not image.lock.idle)

    async def forget(self, image: Image, *, gone: bool = False) -> None:
        """The image is no longer known, here or in the database, and its descriptors closed.

        For a caller that holds ``image.opening`` and has dropped the blocks.

        Args:
            gone: the image itself is removed, so that its setting goes as well.
        """
        await self._lasting.close(image)
        image.row_owed = False
        self._images.forget(image, gone=gone)
        try:
            if self._state.usable:
                await self._committer.forget(image)
        except DatabaseError:
            await self._state.passable()
