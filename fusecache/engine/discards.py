"""Discards: truncate, removal of the last name, and eviction (R6, P5).

Each excludes all other slow work on the image, takes the blocks out of the core and the
database stably, and only then lets anything past the cache.
"""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio

from fusecache.core.geometry import region_of
from fusecache.core.index import CacheIndex
from fusecache.engine.cleaner import Cleaner
from fusecache.engine.closing import Closing
from fusecache.engine.degraded import Degraded
from fusecache.engine.dropping import Dropping
from fusecache.engine.image import Image
from fusecache.engine.images import Images
from fusecache.engine.intents import WriteIntents
from fusecache.engine.lasting import Lasting
from fusecache.engine.ownership import Ownership
from fusecache.engine.ports import Invalidate, Threads
from fusecache.engine.state import CacheState
from fusecache.engine.truth import Truth
from fusecache.errors import DatabaseError, ImageOpenError, OriginError

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Removal:
    """The removal of an image's last name, while it is under way."""

    happened: bool = False
    """The image has no name any more. Whoever removes it says so at once: its blocks go then,
    whatever fails afterwards."""


class Discards:
    """What makes blocks of an image go on purpose."""

    def __init__(
        self,
        core: CacheIndex,
        state: CacheState,
        images: Images,
        dropping: Dropping,
        lasting: Lasting,
        ownership: Ownership,
        truth: Truth,
        closing: Closing,
        intents: WriteIntents,
        cleaner: Cleaner,
        degraded: Degraded,
        threads: Threads,
        invalidate: Invalidate,
    ) -> None:
        self._core = core
        self._state = state
        self._images = images
        self._dropping = dropping
        self._lasting = lasting
        self._ownership = ownership
        self._truth = truth
        self._closing = closing
        self._intents = intents
        self._cleaner = cleaner
        self._degraded = degraded
        self._threads = threads
        self._invalidate = invalidate

    async def truncate(self, image: Image, size: int) -> None:
        """Sets the size of an image that is open for writing.

        Origin first, origin sync, then the rows stably; nothing else happens to the image.

        Raises:
            OriginError: the origin failed; the blocks beyond ``size`` are gone all the same.
            LostDataError, CacheDeviceError: the block of the new end is dirty and cannot be
                written back; nothing happened.
        """
        async with image.cleaning, image.lock.everything():
            image.wrote = True
            if not self._state.serves(image):
                await self._past_cache(image, size)
                return
            if size >= image.size:
                await self._truncate_origin(image, size)
                return
            geometry = self._core.geometry
            region = region_of(size >> geometry.block_shift)
            try:
                if size % geometry.block_size:
                    await self._cleaner.finish_block(image, size >> geometry.block_shift)
                # The region of the new end is active, should we die between origin and rows.
                async with self._intents.writing(image, range(region, region + 1)):
                    await self._truncate_cached(image, size)
            except DatabaseError:
                await self._past_cache(image, size)

    async def _past_cache(self, image: Image, size: int) -> None:
        await self._state.passable()
        self._refuse_held(image, size)
        await self._truncate_origin(image, size)

    def _refuse_held(self, image: Image, size: int) -> None:
        """A broken cache cannot forget dirty pages, and they would come back in a longer file."""
        if not self._degraded.holds(image):
            return
        geometry = self._core.geometry
        first = size >> geometry.block_shift
        if size >= image.size:
            first = -(-image.size >> geometry.block_shift)
        slots = self._core.dirty.slots(image.id).tolist()
        if any(self._core.dirty.place(slot)[0] >= first for slot in slots):
            raise OriginError(5, "the cache is degraded and holds data past the new end")

    async def _truncate_cached(self, image: Image, size: int) -> None:
        geometry = self._core.geometry
        block, tail = divmod(size, geometry.block_size)
        before = image.size
        try:
            await self._truncate_origin(image, size)
        except OriginError:
            await self._learn_size(image)  # it may have cut the file before it failed
            raise
        finally:
            if tail:
                self._core.clear(image.id, block, geometry.touched(tail, geometry.block_size))
            cut = image.size < before
            await self._dropping.drop(image, block + (1 if tail else 0), dirty=cut)

    async def _learn_size(self, image: Image) -> None:
        try:
            seen = await self._threads.harmless(image.limiter, image.origin.attributes)
        except OriginError as exc:
            image.counters.failed(exc)
        else:
            image.size = min(image.size, seen.size)

    async def _truncate_origin(self, image: Image, size: int) -> None:
        try:
            await self._threads.run(image.origin.truncate, size, limiter=image.limiter)
            image.size = size
        except OriginError as exc:
            image.counters.failed(exc)
            raise
        finally:
            image.wrote_origin(data=False)
        await self._lasting.sync(image)

    @asynccontextmanager
    async def removing(self, identity: bytes) -> AsyncIterator[Removal | None]:
        """Around the removal of an image's last name: if it has happened its blocks go, stably.

        Gives None if the image is not known; if it is, the removal must be synced as well. Handles
        that are open keep working, uncached.
        """
        while (image := self._images.find(identity)) is not None:
            if self._outlives(image):
                await self._ownership.adopted(image)
                if not self._state.usable:
                    await self._degraded.rescue(image)
            async with image.opening, image.cleaning, image.lock.everything():
                if self._images.find(identity) is not image:
                    continue  # evicted and forgotten while we waited
                if self._outlives(image):
                    if not (image.origin.writable and (self._state.usable or image.rescued)):
                        continue  # opened, or the cache broke, while we waited
                    if self._state.usable:
                        await self._cleaner.finish(image)
                removal = Removal()
                try:
                    yield removal
                finally:
                    if removal.happened:
                        await self._removed(image)
                return
        yield None

    def _outlives(self, image: Image) -> bool:
        """Whether whoever has it open goes on with it after its removal, and has dirty data: that
        must be where they will read it. It is there already if a broken cache's slots count no
        more."""
        counts = self._state.usable or self._degraded.holds(image)
        return bool(counts and image.handles and self._core.dirty.pages(image.id))

    async def _removed(self, image: Image) -> None:
        image.detached = image.gone = True
        with trio.CancelScope(shield=True):
            try:
                await self._dropping.drop(image, 0, dirty=True)
            except DatabaseError as exc:
                log.error("rows of a removed image stay: %s", exc)
        await self._ownership.unlock(image)
        if not image.handles:
            await self._closing.forget(image, gone=True)

    async def evict(
        self,
        image: Image,
        path_fd: int | None = None,
        *,
        discard_dirty: bool = False,
    ) -> int:
        """Flushes an image and drops its blocks alone; returns how many were dropped.

        If it is open it is detached: uncached and written through until its last handle closes.
        Its blocks go before the first write can pass them. Invalidation pushes out pages that
        guests changed in mappings; they arrive as writes, straight to the origin, before the
        origin sync. ``opening`` is free meanwhile, since the kernel may hold such pages back
        while it waits for an open or a truncate of the same image.

        Args:
            path_fd: a descriptor to open the image by for its sync, if nobody has it open.
            discard_dirty: what the origin has not is dropped as well.

        Raises:
            OriginError, LostDataError, CacheDeviceError: it is not all on the origin; the image
                stays as it was, or is detached if only its last sync failed.
            DatabaseError: the rows could not be dropped.
        """
        self._refuse_broken()
        image.draining += 1
        try:
            if self._core.dirty.pages(image.id) and not discard_dirty:
                await self._threads.kernel(self._invalidate, image.row.identity)
                await self._cleaner.clean(image)
            async with image.opening, image.cleaning, image.lock.everything():
                if not discard_dirty and self._core.dirty.pages(image.id):
                    await self._cleaner.finish(image)
                blocks = self._core.usage(image.id).blocks
                # All or nothing, also if whoever asked gives up: a write past the cache must not
                # meet rows or pages that are left.
                with trio.CancelScope(shield=True):
                    await self._dropping.drop(image, 0, dirty=True)
                    image.detached = image.adopted = True
                    image.changed_elsewhere = False
                    image.unreadable.clear()
        finally:
            image.draining -= 1
            if image.own_pending:
                await self._ownership.cleaned(image)
        await self._threads.kernel(self._invalidate, image.row.identity)
        async with image.opening:
            async with image.lock.everything():
                await self._sync(image, path_fd)
            if self._images.find(image.row.identity) is image:  # else it was forgotten meanwhile
                await self._ownership.unlock(image)
                if not image.handles:
                    await self._closing.forget(image)
        self._refuse_broken()
        return blocks

    async def evict_closed(self, image: Image, path_fd: int | None) -> int:
        """``evict`` for an image that nobody has open; whoever opens it then finds it forgotten,
        and not detached for as long as he has it open.

        Opens wait meanwhile. The kernel cannot: of a closed image nothing is changed in mappings,
        and no read is unanswered.

        Raises:
            ImageOpenError: it is open, or was opened while it was flushed; it stays cached.
            OriginError, LostDataError, CacheDeviceError, DatabaseError: see ``evict``.
        """
        self._refuse_broken()
        _refuse_open(image)
        await self.drain(image)
        await self.sync(image, path_fd)
        async with image.opening:
            if self._images.find(image.row.identity) not in (image, None):
                raise ImageOpenError(f"'{image.name}' was opened meanwhile")
            async with image.cleaning, image.lock.everything():
                _refuse_open(image)
                if self._core.dirty.pages(image.id):
                    await self._cleaner.finish(image)
                blocks = self._core.usage(image.id).blocks
                with trio.CancelScope(shield=True):
                    await self._dropping.drop(image, 0, dirty=True)
                    image.unreadable.clear()
                await self._sync(image, path_fd)
            await self._threads.kernel(self._invalidate, image.row.identity)
            await self._ownership.unlock(image)
            await self._closing.forget(image)
        self._refuse_broken()
        return blocks

    def _refuse_broken(self) -> None:
        if not self._state.usable:
            raise DatabaseError(
                f"the cache is degraded ({self._state.trouble}): nothing can be evicted from it. "
                "Unmount it; what is dirty is brought to the origin by that"
            )

    async def drain(self, image: Image) -> None:
        """Everything dirty goes to the origin, synced, and nothing of the image is dirty then.

        Raises:
            OriginError, LostDataError, DatabaseError, CacheDeviceError: some of it stays dirty.
        """
        image.draining += 1
        try:
            await self._cleaner.clean(image)
            if self._core.dirty.pages(image.id):
                async with image.cleaning, image.lock.everything():
                    await self._cleaner.finish(image)
        finally:
            image.draining -= 1
            await self._ownership.cleaned(image)

    async def sync(self, image: Image, path_fd: int | None = None) -> None:
        """Origin sync if anything was written since the last; see ``evict`` for ``path_fd``.

        Raises:
            OriginError: the origin failed.
        """
        if image.synced < image.written:
            async with image.opening:  # or the last handle's end could close it under the sync
                await self._sync(image, path_fd)

    async def _sync(self, image: Image, path_fd: int | None) -> None:
        if image.synced >= image.written:
            return
        if not image.origin_open:
            if path_fd is None:
                return  # the file is gone, or its last holder synced it
            await self._truth.open_side(image, path_fd, write=False)
        try:
            await self._lasting.sync(image)
        finally:
            if self._images.find(image.row.identity) is not image:
                await self._lasting.close(image)  # it was forgotten: nobody else will


def _refuse_open(image: Image) -> None:
    if image.handles:
        raise ImageOpenError(f"'{image.name}' is open")
