"""Block map rows as bytes: batches for ``pending``, regions for ``block``. Every one has a CRC.

A flipped bit in a slot number would serve one image's data as another's, so nothing that is
read back is used before its checksum was seen to match.
"""

import struct
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fusecache.core.geometry import REGION_BLOCKS
from fusecache.core.rows import Rows
from fusecache.core.slots import NO_SLOT

_BATCH = np.dtype(
    [("image", "<u4"), ("block", "<u4"), ("slot", "<u4"), ("valid", "<u2"), ("dirty", "<u2")]
)
_ONE = struct.Struct("<IIIHH")
_KEY = struct.Struct("<II")
_SEQ = struct.Struct("<Q")


class PackedRegion(NamedTuple):
    """One row of ``block``: three columns of 64 entries as bytes, and their checksum."""

    image: int
    region: int
    slots: bytes
    valid: bytes
    dirty: bytes
    crc: int


def pack_batch(rows: Rows) -> bytes:
    """Rows as one blob, in order."""
    if rows.slot.size == 1:  # as for most writes; a third of the time
        return _ONE.pack(*(column.item() for column in rows))
    packed = np.empty(rows.slot.size, _BATCH)
    for name, column in rows._asdict().items():
        packed[name] = column
    return packed.tobytes()


def batch_crc(seq: int, blob: bytes) -> int:
    """The checksum of a row of ``pending``."""
    return zlib.crc32(blob, zlib.crc32(_SEQ.pack(seq)))


def unpack_batches(blobs: Sequence[bytes]) -> Rows:
    """All rows of several blobs, in order."""
    packed = np.frombuffer(b"".join(blobs), _BATCH)
    return Rows(
        image=np.ascontiguousarray(packed["image"]),
        block=np.ascontiguousarray(packed["block"]),
        slot=np.ascontiguousarray(packed["slot"]),
        valid=np.ascontiguousarray(packed["valid"]),
        dirty=np.ascontiguousarray(packed["dirty"]),
    )


def last_of_each(rows: Rows) -> Rows:
    """The last row of each tag, sorted by image and block."""
    tags = rows.image.astype(np.uint64) << np.uint64(32) | rows.block
    _, index = np.unique(tags[::-1], return_index=True)
    return rows.where(tags.size - 1 - index)


def region_crc(image: int, region: int, slots: bytes, valid: bytes, dirty: bytes) -> int:
    """The checksum of a row of ``block``."""
    crc = zlib.crc32(_KEY.pack(image, region))
    for column in (slots, valid, dirty):
        crc = zlib.crc32(column, crc)
    return crc


class RegionColumns:
    """The three columns of one region, to be changed in place."""

    def __init__(self, row: PackedRegion | None) -> None:
        self.was = row
        if row is None:
            self.slots = np.full(REGION_BLOCKS, NO_SLOT, np.uint32)
            self.valid = np.zeros(REGION_BLOCKS, np.uint16)
            self.dirty = np.zeros(REGION_BLOCKS, np.uint16)
        else:
            self.slots = np.frombuffer(row.slots, "<u4").astype(np.uint32)
            self.valid = np.frombuffer(row.valid, "<u2").astype(np.uint16)
            self.dirty = np.frombuffer(row.dirty, "<u2").astype(np.uint16)

    def put(self, rows: Rows) -> None:
        """Replaces the entries of these blocks of the region."""
        at = rows.block % np.uint32(REGION_BLOCKS)
        self.slots[at] = rows.slot
        self.valid[at] = rows.valid
        self.dirty[at] = rows.dirty

    def drop_clean(self) -> None:
        """Only dirty pages stay, lost ones too, and only blocks that have some stay.

        Raises:
            ValueError: a block has no page at all, so nobody knows what it had.
        """
        if ((self.slots != NO_SLOT) & ((self.valid | self.dirty) == 0)).any():
            raise ValueError("a row names a slot without any page")
        self.valid &= self.dirty
        self.slots[(self.valid | self.dirty) == 0] = NO_SLOT

    def drop_from(self, place: int) -> None:
        """The entries from ``place`` on are gone."""
        self.slots[place:] = NO_SLOT
        self.valid[place:] = 0
        self.dirty[place:] = 0

    @property
    def empty(self) -> bool:
        """Whether no block of the region is cached."""
        return bool((self.slots == NO_SLOT).all())

    def pack(self, image: int, region: int) -> PackedRegion:
        """The row to store."""
        columns = (self.slots.tobytes(), self.valid.tobytes(), self.dirty.tobytes())
        return PackedRegion(image, region, *columns, region_crc(image, region, *columns))


def check(row: PackedRegion) -> None:
    """Raises ValueError if the row's checksum or length is wrong."""
    sizes = (len(row.slots), len(row.valid), len(row.dirty))
    if sizes != (4 * REGION_BLOCKS, 2 * REGION_BLOCKS, 2 * REGION_BLOCKS):
        raise ValueError(f"region {row.region} of image {row.image} has the wrong length")
    if row.crc != region_crc(*row[:5]):
        raise ValueError(f"region {row.region} of image {row.image} has a wrong checksum")


def unpack_regions(regions: Sequence[PackedRegion]) -> Rows:
    """All cached blocks of several regions.

    Raises:
        ValueError: a row's checksum or length is wrong.
    """
    for row in regions:
        check(row)
    slots = np.frombuffer(b"".join(row.slots for row in regions), "<u4")
    here = np.flatnonzero(slots != NO_SLOT)
    image = np.array([row.image for row in regions], np.uint32)
    first = np.array([row.region * REGION_BLOCKS for row in regions], np.uint32)
    return Rows(
        image=image[here // REGION_BLOCKS],
        block=first[here // REGION_BLOCKS] + (here % REGION_BLOCKS).astype(np.uint32),
        slot=slots[here].astype(np.uint32),
        valid=np.frombuffer(b"".join(row.valid for row in regions), "<u2")[here],
        dirty=np.frombuffer(b"".join(row.dirty for row in regions), "<u2")[here],
    )
