"""Reads of a damaged database what can be read, from a copy, so that nothing of it changes.

Nothing here decides: every row is either sound by its own checksum or counted as damaged.
"""

import contextlib
import os
import sqlite3
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from sqlite_utils import Database

from fusecache.core.rows import U64, Rows
from fusecache.store import packing
from fusecache.store.packing import PackedRegion
from fusecache.store.records import (
    IMAGE_COLUMNS,
    ImageRow,
    Meta,
    block_hash,
    image_crc,
    image_hash,
    part_hash,
    pending_hash,
    region_hash,
)
from fusecache.store.schema import SCHEMA_VERSION, migrations
from fusecache.store.tables import Tables
from fusecache.store.tallies import Tally
from fusecache.store.telling import Tell, silent

TABLES = ("block", "pending", "region", "image", "part")
_MOST_COMPLAINTS = 20
_PIECE = 4 << 20
_AT_ONCE = 256
_KEYS = {"block": "image {0}, region {0}", "pending": "seq {0}", "region": "image {0}, region {0}"}
_VALUES = (ValueError, TypeError, OverflowError, AttributeError, struct.error)
"""What values of the wrong kind lead to."""


@dataclass(slots=True)
class Salvaged:
    """A database as far as it can be read.

    ``damaged`` has of every table what its unsound rows say they are; ``found`` counts and sums
    all rows by their own checksum column, whether it is right or not.
    """

    meta: Meta | None = None
    version: int | None = None
    other_version: bool = False
    """Not a number that is wrong: the tables are other ones, too."""
    images: list[ImageRow] = field(default_factory=list)
    regions: list[PackedRegion] = field(default_factory=list)
    pending: list[tuple[int, Rows]] = field(default_factory=list)
    intents: list[tuple[int, int, int]] = field(default_factory=list)
    parts: dict[tuple[int, int], Tally] = field(default_factory=dict)
    order: list[tuple[int, U64]] = field(default_factory=list)
    damaged: dict[str, list[tuple[Any, ...]]] = field(default_factory=dict)
    found: dict[str, Tally] = field(default_factory=dict)
    complaints: list[str] = field(default_factory=list)
    """SQLite's own, and what is wrong with the tables themselves."""
    bad_order: int = 0

    def proven(self, table: str) -> bool:
        """Whether the table holds exactly what was written last."""
        return (
            self.meta is not None
            and not self.damaged[table]
            and self.found[table] == self.meta.tally(table)
        )

    def merged(self) -> Rows:
        """The sound blocks as of the last barrier."""
        return packing.unpack_regions(self.regions)


def salvage(path: Path, tell: Tell = silent) -> Salvaged:
    """Everything that can be read of the database and its write-ahead log."""
    read = Salvaged(damaged={name: [] for name in TABLES}, found=dict.fromkeys(TABLES, Tally()))
    with tempfile.TemporaryDirectory(prefix="fusecache-") as directory:
        copy = Path(directory) / "copy.sqlite"
        for suffix in ("", "-wal"):
            with contextlib.suppress(FileNotFoundError):
                _copy(f"{path}{suffix}", f"{copy}{suffix}", tell)
        with contextlib.closing(sqlite3.connect(copy, isolation_level=None)) as connection:
            # One flipped bit in a text must not make the row unreadable.
            connection.text_factory = lambda raw: raw.decode("utf-8", "surrogateescape")
            _read(connection, read, tell)
    return read


def _copy(source: str, target: str, tell: Tell) -> None:
    done = 0
    with open(source, "rb") as old, open(target, "wb") as new:
        of = os.fstat(old.fileno()).st_size
        while piece := old.read(_PIECE):
            new.write(piece)
            done += len(piece)
            tell("of the database copied", done, of)


def _read(connection: sqlite3.Connection, read: Salvaged, tell: Tell) -> None:
    try:
        # Also where the header says otherwise; and no index of the log in a mapped file.
        connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        read.version = _version(connection)
        read.complaints += _integrity(connection)
        wrong = _schema(connection)
        read.complaints += wrong
        read.other_version = bool(wrong) and read.version not in (None, SCHEMA_VERSION)
    except _SQL as exc:
        read.complaints.append(str(exc))
    try:
        read.meta = Tables(connection).written_meta()
    except (*_SQL, *_VALUES) as exc:
        read.complaints.append(f"meta: {exc}" if "meta" not in str(exc) else str(exc))
    _read_block(connection, read, tell)
    _read_pending(connection, read)
    _read_region(connection, read)
    _read_image(connection, read)
    _read_parts(connection, read)
    _read_order(connection, read)


_SQL = (sqlite3.Error, sqlite3.Warning, UnicodeDecodeError)
"""The last for messages that quote damaged names."""


def _version(connection: sqlite3.Connection) -> int | None:
    try:
        row = connection.execute("SELECT schema_version FROM meta").fetchone()
        return int(row[0])
    except (*_SQL, *_VALUES):
        return None


def _integrity(connection: sqlite3.Connection) -> list[str]:
    lines = connection.execute(f"PRAGMA integrity_check({_MOST_COMPLAINTS})").fetchall()
    return [str(line) for (line,) in lines if line != "ok"]


