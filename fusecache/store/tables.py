"""The tables of the database, row by row, with the tallies of ``meta`` kept up.

Everything that changes a row of ``block``, ``pending``, ``region`` or ``image`` goes through here.
An old row is looked up before it is replaced or removed, and leaves the tally as it is *found*: a
row that damage took away stays in the sum, and is missed at the next start.
"""

import sqlite3
from collections.abc import Iterable, Iterator

import numpy as np

from fusecache.core.rows import Rows
from fusecache.store import packing
from fusecache.store.packing import PackedRegion, RegionColumns
from fusecache.store.records import (
    IMAGE_COLUMNS,
    META_COLUMNS,
    PART_REGIONS,
    ImageRow,
    Meta,
    block_hash,
    image_crc,
    image_hash,
    part_hash,
    pending_hash,
    region_hash,
)
from fusecache.store.tallies import Tally, row_hashes, tally_of

EVERYTHING = 1 << 62
"""As a mark: all of ``pending``."""
_CHUNK = 512
"""Regions read at a time; with 4096 freed temporary memory kept 10 bytes a slot (measured)."""

_BLOCK = "SELECT image, region, slots, valid, dirty, crc FROM block "
_IMAGE = f"SELECT {', '.join(IMAGE_COLUMNS)}, crc FROM image "
_META = f"SELECT {', '.join(META_COLUMNS)}, crc FROM meta"
_PUT_BLOCK = "INSERT OR REPLACE INTO block VALUES (?, ?, ?, ?, ?, ?)"
_PUT_REGION = "INSERT OR REPLACE INTO region VALUES (?, ?, ?)"
_PUT_PENDING = "INSERT INTO pending (seq, rows, crc) VALUES (?, ?, ?)"
_PUT_IMAGE = (
    f"INSERT OR REPLACE INTO image ({', '.join(IMAGE_COLUMNS)}, crc) "
    f"VALUES ({', '.join('?' * len(IMAGE_COLUMNS))}, ?)"
)
_PUT_META = f"UPDATE meta SET {', '.join(f'{name} = ?' for name in META_COLUMNS)}, crc = ?"
_NEW_META = (
    f"INSERT INTO meta (id, {', '.join(META_COLUMNS)}, crc) "
    f"VALUES (1, {', '.join('?' * len(META_COLUMNS))}, ?)"
)


