"""Calls of the origin whose outcome counts also if whoever asked for them gives up.

A sync, because the kernel tells of a lost write once, to whichever sync of the file comes first:
its failure must be noted, and no other sync believed meanwhile. A close and the end of a lock,
because whoever opens or locks next must find them done. Each runs in a task of the engine, which
survives an exception nobody foresaw; at the engine's end they are left behind like everything that
a stalled origin holds up.
"""

import errno
import logging
from collections.abc import Callable
from functools import partial

import trio

from fusecache.engine.image import Image, OriginSync
from fusecache.engine.ports import Threads
from fusecache.engine.state import UNEXPECTED, CacheState
from fusecache.errors import OriginError
from fusecache.observe.latency import Call, timed

log = logging.getLogger(__name__)


class Lasting:
    """See the module.

    Args:
        nursery: the engine's.
        distrust: told of images of which a sync failed; has their clean blocks dropped, soon.
    """

    def __init__(
        self,
        nursery: trio.Nursery,
        state: CacheState,
        threads: Threads,
        distrust: Callable[[Image], None],
    ) -> None:
        self._nursery = nursery
        self._state = state
        self._threads = threads
        self._distrust = distrust

    async def sync(self, image: Image, *, metadata: bool = True) -> None:
        """Origin sync; ``image.synced`` tells afterwards what it covered (R5).

        One at a time for each image; those who wait for the same one share it.

        Raises:
            OriginError: the origin failed; counted.
        """
        mine = image.next_sync
        if mine is None:
            mine = image.next_sync = OriginSync()
        mine.metadata = mine.metadata or metadata
        if image.running_sync is None:
            self._begin_next(image)
            self._nursery.start_soon(self._run_syncs, image)
        await mine.done.wait()
        if mine.error is not None:
            raise mine.error

    async def bring(self, image: Image) -> None:
        """Origin sync of what was dirty here: from now on the cache need not have it.

        Raises:
            OriginError: the origin failed; or the file was removed there, by others, and what was
                written to it would go with our descriptor.
        """
        await self.sync(image)
        if await self._threads.harmless(image.limiter, image.origin.nameless):
            raise OriginError(
                errno.ENOENT,
                f"'{image.name}' was removed on the origin, or another file put in its place. If "
                "nobody needs what is dirty of it, evict it with --discard-dirty",
            )

    def _begin_next(self, image: Image) -> None:
        image.running_sync, image.next_sync = image.next_sync, None

    async def _run_syncs(self, image: Image) -> None:
        try:
            while (current := image.running_sync) is not None:
                await self._sync(image, current)
                self._begin_next(image)
                current.done.set()
        finally:  # if this is cancelled nobody must wait for ever
            for left in filter(None, (image.running_sync, image.next_sync)):
                left.error = OriginError(5, "fusecache is stopping")
                left.done.set()
            image.running_sync = image.next_sync = None

    async def _sync(self, image: Image, current: OriginSync) -> None:
        covered, attributes = image.written, image.attributes_set
        # What is covered need not be synced again, also by who asks for more than data.
        metadata = current.metadata or attributes > image.attributes_synced
        spans: list[float] = []
        try:
            sync = partial(timed(image.origin.sync, spans), metadata=metadata)
            await self._threads.harmless(image.limiter, sync)
        except OriginError as exc:
            self._sync_failed(image, current, exc)
        except Exception as exc:
            self._state.unexpected(exc, "syncing the origin")
            self._sync_failed(image, current, OriginError(5, UNEXPECTED))
        else:
            image.synced = max(image.synced, covered)
            if metadata:
                image.attributes_synced = max(image.attributes_synced, attributes)
        finally:
            image.counters.latency.add(Call.SYNC, spans)

    def _sync_failed(self, image: Image, current: OriginSync, error: OriginError) -> None:
        current.error = error
        image.counters.failed(error)
        image.sync_failed()
        self._distrust(image)

    async def close(self, image: Image) -> None:
        """Closes the origin's descriptors, after a sync that is under way, and gives up the lock.

        In a thread: on a network filesystem a close asks the server.
        """
        while image.running_sync is not None:
            await image.running_sync.done.wait()
        await self._give_up(image, image.origin.closer())

    async def unlock(self, image: Image) -> None:
        """Gives up the lock."""
        await self._give_up(image, image.origin.unlocker())

    async def unlocked(self, image: Image) -> None:
        """Returns once no lock of ours is on its way out: it would keep us from taking it anew."""
        while image.giving_up is not None:
            await image.giving_up.wait()

    async def _give_up(self, image: Image, close: Callable[[], None]) -> None:
        before, done = image.giving_up, trio.Event()
        image.giving_up = done
        self._nursery.start_soon(self._run_close, image, close, before, done)
        await done.wait()

    async def _run_close(
        self,
        image: Image,
        close: Callable[[], None],
        before: trio.Event | None,
        done: trio.Event,
    ) -> None:
        try:
            if before is not None:
                await before.wait()
            await self._threads.harmless(image.limiter, close)
        except OriginError as exc:
            image.counters.failed(exc)
            log.warning("%s was not closed well on the origin: %s", image.name, exc)
        except Exception as exc:
            self._state.unexpected(exc, "closing on the origin")
        finally:
            if image.giving_up is done:
                image.giving_up = None
            done.set()
