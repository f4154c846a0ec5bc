"""Write intents (R4): the database knows where a write may leave cache and origin apart.

Before the first write in a region its row is stable and active. A killed daemon's successor
drops the clean pages of active regions, a power cut's those of every region with a row.
"""

import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from fusecache.config import Tuning
from fusecache.engine.committer import Committer
from fusecache.engine.image import Image, Intent
from fusecache.engine.lasting import Lasting
from fusecache.engine.ports import Threads
from fusecache.errors import FusecacheError
from fusecache.store.block_map import WHOLE_IMAGE, Batch

log = logging.getLogger(__name__)


class WriteIntents:
    """Sets, clears and removes the rows of ``region``."""

    def __init__(
        self,
        committer: Committer,
        threads: Threads,
        tuning: Tuning,
        now: Callable[[], float],
        lasting: Lasting,
    ) -> None:
        self._committer = committer
        self._threads = threads
        self._tuning = tuning
        self._now = now
        self._lasting = lasting

    @asynccontextmanager
    async def writing(
        self, image: Image, regions: Sequence[int], *, active: bool = True
    ) -> AsyncIterator[None]:
        """Around a write: the regions' rows are there, stably, from before it to well after it.

        Args:
            active: the write leaves cache and origin apart even for a killed daemon's successor.
                One that makes pages dirty does not: their rows say so.

        Raises:
            DatabaseError: they could not be made so; nothing was written.
        """
        if image.whole_intent and not active:
            image.begun += 1
            image.in_flight += 1
            try:
                yield
            finally:
                image.in_flight -= 1
                image.last_intent = self._now()
            return
        mine = [image.intents.setdefault(region, Intent()) for region in regions]
        image.begun += 1
        for intent in mine:
            intent.in_flight += 1
            intent.begun += 1
        try:
            if not all(intent.active or (intent.stable and not active) for intent in mine):
                await self._committer.activate(image, list(regions), active=active)
            yield
        finally:
            now = image.last_intent = self._now()
            for intent in mine:
                intent.in_flight -= 1
                intent.last = now

    def began(self, image: Image, region: int) -> bool:
        """Whether a write that makes pages dirty, and is over at once, may happen in a region: its
        row is stable already. Noted as ``writing`` would."""
        now = self._now()
        if not image.whole_intent:
            intent = image.intents.get(region)
            if intent is None or not intent.stable:
                return False
            intent.begun += 1
            intent.last = now
        image.begun += 1
        image.last_intent = now
        return True

    async def clear_idle(self, images: list[Image]) -> None:
        """Clears ``active`` where nothing was written for a while.

        In the transaction that commits what those writes owed, so never ahead of it.
        """
        limit = self._now() - self._tuning.intent_idle
        if any(self._idle(image, limit) for image in images):
            await self._committer.commit(lambda: self._take_idle(images, limit))

    def _idle(self, image: Image, limit: float) -> list[int]:
        return [
            region
            for region, intent in image.intents.items()
            if (intent.active or image.whole_intent)
            and not intent.in_flight
            and intent.last <= limit
        ]

    def _take_idle(self, images: list[Image], limit: float) -> Batch:
        batch = Batch()
        for image in images:
            for region in self._idle(image, limit):
                if image.whole_intent:
                    # The whole-image row stands for it, so its own need not stay.
                    del image.intents[region]
                    batch.settled.append((image.id, region))
                else:
                    image.intents[region].active = False
                    batch.intents.append((image.id, region, 0))
        return batch

    async def remove_old(self, image: Image, *, older_than: float | None = None) -> None:
        """Removes the rows of inactive regions: origin sync, barrier, and no write since.

        Failing is harmless: the rows stay.
        """
        age = self._tuning.intent_removal if older_than is None else older_than
        limit = self._now() - age
        quiet = {
            region: intent.begun
            for region, intent in image.intents.items()
            if not intent.in_flight and intent.last <= limit
        }
        whole = image.whole_intent and len(quiet) == len(image.intents)
        if image.whole_intent and (not whole or image.last_intent > limit):
            return  # the whole-image row goes only when nothing is written anywhere
        if not (quiet or whole) or image.removing_intents or not image.origin_open:
            return
        begun = image.begun
        image.removing_intents = True
        try:
            async with image.opening:  # or an eviction could close it under the sync
                if not image.origin_open:
                    return
                await self._lasting.sync(image)
            await self._committer.barrier()
            await self._committer.commit(lambda: self._take_removed(image, quiet, begun))
        except FusecacheError as exc:
            log.warning("write intents of an image stay: %s", exc)
        finally:
            image.removing_intents = False

    def _take_removed(self, image: Image, quiet: dict[int, int], begun: int) -> Batch:
        batch = Batch()
        if image.whole_intent:
            busy = image.in_flight or any(i.in_flight for i in image.intents.values())
            if image.begun != begun or busy:
                return batch
            image.whole_intent = False
            batch.settled.append((image.id, WHOLE_IMAGE))
        for region, count in quiet.items():
            intent = image.intents.get(region)
            if intent is not None and intent.begun == count and not intent.in_flight:
                del image.intents[region]
                batch.settled.append((image.id, region))
        return batch