class Tables:
    """The rows of an open database.

    ``now`` is ``meta`` as the transaction under way will write it, or as it would be after the
    batches that were appended since it was written. Damaged rows raise ValueError.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._conn = connection
        self.now = Meta(0, "", 0, 0)
        self._changed: dict[tuple[int, int], Tally] = {}
        """By (image, part): what the transaction under way adds to it."""

    def _add(self, table: str, hashed: int) -> None:
        self.now.set_tally(table, self.now.tally(table).plus(hashed))

    def _remove(self, table: str, hashed: int) -> None:
        self.now.set_tally(table, self.now.tally(table).minus(hashed))

    def _add_block(self, image: int, region: int, crc: int, times: int = 1) -> None:
        """A row of ``block`` comes, or with -1 goes."""
        hashed = block_hash(image, region, crc)
        (self._add if times > 0 else self._remove)("block", hashed)
        part = (image, region // PART_REGIONS)
        change = self._changed.get(part, Tally())
        self._changed[part] = change.plus(hashed) if times > 0 else change.minus(hashed)

    def forget_changes(self) -> None:
        """The transaction failed."""
        self._changed = {}

    def _put_parts(self) -> None:
        changed, self._changed = self._changed, {}
        where = "WHERE image = ? AND part = ?"
        for key, change in changed.items():
            row = self._conn.execute(f"SELECT rows, sum FROM part {where}", key).fetchone()
            old = Tally() if row is None else Tally(*row)
            new = old.join(change)
            if row is not None:
                self._remove("part", part_hash(*key, old))
            if new == Tally():
                self._conn.execute(f"DELETE FROM part {where}", key)
            else:
                self._conn.execute("INSERT OR REPLACE INTO part VALUES (?, ?, ?, ?)", (*key, *new))
                self._add("part", part_hash(*key, new))

    # -- meta --------------------------------------------------------------------------------------

    def meta(self) -> Meta:
        """The row with all that was appended since it was written."""
        meta = self.written_meta()
        sql = "SELECT seq, crc FROM pending WHERE seq > ? ORDER BY seq"
        for seq, crc in self._conn.execute(sql, (meta.commits,)):
            if seq != meta.commits + 1:
                raise ValueError("rows of its table pending are missing")
            meta.appended(pending_hash(seq, crc))
        return meta

    def written_meta(self) -> Meta:
        """The row as it is in the database."""
        rows = self._conn.execute(_META).fetchall()
        if len(rows) != 1:
            raise ValueError("its table meta has not one row")
        meta = Meta(*rows[0][:-1])
        if rows[0][-1] != meta.crc():
            raise ValueError("its table meta has a wrong checksum")
        return meta

    def new_meta(self, meta: Meta) -> None:
        """The first row."""
        self._conn.execute(_NEW_META, (*meta.values(), meta.crc()))
        self.now = meta

    def put_meta(self) -> None:
        """Writes ``now``, and what changed of the parts: the end of every transaction."""
        self._put_parts()
        self._conn.execute(_PUT_META, (*self.now.values(), self.now.crc()))

    # -- block -------------------------------------------------------------------------------------

    def columns(self, image: int, region: int) -> RegionColumns:
        """One region, to be changed and put back."""
        sql = _BLOCK + "WHERE image = ? AND region = ?"
        row = self._conn.execute(sql, (image, region)).fetchone()
        if row is None:
            return RegionColumns(None)
        packed = PackedRegion(*row)
        packing.check(packed)  # else a change to a damaged row would give it a right checksum
        return RegionColumns(packed)

    def put_columns(self, image: int, region: int, columns: RegionColumns) -> None:
        """Replaces the region; an empty one has no row."""
        if columns.was is not None:
            self._add_block(image, region, columns.was.crc, -1)
        if columns.empty:
            sql = "DELETE FROM block WHERE image = ? AND region = ?"
            self._conn.execute(sql, (image, region))
        else:
            row = columns.pack(image, region)
            self._conn.execute(_PUT_BLOCK, row)
            self._add_block(image, region, row.crc)

    def add_packed(self, rows: Iterable[PackedRegion]) -> None:
        """Regions that have no row yet."""
        for row in rows:
            self._conn.execute(_PUT_BLOCK, row)
            self._add_block(row.image, row.region, row.crc)

    def delete_regions(self, image: int, first: int) -> None:
        """The image's regions from ``first`` on."""
        where = "FROM block WHERE image = ? AND region >= ?"
        for region, crc in self._conn.execute(f"SELECT region, crc {where}", (image, first)):
            self._add_block(image, region, crc, -1)
        self._conn.execute(f"DELETE {where}", (image, first))

    def regions_of(self, image: int) -> list[int]:
        """The image's regions that have a row."""
        sql = "SELECT region FROM block WHERE image = ?"
        return [int(row[0]) for row in self._conn.execute(sql, (image,))]

    def owners(self) -> Iterator[int]:
        """The images that have a row in ``block``: a look-up each, not a scan."""
        sql = "SELECT image FROM block WHERE image > ? ORDER BY image LIMIT 1"
        image = -1
        while (row := self._conn.execute(sql, (image,)).fetchone()) is not None:
            image = int(row[0])
            yield image

    def blocks_of(self, image: int) -> Rows:
        """The image's blocks as of the last barrier."""
        cursor = self._conn.execute(_BLOCK + "WHERE image = ?", (image,))
        return packing.unpack_regions([PackedRegion(*row) for row in cursor])

    def dirty_blocks_of(self, image: int) -> Iterator[Rows]:
        """The image's blocks with dirty pages as of the last barrier."""
        cursor = self._conn.execute(_BLOCK + "WHERE image = ?", (image,))
        while regions := cursor.fetchmany(_CHUNK):
            rows = packing.unpack_regions([PackedRegion(*row) for row in regions])
            yield rows.where(rows.dirty != 0)

    def all_blocks(self) -> Iterator[Rows]:
        """Every cached block, some regions at a time; at the end it is known whether all came."""
        found = Tally()
        cursor = self._conn.execute(_BLOCK)
        while rows := cursor.fetchmany(_CHUNK):
            regions = [PackedRegion(*row) for row in rows]
            blocks = packing.unpack_regions(regions)
            keys = zip(*((row.image, row.region, row.crc) for row in regions), strict=True)
            found = found.join(tally_of(row_hashes(*keys)))
            yield blocks
        self._compare("block", found)

    # -- pending -----------------------------------------------------------------------------------

    def add_pending(self, seq: int, rows: Rows) -> None:
        """One more batch."""
        blob = packing.pack_batch(rows)
        crc = packing.batch_crc(seq, blob)
        self._conn.execute(_PUT_PENDING, (seq, blob, crc))
        self.now.add_pending(pending_hash(seq, crc))

    def append(self, rows: Rows) -> None:
        """One more batch, without a transaction around it: the row is the whole commit.

        ``meta`` stays as it is: the number shows a row missing before this one, and the cache
        device's witness one that is missing behind. The next transaction writes it again.
        """
        seq = self.now.commits + 1
        self.add_pending(seq, rows)
        self.now.commits = seq

    def pending(self, mark: int = EVERYTHING) -> list[tuple[int, Rows]]:
        """The batches up to the mark, in order, each with its number."""
        sql = "SELECT seq, rows, crc FROM pending WHERE seq <= ? ORDER BY seq"
        return [
            (seq, packing.unpack_batches([_checked(seq, blob, crc)]))
            for seq, blob, crc in self._conn.execute(sql, (mark,))
        ]

    def has_pending(self, mark: int = EVERYTHING) -> bool:
        """Whether there are batches up to the mark."""
        sql = "SELECT 1 FROM pending WHERE seq <= ? LIMIT 1"
        return self._conn.execute(sql, (mark,)).fetchone() is not None

    def delete_pending(self, mark: int = EVERYTHING) -> None:
        """The batches up to the mark."""
        where = "FROM pending WHERE seq <= ?"
        for seq, crc in self._conn.execute(f"SELECT seq, crc {where}", (mark,)):
            self._remove("pending", pending_hash(seq, crc))
        self._conn.execute(f"DELETE {where}", (mark,))

    def drop_pending(self, image: int, first_block: int) -> None:
        """The image's blocks from ``first_block`` on leave all batches."""
        for seq, rows in self.pending():
            stays = (rows.image != image) | (rows.block < first_block)
            if not stays.all():
                sql = "SELECT crc FROM pending WHERE seq = ?"
                ((crc,),) = self._conn.execute(sql, (seq,)).fetchall()
                self._remove("pending", pending_hash(seq, crc))
                self._conn.execute("DELETE FROM pending WHERE seq = ?", (seq,))
                if stays.any():
                    self.add_pending(seq, rows.where(stays))

    # -- image and region --------------------------------------------------------------------------

    def images(self) -> list[ImageRow]:
        """Every image."""
        found = []
        for row in self._conn.execute(_IMAGE):
            if image_crc(row[:-1]) != row[-1]:
                raise ValueError(f"the row of image {row[0]} has a wrong checksum")
            found.append(ImageRow(*row[:-1]))
        return found

    def put_image(self, row: ImageRow) -> None:
        """Adds or replaces it."""
        self._forget_tally(row.id)
        # A file that came back under a new number, before the old one was forgotten.
        sql = "SELECT id FROM image WHERE identity = ? AND id <> ?"
        for (old,) in self._conn.execute(sql, (row.identity, row.id)).fetchall():
            self._forget_tally(old)
        values = row.values()
        crc = image_crc(values)
        self._conn.execute(_PUT_IMAGE, (*values, crc))
        self._add("image", image_hash(row.id, crc))

    def delete_image(self, image: int) -> None:
        """It and its regions' intents."""
        self._forget_tally(image)
        self._conn.execute("DELETE FROM image WHERE id = ?", (image,))
        sql = "SELECT region FROM region WHERE image = ?"
        for (region,) in self._conn.execute(sql, (image,)).fetchall():
            self.delete_intent(image, region)

    def _forget_tally(self, image: int) -> None:
        for (crc,) in self._conn.execute("SELECT crc FROM image WHERE id = ?", (image,)):
            self._remove("image", image_hash(image, crc))

    def intents(self) -> list[tuple[int, int, int]]:
        """(image, region, active) of every row of ``region``."""
        sql = "SELECT image, region, active FROM region"
        return [(int(i), int(r), int(a)) for i, r, a in self._conn.execute(sql)]

    def put_intent(self, image: int, region: int, active: int) -> None:
        """Adds or replaces a row of ``region``."""
        self._forget_intent(image, region)
        self._conn.execute(_PUT_REGION, (image, region, active))
        self._add("region", region_hash(image, region, active))

    def delete_intent(self, image: int, region: int) -> None:
        """Removes it."""
        self._forget_intent(image, region)
        self._conn.execute("DELETE FROM region WHERE image = ? AND region = ?", (image, region))

    def _forget_intent(self, image: int, region: int) -> None:
        sql = "SELECT active FROM region WHERE image = ? AND region = ?"
        for (active,) in self._conn.execute(sql, (image, region)):
            self._remove("region", region_hash(image, region, active))

    # -- tallies -----------------------------------------------------------------------------------

    def _compare(self, table: str, found: Tally) -> None:
        expected = self.now.tally(table)
        if found.rows != expected.rows:
            raise ValueError(
                f"its table {table} has {found.rows} rows and should have {expected.rows}"
            )
        if found != expected:
            raise ValueError(f"its table {table} holds other rows than were written last")

    def verify_small(self) -> None:
        """All tables but ``block``, which ``all_blocks`` verifies: what recovery goes by."""
        pending = Tally()
        for seq, crc in self._conn.execute("SELECT seq, crc FROM pending"):
            pending = pending.plus(pending_hash(seq, crc))
        self._compare("pending", pending)
        region = Tally()
        for row in self.intents():
            region = region.plus(region_hash(*row))
        self._compare("region", region)
        image = Tally()
        for row_ in self.images():
            image = image.plus(image_hash(row_.id, image_crc(row_.values())))
        self._compare("image", image)

    def clear(self) -> None:
        """No table but ``meta`` has a row."""
        self.forget_changes()
        for table in ("block", "pending", "region", "image", "part"):
            self._conn.execute(f"DELETE FROM {table}")
            self.now.set_tally(table, Tally())
        self._conn.execute("DELETE FROM lru")

    def seal(self) -> None:
        """Checksums and tallies over all that is there, for a database that had none."""
        pending = self._conn.execute("SELECT seq, rows FROM pending").fetchall()
        self._conn.execute("DELETE FROM pending")
        for seq, blob in pending:
            self.add_pending(seq, packing.unpack_batches([blob]))
        images = f"SELECT {', '.join(IMAGE_COLUMNS)} FROM image"
        for row in self._conn.execute(images).fetchall():
            crc = image_crc(row)
            self._conn.execute("UPDATE image SET crc = ? WHERE id = ?", (crc, row[0]))
            self._add("image", image_hash(row[0], crc))
        for intent in self.intents():
            self._add("region", region_hash(*intent))
        for image, region, crc in self._conn.execute("SELECT image, region, crc FROM block"):
            self._add_block(image, region, crc)


def latest(batches: list[tuple[int, Rows]]) -> Rows | None:
    """The last row of each tag of several batches."""
    parts = [rows for _, rows in batches if rows.slot.size]
    if not parts:
        return None
    return packing.last_of_each(Rows(*map(np.concatenate, zip(*parts, strict=True))))


def _checked(seq: int, blob: bytes, crc: int) -> bytes:
    if packing.batch_crc(seq, blob) != crc:
        raise ValueError(f"row {seq} of its table pending has a wrong checksum")
    return blob
