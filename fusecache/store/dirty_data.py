"""What would be lost with a database: the dirty data it knows of, read past the engine.

For a cache that is about to be formatted anew, whose superblock may be gone or damaged.
"""

import contextlib
import sqlite3
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fusecache.core.geometry import Geometry
from fusecache.core.rows import Rows, pages_in
from fusecache.errors import DatabaseError
from fusecache.store import packing
from fusecache.store.packing import PackedRegion

_CHUNK = 512
"""Regions read at a time: the whole map at once would double the memory of a start."""


@dataclass(frozen=True, slots=True)
class DirtyData:
    """The cache a database belongs to, and the bytes of each image that only it has."""

    uuid: str
    origin: bytes
    images: dict[bytes, int]
    """By path relative to the origin."""

    @property
    def bytes(self) -> int:
        """Of all images."""
        return sum(self.images.values())


def dirty_data(path: Path) -> DirtyData:
    """What a database, that nobody has open, says is dirty as of its last light commit.

    A page that the cache device lost counts, too: what the origin has of it is older.

    Raises:
        DatabaseError: it is no cache's database, or damaged.
    """
    if not path.exists():
        raise DatabaseError(f"The database {path} is missing.")
    try:
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
            connection.execute("PRAGMA locking_mode = EXCLUSIVE")  # no mapped file, see BlockMap
            sql = "SELECT uuid, block_size, origin FROM meta WHERE id = 1"
            uuid, block_size, origin = connection.execute(sql).fetchone()
            images = connection.execute("SELECT id, path FROM image").fetchall()
            page_size = Geometry.of(int(block_size)).page_size
            found = {}
            for number, name in images:
                if pages := _dirty_pages(connection, int(number)):
                    found[bytes(name)] = pages * page_size
    except (sqlite3.Error, ValueError, TypeError, OverflowError) as exc:
        raise DatabaseError(f"The database {path} cannot be read: {exc}.") from exc
    return DirtyData(str(uuid), bytes(origin), found)


def _dirty_pages(connection: sqlite3.Connection, image: int) -> int:
    """How many; changes since the last barrier count as the next start may see them."""
    sql = "SELECT image, region, slots, valid, dirty, crc FROM block WHERE image = ?"
    cursor = connection.execute(sql, (image,))
    parts = [packing.unpack_regions([])]
    while regions := cursor.fetchmany(_CHUNK):
        rows = packing.unpack_regions([PackedRegion(*row) for row in regions])
        parts.append(rows.where(rows.dirty != 0))  # clean ones do not matter, also if overlaid
    for seq, blob, crc in connection.execute("SELECT seq, rows, crc FROM pending ORDER BY seq"):
        if packing.batch_crc(seq, blob) != crc:
            raise ValueError("a row of the table pending has a wrong checksum")
        rows = packing.unpack_batches([blob])
        parts.append(rows.where(rows.image == image))
    latest = packing.last_of_each(Rows(*map(np.concatenate, zip(*parts, strict=True))))
    return pages_in(latest.dirty)
