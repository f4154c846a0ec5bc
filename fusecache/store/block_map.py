"""The block map in SQLite: load, commit, merge. sqlite-utils and sqlite3 stop here.

Two strengths of commit (DESIGN: 17 us and 140 us measured): a *light* one (``synchronous=NORMAL``)
is in the kernel when it returns and survives a killed process; a *stable* one (``FULL``) is on
stable storage. Calls block and must come one at a time: there is one connection and one writer.
"""

import contextlib
import itertools
import os
import sqlite3
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import numpy as np
from sqlite_utils import Database

from fusecache.core.geometry import REGION_BLOCKS
from fusecache.core.rows import U64, Rows
from fusecache.core.slots import NO_SLOT
from fusecache.errors import DatabaseError
from fusecache.store import packing
from fusecache.store.packing import PackedRegion, RegionColumns
from fusecache.store.schema import SCHEMA_VERSION, migrations
from fusecache.store.superblock import Superblock

WHOLE_IMAGE = -1
"""As a region number: the row stands for every region of the image."""

_CHUNK = 512
"""Regions loaded at a time; with 4096 freed temporary memory kept 10 bytes a slot (measured)."""
_OWN_CHANGE_SLACK_NS = 2_000_000_000

_REGION_SQL = "SELECT image, region, slots, valid, dirty, crc FROM block "
_PUT_REGION = "INSERT OR REPLACE INTO block VALUES (?, ?, ?, ?, ?, ?)"
_PUT_INTENT = "INSERT OR REPLACE INTO region VALUES (?, ?, ?)"
_PUT_PENDING = "INSERT INTO pending (seq, rows, crc) VALUES (?, ?, ?)"


@dataclass(slots=True)
class ImageRow:
    """What the database remembers of an image; see ``schema`` for the columns."""

    id: int
    identity: bytes
    path: bytes
    size: int = 0
    mtime_ns: int = 0
    ctime_ns: int = 0
    recorded_ns: int = 0
    trusted: int = 0
    writing: int = 0
    ours_until_ns: int = 0
    write_mode: str = ""

    def copy(self) -> "ImageRow":
        """The row as it is now, for a commit in another thread."""
        return ImageRow(*(getattr(self, name) for name in _IMAGE_COLUMNS))


_IMAGE_COLUMNS = tuple(ImageRow.__dataclass_fields__)
_PUT_IMAGE = (
    f"INSERT OR REPLACE INTO image ({', '.join(_IMAGE_COLUMNS)}) "
    f"VALUES ({', '.join('?' * len(_IMAGE_COLUMNS))})"
)


@dataclass(slots=True)
class Meta:
    """The row of ``meta``."""

    schema_version: int
    uuid: str
    block_size: int
    slot_count: int
    boot_id: str
    clean: int
    heartbeat_ns: int
    pid: int
    mountpoint: bytes
    origin: bytes


@dataclass(slots=True)
class Batch:
    """What goes into one transaction, in this order."""

    rows: Rows | None = None
    drops: list[tuple[int, int]] = field(default_factory=list)
    """(image, first block): these blocks and all after them leave the database too (R6)."""
    images: list[ImageRow] = field(default_factory=list)
    forgotten: list[int] = field(default_factory=list)
    intents: list[tuple[int, int, int]] = field(default_factory=list)
    """(image, region, active)"""
    settled: list[tuple[int, int]] = field(default_factory=list)
    """(image, region): rows to remove"""
    order: list[tuple[int, U64]] = field(default_factory=list)
    heartbeat_ns: int | None = None


@contextlib.contextmanager
def _translated(doing: str) -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, ValueError, TypeError, OverflowError, struct.error) as exc:
        # All but the first are what damaged values lead to.
        raise DatabaseError(f"{doing}: {exc}") from exc


