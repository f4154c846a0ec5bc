"""The first 4 KiB of a cache device: what it is, whose it is, and how it is divided.

Little endian: magic (8 bytes), format version (4), block size (4), slot count (8), uuid (16),
fenced (4: 1 if the database must not be believed), then the CRC-32 of all that (4); the rest is
zero. Slots begin at 1 MiB.
"""

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


@dataclass(frozen=True, slots=True)
class Superblock:
    """``block_size`` in bytes, ``slot_count`` in slots."""

    block_size: int
    slot_count: int
    uuid: uuid.UUID
    fenced: bool = False

    def pack(self) -> bytes:
        """The 4096 bytes as they stand on the device."""
        sizes = (self.block_size, self.slot_count)
        body = _LAYOUT.pack(MAGIC, VERSION, *sizes, self.uuid.bytes, int(self.fenced))
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
        _, version, block_size, slot_count, raw, fenced = _LAYOUT.unpack(body)
        if version != VERSION:
            raise SuperblockError(
                f"its format version is {version}, this fusecache reads version {VERSION}"
            )
        if block_size & (block_size - 1) or not MIN_BLOCK_SIZE <= block_size <= MAX_BLOCK_SIZE:
            raise SuperblockError(f"its superblock names an impossible block size, {block_size}")
        return cls(block_size, slot_count, uuid.UUID(bytes=raw), bool(fenced))
