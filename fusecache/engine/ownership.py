"""Ownership: which images this host may write, and dirty data that an earlier life left (P8).

Images are opened by ``opening`` and compared with their records by ``truth``; here is what
write-back needs besides: the lock on the origin, the record that somebody writes, a place in the
origin for data nobody has open, and the record of what the cleaner did.
"""

import errno
import logging
import os

from fusecache.config import Tuning
from fusecache.core.index import CacheIndex
from fusecache.engine.committer import Committer
from fusecache.engine.dropping import Dropping
from fusecache.engine.image import Image
from fusecache.engine.images import Images
from fusecache.engine.lasting import Lasting
from fusecache.engine.ports import Clock, Pin, Threads
from fusecache.engine.state import CacheState
from fusecache.engine.truth import Truth
from fusecache.errors import (
    ChangedElsewhereError,
    DatabaseError,
    LockedElsewhereError,
    LocksUnsupportedError,
    OriginError,
)
from fusecache.observe.logs import fields

log = logging.getLogger(__name__)


class Ownership:
    """See the module."""

    def __init__(
        self,
        core: CacheIndex,
        state: CacheState,
        images: Images,
        committer: Committer,
        dropping: Dropping,
        lasting: Lasting,
        truth: Truth,
        threads: Threads,
        clock: Clock,
        tuning: Tuning,
        pin: Pin,
    ) -> None:
        self._core = core
        self._state = state
        self._images = images
        self._committer = committer
        self._dropping = dropping
        self._lasting = lasting
        self._truth = truth
        self._threads = threads
        self._clock = clock
        self._tuning = tuning
        self._pin = pin
        self._warned_of_locks = False

    async def lock(self, image: Image, path_fd: int) -> None:
        """No other host may write the image as long as we do, or have dirty data of it (P8).

        Raises:
            LockedElsewhereError: one does.
        """
        await self._lasting.unlocked(image)
        try:
            await self._threads.harmless(image.limiter, image.origin.locker(path_fd))
        except LockedElsewhereError as exc:
            log.error(
                "%s cannot be opened for writing: %s",
                image.name,
                exc,
                extra=fields("image-locked", image=image.name),
            )
            raise  # no error of the origin, nor counted as one
        except LocksUnsupportedError as exc:
            if not self._warned_of_locks:
                self._warned_of_locks = True
                log.warning(
                    "the origin has no locks (%s): nothing keeps two hosts from one image", exc
                )
        except OriginError as exc:
            if exc.errno not in (errno.EACCES, errno.EROFS):
                raise
            log.debug("%s is not locked: %s", image.name, exc)

    async def begin_writing(self, image: Image) -> None:
        """From here on a killed daemon's successor may take young changes for ours (P3), and what
        an earlier life left dirty is ours to write: stably, or after a power cut what we write now
        would be taken for others'."""
        waited = self._truth.may_be_changed_elsewhere(image)
        self._truth.overrule(image)
        if not image.row.writing and self._state.serves(image):
            image.row.writing = 1
            image.row_owed = True
            try:
                await self._committer.heartbeat(stable=waited)
            except DatabaseError:
                log.debug("not recorded as open for writing: the cache is unusable")

    async def release(self, image: Image) -> None:
        """Gives the lock up if nobody writes the image and nothing of it is dirty, nor settling: a
        power cut would bring that back over what another host has written since. So may others do
        with an image that they have changed already.

        First the record says so, or a killed daemon's successor would take for its own what others
        changed then (P3). For a caller that holds ``image.opening``.
        """
        if image.writers:
            return
        if self._core.dirty.holds(image.id) and not image.changed_elsewhere:
            return
        if image.row.writing:
            image.row.writing = 0
            image.row_owed = True
        try:
            if image.row_owed and self._state.usable:
                await self._committer.commit_owed()
        except DatabaseError:
            log.debug("not recorded as closed: the cache is unusable")
        await self._state.passable()
        await self.unlock(image)

    async def unlock(self, image: Image) -> None:
        """Other hosts may write the image again."""
        if image.origin.locked:
            await self._lasting.unlock(image)

    async def adopt(self, image: Image) -> None:
        """Fits an earlier life's dirty data to the origin: what lies past its end goes.

        The origin is synced first: a truncate of that life may not have been.

        Raises:
            OriginError: the origin failed.
        """
        if image.adopted or not self._state.serves(image):
            return
        await self._lasting.sync(image)
        seen = await self._threads.harmless(image.limiter, image.origin.attributes)
        async with image.cleaning, image.lock.everything():
            await self._dropping.fit(image, seen.size)
            image.size = seen.size
        image.adopted, image.changed_elsewhere = True, False

    async def adopted(self, image: Image) -> None:
        """The image's dirty data can be written back: the origin is open for writing, locked,
        and has been compared with what is recorded. An image that was evicted and forgotten while
        this waited has none, and stays closed.

        Raises:
            OriginError: not so, for now.
            ChangedElsewhereError: not before the operator has decided.
        """
        if image.adopted and image.origin.writable:
            return
        async with image.opening:
            if image.adopted and image.origin.writable:
                return
            if self._images.find(image.row.identity) is not image:
                return  # nobody would give up the lock again
            path_fd = await self._pinned(image)
            try:
                await self._truth.look_elsewhere(image, path_fd)
                await self.lock(image, path_fd)
                seen = await self._truth.open_side(image, path_fd, write=False)
                await self._truth.open_side(image, path_fd, write=True)
                if image.writers == 0 and not image.own_pending:
                    await self._truth.check(image, seen)
            except ChangedElsewhereError:
                await self.release(image)
                raise
            finally:
                os.close(path_fd)
            await self.adopt(image)
            await self.begin_writing(image)

    async def _pinned(self, image: Image) -> int:
        """A new descriptor of an image that nobody has open."""
        try:
            where = (image.row.path, image.row.identity)
            path_fd = await self._threads.harmless(image.limiter, self._pin, *where)
        except OSError as exc:
            raise OriginError(exc.errno or 5, f"finding '{image.name}': {exc.strerror}") from exc
        if path_fd is None:
            raise OriginError(
                errno.ENOENT,
                f"'{image.name}' is not where it was on the origin. If it was moved, open it once "
                "below the mount; if nobody needs its data, evict it with --discard-dirty",
            )
        return path_fd

    async def cleaned(self, image: Image) -> None:
        """The cleaner has done what it could for now: records what it made of the origin (P3),
        and gives up the lock if nothing is dirty."""
        if image.cleaning.locked():
            return  # somebody is at it again, and will record what comes of it
        async with image.opening:
            if image.writers or self._images.find(image.row.identity) is not image:
                image.own_pending = False  # recorded when the last writer closes
                return
            if image.own_pending:
                image.own_pending = False  # a batch that begins while we ask sets it anew
                try:
                    seen = await self._threads.harmless(image.limiter, image.origin.attributes)
                except OriginError as exc:
                    image.counters.failed(exc)
                else:
                    image.record(seen, self._clock.origin_ns(), self._tuning.settle_age, own=True)
            await self.release(image)
