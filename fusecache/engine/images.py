"""Images: which are known, how they open and close, and whether their blocks are true (P3)."""

import errno
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial

import numpy as np
import trio

from fusecache.config import Policy, Tuning, WriteMode
from fusecache.core.index import CacheIndex
from fusecache.engine.committer import Committer
from fusecache.engine.image import Image, Intent
from fusecache.engine.lasting import Lasting
from fusecache.engine.ownership import Ownership
from fusecache.engine.ports import Clock, Invalidate, Threads
from fusecache.engine.state import CacheState
from fusecache.errors import (
    CacheDeviceError,
    DatabaseError,
    OriginError,
)
from fusecache.observe.logs import fields
from fusecache.store.block_map import WHOLE_IMAGE, ImageRow
from fusecache.store.origin import Attributes, OriginImage, attributes_of

log = logging.getLogger(__name__)

_DROP_PART = 256


class Images:
    """Every image the cache knows, by identity.

    Args:
        new_origin: makes the origin side of an image; tests give doubles that fail and stall.
    """

    def __init__(
        self,
        core: CacheIndex,
        state: CacheState,
        threads: Threads,
        clock: Clock,
        tuning: Tuning,
        policy: Policy,
        new_origin: Callable[[], OriginImage],
        invalidate: Invalidate,
    ) -> None:
        self._core = core
        self._state = state
        self._threads = threads
        self._clock = clock
        self._tuning = tuning
        self.policy = policy
        """May be replaced; whoever does so brings what is known in line with it."""
        self._new_origin = new_origin
        self._invalidate = invalidate
        self._by_identity: dict[bytes, Image] = {}
        self._next_id = 1
        self.committer: Committer
        self.ownership: Ownership
        self.lasting: Lasting

    def load(self, rows: Iterable[ImageRow], intents: Iterable[tuple[int, int, int]]) -> None:
        """Takes over what the database knows."""
        by_id = {row.id: self._add(row) for row in rows}
        for number, region, _ in intents:
            image = by_id.get(number)
            if image is None:
                continue
            if region == WHOLE_IMAGE:
                image.whole_intent = True
            else:
                image.intents[region] = Intent(stable=True)

    def _add(self, row: ImageRow) -> Image:
        image = Image(
            row=row,
            origin=self._new_origin(),
            limiter=self._threads.new_image_limiter(),
            cleaner_limiter=trio.CapacityLimiter(self._tuning.clean_writes),
            write_mode=WriteMode(row.write_mode or self.policy.mode_of(row.path)),
            max_waiting=self._tuning.max_waiting_per_image,
            _size=row.size,
            adopted=not self._core.dirty.pages(row.id),
        )
        image.counters.latency.total = self._state.counters.latency
        self._by_identity[row.identity] = image
        self._next_id = max(self._next_id, row.id + 1)
        return image

    def all(self) -> list[Image]:
        """Every known image."""
        return list(self._by_identity.values())

    def counted(self) -> list[Image]:
        """Every known image, with what the lane did for it in its counters."""
        images = self.all()
        for image in images:
            image.count_lane()
        return images

    def find(self, identity: bytes) -> Image | None:
        """The image, if it is known."""
        return self._by_identity.get(identity)

    def known(self, identity: bytes, path: bytes) -> Image:
        """The image, made known if it was not."""
        image = self._by_identity.get(identity)
        if image is None:
            image = self._add(ImageRow(id=self._next_id, identity=identity, path=path))
            # Nothing of it is cached, so that it may be as an evicted one from the beginning.
            image.bypassed = image.detached = self.policy.bypasses(path)
        if path and image.row.path != path:
            image.row.path = path
            image.row_owed = image.row_owed or image.row.recorded_ns != 0
        return image

    async def forget(self, image: Image, *, gone: bool = False) -> None:
        """The image is no longer known, here or in the database, and its descriptors closed.

        For a caller that holds ``image.opening`` and has dropped the blocks.

        Args:
            gone: the image itself is removed, so that its setting goes as well.
        """
        await self.lasting.close(image)
        image.row_owed = False
        if self._by_identity.get(image.row.identity) is image:
            del self._by_identity[image.row.identity]
            self._state.counters.forgotten.add(image.counters)
            if (mode := image.row.write_mode) and not gone:
                # What the operator has set stays, for when the image is used again.
                row = ImageRow(self._next_id, image.row.identity, image.row.path, write_mode=mode)
                self._add(row).row_owed = True
        try:
            if self._state.usable:
                await self.committer.forget(image)
        except DatabaseError:
            await self._state.passable()

    def unused(self, image: Image) -> bool:
        """Whether nothing is cached of the image and nobody has it open or needs it."""
        return not (
            image.handles
            or image.origin_open
            or image.intents
            or image.whole_intent
            or image.settles
            or image.row.write_mode
            or self._core.usage(image.id).blocks
            or not image.lock.idle
        )

    # -- opening and closing -----------------------------------------------------------------------

    async def open(self, identity: bytes, path: bytes, path_fd: int, *, write: bool) -> Image:
        """One more handle; ends with ``close``.

        At every open while no handle is open for writing the origin is opened anew and compared
        with what was recorded (P3).

        Raises:
            OriginError: the origin refused.
        """
        while True:
            image = self.known(identity, path)
            async with image.opening:
                if self.find(identity) is not image:
                    continue  # evicted and forgotten while we waited
                try:
                    await self._open(image, path_fd, write=write)
                except OriginError:
                    await self.ownership.release(image)
                    raise
                return image

    async def _open(self, image: Image, path_fd: int, *, write: bool) -> None:
        await self._let_settle(image)
        seen: Attributes | None = None
        if write and self._locks(image):
            await self.ownership.lock(image, path_fd)
        if image.writers == 0 or not image.origin.readable:
            try:
                seen = await self.open_side(image, path_fd, write=False)
            except OriginError as exc:
                if not (write and exc.errno == errno.EACCES):
                    raise  # a file that may only be written is served without fills
        if write and not image.origin.writable:
            seen = await self.open_side(image, path_fd, write=True)
        image.kernel_true = True
        # While the cleaner's changes are not recorded yet, its handle is one open for writing.
        if seen is not None and image.writers == 0 and not image.own_pending:
            image.kernel_true = await self.check(image, seen)
        await self.ownership.adopt(image)
        if write:
            if image.writers == 0:
                image.wrote = image.own_pending
                await self.begin_writing(image)
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

    async def open_side(self, image: Image, path_fd: int, *, write: bool) -> Attributes:
        """Opens the origin's file anew for reading or for writing. Raises OriginError."""
        try:
            opening = image.origin.opener(path_fd, write=write)
            return await self._threads.harmless(image.limiter, opening)
        except OriginError as exc:
            image.counters.failed(exc)
            raise

    async def begin_writing(self, image: Image) -> None:
        """From here on a killed daemon's successor may take young changes for ours (P3)."""
        if not image.row.writing and self._state.serves(image):
            image.row.writing = 1
            image.row_owed = True
            try:
                await self.committer.heartbeat()
            except DatabaseError:
                log.debug("not recorded as open for writing: the cache is unusable")

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
        await self.ownership.release(image)

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
            await self.ownership.cleaned(image)

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
                await self.lasting.sync(image)
            except OriginError:
                if covered > 1 and not image.gone:
                    raise
        await self.forget(image, gone=image.gone)

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

    # -- P3 ----------------------------------------------------------------------------------------

    async def check(self, image: Image, seen: Attributes) -> bool:
        """Compares the origin with the record and drops the blocks if they may not be its own.

        Returns whether what is cached, by the kernel too, is true. Blocks go before the record
        of what they belonged to: a stop in between must not leave old blocks with a new record.
        """
        row = image.row
        if self._core.dirty.pages(image.id):
            # What is dirty is about to be fitted to what we see, which may be an earlier life's
            # truncate that is not synced.
            async with image.cleaning:
                if image.own_pending:
                    return True  # the cleaner is at it, and will record what it made of the file
                await self.lasting.sync(image)
                seen = await self._threads.harmless(image.limiter, image.origin.attributes)
        now = self._clock.origin_ns()
        age = self._tuning.settle_age
        if image.settles and image.matches(seen):
            image.record(seen, now, age, own=True)  # trusted, if it is old enough by now
        if image.matches(seen) and row.trusted:
            if row.ours_until_ns:
                row.ours_until_ns = 0
                image.row_owed = True
            image.size = seen.size
            return True
        ours = row.ours_until_ns > 0 and seen.ctime_ns <= row.ours_until_ns
        if ours:
            # A killed daemon's own changes. Blocks beyond a truncate of its last moment go.
            async with image.cleaning, image.lock.everything():
                await self.fit(image, seen.size)
                image.size = seen.size
        elif row.recorded_ns:
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
                await self.drop(image, 0, dirty=False)
                await self.fit(image, seen.size)
                # Before any fill: one that took the old end for the end would bring zeros.
                image.size = seen.size
            await self._threads.kernel(self._invalidate, row.identity)
        else:
            image.size = seen.size
        image.record(seen, now, age, own=ours)
        return False

    async def noticed(self, identity: bytes, seen: Attributes, path_fd: int) -> None:
        """Attributes that somebody asked for: a change by others while only readers are open
        is looked into at once, before its new size is told to the kernel."""
        image = self.find(identity)
        if image is None or image.writers or not image.readers or image.matches(seen):
            return
        if image.own_pending:
            return
        async with image.opening:
            if image.own_pending:
                return
            if image.readers and not image.writers and not image.matches(seen):
                await self.check(image, await self.open_side(image, path_fd, write=False))

    async def drop(self, image: Image, from_block: int, *, dirty: bool) -> None:
        """Drops the blocks from ``from_block`` on, stably, for a caller that holds all of
        ``image.lock``.

        Args:
            dirty: whole blocks go, for a caller that holds ``image.cleaning``; else what is
                held stays.

        Raises:
            DatabaseError: dirty pages were to go and their rows stay; nothing was dropped.
        """
        held = bool(self._core.dirty.slots(image.id).size)
        if dirty and held:
            # Rows first: were they to stay, these pages must stay as well, or the rows would
            # bring them back over what comes after.
            await self.committer.drop(image, from_block)
        none = self._core.usage(image.id).blocks == 0
        slots = np.empty(0, np.uint32) if none else self._core.slots_of(image.id, from_block)
        for first in range(0, slots.size, _DROP_PART):
            self._core.drop(image.id, slots[first : first + _DROP_PART], dirty=dirty)
            await trio.lowlevel.checkpoint()
        if self._state.usable and not (dirty and held):
            try:
                if held:
                    await self.committer.barrier()
                else:
                    await self.committer.drop(image, from_block)
            except (DatabaseError, CacheDeviceError):
                log.debug("rows stay: the cache is unusable")
        await self._state.passable()

    async def fit(self, image: Image, size: int) -> None:
        """Nothing is cached past ``size``, not even dirty, and what a page has there is zeros.

        For a caller that holds all of ``image.lock`` of an image that is not written back.
        """
        geometry = self._core.geometry
        block, tail = divmod(size, geometry.block_size)
        try:
            await self.drop(image, block + (1 if tail else 0), dirty=True)
        except DatabaseError:
            await self._state.passable()
        if not tail or not self._state.usable:
            return
        beyond = geometry.touched(tail, geometry.block_size)
        last = geometry.touched(tail - 1, tail) & beyond
        self._core.supersede(image.id, block, beyond & ~last)
        self._core.clear(image.id, block, last)
        if self._core.dirty.mask(image.id, block) & last:
            await self._zero_from(image, block, tail, last)
        if self._state.usable:
            try:
                await self.committer.barrier()
            except (DatabaseError, CacheDeviceError):
                log.debug("rows stay: the cache is unusable")
        await self._state.passable()

    async def _zero_from(self, image: Image, block: int, tail: int, page: int) -> None:
        """A dirty page (a mask) holds zeros from ``tail`` (in the block) on."""
        geometry = self._core.geometry
        located = self._core.locate(image.id, block)
        assert located is not None
        length = (tail | geometry.page_size - 1) + 1 - tail
        position = (located.slot << geometry.block_shift) + tail
        try:
            something = any(await self._threads.device(self._state.device.read, position, length))
        except CacheDeviceError:
            something = True  # for all we know
        try:
            if something:
                await self._threads.device(self._state.device.write, position, bytes(length))
                self._core.dirty.written(located.slot, page)
        except CacheDeviceError as exc:
            self._state.device_failed(exc)
            self._core.dirty.lose(located.slot, page)  # rather than show what was cut off

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
        image = self.find(identity)
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
                    await self.lasting.sync(image)  # nobody could do so later
            except OriginError:
                return
            if not self._needs_origin(image):
                await self.lasting.close(image)

    def _needs_origin(self, image: Image) -> bool:
        dirty = self._core.dirty.pages(image.id) or image.own_pending
        unsettled = image.intents or image.whole_intent
        return bool(image.handles or dirty or unsettled or not image.lock.idle)

    async def moved(self, identity: bytes, path: bytes) -> None:
        """The image has a new name: that is where its dirty data will be brought, also by the
        successor of a killed daemon."""
        image = self.find(identity)
        if image is None or image.row.path == path:
            return
        self._move(image, path)
        if self._core.dirty.pages(image.id):
            await self._commit_names()

    async def moved_below(self, directories: dict[bytes, bytes]) -> None:
        """As ``moved``, of every image in directories that have new names: old name to new."""
        dirty = False
        for image in self.all():
            for before, after in directories.items():
                if image.row.path.startswith(before + b"/"):
                    self._move(image, after + image.row.path[len(before) :])
                    dirty = dirty or self._core.dirty.pages(image.id) > 0
                    break
        if dirty:
            await self._commit_names()

    def _move(self, image: Image, path: bytes) -> None:
        image.row.path = path
        image.row_owed = image.row_owed or image.row.recorded_ns != 0

    async def _commit_names(self) -> None:
        try:
            await self.committer.commit_owed()
        except DatabaseError:
            log.debug("new names are not recorded: the cache is unusable")

    @contextmanager
    def setting_attributes(self, identity: bytes) -> Iterator[None]:
        """Around a change of owner, mode, names or times on the origin: the next fsync has
        something to sync. Counted when it is over: a sync that ran meanwhile may have missed it."""
        try:
            yield
        finally:
            image = self.find(identity)
            if image is not None:
                image.attributes_set += 1
                image.written += 1
                image.guest_written = image.written
