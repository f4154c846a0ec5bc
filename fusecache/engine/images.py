"""Images: which are known."""

from collections.abc import Callable, Iterable

import trio

from fusecache.config import Policy, Tuning, WriteMode
from fusecache.core.index import CacheIndex
from fusecache.engine.image import Image, Intent
from fusecache.engine.ports import Threads
from fusecache.engine.state import CacheState
from fusecache.store.block_map import WHOLE_IMAGE, ImageRow
from fusecache.store.origin import OriginImage


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
        tuning: Tuning,
        policy: Policy,
        new_origin: Callable[[], OriginImage],
    ) -> None:
        self._core = core
        self._state = state
        self._threads = threads
        self._tuning = tuning
        self.policy = policy
        """May be replaced; whoever does so brings what is known in line with it."""
        self._new_origin = new_origin
        self._by_identity: dict[bytes, Image] = {}
        self._next_id = 1

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

    def forget(self, image: Image, *, gone: bool) -> None:
        """The image is no longer known, if it still was; what it counted stays in the sums.

        Args:
            gone: the image itself is removed, so that its setting goes as well.
        """
        if self._by_identity.get(image.row.identity) is not image:
            return
        del self._by_identity[image.row.identity]
        self._state.counters.forgotten.add(image.counters)
        if (mode := image.row.write_mode) and not gone:
            # What the operator has set stays, for when the image is used again.
            row = ImageRow(self._next_id, image.row.identity, image.row.path, write_mode=mode)
            self._add(row).row_owed = True

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
