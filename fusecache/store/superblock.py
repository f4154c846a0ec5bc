"""The first 4 KiB of a cache device: what it is, whose it is, and how it is divided.

Little endian: magic (8 bytes), format version (4), block size (4), slot count (8), uuid (16),
fence (4: what of the database must not be believed), then the CRC-32 of all that (4); the rest is
zero. Slots begin at 1 MiB.
"""

import enum
import struct
import uuid
import zlib
from dataclasses import dataclass

from fusecache.config import MAX_BLOCK_SIZE, MIN_BLOCK_SIZE
from fusecache.errors import NotACacheError, SuperblockError

MAGIC = b"FUSECACH"
VERSION = 1
SUPERBLOCK_SIZE = 4096
DATA_OFFSET = 1 << 20
_LAYOUT = struct.Struct("<8sIIQ16sI")
_CRC = struct.Struct("<I")


class Fence(enum.IntEnum):
    """What the next start may believe of the database. Written when the last daemon had to go on
    past a database or device that failed."""

    NONE = 0
    """All of it."""
    ALL = 1
    """Nothing: the cache starts empty."""
    CLEAN = 2
    """Only what is dirty: clean pages may be older than the origin."""


@dataclass(frozen=True, slots=True)
class Superblock:
    """``block_size`` in bytes, ``slot_count`` in slots."""

    block_size: int
    slot_count: int
    uuid: uuid.UUID
    fence: Fence = Fence.NONE

    def pack(self) -> bytes:
        """The 4096 bytes as they stand on the device."""
        sizes = (self.block_size, self.slot_count)
        body = _LAYOUT.pack(MAGIC, VERSION, *sizes, self.uuid.bytes, int(self.fence))
        return (body + _CRC.pack(zlib.crc32(body))).ljust(SUPERBLOCK_SIZE, b"\0")

    @classmethod
    def unpack(cls, data: bytes) -> "Superblock":
        """Reads what ``pack`` wrote.

        Raises:
            NotACacheError: no magic: this was never a fusecache cache.
            SuperblockError: the magic is there, but the rest is damaged or of another version.
        """
        if len(data) < SUPERBLOCK_SIZE or not data.startswith(MAGIC):
            raise NotACacheError("there is no fusecache superblock")
        body = data[: _LAYOUT.size]
        (crc,) = _CRC.unpack_from(data, _LAYOUT.size)
        if crc != zlib.crc32(body):
            raise SuperblockError("its superblock is damaged (the checksum does not match)")
        _, version, block_size, slot_count, raw, fence = _LAYOUT.unpack(body)
        if version != VERSION:
            raise SuperblockError(
                f"its format version is {version}, this fusecache reads version {VERSION}"
            )
        if block_size & (block_size - 1) or not MIN_BLOCK_SIZE <= block_size <= MAX_BLOCK_SIZE:
            raise SuperblockError(f"its superblock names an impossible block size, {block_size}")
        if fence not in Fence._value2member_map_:
            raise SuperblockError(f"its superblock names an impossible fence, {fence}")
        return cls(block_size, slot_count, uuid.UUID(bytes=raw), Fence(fence))
