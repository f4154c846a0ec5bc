"""What is wrong with a cache, as facts: everything ``check`` says and ``repair`` goes by.

Only reads. Damage is told by kind: a ``Finding`` has one sentence, how often, and an example.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from fusecache.config import format_size
from fusecache.core.geometry import Geometry
from fusecache.core.rows import Rows
from fusecache.core.slots import NO_SLOT
from fusecache.errors import NotACacheError, SuperblockError
from fusecache.store import cache_device
from fusecache.store.records import ImageRow, Meta
from fusecache.store.salvage import TABLES, Salvaged, salvage
from fusecache.store.schema import SCHEMA_VERSION
from fusecache.store.superblock import (
    DATA_OFFSET,
    MAGIC,
    WITNESS_OFFSET,
    WITNESS_SIZE,
    Fence,
    Superblock,
    Witness,
)
from fusecache.store.tables import latest
from fusecache.store.telling import Tell, silent
from fusecache.store.watching import lost_record

_NO_ROWS = Rows(
    np.zeros(0, np.uint32),
    np.zeros(0, np.uint32),
    np.zeros(0, np.uint32),
    np.zeros(0, np.uint16),
    np.zeros(0, np.uint16),
)


@dataclass(frozen=True, slots=True)
class Finding:
    """One kind of inconsistency: ``what`` is wrong, how often, and an example of it."""

    kind: str
    what: str
    count: int = 1
    example: str = ""


@dataclass(slots=True)
class Inspection:
    """A cache as it lies there."""

    path: Path
    database: Path
    device_size: int
    superblock: Superblock | None = None
    witness: Witness | None = None
    read: Salvaged | None = None
    same_boot: bool = False
    has_magic: bool = False
    empty: bool = False
    foreign: bool = False
    contradiction: str | None = None
    findings: list[Finding] = field(default_factory=list)

    def add(self, kind: str, what: str, count: int = 1, example: str = "") -> None:
        """One more finding."""
        self.findings.append(Finding(kind, what, count, example))

    @property
    def kinds(self) -> set[str]:
        """Of all findings."""
        return {finding.kind for finding in self.findings}

    @property
    def geometry(self) -> Geometry | None:
        """Of the superblock, or else of the database."""
        if self.superblock is not None:
            return Geometry.of(self.superblock.block_size)
        if self.read is not None and self.read.meta is not None:
            return Geometry.of(self.read.meta.block_size)
        return None

    @property
    def _said(self) -> Superblock | Meta | None:
        """What tells of the sizes."""
        return self.superblock or (self.read.meta if self.read is not None else None)

    @property
    def needed(self) -> int:
        """Bytes that the cache device should have; 0 if nobody can say."""
        said = self._said
        return 0 if said is None else DATA_OFFSET + said.slot_count * said.block_size

    @property
    def slot_count(self) -> int:
        """Slots that are really there."""
        geometry, said = self.geometry, self._said
        if geometry is None or said is None:
            return 0
        there = max(0, self.device_size - DATA_OFFSET) // geometry.block_size
        return min(said.slot_count, there)

    @property
    def left(self) -> str:
        """How the last daemon left the cache: clean, killed, cut, or unknown."""
        meta = None if self.read is None else self.read.meta
        if meta is None:
            return "unknown"
        if meta.clean:
            return "clean"
        return "killed" if self.same_boot else "cut"

    def rows(self) -> Rows:
        """The cached blocks as the next start sees them, as far as they are sound."""
        if self.read is None:
            return _NO_ROWS
        merged = self.read.merged() if self.read.regions else _NO_ROWS
        if self.left != "killed":
            return merged
        return present(latest([(0, merged), *self.read.pending]))

    def image_names(self) -> dict[int, bytes]:
        """Paths by image number, also of rows that are damaged."""
        if self.read is None:
            return {}
        names = {
            number: path if isinstance(path, bytes) else str(path).encode()
            for number, path in self.read.damaged["image"]
            if isinstance(number, int)
        }
        return names | {image.id: image.path for image in self.read.images}


def present(rows: Rows | None) -> Rows:
    """Those that are not deletions."""
    return _NO_ROWS if rows is None else rows.where(rows.slot != NO_SLOT)


def inspect(
    fd: int, path: Path, database: Path | None, boot_id: str, tell: Tell = silent
) -> Inspection:
    """Looks at a cache that nobody has open.

    Args:
        fd: of the cache device, locked.
        database: None if nobody can tell where it is.
    """
    found = Inspection(path, database or Path(os.devnull), cache_device.size_of(fd))
    _superblock(found, fd)
    if database is None:
        found.add("database missing", "which database is this cache's, nobody can tell")
        return found
    if not database.is_file():
        found.add("database missing", f"the database {database} is missing")
        return found
    read = found.read = salvage(database, tell)
    _database(found, read, boot_id)
    if not found.foreign and not read.other_version:
        _tables(found, read)
        _map(found, read)
    return found


def _superblock(found: Inspection, fd: int) -> None:
    data = os.pread(fd, WITNESS_OFFSET + WITNESS_SIZE, 0)
    found.has_magic = data.startswith(MAGIC)
    found.empty = cache_device.is_empty(fd)
    try:
        found.superblock = Superblock.unpack(data)
    except NotACacheError:
        found.add("superblock", "there is no fusecache superblock")
    except SuperblockError as exc:
        found.add("superblock", str(exc))
    try:
        found.witness = Witness.unpack(data[WITNESS_OFFSET:])
    except SuperblockError as exc:
        found.add("witness", str(exc))
    superblock = found.superblock
    if superblock is None:
        return
    _length(found)
    if superblock.fence is not Fence.NONE:
        what = "nothing" if superblock.fence is Fence.ALL else "only what is dirty"
        found.add(
            "fence", f"the last daemon went on past trouble: {what} in the database is believed"
        )


def _length(found: Inspection) -> None:
    if found.device_size < found.needed:
        sizes = f"{format_size(found.device_size)} of {format_size(found.needed)}"
        found.add("cut short", f"the cache device is shorter than it was, cut short: {sizes}")


def _database(found: Inspection, read: Salvaged, boot_id: str) -> None:
    meta = read.meta
    if read.other_version:
        found.add("version", f"the database is of version {read.version}, not {SCHEMA_VERSION}")
        return
    if read.complaints:
        what = "the database is damaged"
        found.add("database", what, len(read.complaints), read.complaints[0])
    if meta is None:
        return
    found.same_boot = meta.boot_id == boot_id
    superblock, witness = found.superblock, found.witness
    if superblock is None:
        _length(found)
    else:
        if (meta.uuid, meta.block_size) != (str(superblock.uuid), superblock.block_size):
            found.foreign = True
            found.add("other cache", f"the database belongs to another cache ({meta.uuid})")
            return
        if meta.slot_count != superblock.slot_count:
            counts = f"{meta.slot_count} and {superblock.slot_count}"
            found.add("geometry", f"database and cache device disagree on the slots: {counts}")
    if witness is None:
        return
    if witness.blank:
        if lost_record(meta, witness):
            found.add("witness", "the cache device has lost its record of the database's commits")
        return
    found.contradiction = witness.contradiction(
        meta.commits, meta.synced, same_boot=found.same_boot
    )
    if found.contradiction is not None:
        there = Path(f"{found.database}-wal").exists()
        log = "" if there else "there is no write-ahead log beside it; "
        example = f"{log}commit {meta.commits}, the device knows of {witness.commits}"
        found.add("rolled back", f"the database {found.contradiction}", example=example)


def _tables(found: Inspection, read: Salvaged) -> None:
    for table in TABLES:
        bad = read.damaged[table]
        if bad:
            what = f"rows of the table {table} have a wrong checksum or impossible values"
            found.add(f"{table} row", what, len(bad), _key(bad[0]))
        if read.meta is None:
            continue
        there, expected = read.found[table], read.meta.tally(table)
        if there.rows < expected.rows:
            found.add(
                f"{table} rows",
                f"rows of the table {table} are missing",
                expected.rows - there.rows,
            )
        elif there.rows > expected.rows:
            found.add(
                f"{table} rows",
                f"rows too many are in the table {table}",
                there.rows - expected.rows,
            )
        elif there != expected:
            found.add(f"{table} rows", f"the table {table} holds other rows than were written last")
    if read.bad_order:
        found.add("order", "rows of the saved LRU order cannot be read", read.bad_order)


def _key(row: tuple[object, ...]) -> str:
    return ", ".join(str(value) for value in row[:2])


def _map(found: Inspection, read: Salvaged) -> None:
    """What the rows say of each other and of the device."""
    rows = found.rows()
    known = np.array([image.id for image in read.images], np.uint32)
    # A clean one is left by a fill that ended while its image was forgotten; a start drops it.
    orphans = ~np.isin(rows.image, known) & (rows.dirty != 0)
    _row_kind(found, rows, orphans, "orphan", "blocks with dirty data belong to an unknown image")
    for kind, (what, which) in wrong_rows(found, rows).items():
        _row_kind(found, rows, which, kind, what)
    lost = (rows.dirty & ~rows.valid) != 0
    for image, name in found.image_names().items():
        mine = lost & (rows.image == image)
        if mine.any() and found.geometry is not None:
            part = rows.where(mine)
            ranges = byte_ranges(part.block, part.dirty & ~part.valid, found.geometry)
            shown = ", ".join(f"{first}-{end - 1}" for first, end in ranges)
            what = f"the cache device lost dirty data of '{os.fsdecode(name)}'"
            found.add("lost", what, len(ranges), f"bytes {shown}")


def wrong_rows(
    found: Inspection, rows: Rows
) -> dict[str, tuple[str, "np.ndarray[tuple[int], np.dtype[np.bool_]]"]]:
    """Rows that no sound map has: by kind a sentence and which of the rows they are."""
    _, inverse, counts = np.unique(rows.slot, return_inverse=True, return_counts=True)
    wrong = {
        "slot outside": (
            "blocks lie in slots beyond the end of the cache device",
            rows.slot >= np.uint32(min(found.slot_count, NO_SLOT)),
        ),
        "slot twice": ("blocks lie in a slot that holds another block, too", counts[inverse] > 1),
        "no page": ("blocks have no page", (rows.valid | rows.dirty) == 0),
    }
    if found.geometry is not None:
        beyond = np.uint16(~found.geometry.full_mask & 0xFFFF)
        outside = ((rows.valid | rows.dirty) & beyond) != 0
        wrong["page outside"] = ("blocks have pages beyond their end", outside)
    return wrong


def _row_kind(
    found: Inspection,
    rows: Rows,
    which: "np.ndarray[tuple[int], np.dtype[np.bool_]]",
    kind: str,
    what: str,
) -> None:
    if which.any():
        one = rows.where(which)
        example = f"image {one.image[0]}, block {one.block[0]}, slot {one.slot[0]}"
        found.add(kind, what, int(which.sum()), example)


def byte_ranges(
    blocks: "np.ndarray[tuple[int], np.dtype[np.uint32]]",
    masks: "np.ndarray[tuple[int], np.dtype[np.uint16]]",
    geometry: Geometry,
) -> list[tuple[int, int]]:
    """The pages of these masks as (first byte, byte after the last) of the image, joined."""
    ranges: list[tuple[int, int]] = []
    for block, mask in sorted(zip(blocks.tolist(), masks.tolist(), strict=True)):
        for page in range(geometry.pages_per_block):
            if mask >> page & 1:
                first = block * geometry.block_size + page * geometry.page_size
                if ranges and ranges[-1][1] == first:
                    ranges[-1] = (ranges[-1][0], first + geometry.page_size)
                else:
                    ranges.append((first, first + geometry.page_size))
    return ranges


def image_rows(found: Inspection) -> Iterator[tuple[ImageRow, Rows]]:
    """Every image whose row is sound, with its blocks."""
    rows = found.rows()
    for image in () if found.read is None else found.read.images:
        yield replace(image), rows.where(rows.image == image.id)
