"""``evict`` and ``flush`` on a cache that no daemon has open.

While all its data is clean the database alone is changed; else the engine writes it back.
"""

import contextlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusecache.cli.cache import default_database, open_locked, read_superblock
from fusecache.control import image_names
from fusecache.control.protocol import readable
from fusecache.engine.recovery import boot_id
from fusecache.errors import CacheDeviceError, ControlError, OriginError
from fusecache.store.block_map import Batch, BlockMap, ImageRow, Meta
from fusecache.store.cache_device import CacheDevice
from fusecache.store.superblock import Fence
from fusecache.store.tree import Tree

_SHOWN = 10


def evict(
    cache: Path, database: Path | None, names: tuple[str, ...], *, discard_dirty: bool
) -> dict[str, Any]:
    """Drops the named images, or all, stably from the block map.

    What the origin does not have is written back first, by the engine, or thrown away with
    ``discard_dirty``, for which the origin need not be there.

    Raises:
        FusecacheError: in use, damaged, no such image, or the origin is not there.
    """
    with _opened(cache, database) as (device, block_map):
        meta = block_map.meta()
        images = _named(block_map, meta, names)
        cached = [block_map.cached(image.id) for image in images]
        if any(dirty for _, dirty in cached) and not discard_dirty:
            return _write_back(device, block_map, meta, images, evict=True, overwrite=False)
        with contextlib.suppress(*([OriginError] if discard_dirty else [])):
            _sync_origin(meta, images)
        ids = [image.id for image in images]
        block_map.watch(device, boot_id(), believed=device.fence is not Fence.ALL)
        block_map.commit(Batch(drops=[(number, 0) for number in ids], forgotten=ids), stable=True)
        block_map.checkpoint(truncate=True)
        return {"images": len(images), "blocks": sum(blocks for blocks, _ in cached)}


def flush(
    cache: Path, database: Path | None, names: tuple[str, ...], *, overwrite: bool
) -> dict[str, Any]:
    """Makes sure that all data of the named images, or of all, is on the origin, synced.

    Args:
        overwrite: also over what others changed since the cache was stopped.

    Raises:
        FusecacheError: it is not, or nobody can tell.
    """
    with _opened(cache, database) as (device, block_map):
        meta = block_map.meta()
        images = _named(block_map, meta, names)
        if any(block_map.has_dirty(image.id) for image in images):
            return _write_back(device, block_map, meta, images, evict=False, overwrite=overwrite)
        _sync_origin(meta, images)
        return {"images": len(images), "blocks": 0}


def _write_back(
    device: CacheDevice,
    block_map: BlockMap,
    meta: Meta,
    images: list[ImageRow],
    *,
    evict: bool,
    overwrite: bool,
) -> dict[str, Any]:
    from fusecache.cli.writeback import write_back  # the engine takes its time to load

    answer = write_back(device, block_map, meta, images, evict=evict, overwrite=overwrite)
    return {**answer, "root": os.fsdecode(meta.origin)}


@contextlib.contextmanager
def _opened(cache: Path, database: Path | None) -> Iterator[tuple[CacheDevice, BlockMap]]:
    if not os.path.lexists(cache):
        raise CacheDeviceError(f"The cache {cache} does not exist.")
    fd = open_locked(cache)
    try:
        superblock = read_superblock(fd, cache, database)
        place = database or default_database(cache, superblock)
        with contextlib.closing(BlockMap.open(place, superblock)) as block_map:
            yield CacheDevice(cache, fd, superblock), block_map
    finally:
        os.close(fd)


def _sync_origin(meta: Meta, images: list[ImageRow]) -> None:
    """A daemon that did not stop cleanly may have written to the origin without a sync."""
    if meta.clean or not images:
        return
    origin = Path(os.fsdecode(meta.origin))
    try:
        tree = Tree(origin)
    except OSError as exc:
        raise OriginError(
            exc.errno or 0,
            f"The last daemon did not stop cleanly and its origin {origin} is not there to be "
            "synced: mount that storage, then try again.",
        ) from exc
    with contextlib.closing(tree):
        for image in images:
            _sync_image(tree, image)


def _sync_image(tree: Tree, image: ImageRow) -> None:
    try:
        found = tree.resolve(image.path)
    except (FileNotFoundError, NotADirectoryError):
        return  # the image is gone, and what was written to it with it
    except OSError as exc:
        raise OriginError(
            exc.errno or 0, f"'{_shown(image)}' on the origin cannot be synced: {exc.strerror}."
        ) from exc
    try:
        if not stat.S_ISREG(found.st.st_mode):
            return
        fd = os.open(f"/proc/self/fd/{found.fd}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as exc:
        raise OriginError(
            exc.errno or 0, f"Syncing '{_shown(image)}' on the origin failed: {exc.strerror}."
        ) from exc
    finally:
        os.close(found.fd)


# -- names -----------------------------------------------------------------------------------------


def _named(block_map: BlockMap, meta: Meta, names: tuple[str, ...]) -> list[ImageRow]:
    """The images of these names, each once; all of them if there are no names."""
    known = block_map.images()
    if not names:
        return known
    place = _Place(*(Path(os.fsdecode(root)) for root in (meta.mountpoint, meta.origin)))
    chosen: dict[int, ImageRow] = {}
    for name in names:
        read = image_names.readings(name, [place], ())
        by_path, by_root = (
            {image.id: image for _, path in paths for image in _at(path, known, place)}
            for paths in (read.path, read.root)
        )
        if by_path and by_root and by_path != by_root:
            raise image_names.ambiguous(name, [*read.path, *read.root])
        found = by_path or by_root
        if not found:
            raise ControlError(f"No image '{readable(name)[0]}' is cached. {_listing(known)}")
        chosen |= found
    return list(chosen.values())


@dataclass(frozen=True, slots=True)
class _Place:
    """The last mount of the cache."""

    mountpoint: Path
    origin: Path


def _at(path: str, known: list[ImageRow], place: _Place) -> list[ImageRow]:
    """The image that a path relative to the origin means. The origin is asked only if none was
    seen there: it may be away, and what is clean can be evicted without it."""
    if found := [image for image in known if image.path == os.fsencode(path)]:
        return found
    try:
        with contextlib.closing(Tree(place.origin)) as tree:
            meant = image_names.look_up(tree, path, place.mountpoint)
    except (OSError, OriginError):
        return []
    return [
        image for image in known if meant.identity == image.identity or meant.path == image.path
    ]


def _listing(known: list[ImageRow]) -> str:
    if not known:
        return "There are none in this cache."
    names = sorted(_shown(image) for image in known)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"There are: {', '.join(names[:_SHOWN])}{more}."


def _shown(image: ImageRow) -> str:
    return readable(os.fsdecode(image.path))[0]