def _schema(connection: sqlite3.Connection) -> list[str]:
    """Tables, indexes and views that are not those of a new database."""
    sql = "SELECT type, name, sql FROM sqlite_master"
    with contextlib.closing(sqlite3.connect(":memory:")) as fresh:
        migrations.apply(Database(fresh))
        expected = set(fresh.execute(sql).fetchall())
        names = "SELECT migration_set, name FROM _sqlite_migrations"
        applied = set(fresh.execute(names).fetchall())
    wrong = expected ^ set(connection.execute(sql).fetchall())
    found = [f"the definition of {name} is not right" for name in sorted({w[1] for w in wrong})]
    if not wrong and set(connection.execute(names).fetchall()) != applied:
        found.append("the list of migrations is not right")
    return found


def _rows(
    connection: sqlite3.Connection, read: Salvaged, table: str, sql: str
) -> Iterator[tuple[Any, ...]]:
    """All rows, from the front, and if that ends in an error, from the back, too."""
    seen: set[Any] = set()
    for direction in ("ASC", "DESC"):
        try:
            order = f" ORDER BY {_KEYS[table].format(direction)}" if table in _KEYS else ""
            for row in connection.execute(sql + order):
                if direction == "ASC" or row[:2] not in seen:
                    seen.add(row[:2])
                    yield row
            return
        except _SQL as exc:
            complaint = f"{table}: {exc}"
            if complaint not in read.complaints:
                read.complaints.append(complaint)


def _count(read: Salvaged, table: str, hashed: int) -> None:
    read.found[table] = read.found[table].plus(hashed)


def _read_block(connection: sqlite3.Connection, read: Salvaged, tell: Tell) -> None:
    sql = "SELECT image, region, slots, valid, dirty, crc FROM block"
    of = 0 if read.meta is None else read.meta.tally("block").rows
    for number, row in enumerate(_rows(connection, read, "block", sql)):
        if number % _AT_ONCE == 0:
            tell("of the block map read", number, of, "regions")
        region = PackedRegion(*row)
        try:
            _count(read, "block", block_hash(region.image, region.region, region.crc))
            packing.unpack_regions([region])
        except _VALUES:
            read.damaged["block"].append(row)
        else:
            read.regions.append(region)


def _read_pending(connection: sqlite3.Connection, read: Salvaged) -> None:
    hashes: dict[int, int] = {}
    for seq, blob, crc in _rows(connection, read, "pending", "SELECT seq, rows, crc FROM pending"):
        try:
            hashes[seq] = pending_hash(seq, crc)
            _count(read, "pending", hashes[seq])
            if packing.batch_crc(seq, blob) != crc:
                raise ValueError("wrong checksum")
            read.pending.append((seq, packing.unpack_batches([blob])))
        except _VALUES:
            read.damaged["pending"].append((seq,))
    read.pending.sort(key=lambda batch: batch[0])
    if read.meta is not None:
        _take_appended(read.meta, hashes, max((seq for seq, _ in read.pending), default=0))


def _take_appended(meta: Meta, hashes: dict[int, int], last: int) -> None:
    """``Tables.meta``, but a row that is missing before the last sound one only counts as one that
    should be there."""
    while meta.commits < last or meta.commits + 1 in hashes:
        meta.appended(hashes.get(meta.commits + 1, 0))


def _read_region(connection: sqlite3.Connection, read: Salvaged) -> None:
    for row in _rows(connection, read, "region", "SELECT image, region, active FROM region"):
        try:
            _count(read, "region", region_hash(*row))
            read.intents.append((int(row[0]), int(row[1]), int(row[2])))
        except _VALUES:
            read.damaged["region"].append(row)


def _read_image(connection: sqlite3.Connection, read: Salvaged) -> None:
    sql = f"SELECT {', '.join(IMAGE_COLUMNS)}, crc FROM image NOT INDEXED"
    for *values, crc in _rows(connection, read, "image", sql):
        try:
            _count(read, "image", image_hash(values[0], crc))
            if image_crc(tuple(values)) != crc:
                raise ValueError("wrong checksum")
            read.images.append(ImageRow(*values))
        except _VALUES:
            read.damaged["image"].append((values[0], values[2]))


def _read_parts(connection: sqlite3.Connection, read: Salvaged) -> None:
    for row in _rows(connection, read, "part", "SELECT image, part, rows, sum FROM part"):
        try:
            tally = Tally(int(row[2]), int(row[3]))
            _count(read, "part", part_hash(row[0], row[1], tally))
            read.parts[int(row[0]), int(row[1])] = tally
        except _VALUES:
            read.damaged["part"].append(row)


def _read_order(connection: sqlite3.Connection, read: Salvaged) -> None:
    for first, ticks in _rows(connection, read, "lru", "SELECT first_slot, ticks FROM lru"):
        if isinstance(ticks, bytes) and len(ticks) % 8 == 0 and first >= 0:
            read.order.append((first, np.frombuffer(ticks, "<u8")))
        else:
            read.bad_order += 1
