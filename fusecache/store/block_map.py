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
from collections.abc import Iterable, Iterator
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
from fusecache.store.records import WHOLE_IMAGE, Batch, ImageRow, Meta
from fusecache.store.schema import SCHEMA_VERSION, migrations
from fusecache.store.superblock import Fence, Superblock, remedy
from fusecache.store.tables import EVERYTHING, Tables, latest
from fusecache.store.telling import Tell, silent
from fusecache.store.watching import Place, Watch, WitnessKeeper

__all__ = ["WHOLE_IMAGE", "Batch", "BlockMap", "ImageRow", "Meta"]

_AT_ONCE = 256
_OWN_CHANGE_SLACK_NS = 2_000_000_000
_CUT_SLACK_NS = 60_000_000_000
"""After a power cut: the last sign of life may not have been stable. A checkpoint makes it so,
every few seconds, unless the database's disk is slow just then."""
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


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
        self._tables = Tables(connection)
        self._stable: bool | None = None
        self._watch = Watch(path, log_missing=False)
        self._place: Place | None = None

    # -- opening -----------------------------------------------------------------------------------

    @classmethod
    def create(cls, path: Path, superblock: Superblock) -> "BlockMap":
        """A new, empty database for a freshly formatted cache; an old one there is replaced."""
        try:
            for name in (path, Path(f"{path}-wal"), Path(f"{path}-shm")):
                name.unlink(missing_ok=True)
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        except OSError as exc:
            raise DatabaseError(f"Cannot create the database {path}: {exc.strerror}.") from exc
        with _translated(f"Cannot create the database {path}"):
            block_map = cls(path, _connect(path))
            block_map._prepare()
            migrations.apply(block_map._db)
            sizes = (superblock.block_size, superblock.slot_count)
            block_map._tables.new_meta(Meta(SCHEMA_VERSION, str(superblock.uuid), *sizes))
            block_map.checkpoint(truncate=True)
        block_map._place = Place(path)
        return block_map

    @classmethod
    def open(cls, path: Path, superblock: Superblock) -> "BlockMap":
        """The database of this very cache.

        Raises:
            DatabaseError: missing, damaged, rolled back, of another cache or of a newer version.
        """
        if not path.exists():
            raise DatabaseError(
                f"The cache's database {path} is missing. {remedy(superblock.path, path)}"
            )
        block_map: BlockMap | None = None
        log_missing = not Path(f"{path}-wal").exists()  # to open it makes one
        try:
            with _translated(f"The cache's database {path} is damaged"):
                block_map = cls(path, _connect(path))
                block_map._watch = Watch(path, log_missing=log_missing)
                block_map._prepare()
                block_map._migrate()
                meta = block_map._tables.now = block_map._tables.meta()
            if (meta.uuid, meta.block_size, meta.slot_count) != (
                str(superblock.uuid),
                superblock.block_size,
                superblock.slot_count,
            ):
                raise DatabaseError(
                    f"The database {path} belongs to another cache ({meta.uuid}, this one is "
                    f"{superblock.uuid}): name the right one with --db"
                )
            if superblock.witness is not None and superblock.fence is not Fence.ALL:
                same_boot = meta.boot_id == _this_boot()
                block_map._watch.believe(meta, superblock.witness, same_boot=same_boot)
        except DatabaseError as exc:
            if block_map is not None:
                block_map.close()
            raise DatabaseError(f"{str(exc).rstrip('.')}. {remedy(superblock.path, path)}") from exc
        block_map._place = Place(path)
        return block_map

    def gone(self) -> str | None:
        """See ``Place.gone``. Asks the filesystem and not the database, in any thread."""
        return None if self._place is None else self._place.gone()

    def _migrate(self) -> None:
        version = self._version()
        if version > SCHEMA_VERSION:
            raise DatabaseError(
                f"The cache's database {self.path} is of version {version}, this fusecache "
                f"knows version {SCHEMA_VERSION}: use the newer fusecache again."
            )
        if version == SCHEMA_VERSION:
            return
        with self._db.atomic():
            if version > 1:
                self._tables.now = self._tables.written_meta()
            migrations.apply(self._db)
            if version == 1:
                sql = "SELECT schema_version, uuid, block_size, slot_count, boot_id, clean, "
                sql += "heartbeat_ns, pid, mountpoint, origin FROM meta"
                self._tables.now = Meta(*self._conn.execute(sql).fetchone())
                self._tables.seal()
            self._tables.now.schema_version = SCHEMA_VERSION
            self._tables.put_meta()

    def watch(self, keeper: WitnessKeeper, boot_id: str, *, believed: bool = True) -> None:
        """From here on every commit is told to the cache device.

        Args:
            believed: False if nothing in the database counts (``Fence.ALL``).

        Raises:
            DatabaseError: database and device are not of the same time.
            SuperblockError, CacheDeviceError: what the device keeps is damaged, or it fails.
        """
        self._watch.begin(self._tables.now, keeper, boot_id, believed=believed)

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
            return self._tables.meta()

    def images(self) -> list[ImageRow]:
        """Every image the database knows."""
        with _translated(f"Reading {self.path}"):
            return self._tables.images()

    def cached(self, image: int) -> tuple[int, bool]:
        """How many blocks of an image are cached, and whether any is dirty. Slow: for when no
        daemon runs."""
        with _translated(f"The database {self.path} is damaged"):
            merged = [(0, self._tables.blocks_of(image))]
            changes = [(n, r.where(r.image == image)) for n, r in self._tables.pending()]
            rows = latest(merged + changes)
            if rows is None:
                return 0, False
            return int((rows.slot != NO_SLOT).sum()), bool(rows.dirty.any())

    def has_dirty(self, image: int) -> bool:
        """Whether anything of an image is dirty, before recovery; in little memory."""
        with _translated(f"The database {self.path} is damaged"):
            parts = [(0, rows) for rows in self._tables.dirty_blocks_of(image)]
            parts += [(n, r.where(r.image == image)) for n, r in self._tables.pending()]
            rows = latest(parts)
            return rows is not None and bool(rows.dirty.any())

    def intents(self) -> list[tuple[int, int, int]]:
        """(image, region, active) of every row of ``region``."""
        with _translated(f"Reading {self.path}"):
            return self._tables.intents()

    # -- transactions ------------------------------------------------------------------------------

    def _strength(self, *, stable: bool) -> None:
        """Of the commits from here on."""
        if stable != self._stable:
            self._conn.execute(f"PRAGMA synchronous = {'FULL' if stable else 'NORMAL'}")
            self._stable = stable

    @contextlib.contextmanager
    def _transaction(self, *, stable: bool) -> Iterator[None]:
        self._strength(stable=stable)
        before = self._tables.now.copy()
        try:
            with self._db.atomic():
                self._tables.now.commits += 1
                yield
                self._tables.put_meta()
        except BaseException:
            self._tables.now = before
            self._tables.forget_changes()
            raise
        self._watch.note(self._tables.now.commits, stable=stable)

    def commit(self, batch: Batch, *, stable: bool) -> int:
        """One transaction with all of ``batch``.

        Returns:
            The mark: ``merge`` with it takes in everything committed up to now.
        """
        tables = self._tables
        if batch.rows is not None and batch.rows_alone and not stable:
            return self.append(batch.rows)
        with _translated(f"Writing {self.path}"), self._transaction(stable=stable):
            if batch.rows is not None and batch.rows.slot.size:
                tables.add_pending(tables.now.commits, batch.rows)
            for image, first_block in batch.drops:
                self._drop(image, first_block)
            for row in batch.images:
                tables.put_image(row)
            for image in batch.forgotten:
                tables.delete_image(image)
            for intent in batch.intents:
                tables.put_intent(*intent)
            for image, region in batch.settled:
                tables.delete_intent(image, region)
            self._put_order(batch.order)
            if batch.heartbeat_ns is not None:
                tables.now.heartbeat_ns = batch.heartbeat_ns
        return tables.now.commits

    def append(self, rows: Rows) -> int:
        """A light commit of nothing but rows, or of none; see ``commit``.

        A single statement: 7 us of SQLite against 24 (measured).
        """
        try:
            self._append(rows)
        except (sqlite3.Error, OverflowError) as exc:
            raise DatabaseError(f"Writing {self.path}: {exc}") from exc
        return self._tables.now.commits

    def _append(self, rows: Rows) -> None:
        if self._stable is not False:
            self._strength(stable=False)
        self._tables.append(rows)
        self._watch.note(self._tables.now.commits, stable=False)

    @property
    def mark(self) -> int:
        """As ``commit`` returns it: everything committed up to now."""
        return self._tables.now.commits

    def _put_order(self, order: list[tuple[int, U64]]) -> None:
        self._conn.executemany(
            "INSERT OR REPLACE INTO lru (first_slot, ticks) VALUES (?, ?)",
            [(first, ticks.astype("<u8").tobytes()) for first, ticks in order],
        )

    def merge(self, mark: int) -> None:
        """Step 3 of a barrier (R1): ``pending`` up to ``mark`` becomes part of ``block``, stably.

        The caller has synced the cache device since the mark was taken.
        """
        with _translated(f"Writing {self.path}"):
            if not self._tables.has_pending(mark):
                return  # overwritten dirty pages alone: no row changed, and nothing to sync
            with self._transaction(stable=True):
                self._merge(mark)
                meta = self._tables.now
                meta.synced = max(meta.synced, min(mark, self._watch.synced))

    def _merge(self, mark: int) -> None:
        rows = latest(self._tables.pending(mark))
        if rows is not None:
            self._put_rows(rows)
        self._tables.delete_pending(mark)

    def _put_rows(self, rows: Rows, tell: Tell = silent) -> None:
        """Rows of distinct tags, sorted by tag."""
        regions = rows.block // np.uint32(REGION_BLOCKS)
        changes = np.flatnonzero(np.diff(regions) | np.diff(rows.image)) + 1
        edges = [0, *changes.tolist(), rows.slot.size]
        for number, (start, stop) in enumerate(itertools.pairwise(edges)):
            if number % _AT_ONCE == 0:
                tell("of the block map written", number, len(edges) - 1, "regions")
            part = rows.where(slice(start, stop))
            image, region = int(part.image[0]), int(regions[start])
            columns = self._tables.columns(image, region)
            columns.put(part)
            self._put_region(image, region, columns)

    def _put_region(self, image: int, region: int, columns: RegionColumns) -> None:
        self._tables.put_columns(image, region, columns)

    def _drop(self, image: int, first_block: int) -> None:
        """Takes the image's blocks from ``first_block`` on out of ``block`` and ``pending``."""
        region, place = divmod(first_block, REGION_BLOCKS)
        if place:
            columns = self._tables.columns(image, region)
            columns.drop_from(place)
            self._put_region(image, region, columns)
            region += 1
        self._tables.delete_regions(image, region)
        self._tables.drop_pending(image, first_block)

    def add_regions(self, rows: Iterable[PackedRegion]) -> None:
        """Regions for a map that has none of them yet, stably."""
        with _translated(f"Writing {self.path}"), self._transaction(stable=True):
            self._tables.add_packed(rows)

    def restore(
        self,
        meta: Meta,
        images: list[ImageRow],
        rows: Rows | None,
        order: list[tuple[int, U64]],
        tell: Tell = silent,
    ) -> None:
        """Fills a new database, stably, with what was kept of another, and how that was left."""
        tables = self._tables
        with _translated(f"Writing {self.path}"):
            with self._transaction(stable=True):
                tables.now.commits = meta.commits + 1
                tables.now.clean, tables.now.boot_id = meta.clean, meta.boot_id
                tables.now.heartbeat_ns = meta.heartbeat_ns
                tables.now.mountpoint, tables.now.origin = meta.mountpoint, meta.origin
                for image in images:
                    tables.put_image(image)
                if rows is not None and rows.slot.size:
                    self._put_rows(packing.last_of_each(rows), tell)
                self._put_order(order)
            self.checkpoint(truncate=True)

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
        tables = self._tables
        with _translated(f"Recovering {self.path}"), self._transaction(stable=True):
            tables.verify_small()
            if not meta.clean:
                if meta.boot_id == boot_id:
                    self._recover_killed(meta.heartbeat_ns)
                else:
                    self._recover_cut(meta.heartbeat_ns)
            else:
                tables.delete_pending()
                same = meta.boot_id == boot_id
                self._mark_stopped(meta.heartbeat_ns, _OWN_CHANGE_SLACK_NS, same_boot=same)
            self._drop_orphans()
            if only_dirty:
                for image in self.images():
                    self._drop_clean(image.id, WHOLE_IMAGE)
                    image.lived_on()
                    tables.put_image(image)
            tables.now.clean, tables.now.pid = 0, pid
            tables.now.boot_id = boot_id
            tables.now.mountpoint, tables.now.origin = mountpoint, origin

    def _recover_killed(self, heartbeat_ns: int) -> None:
        """What reached the kernel is there: every row counts, but in active regions (R4)."""
        self._merge(EVERYTHING)
        for image, region, active in self._tables.intents():
            if active:
                if region != WHOLE_IMAGE:
                    self._drop_clean(image, region)
                self._tables.put_intent(image, region, 0)
        for row in self._tables.images():
            if row.writing:
                row.writing, row.ours_until_ns = 0, heartbeat_ns + _OWN_CHANGE_SLACK_NS
                self._tables.put_image(row)

    def _recover_cut(self, heartbeat_ns: int) -> None:
        """Only what a barrier made stable counts, and no region that was ever written to (R4)."""
        self._tables.delete_pending()
        for image, region, _ in self._tables.intents():
            self._drop_clean(image, region)
            self._tables.delete_intent(image, region)
        self._mark_stopped(heartbeat_ns, _CUT_SLACK_NS)

    def _drop_orphans(self) -> None:
        """A fill that ended while its image was forgotten leaves blocks of an image without a
        row. Its number may be given again, so they go; ``image`` itself was seen to be whole."""
        known = {image.id for image in self._tables.images()}
        for image in self._tables.owners():
            if image in known:
                continue
            if self._tables.blocks_of(image).dirty.any():
                raise ValueError(f"image {image} has dirty data and no row in its table image")
            self._tables.delete_regions(image, 0)

    def _mark_stopped(self, heartbeat_ns: int, slack_ns: int, *, same_boot: bool = False) -> None:
        """No change counts as ours for certain. Who had an image open for writing, or dirty, may
        have changed it until then, and has not later. But what was killed in this boot may: see
        docs/architecture.md, section 9. Repair may have lost the last sign of life."""
        lived_until_ns = heartbeat_ns + slack_ns if heartbeat_ns else 0
        for image in self._tables.images():
            if image.writing or (image.ours_until_ns > 0 and not same_boot):
                image.writing, image.ours_until_ns = 0, -lived_until_ns
                self._tables.put_image(image)

    def _drop_clean(self, image: int, region: int) -> None:
        regions = [region] if region != WHOLE_IMAGE else self._tables.regions_of(image)
        for number in regions:
            columns = self._tables.columns(image, number)
            if columns.was is not None:
                columns.drop_clean()
                self._put_region(image, number, columns)

    def load(self) -> Iterator[Rows]:
        """Every cached block as of ``attach``, some regions at a time.

        Raises:
            DatabaseError: a row is damaged, or rows are missing; perhaps only at the end.
        """
        with _translated(f"The database {self.path} is damaged"):
            yield from self._tables.all_blocks()

    def load_order(self) -> Iterator[tuple[int, U64]]:
        """The saved LRU order as (first slot, ticks): a hint, so damaged rows are left out."""
        with _translated(f"The database {self.path} is damaged"):
            for first, ticks in self._conn.execute("SELECT first_slot, ticks FROM lru"):
                if isinstance(first, int) and isinstance(ticks, bytes) and first >= 0:
                    yield first, np.frombuffer(ticks[: len(ticks) // 8 * 8], "<u8")

    def wipe_clean(self) -> None:
        """Forgets every clean page, stably."""
        with _translated(f"Writing {self.path}"), self._transaction(stable=True):
            self._merge(EVERYTHING)
            for image in self.images():
                self._drop_clean(image.id, WHOLE_IMAGE)
                image.lived_on()
                self._tables.put_image(image)

    def wipe(self) -> None:
        """Forgets every block, stably."""
        with _translated(f"Writing {self.path}"), self._transaction(stable=True):
            self._tables.clear()

    def detach(self) -> None:
        """The clean stop: everything before it is stable, and the next start may trust it."""
        with _translated(f"Writing {self.path}"):
            with self._transaction(stable=True):
                if self._tables.has_pending():
                    raise ValueError("rows came after the last barrier")
                self._tables.now.clean, self._tables.now.pid = 1, 0
            self.checkpoint(truncate=True)


def _this_boot() -> str:
    return _BOOT_ID.read_text().strip()


def _connect(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=5)
