"""What the compiled lane does for an overwrite or an fsync, step by step, for worlds without a
kernel.

It has no descriptor to write to and no threads there; all it shares with the engine is real: the
gates, the slot table, the list of soiled slots. ``tests/lane`` has the compiled one.
"""

from collections.abc import Callable
from weakref import WeakKeyDictionary

import trio

from fusecache.engine.block_cache import BlockCache
from fusecache.engine.image import Image
from fusecache.errors import CacheDeviceError

_REQUEST = 4096
_FLAGS, _BOTH, _READS_AND_SYNCS = 0, 3, 5
_BEGUN, _GOOD, _SYNCING = 0, 1, 2
_SIZE, _CHANGES, _WRITES, _WRITE_BYTES = 1, 7, 12, 13

_EIO = 5


class _Syncs:
    """Those of one lane: one at a time, and none any more after one has failed."""

    def __init__(self) -> None:
        self.lock = trio.Lock()
        self.failed = False


_SYNCS: WeakKeyDictionary[BlockCache, _Syncs] = WeakKeyDictionary()


def admit(cache: BlockCache) -> None:
    """From now on images that are opened have gates."""
    cache.core.gates.used = True
    _SYNCS[cache] = _Syncs()


def _lets(cache: BlockCache, image: Image, flags: int) -> bool:
    gate = image.gate
    if gate is None:
        return False
    return cache.core.gates.words32[gate.number * 32 + _FLAGS] & flags == flags


async def write(
    cache: BlockCache,
    image: Image,
    offset: int,
    data: bytes,
    answered: Callable[[int, int], None],
) -> None:
    """As the lane does it, and ``Requests`` what the lane leaves: an overwrite, or requests of a
    page each that come together, each of which is answered (offset, length) by itself."""
    if overwrite(cache, image, offset, data):
        answered(offset, len(data))
        return
    parts = [(image, offset + at, data[at : at + _REQUEST]) for at in range(0, len(data), _REQUEST)]
    slowly = []
    for part, done in zip(parts, cache.write_at_once(parts), strict=True):
        if done:
            answered(part[1], len(part[2]))
        else:
            slowly.append(part)
    for part in slowly:
        await cache.write(*part)
        answered(part[1], len(part[2]))


def overwrite(cache: BlockCache, image: Image, offset: int, data: bytes) -> bool:
    """As ``core_overwrite`` and ``write_slots``: False, and nothing is written, unless all pages
    are dirty. The caller is a guest, and nothing else runs meanwhile."""
    core, gates, gate = cache.core, cache.core.gates, image.gate
    if gate is None or not _lets(cache, image, _BOTH):
        return False
    words = gates.words_of[gate.number * 16 : gate.number * 16 + 16]
    if not data or offset + len(data) > int(words[_SIZE]):
        return False
    arrays, geometry = core.arrays(), core.geometry
    parts = []
    for block, start, stop in geometry.split(offset, len(data)):
        located = core.locate(image.id, block)
        if located is None or arrays["pins"][located.slot]:
            return False
        need = geometry.touched(start, stop)
        both = int(arrays["dirty"][located.slot]) & int(arrays["valid"][located.slot])
        if both & need != need:
            return False
        parts.append((located.slot, start, stop, need))
    if int(arrays["soiled_count"][0]) + len(parts) > arrays["soiled"].size:
        return False
    for slot, _, _, need in parts:
        arrays["cleaning"][slot] &= ~need & 0xFFFF
        if not arrays["unsynced"][slot]:
            arrays["soiled"][int(arrays["soiled_count"][0])] = slot
            arrays["soiled_count"][0] += 1
        arrays["unsynced"][slot] |= need
    done = 0
    for slot, start, stop, _ in parts:
        position = (slot << geometry.block_shift) + start
        try:
            cache.device.write(position, data[done : done + stop - start])
        except CacheDeviceError:
            return False  # the engine meets the error again and deals with it
        done += stop - start
    words[_CHANGES] += 1
    words[_WRITES] += 1
    words[_WRITE_BYTES] += len(data)
    return True


async def fsync(cache: BlockCache, image: Image, *, metadata: bool) -> bool:
    """As ``syncs.c`` does it, and ``Requests`` what the lane leaves; whether the lane did it."""
    may = _lets(cache, image, _READS_AND_SYNCS) and await _sync(cache)
    if may and _lets(cache, image, _READS_AND_SYNCS):
        return True
    await cache.fsync(image, metadata=metadata)
    return False


async def _sync(cache: BlockCache) -> bool:
    syncs = _SYNCS[cache]
    async with syncs.lock:
        if syncs.failed:
            return False
        _sync_begins(cache)
        try:
            await trio.lowlevel.checkpoint()  # others run before it is done, and afterwards
            told = cache.device.synced_commit
            cache.device.sync()
            cache.device.synced_commit = told  # the lane knows nothing of commits
            await trio.lowlevel.checkpoint()
        except CacheDeviceError:
            syncs.failed = True
            await cache.lane_sync_failed(_EIO)
            return False
        words = cache.core.arrays()["syncs"]
        words[_GOOD], words[_SYNCING] = words[_BEGUN], 0
        return True


def _sync_begins(cache: BlockCache) -> None:
    """As ``core_sync_begins``."""
    arrays = cache.core.arrays()
    count = int(arrays["soiled_count"][0])
    slots = arrays["soiled"][:count]
    arrays["syncing"][:count] = slots
    arrays["syncing_pages"][:count] = arrays["unsynced"][slots]
    arrays["unsynced"][slots] = 0
    arrays["soiled_count"][0] = 0
    arrays["syncs"][_SYNCING] = count
    arrays["syncs"][_BEGUN] += 1
