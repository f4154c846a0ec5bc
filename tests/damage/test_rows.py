"""Every table: bits of its values flipped, rows missing, rows doubled."""

import random
import sqlite3
from collections.abc import Callable
from typing import Any

import pytest

from tests.damage.place import Place
from tests.damage.suffering import suffer

COLUMNS = {
    "block": ["image", "region", "slots", "valid", "dirty", "crc"],
    "pending": ["seq", "rows", "crc"],
    "region": ["image", "region", "active"],
    "part": ["image", "part", "rows", "sum"],
    "image": [
        *("id", "identity", "path", "size", "mtime_ns", "ctime_ns", "recorded_ns", "trusted"),
        *("writing", "ours_until_ns", "write_mode", "crc"),
    ],
    "meta": [
        *("schema_version", "uuid", "block_size", "slot_count", "boot_id", "clean"),
        *("heartbeat_ns", "pid", "mountpoint", "origin", "commits", "synced", "crc"),
        *("block_rows", "block_sum", "pending_rows", "pending_sum"),
        *("region_rows", "region_sum", "image_rows", "image_sum", "part_rows", "part_sum"),
    ],
}
KEYS = {
    "block": ("image", "region"),
    "pending": ("seq",),
    "region": ("image", "region"),
    "part": ("image", "part"),
    "image": ("id",),
    "meta": ("id",),
}
TABLES = {
    "clean": ("block", "part", "image", "meta"),
    "kept": ("block", "part", "image", "meta"),
    "killed": ("block", "part", "pending", "region", "image", "meta"),
    "moved": ("block", "part", "pending", "region", "image", "meta"),
}
FLIPS = [
    (kind, table, column)
    for kind in ("kept", "killed", "moved")
    for table in TABLES[kind]
    for column in COLUMNS[table]
]
"""``lru`` is missing here: it is a hint (see test_order)."""


def flipped(value: Any, chance: random.Random) -> Any:
    """The value with one bit changed, of the same type."""
    if isinstance(value, int):
        return value ^ 1 << chance.randrange(20)
    raw = value if isinstance(value, bytes) else value.encode()
    if not raw:
        raw = b"\0"
    at = chance.randrange(len(raw))
    # In texts only bits that leave them ASCII.
    bit = 1 << chance.randrange(8 if isinstance(value, bytes) else 4)
    raw = raw[:at] + bytes([raw[at] ^ bit]) + raw[at + 1 :]
    return raw if isinstance(value, bytes) else raw.decode()


def flip(connection: sqlite3.Connection, table: str, column: str, seed: int) -> None:
    """One bit of that column in some row of the table."""
    chance = random.Random(seed)
    keys = ", ".join(KEYS[table])
    rows = connection.execute(f"SELECT {column}, {keys} FROM {table} ORDER BY {keys}").fetchall()
    value, *key = chance.choice(rows)
    where = " AND ".join(f"{name} = ?" for name in KEYS[table])
    for _ in range(20):
        try:
            sql = f"UPDATE {table} SET {column} = ? WHERE {where}"
            connection.execute(sql, (flipped(value, chance), *key))
            return
        except sqlite3.IntegrityError:
            continue  # the key of another row
    raise AssertionError("no bit can be flipped")


@pytest.mark.parametrize(("kind", "table", "column"), FLIPS)
def test_a_flipped_bit_in_any_column_is_noticed_and_mended(
    place_of: Callable[[str], Place], kind: str, table: str, column: str
) -> None:
    seed = hash_of(kind, table, column)

    def damage(place: Place) -> None:
        with place.sql() as connection:
            flip(connection, table, column, seed)

    started, _ = suffer(place_of(kind), damage)
    # Only repair reads ``part``, and after a power cut nobody reads what these rows hold.
    unread = table == "part" or (kind, table, column) == ("moved", "pending", "rows")
    assert unread or started.refusal is not None, f"seed {seed}"


