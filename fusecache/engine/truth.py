"""Truth: whether the blocks of an image are those of its file on the origin (P3).

The origin is compared with what was recorded of it. Changes by others make the blocks go; our own
are recorded.
"""

import errno
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial

import trio

from fusecache.config import Tuning
from fusecache.core.index import CacheIndex
from fusecache.engine.dropping import Dropping
from fusecache.engine.image import Image
from fusecache.engine.images import Images
from fusecache.engine.lasting import Lasting
from fusecache.engine.ports import Clock, Invalidate, Threads
from fusecache.errors import ChangedElsewhereError, OriginError
from fusecache.observe.logs import fields
from fusecache.store.origin import Attributes, attributes_of
from fusecache.store.records import CHANGED_ELSEWHERE

log = logging.getLogger(__name__)


class Truth:
    """See the module."""

    def __init__(
        self,
        core: CacheIndex,
        images: Images,
        dropping: Dropping,
        lasting: Lasting,
        threads: Threads,
        clock: Clock,
        tuning: Tuning,
        invalidate: Invalidate,
    ) -> None:
        self._core = core
        self._images = images
        self._dropping = dropping
        self._lasting = lasting
        self._threads = threads
        self._clock = clock
        self._tuning = tuning
        self._invalidate = invalidate

    async def open_side(self, image: Image, path_fd: int, *, write: bool) -> Attributes:
        """Opens the origin's file anew for reading or for writing. Raises OriginError."""
        try:
            opening = image.origin.opener(path_fd, write=write)
            return await self._threads.harmless(image.limiter, opening)
        except OriginError as exc:
            image.counters.failed(exc)
            raise

    async def check(self, image: Image, seen: Attributes) -> bool:
        """Compares the origin with the record and drops the blocks if they may not be its own.

        Returns whether what is cached, by the kernel too, is true. Blocks go before the record
        of what they belonged to: a stop in between must not leave old blocks with a new record.

        Raises:
            ChangedElsewhereError: an earlier life's dirty data waits, and others changed it since.
            OriginError: the origin failed.
        """
        row = image.row
        if self._core.dirty.pages(image.id):
            # What is dirty is about to be fitted to what we see, which may be an earlier life's
            # truncate that is not synced.
            async with image.cleaning:
                if image.own_pending:
                    return True  # the cleaner is at it, and will record what it made of the file
                await self._lasting.sync(image)
                seen = await self._threads.harmless(image.limiter, image.origin.attributes)
        self._refuse_changed_elsewhere(image, seen)
        now = self._clock.origin_ns()
        age = self._tuning.settle_age
        if image.settles and image.matches(seen):
            image.record(seen, now, age, own=True)  # trusted, if it is old enough by now
        if image.matches(seen) and row.trusted:
            if row.ours_until_ns > 0:
                row.ours_until_ns = 0
                image.row_owed = True
            image.size = seen.size
            return True
        ours = row.ours_until_ns > 0 and seen.ctime_ns <= row.ours_until_ns
        if ours:
            # A killed daemon's own changes. Blocks beyond a truncate of its last moment go.
            async with image.cleaning, image.lock.everything():
                await self._dropping.fit(image, seen.size)
                image.size = seen.size
        elif row.recorded_ns:
            await self._changed(image, seen)
        else:
            image.size = seen.size
        image.record(seen, now, age, own=ours)
        return False

    def may_be_changed_elsewhere(self, image: Image) -> bool:
        """Whether an earlier life's dirty data of it waits here, which we have not begun to write:
        until then the lock may be another host's."""
        return image.row.ours_until_ns < 0 and self._core.dirty.pages(image.id) > 0

    async def look_elsewhere(self, image: Image, path_fd: int) -> None:
        """What is dirty here of an earlier life is refused before the image's lock is taken, which
        would keep others from what is theirs; and again by ``check``, with the lock.

        Raises:
            ChangedElsewhereError: others changed the image since that life.
            OriginError: the origin failed.
        """
        if not self.may_be_changed_elsewhere(image):
            return
        try:
            seen = await self.open_side(image, path_fd, write=False)
        except OriginError as exc:
            if exc.errno != errno.EACCES:  # a file that may only be written
                raise
            seen = await self._threads.metadata(partial(attributes_of, path_fd))
        self._refuse_changed_elsewhere(image, seen)

    def _refuse_changed_elsewhere(self, image: Image, seen: Attributes) -> None:
        """What is dirty here is older than what others wrote since, and neither is an image with
        the other in it: the operator says whose is kept. Data alone counts; owners, links and
        extended attributes leave the time of modification as it is.

        So it is if a host died with dirty data, and its guests were started elsewhere.

        Raises:
            ChangedElsewhereError: it is so.
        """
        lived_until_ns = -image.row.ours_until_ns
        if (
            not self.may_be_changed_elsewhere(image)
            or seen.mtime_ns == image.row.mtime_ns
            or min(seen.mtime_ns, seen.ctime_ns) <= lived_until_ns
        ):
            return
        error = ChangedElsewhereError(
            errno.EBUSY,
            f"'{image.name}' was changed elsewhere after this cache had stopped, with data in it "
            "that is not on the origin",
        )
        if not image.changed_elsewhere:
            image.changed_elsewhere = True
            image.row.ours_until_ns = CHANGED_ELSEWHERE
            image.row_owed = True
            log.error(
                "%s. flush --overwrite writes that data over the change, evict --discard-dirty "
                "gives it up; until then the image is neither served nor written back",
                error,
                extra=fields(
                    "image-conflict",
                    image=image.name,
                    dirty_bytes=self._core.dirty_bytes(image.id),
                ),
            )
        raise error

    def overrule(self, image: Image) -> None:
        """What is dirty here counts from now on, whatever others have changed."""
        if image.row.ours_until_ns < 0:
            image.row.ours_until_ns = 0
            image.row_owed = True
        image.changed_elsewhere = False

    async def _changed(self, image: Image, seen: Attributes) -> None:
        """The blocks go, by others' change or because nobody can tell."""
        if not image.matches(seen):
            log.info(
                "%s changed on the origin, its clean blocks are dropped",
                image.name,
                extra=fields("image-changed", image=image.name),
            )
            if self._core.dirty.pages(image.id):
                log.error(
                    "%s changed on the origin while it is dirty here",
                    image.name,
                    extra=fields(
                        "image-conflict",
                        image=image.name,
                        dirty_bytes=self._core.dirty_bytes(image.id),
                    ),
                )
        async with image.cleaning, image.lock.everything():
            await self._dropping.drop(image, 0, dirty=False)
            await self._dropping.fit(image, seen.size)
            # Before any fill: one that took the old end for the end would bring zeros.
            image.size = seen.size
        await self._threads.kernel(self._invalidate, image.row.identity)

    async def noticed(self, identity: bytes, seen: Attributes, path_fd: int) -> None:
        """Attributes that somebody asked for: a change by others while only readers are open
        is looked into at once, before its new size is told to the kernel."""
        if not self.notices(identity, seen):
            return
        image = self._images.find(identity)
        assert image is not None
        async with image.opening:
            if _tells_of_others(image, seen):
                there = await self.open_side(image, path_fd, write=False)
                with suppress(ChangedElsewhereError):  # told at the next open
                    await self.check(image, there)

    def notices(self, identity: bytes, seen: Attributes) -> bool:
        """Whether ``noticed`` has anything to do."""
        image = self._images.find(identity)
        return image is not None and _tells_of_others(image, seen)

    def lasts(self, identity: bytes) -> bool:
        """Whether what ``notices`` says stays so as long as the attributes do, and nobody opens or
        closes the image: no writeback of ours is about to be recorded."""
        image = self._images.find(identity)
        return image is None or not image.own_pending

    async def settle(self, image: Image) -> None:
        """Trusts a record of our own making once its change time is old enough (P3)."""
        row = image.row
        if not image.settles or image.writers or not image.origin_open or image.own_pending:
            return
        if self._clock.origin_ns() - row.ctime_ns < self._tuning.settle_age * 1e9:
            return
        async with image.opening:
            if image.writers or not image.settles or image.own_pending:
                return
            try:
                seen = await self._threads.harmless(image.limiter, image.origin.attributes)
            except OriginError as exc:
                image.counters.failed(exc)
                image.settles = False
                return
            image.settles = False
            if image.matches(seen):
                image.record(seen, self._clock.origin_ns(), self._tuning.settle_age, own=False)

    @asynccontextmanager
    async def own_change(self, identity: bytes, path_fd: int) -> AsyncIterator[None]:
        """Around a change of owner, mode or names that we make ourselves: its change time is
        recorded as ours, and the next fsync covers it."""
        with self.setting_attributes(identity):
            async with self._recorded(identity, path_fd):
                yield

    @asynccontextmanager
    async def _recorded(self, identity: bytes, path_fd: int) -> AsyncIterator[None]:
        """Such a change moves the change time. Were that not recorded, libvirt's chown at a guest's
        start would cost the guest its cache. The wait of one tick afterwards makes sure that
        whatever follows this call has a change time of its own.

        libvirt has the image open for writing meanwhile, without writing, to lock it. At a guest's
        end the kernel may not yet have told of the end of QEMU's handle: then what was noted at
        its close(2) is brought up to date, if nothing has changed since then.
        """
        image = self._images.find(identity)
        if image is None:
            yield
            return
        async with image.opening:
            attributes = partial(attributes_of, path_fd)
            before = await self._threads.metadata(attributes)
            known = image.row.recorded_ns != 0 and image.matches(before)
            trusted = image.row.trusted
            closing = image.closing
            noted = closing is not None and closing[1] == before
            yield
            if not known and not noted:
                return
            await trio.sleep(self._tuning.tick)
            after = await self._threads.metadata(attributes)
            if (after.size, after.mtime_ns) != (before.size, before.mtime_ns):
                return
            if known:
                settle = self._tuning.settle_age
                image.record(after, self._clock.origin_ns(), settle, own=image.settles)
                image.row.trusted = trusted
            if noted and closing is not None and image.closing is closing:
                image.closing = (closing[0], after)

    @contextmanager
    def setting_attributes(self, identity: bytes) -> Iterator[None]:
        """Around a change of owner, mode, names or times on the origin: the next fsync has
        something to sync. Counted when it is over: a sync that ran meanwhile may have missed it."""
        try:
            yield
        finally:
            image = self._images.find(identity)
            if image is not None:
                image.attributes_set += 1
                image.wrote_origin(data=False)


def _tells_of_others(image: Image, seen: Attributes) -> bool:
    """Whether attributes of an image that nobody writes tell of a change by others."""
    only_read = image.readers and not image.writers and not image.own_pending
    return bool(only_read) and not image.matches(seen)
