"""The database: every table, what its columns mean, and the migrations that make it.

Blocks are packed, one row a region of 64 blocks: 25,000 rows for 100 GiB at 64 KiB instead of
1.6 million. The view ``blocks`` shows them one by one for people and for SQL. Integers in packed
columns are little endian; slot 0xFFFFFFFF means that the block is not cached.
"""

from sqlite_utils import Database, Migrations

SCHEMA_VERSION = 3

migrations = Migrations("fusecache")


@migrations()
def m001_create(db: Database) -> None:
    """Version 1."""
    # One row: which cache this is, and how it was left.
    db.table("meta").create(
        {
            "id": int,  # always 1
            "schema_version": int,
            "uuid": str,  # of the superblock
            "block_size": int,  # bytes
            "slot_count": int,
            "boot_id": str,  # of the boot in which the daemon last ran
            "clean": int,  # 1: stopped cleanly, nothing since
            "heartbeat_ns": int,  # the daemon's last sign of life, by the origin's clock
            "pid": int,  # of the daemon that has, or last had, it open
            "mountpoint": bytes,
            "origin": bytes,
        },
        pk="id",
        not_null={"schema_version", "uuid", "block_size", "slot_count", "clean"},
    )
    # One row an image that was ever cached. What was recorded is what P3 compares at open.
    db.table("image").create(
        {
            "id": int,  # stands in tags; never used again for another image
            "identity": bytes,  # filesystem, inode and file handle
            "path": bytes,  # where it was last seen, relative to the origin; for people
            "size": int,  # bytes
            "mtime_ns": int,
            "ctime_ns": int,
            "recorded_ns": int,  # when, by the origin's clock
            "trusted": int,  # 0: the change time was too young when recorded
            "writing": int,  # 1: open for writing here
            # Above 0: changes up to then were a killed daemon's own. Below 0, of what was dirty at
            # a power cut or a stop: up to its absolute value they may have been, later ones not;
            # -1: there was a later one, and the operator has to decide.
            "ours_until_ns": int,
        },
        pk="id",
        not_null={"identity", "path"},
    )
    db.table("image").create_index(["identity"], unique=True)
    # The block map as of the last barrier.
    db.execute(
        """
        CREATE TABLE block (
            image INTEGER NOT NULL,
            region INTEGER NOT NULL,    -- block number / 64
            slots BLOB NOT NULL,        -- 64 x uint32
            valid BLOB NOT NULL,        -- 64 x uint16, a bit a page
            dirty BLOB NOT NULL,        -- 64 x uint16, a bit a page
            crc INTEGER NOT NULL,       -- CRC-32 of image, region and the three columns
            PRIMARY KEY (image, region)
        ) WITHOUT ROWID
        """
    )
    # Changes since the last barrier, one row a light commit, in order. A later one wins.
    db.execute(
        """
        CREATE TABLE pending (
            seq INTEGER PRIMARY KEY,    -- in order of commit
            rows BLOB NOT NULL,         -- n x (image, block, slot uint32; valid, dirty uint16)
            crc INTEGER NOT NULL
        )
        """
    )
    # Where a write may have left cache and origin apart (R4). Region -1: the whole image.
    db.execute(
        """
        CREATE TABLE region (
            image INTEGER NOT NULL,
            region INTEGER NOT NULL,
            active INTEGER NOT NULL,
            PRIMARY KEY (image, region)
        ) WITHOUT ROWID
        """
    )
    # The LRU order as of its last saving: a hint, by slot number.
    db.table("lru").create({"first_slot": int, "ticks": bytes}, pk="first_slot")
    db.create_view("blocks", _BLOCKS_VIEW)


@migrations()
def m002_write_modes(db: Database) -> None:
    """Version 2: an image's own write mode, and dirty pages that are lost.

    A page whose dirty bit is set and whose valid bit is not is lost: the cache device lost what a
    guest had written to it, and what the origin has is older.
    """
    # "through", "around", "back"; "": the mount's.
    db.table("image").add_column("write_mode", str, not_null_default="")
    # Of all other columns, in the order of records.IMAGE_COLUMNS.
    db.table("image").add_column("crc", int, not_null_default=0)
    # Transactions since the cache was made; the cache device is told each (superblock.Witness).
    db.table("meta").add_column("commits", int, not_null_default=0)
    # Up to which of them the cache device is known to have been synced.
    db.table("meta").add_column("synced", int, not_null_default=0)
    # How many rows each table has, and the sum of their hashes (tallies.py).
    for table in ("block", "pending", "region", "image", "part"):
        db.table("meta").add_column(f"{table}_rows", int, not_null_default=0)
        db.table("meta").add_column(f"{table}_sum", int, not_null_default=0)
    # The same for every 64 regions: when rows of ``block`` are missing or outdated, the others are
    # proven by their parts. Only repair reads it.
    db.execute(
        """
        CREATE TABLE part (
            image INTEGER NOT NULL,
            part INTEGER NOT NULL,      -- region / 64
            rows INTEGER NOT NULL,
            sum INTEGER NOT NULL,
            PRIMARY KEY (image, part)
        ) WITHOUT ROWID
        """
    )
    # Of all other columns but id, in the order of records.META_COLUMNS.
    db.table("meta").add_column("crc", int, not_null_default=0)
    db.execute("UPDATE meta SET schema_version = 2")


@migrations()
def m003_appended(db: Database) -> None:
    """Version 3: a light commit of rows alone is one more row of ``pending`` and nothing else.

    Rows with a ``seq`` above ``meta.commits`` are such commits, one after the other without a gap.
    """
    db.execute("UPDATE meta SET schema_version = 3")


def _integer(column: str, width: int, at: str) -> str:
    """SQL for the little endian unsigned integer in bytes ``at`` and on of a packed column."""
    digits = [
        f"(instr('123456789ABCDEF', substr(hex(substr({column}, {at} + {byte}, 1)), 1, 1)) * 16"
        f" + instr('123456789ABCDEF', substr(hex(substr({column}, {at} + {byte}, 1)), 2, 1)))"
        f" * {256**byte}"
        for byte in range(width)
    ]
    return "(" + " + ".join(digits) + ")"


_BLOCKS_VIEW = f"""
    WITH RECURSIVE place(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM place WHERE i < 63)
    SELECT block.image AS image,
           block.region * 64 + place.i AS block,
           {_integer("block.slots", 4, "place.i * 4 + 1")} AS slot,
           {_integer("block.valid", 2, "place.i * 2 + 1")} AS valid,
           {_integer("block.dirty", 2, "place.i * 2 + 1")} AS dirty
    FROM block CROSS JOIN place
    WHERE substr(block.slots, place.i * 4 + 1, 4) <> x'FFFFFFFF'
"""
