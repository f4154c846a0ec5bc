"""The first 4 KiB of a cache device: what it is, whose it is, and how it is divided.

Little endian: magic (8 bytes), format version (4), block size (4), slot count (8), uuid (16),
fence (4: what of the database must not be believed), then the CRC-32 of all that (4); the rest is
zero. Slots begin at 1 MiB.

The page after it is the *witness*: how far the database has come. A database that was rolled back
(its write-ahead log is missing, an old copy was put in its place) looks sound, but slots it names
may hold other blocks by now. So every commit leaves its number here, unsynced: the next device
sync makes it stable. It is no part of the superblock, which is thus hardly ever written.
"""

import enum
import shlex
import struct
import uuid
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from fusecache.config import MAX_BLOCK_SIZE, MIN_BLOCK_SIZE
from fusecache.errors import NotACacheError, SuperblockError

MAGIC = b"FUSECACH"
VERSION = 1
SUPERBLOCK_SIZE = 4096
WITNESS_OFFSET = 4096
DATA_OFFSET = 1 << 20
_LAYOUT = struct.Struct("<8sIIQ16sI")
_CRC = struct.Struct("<I")
_WITNESS_MAGIC = b"FUSEWITN"
_WITNESS = struct.Struct("<8sQQ")
WITNESS_SIZE = 512
"""One sector: a power cut does not tear it."""


class Fence(enum.IntEnum):
    """What the next start may believe of the database. Written when the last daemon had to go on
    past a database or device that failed."""

    NONE = 0
    """All of it."""
    ALL = 1
    """Nothing: the cache starts empty."""
    CLEAN = 2
    """Only what is dirty: clean pages may be older than the origin."""


class Witness(NamedTuple):
    """The database's last commit and last stable commit, by number, as the cache device saw it.

    ``blank``: nothing was ever written there.
    """

    commits: int = 0
    stable: int = 0
    blank: bool = False

    def pack(self) -> bytes:
        """The 512 bytes as they stand on the device."""
        body = _WITNESS.pack(_WITNESS_MAGIC, self.commits, self.stable)
        return (body + _CRC.pack(zlib.crc32(body))).ljust(WITNESS_SIZE, b"\0")

    @classmethod
    def unpack(cls, data: bytes) -> "Witness":
        """Reads what ``pack`` wrote.

        Raises:
            SuperblockError: it is damaged.
        """
        body = data[: _WITNESS.size]
        if len(data) < WITNESS_SIZE or not any(data[:WITNESS_SIZE]):
            return cls(blank=True)
        if _CRC.unpack_from(data, _WITNESS.size) != (zlib.crc32(body),):
            raise SuperblockError(
                "its record of the database's commits is damaged (the checksum does not match)"
            )
        magic, commits, stable = _WITNESS.unpack(body)
        if magic != _WITNESS_MAGIC:
            raise SuperblockError("its record of the database's commits is not one")
        return cls(commits, stable)

    def contradiction(self, commits: int, synced: int, *, same_boot: bool) -> str | None:
        """What is wrong between this device and a database that says ``commits`` and ``synced``.

        A killed process leaves both as they were. A power cut keeps of the witness any version
        since the last sync, and of the database the last stable commit or any later one. A commit
        reaches the database before the witness, and the witness is synced before ``synced`` says
        so. Anything else is a database or a device from another time.
        """
        if commits < self.stable or (same_boot and commits < self.commits):
            return "is older than the cache device"
        if synced > self.commits:
            return "is newer than the cache device"
        return None


@dataclass(frozen=True, slots=True)
class Superblock:
    """``block_size`` in bytes, ``slot_count`` in slots."""

    block_size: int
    slot_count: int
    uuid: uuid.UUID
    fence: Fence = Fence.NONE
    witness: Witness | None = field(default=None, compare=False)
    """What stood beside it when it was read from a device."""
    path: Path | None = field(default=None, compare=False)
    """From where."""

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


def named(path: Path, database: Path | None = None) -> str:
    """A cache as a command line names it. Its database is named, too, unless it lies where it is
    looked for in any case: a damaged superblock of a block device does not tell where that is."""
    words = [str(path)]
    if database is not None and database != Path(f"{path}.sqlite"):
        words += ["--db", str(database)]
    return shlex.join(words)


def remedy(path: Path | None, database: Path | None = None) -> str:
    """What to do about a damaged cache, for the end of a refusal."""
    cache = "CACHE" if path is None else named(path, database)
    return f"See what is wrong: fusecache check {cache}; to mend it: fusecache repair {cache}"