class BlockMap:
    """An open database. Every method raises DatabaseError when SQLite does."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path = path
        self._conn = connection
        self._db = Database(connection)
        self._stable: bool | None = None
        self._seq = 0

    # -- opening -----------------------------------------------------------------------------------

    @classmethod
    def create(cls, path: Path, superblock: Superblock) -> "BlockMap":
        """A new, empty database for a freshly formatted cache; an old one there is replaced."""
        try:
            for name in (path, Path(f"{path}-wal"), Path(f"{path}-shm")):
                name.unlink(missing_ok=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        except OSError as exc:
            raise DatabaseError(f"Cannot create the database {path}: {exc.strerror}.") from exc
        with _translated(f"Cannot create the database {path}"):
            block_map = cls(path, _connect(path))
            block_map._prepare()
            migrations.apply(block_map._db)
            block_map._db.table("meta").insert(
                {
                    "id": 1,
                    "schema_version": SCHEMA_VERSION,
                    "uuid": str(superblock.uuid),
                    "block_size": superblock.block_size,
                    "slot_count": superblock.slot_count,
                    "boot_id": "",
                    "clean": 1,
                    "heartbeat_ns": 0,
                    "pid": 0,
                    "mountpoint": b"",
                    "origin": b"",
                }
            )
            block_map.checkpoint(truncate=True)
        return block_map

    @classmethod
    def open(cls, path: Path, superblock: Superblock) -> "BlockMap":
        """The database of this very cache.

        Raises:
            DatabaseError: missing, damaged, of another cache or of a newer version.
        """
        anew = (
            "To start with an empty cache (the origin keeps all data written through), "
            "use fusecache format with --force."
        )
        if not path.exists():
            raise DatabaseError(f"The cache's database {path} is missing. {anew}")
        block_map: BlockMap | None = None
        try:
            with _translated(f"The cache's database {path} is damaged"):
                block_map = cls(path, _connect(path))
                block_map._prepare()
                version = block_map._version()
                if version > SCHEMA_VERSION:
                    raise DatabaseError(
                        f"The cache's database {path} is of version {version}, this fusecache "
                        f"knows version {SCHEMA_VERSION}: use the newer fusecache again."
                    )
                migrations.apply(block_map._db)
                meta = block_map.meta()
        except DatabaseError as exc:
            if block_map is not None:
                block_map.close()
            raise DatabaseError(f"{str(exc).rstrip('.')}. {anew}") from exc
        if (meta.uuid, meta.block_size, meta.slot_count) != (
            str(superblock.uuid),
            superblock.block_size,
            superblock.slot_count,
        ):
            block_map.close()
            raise DatabaseError(
                f"The database {path} belongs to another cache ({meta.uuid}, this one is "
                f"{superblock.uuid}): name the right one with --db. {anew}"
            )
        return block_map

    @staticmethod
    def is_block_map(path: Path) -> bool:
        """Whether a file is the database of some cache; nothing in it is touched."""
        connection = sqlite3.connect(f"file:{quote(str(path))}?immutable=1", uri=True)
        try:
            connection.execute("SELECT schema_version, uuid, slot_count FROM meta")
        except sqlite3.Error:
            return False
        finally:
            connection.close()
        return True

    def _prepare(self) -> None:
        # One process at a time: so the log's index is in memory and not in a mapped file, which
        # on a full filesystem would end the daemon by SIGBUS.
        self._conn.execute("PRAGMA locking_mode = EXCLUSIVE")
        self._conn.execute("PRAGMA journal_mode = WAL")
        self._conn.execute("PRAGMA wal_autocheckpoint = 0")  # see checkpoint()
        self._seq = 0

    def _version(self) -> int:
        if "meta" not in self._db.table_names():
            raise ValueError("it has no meta table")
        row = self._conn.execute("SELECT schema_version FROM meta WHERE id = 1").fetchone()
        if row is None:
            raise ValueError("its meta table is empty")
        return int(row[0])

    def close(self) -> None:
        """Closes the connection; the write-ahead log stays unless a checkpoint emptied it."""
        self._conn.close()

    # -- small things ------------------------------------------------------------------------------

    def meta(self) -> Meta:
        """The cache's row of ``meta``."""
        with _translated(f"Reading {self.path}"):
            row = dict(self._db.table("meta").get(1))
            return Meta(**{name: row[name] for name in Meta.__dataclass_fields__})

    def images(self) -> list[ImageRow]:
        """Every image the database knows."""
        with _translated(f"Reading {self.path}"):
            sql = f"SELECT {', '.join(_IMAGE_COLUMNS)} FROM image"
            return [ImageRow(*row) for row in self._conn.execute(sql)]

    def cached(self, image: int) -> tuple[int, bool]:
        """How many blocks of an image are cached, and whether any is dirty. Slow: for when no
        daemon runs."""
        with _translated(f"The database {self.path} is damaged"):
            cursor = self._conn.execute(_REGION_SQL + "WHERE image = ?", (image,))
            parts = [packing.unpack_regions([PackedRegion(*row) for row in cursor])]
            if (pending := self._pending(1 << 62)) is not None:
                parts.append(pending.where(pending.image == image))
            latest = packing.last_of_each(Rows(*map(np.concatenate, zip(*parts, strict=True))))
            return int((latest.slot != NO_SLOT).sum()), bool(latest.dirty.any())

    def intents(self) -> list[tuple[int, int, int]]:
        """(image, region, active) of every row of ``region``."""
        with _translated(f"Reading {self.path}"):
            sql = "SELECT image, region, active FROM region"
            return [(int(i), int(r), int(a)) for i, r, a in self._conn.execute(sql)]

    # -- transactions ------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _transaction(self, *, stable: bool) -> Iterator[None]:
        if stable != self._stable:
            self._conn.execute(f"PRAGMA synchronous = {'FULL' if stable else 'NORMAL'}")
            self._stable = stable
        with self._db.atomic():
            yield

    def commit(self, batch: Batch, *, stable: bool) -> int:
        """One transaction with all of ``batch``.

        Returns:
            The mark: ``merge`` with it takes in everything committed up to now.
        """
        with _translated(f"Writing {self.path}"), self._transaction(stable=stable):
            if batch.rows is not None and batch.rows.slot.size:
                blob = packing.pack_batch(batch.rows)
                self._conn.execute(_PUT_PENDING, (self._seq + 1, blob, zlib.crc32(blob)))
                self._seq += 1
            for image, first_block in batch.drops:
                self._drop(image, first_block)
            self._conn.executemany(
                _PUT_IMAGE, [[getattr(row, n) for n in _IMAGE_COLUMNS] for row in batch.images]
            )
            for image in batch.forgotten:
                self._conn.execute("DELETE FROM region WHERE image = ?", (image,))
                self._conn.execute("DELETE FROM image WHERE id = ?", (image,))
            self._conn.executemany(_PUT_INTENT, batch.intents)
            self._conn.executemany(
                "DELETE FROM region WHERE image = ? AND region = ?", batch.settled
            )
            self._conn.executemany(
                "INSERT OR REPLACE INTO lru (first_slot, ticks) VALUES (?, ?)",
                [(first, ticks.astype("<u8").tobytes()) for first, ticks in batch.order],
            )
            if batch.heartbeat_ns is not None:
                self._conn.execute("UPDATE meta SET heartbeat_ns = ?", (batch.heartbeat_ns,))
        return self._seq

    def merge(self, mark: int) -> None:
        """Step 3 of a barrier (R1): ``pending`` up to ``mark`` becomes part of ``block``, stably.

        The caller has synced the cache device since the mark was taken.
        """
        with _translated(f"Writing {self.path}"):
            sql = "SELECT 1 FROM pending WHERE seq <= ? LIMIT 1"
            if self._conn.execute(sql, (mark,)).fetchone() is None:
                return  # overwritten dirty pages alone: no row changed, and nothing to sync
            with self._transaction(stable=True):
                self._merge(mark)

    def _merge(self, mark: int) -> None:
        rows = self._pending(mark)
        if rows is not None and rows.slot.size:
            latest = packing.last_of_each(rows)
            regions = latest.block // np.uint32(REGION_BLOCKS)
            changes = np.flatnonzero(np.diff(regions) | np.diff(latest.image)) + 1
            edges = [0, *changes.tolist(), latest.slot.size]
            for start, stop in itertools.pairwise(edges):
                part = latest.where(slice(start, stop))
                image, region = int(part.image[0]), int(regions[start])
                columns = RegionColumns(self._region(image, region))
                columns.put(part)
                self._put_region(image, region, columns)
        self._conn.execute("DELETE FROM pending WHERE seq <= ?", (mark,))

    def _pending(self, mark: int) -> Rows | None:
        sql = "SELECT rows, crc FROM pending WHERE seq <= ? ORDER BY seq"
        blobs = [_checked(*row) for row in self._conn.execute(sql, (mark,))]
        return packing.unpack_batches(blobs) if blobs else None

    def _region(self, image: int, region: int) -> PackedRegion | None:
        sql = _REGION_SQL + "WHERE image = ? AND region = ?"
        row = self._conn.execute(sql, (image, region)).fetchone()
        if row is None:
            return None
        packed = PackedRegion(*row)
        packing.check(packed)  # else a change to a damaged row would give it a right checksum
        return packed

    def _put_region(self, image: int, region: int, columns: RegionColumns) -> None:
        if columns.empty:
            sql = "DELETE FROM block WHERE image = ? AND region = ?"
            self._conn.execute(sql, (image, region))
        else:
            self._conn.execute(_PUT_REGION, columns.pack(image, region))

    def _drop(self, image: int, first_block: int) -> None:
        """Takes the image's blocks from ``first_block`` on out of ``block`` and ``pending``."""
        region, place = divmod(first_block, REGION_BLOCKS)
        if place:
            columns = RegionColumns(self._region(image, region))
            columns.drop_from(place)
            self._put_region(image, region, columns)
            region += 1
        self._conn.execute("DELETE FROM block WHERE image = ? AND region >= ?", (image, region))
        for seq, blob, crc in self._conn.execute("SELECT seq, rows, crc FROM pending").fetchall():
            rows = packing.unpack_batches([_checked(blob, crc)])
            stays = (rows.image != image) | (rows.block < first_block)
            if not stays.any():
                self._conn.execute("DELETE FROM pending WHERE seq = ?", (seq,))
            elif not stays.all():
                kept = packing.pack_batch(rows.where(stays))
                sql = "UPDATE pending SET rows = ?, crc = ? WHERE seq = ?"
                self._conn.execute(sql, (kept, zlib.crc32(kept), seq))

    def checkpoint(self, *, truncate: bool = False) -> None:
        """Moves the write-ahead log into the database.

        Done here and not by SQLite inside some commit, which would sync twice at a moment
        nobody chose.
        """
        with _translated(f"Writing {self.path}"):
            self._conn.execute(f"PRAGMA wal_checkpoint({'TRUNCATE' if truncate else 'PASSIVE'})")

    # -- starting and stopping ---------------------------------------------------------------------

    def attach(
        self,
        boot_id: str,
        pid: int,
        mountpoint: bytes,
        origin: bytes,
        *,
        only_dirty: bool = False,
    ) -> None:
        """Recovery in one stable transaction (DESIGN, section 6); can be cut and run again.

        The caller has synced the cache device, so that merging ``pending`` is a barrier.

        Args:
            only_dirty: clean pages are not to be believed (``Fence.CLEAN``).
        """
        meta = self.meta()
        with _translated(f"Recovering {self.path}"), self._transaction(stable=True):
            if not meta.clean:
                if meta.boot_id == boot_id:
                    self._recover_killed(meta.heartbeat_ns)
                else:
                    self._recover_cut()
            else:
                self._conn.execute("DELETE FROM pending")
                self._conn.execute("UPDATE image SET writing = 0, ours_until_ns = 0")
            if only_dirty:
                for image in self.images():
                    self._drop_clean(image.id, WHOLE_IMAGE)
            self._conn.execute(
                "UPDATE meta SET clean = 0, boot_id = ?, pid = ?, mountpoint = ?, origin = ?",
                (boot_id, pid, mountpoint, origin),
            )
        self._seq = int(self._conn.execute("SELECT ifnull(max(seq), 0) FROM pending").fetchone()[0])

    def _recover_killed(self, heartbeat_ns: int) -> None:
        """What reached the kernel is there: every row counts, but in active regions (R4)."""
        self._merge(1 << 62)
        for image, region, active in self.intents():
            if active and region != WHOLE_IMAGE:
                self._drop_clean(image, region)
        self._conn.execute("UPDATE region SET active = 0")
        self._conn.execute(
            "UPDATE image SET ours_until_ns = ?, writing = 0 WHERE writing = 1",
            (heartbeat_ns + _OWN_CHANGE_SLACK_NS,),
        )

    def _recover_cut(self) -> None:
        """Only what a barrier made stable counts, and no region that was ever written to (R4)."""
        self._conn.execute("DELETE FROM pending")
        for image, region, _ in self.intents():
            self._drop_clean(image, region)
        self._conn.execute("DELETE FROM region")
        self._conn.execute("UPDATE image SET writing = 0, ours_until_ns = 0")

    def _drop_clean(self, image: int, region: int) -> None:
        regions = [region]
        if region == WHOLE_IMAGE:
            sql = "SELECT region FROM block WHERE image = ?"
            regions = [int(row[0]) for row in self._conn.execute(sql, (image,)).fetchall()]
        for number in regions:
            row = self._region(image, number)
            if row is not None:
                columns = RegionColumns(row)
                columns.drop_clean()
                self._put_region(image, number, columns)

    def load(self) -> Iterator[Rows]:
        """Every cached block as of ``attach``, some regions at a time.

        Raises:
            DatabaseError: a row is damaged.
        """
        with _translated(f"The database {self.path} is damaged"):
            cursor = self._conn.execute(_REGION_SQL)
            while rows := cursor.fetchmany(_CHUNK):
                yield packing.unpack_regions([PackedRegion(*row) for row in rows])

    def load_order(self) -> Iterator[tuple[int, U64]]:
        """The saved LRU order as (first slot, ticks)."""
        with _translated(f"The database {self.path} is damaged"):
            for first, ticks in self._conn.execute("SELECT first_slot, ticks FROM lru"):
                yield int(first), np.frombuffer(ticks, "<u8")

    def wipe_clean(self) -> None:
        """Forgets every clean page, stably."""
        with _translated(f"Writing {self.path}"), self._transaction(stable=True):
            self._merge(1 << 62)
            for image in self.images():
                self._drop_clean(image.id, WHOLE_IMAGE)

    def wipe(self) -> None:
        """Forgets every block, stably."""
        with _translated(f"Writing {self.path}"), self._transaction(stable=True):
            for table in ("pending", "block", "region", "lru", "image"):
                self._conn.execute(f"DELETE FROM {table}")

    def detach(self) -> None:
        """The clean stop: everything before it is stable, and the next start may trust it."""
        with _translated(f"Writing {self.path}"):
            with self._transaction(stable=True):
                if self._conn.execute("SELECT 1 FROM pending LIMIT 1").fetchone():
                    raise ValueError("rows came after the last barrier")
                self._conn.execute("UPDATE meta SET clean = 1, pid = 0")
            self.checkpoint(truncate=True)


def _checked(blob: bytes, crc: int) -> bytes:
    if zlib.crc32(blob) != crc:
        raise ValueError("a row of the table pending has a wrong checksum")
    return blob


def _connect(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=5)
