"""Which databases may belong to a cache device whose superblock cannot be read.

A database does not say where its cache lies. But it knows how large that is, and the witness, which
lies beside the superblock and not in it, tells how far the database of this device has come.
"""

import fcntl
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fusecache.core.rows import pages_in
from fusecache.store.dirty_data import DirtyData
from fusecache.store.inspection import Inspection, inspect
from fusecache.store.superblock import DATA_OFFSET

_LOOKED_AT = 64
"""Slots; somebody who wrote that many blocks of zeros is not thought of."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A database, and what it says that only its cache has."""

    path: Path
    dirty: DirtyData | None
    """None: it is damaged, and nobody can tell."""
    size: int
    """Of the cache in bytes, as far as it is known."""
    certain: bool
    """The device's record of commits is that of this database."""
    holds: bool
    """There is data on the device where this database says that dirty data is. If not, the device
    was emptied or is another one, and what a repair would keep are zeros."""


def candidates(
    fd: int, path: Path, databases: Iterable[Path], boot_id: str, *, chosen: bool
) -> list[Candidate]:
    """Those of the databases that may be the one of a cache, the most likely first.

    Args:
        fd: of the cache device, locked.
        chosen: somebody or their place says that they are this cache's; else sizes and the record
            of commits have to agree.
    """
    found = []
    for database in databases:
        if not database.is_file() or in_use(database):
            continue
        seen = inspect(fd, path, database, boot_id)
        if chosen or _fits(seen):
            found.append(_candidate(fd, seen))
    return sorted(found, key=lambda one: not one.certain)


def in_use(database: Path) -> bool:
    """Whether another process has a database open, as a daemon has its own: SQLite has a lock on
    some of its bytes then."""
    try:
        with database.open("rb") as file:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _fits(seen: Inspection) -> bool:
    meta = None if seen.read is None else seen.read.meta
    if meta is None or seen.contradiction is not None or seen.foreign:
        return False
    return seen.needed <= seen.device_size


def _candidate(fd: int, seen: Inspection) -> Candidate:
    read, witness = seen.read, seen.witness
    meta = None if read is None else read.meta
    if read is None or meta is None or read.complaints or any(read.damaged.values()):
        return Candidate(seen.database, None, seen.needed, certain=False, holds=False)
    certain = witness is not None and not witness.blank and meta.commits == witness.commits
    return Candidate(seen.database, _dirty(seen), seen.needed, certain, _holds(fd, seen))


def _dirty(seen: Inspection) -> DirtyData:
    assert seen.read is not None and seen.read.meta is not None and seen.geometry is not None
    rows, names = seen.rows(), seen.image_names()
    images: dict[bytes, int] = {}
    for number in np.unique(rows.image[rows.dirty != 0]).tolist():
        name = names.get(number, b"?")
        dirty = pages_in(rows.dirty[rows.image == number]) * seen.geometry.page_size
        images[name] = images.get(name, 0) + dirty
    meta = seen.read.meta
    return DirtyData(meta.uuid, meta.origin, images)


def _holds(fd: int, seen: Inspection) -> bool:
    assert seen.geometry is not None
    rows, size = seen.rows(), seen.geometry.block_size
    slots = rows.slot[(rows.dirty & rows.valid) != 0][:_LOOKED_AT]
    return any(any(os.pread(fd, size, DATA_OFFSET + slot * size)) for slot in slots.tolist())