def hash_of(*words: str) -> int:
    """The same number in every run."""
    return sum(ord(letter) * 31**n for n, letter in enumerate("".join(words))) % 10**6


MISSING = [
    (kind, table, which)
    for kind in TABLES
    for table in TABLES[kind]
    for which in ("first", "last", "all")
    if table != "meta" or which == "all"
]


@pytest.mark.parametrize(("kind", "table", "which"), MISSING)
def test_missing_rows_are_noticed_and_mended(
    place_of: Callable[[str], Place], kind: str, table: str, which: str
) -> None:
    def damage(place: Place) -> None:
        keys = ", ".join(KEYS[table])
        with place.sql() as connection:
            rows = connection.execute(f"SELECT {keys} FROM {table} ORDER BY {keys}").fetchall()
            chosen = {"first": rows[:1], "last": rows[-1:], "all": rows}[which]
            where = " AND ".join(f"{name} = ?" for name in KEYS[table])
            connection.executemany(f"DELETE FROM {table} WHERE {where}", chosen)

    started, _ = suffer(place_of(kind), damage)
    assert table == "part" or started.refusal is not None


DOUBLES = {
    "block": "INSERT INTO block SELECT image, region + 9, slots, valid, dirty, crc FROM block "
    "ORDER BY image, region LIMIT 1",
    "pending": "INSERT INTO pending SELECT seq + 9, rows, crc FROM pending ORDER BY seq LIMIT 1",
    "part": "INSERT INTO part SELECT image, part + 9, rows, sum FROM part LIMIT 1",
    "region": "INSERT INTO region SELECT image, region + 9, active FROM region LIMIT 1",
    "image": "INSERT INTO image SELECT id + 9, x'00' || identity, path, size, mtime_ns, ctime_ns, "
    "recorded_ns, trusted, writing, ours_until_ns, write_mode, crc FROM image LIMIT 1",
}


@pytest.mark.parametrize(
    ("kind", "table"), [(kind, table) for kind in TABLES for table in TABLES[kind]]
)
def test_doubled_rows_are_noticed_and_mended(
    place_of: Callable[[str], Place], kind: str, table: str
) -> None:
    def damage(place: Place) -> None:
        with place.sql() as connection:
            names = [row[1] for row in connection.execute("PRAGMA table_info(meta)")][1:]
            columns = ", ".join(names)
            sql = f"INSERT INTO meta (id, {columns}) SELECT 2, {columns} FROM meta"
            connection.execute(sql if table == "meta" else DOUBLES[table])

    started, _ = suffer(place_of(kind), damage)
    assert table == "part" or started.refusal is not None


@pytest.mark.parametrize("kind", ["kept", "killed", "moved"])
def test_a_row_that_went_back_in_time_is_noticed_and_none_is_believed(
    place_of: Callable[[str], Place], kind: str
) -> None:
    def damage(place: Place) -> None:
        with place.sql() as connection:
            connection.execute("ATTACH ? AS older", (str(place.older),))
            connection.execute("INSERT OR REPLACE INTO block SELECT * FROM older.block")

    started, made = suffer(place_of(kind), damage)
    assert started.refusal is not None
    assert made.losses and all(loss.path is not None for loss in made.losses)


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO lru VALUES (0, x'010203')",
        "INSERT INTO lru VALUES (-5, x'0100000000000000')",
        "INSERT INTO lru VALUES (3, 'text')",
        "INSERT INTO lru VALUES (1 << 50, zeroblob(8000))",
        "INSERT INTO lru VALUES (0, randomblob(8000))",
    ],
)
def test_order_is_a_hint_and_its_damage_does_no_harm(
    place_of: Callable[[str], Place], kind: str, statement: str
) -> None:
    def damage(place: Place) -> None:
        with place.sql() as connection:
            connection.execute(statement)

    started, made = suffer(place_of(kind), damage, hint=True)
    assert started.refusal is None
    assert not made.losses and not made.unnamed
