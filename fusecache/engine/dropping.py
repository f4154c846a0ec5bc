"""Dropping: blocks leave the cache, stably.

Whoever asks for it has excluded all other slow work on the image.
"""

import logging

import numpy as np
import trio

from fusecache.core.index import CacheIndex
from fusecache.engine.committer import Committer
from fusecache.engine.image import Image
from fusecache.engine.ports import Threads
from fusecache.engine.state import CacheState
from fusecache.errors import CacheDeviceError, DatabaseError

log = logging.getLogger(__name__)

_DROP_PART = 256


class Dropping:
    """See the module."""

    def __init__(
        self, core: CacheIndex, state: CacheState, committer: Committer, threads: Threads
    ) -> None:
        self._core = core
        self._state = state
        self._committer = committer
        self._threads = threads

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
            await self._committer.drop(image, from_block)
        none = self._core.usage(image.id).blocks == 0
        slots = np.empty(0, np.uint32) if none else self._core.slots_of(image.id, from_block)
        for first in range(0, slots.size, _DROP_PART):
            self._core.drop(image.id, slots[first : first + _DROP_PART], dirty=dirty)
            await trio.lowlevel.checkpoint()
        if self._state.usable and not (dirty and held):
            try:
                if held:
                    await self._committer.barrier()
                else:
                    await self._committer.drop(image, from_block)
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
                await self._committer.barrier()
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
