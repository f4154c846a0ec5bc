"""Recovery: from what a stop left behind to an index that may be served from."""

import logging
from functools import partial
from pathlib import Path

from fusecache.core.geometry import Geometry
from fusecache.core.index import CacheIndex
from fusecache.core.rows import Rows
from fusecache.errors import CacheDeviceError, DatabaseError, SuperblockError
from fusecache.observe.logs import fields
from fusecache.store.block_map import Batch, BlockMap
from fusecache.store.cache_device import CacheDevice
from fusecache.store.superblock import Fence, remedy

log = logging.getLogger(__name__)


def recover(
    device: CacheDevice,
    block_map: BlockMap,
    *,
    boot_id: str,
    pid: int,
    mountpoint: bytes,
    origin: bytes,
) -> CacheIndex:
    """Makes the cache ours and loads its index. Blocks; can be cut at any step and run again.

    Raises:
        CacheDeviceError: the cache device cannot be synced.
        DatabaseError: the database is damaged or cannot be written.
    """
    try:
        return _recover(device, block_map, boot_id, pid, mountpoint, origin)
    except (ValueError, DatabaseError, SuperblockError) as exc:
        what = str(exc).rstrip(".")
        if isinstance(exc, ValueError):
            what = f"The database {block_map.path} is damaged: {what}"
        raise DatabaseError(f"{what}. {_remedy(exc, device, block_map)}") from exc


def _recover(
    device: CacheDevice,
    block_map: BlockMap,
    boot_id: str,
    pid: int,
    mountpoint: bytes,
    origin: bytes,
) -> CacheIndex:
    superblock = device.superblock
    meta = block_map.meta()
    fresh = device.fence is Fence.ALL
    block_map.watch(device, boot_id, believed=not fresh)
    if fresh:
        # The last daemon went on past a broken database: nothing in it can be believed.
        log.warning("the cache was left in trouble and starts empty")
        block_map.wipe()
        device.set_fence(Fence.NONE)
    if not meta.clean and not fresh:
        device.sync()  # data before rows: merging what a killed daemon left is a barrier (R1)
        same = meta.boot_id == boot_id
        after = "a killed daemon" if same else "a power cut or a move"
        log.info("recovering after %s", after, extra=fields("recovering", cache=device.path))
    index = CacheIndex(Geometry.of(superblock.block_size), superblock.slot_count)
    only_dirty = device.fence is Fence.CLEAN
    block_map.attach(boot_id, pid, mountpoint, origin, only_dirty=only_dirty)
    if only_dirty:
        log.warning("the cache was left in trouble: its dirty data is kept, the rest dropped")
        device.set_fence(Fence.NONE)
    for rows in block_map.load():
        index.load(rows)
    index.finish_load(block_map.load_order())
    return index


def _remedy(exc: Exception, device: CacheDevice, block_map: BlockMap) -> str:
    """What to do about a database that cannot be recovered."""
    if "disk is full" in str(exc):
        return f"Make room on the filesystem of {block_map.path}, then mount again."
    return remedy(device.path, block_map.path)


def boot_id() -> str:
    """This boot of this host."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def fence(
    device: CacheDevice,
    block_map: BlockMap,
    rows: Rows | None,
    *,
    dirty: bool,
) -> bool:
    """Keeps the next start from trusting a map that could not be kept up to date.

    Marks the superblock, which needs no space and no database, or else empties the map. Dirty
    data (``dirty``: there is some) stays, clean pages alone go. True if either worked.

    Args:
        rows: what is owed to the database: if it can still be told, lost pages stay known as lost.
            What is dirty in them and not lost is on the device, stably.
    """
    if rows is not None and dirty:
        try:
            block_map.merge(block_map.commit(Batch(rows=rows), stable=True))
        except DatabaseError as exc:
            log.warning("the last changes of the map are not recorded: %s", exc)
    wipe = block_map.wipe_clean if dirty else block_map.wipe
    mark = partial(device.set_fence, Fence.CLEAN if dirty else Fence.ALL)
    for attempt in (mark, wipe):
        try:
            attempt()
        except (CacheDeviceError, DatabaseError) as exc:
            log.warning("fencing the cache: %s", exc)
        else:
            return True
    log.error("the cache cannot be fenced: do not mount it again before it was repaired")
    return False
