"""Files that are missing, cut, foreign, of another time; superblocks of all kinds."""

import os
import random
import shutil
import uuid
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fusecache.store.block_map import BlockMap
from fusecache.store.superblock import WITNESS_OFFSET, Fence, Superblock, Witness
from tests.damage.place import BLOCK, SUPERBLOCK, Damage, Place, make_large
from tests.damage.suffering import suffer

ALL = ("clean", "kept", "killed", "moved")


def _cut_to(name: str, share: float, plus: int = 0) -> Damage:
    def damage(place: Place) -> None:
        path = getattr(place, name)
        os.truncate(path, max(0, int(path.stat().st_size * share) + plus))

    return damage


def _overwrite(name: str, offset: int, data: bytes) -> Damage:
    def damage(place: Place) -> None:
        with open(getattr(place, name), "r+b") as file:
            file.seek(offset)
            file.write(data)

    return damage


def _older(place: Place) -> None:
    place.log.unlink(missing_ok=True)
    shutil.copyfile(place.older, place.database)


def _foreign(place: Place) -> None:
    other = replace(SUPERBLOCK, uuid=uuid.UUID(int=5))
    with closing(BlockMap.create(place.base / "other", other)):
        pass
    place.log.unlink(missing_ok=True)
    os.replace(place.base / "other", place.database)


DATABASE: dict[str, Damage] = {
    "missing": lambda place: place.database.unlink(),
    "empty": _cut_to("database", 0),
    "one byte": _cut_to("database", 0, 1),
    "one page": _cut_to("database", 0, 4096),
    "half": _cut_to("database", 0.5),
    "a page less": _cut_to("database", 1, -4096),
    "a byte less": _cut_to("database", 1, -1),
    "no header": _overwrite("database", 0, bytes(100)),
    "text": lambda place: place.database.write_text("This is a letter.\n" * 3000) and None,
    "noise": _overwrite("database", 100, random.Random(1).randbytes(60_000)),
    "of another cache": _foreign,
    "of another time": _older,
}


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("damage", DATABASE)
def test_a_damaged_database_file_is_refused_and_replaced(
    place_of: Callable[[str], Place], kind: str, damage: str
) -> None:
    # The end of the last page may have no meaning, or the log have the page anew.
    hint = damage.endswith("less")
    started, _ = suffer(place_of(kind), DATABASE[damage], hint=hint)
    assert hint or started.refusal is not None


LOG: dict[str, Damage] = {
    "missing": lambda place: place.log.unlink(),
    "empty": _cut_to("log", 0),
    "the header alone": _cut_to("log", 0, 32),
    "half": _cut_to("log", 0.5),
    "a frame less": _cut_to("log", 1, -4120),
    "a byte less": _cut_to("log", 1, -1),
    "other salts": _overwrite("log", 16, b"\x55" * 8),
    "no header": _overwrite("log", 0, bytes(32)),
}


@pytest.mark.parametrize("kind", ["killed", "moved"])
@pytest.mark.parametrize("damage", LOG)
def test_a_damaged_write_ahead_log_is_refused(
    place_of: Callable[[str], Place], kind: str, damage: str
) -> None:
    """A power cut may take the last light commits, which the last frames are: no damage then."""
    legit = kind == "moved" and damage in ("a frame less", "a byte less")
    started, made = suffer(place_of(kind), LOG[damage], hint=legit)
    if not legit:
        assert started.refusal is not None and "older than the cache device" in started.refusal
        assert made.rows is None, "rows of a database that was rolled back were believed"


@pytest.mark.parametrize("boot", ["boot 1", "boot 2"])
def test_an_older_database_under_a_current_log_is_refused_and_no_old_row_believed(
    tmp_path: Path, boot: str
) -> None:
    """The log brings the newest ``meta`` along; only the tallies tell that rows are old."""
    place = make_large(tmp_path / "large")
    place.boot = boot
    assert place.copy(tmp_path / "sound").start().refusal is None
    started, _ = suffer(place, lambda place: shutil.copyfile(place.older, place.database) and None)
    assert started.refusal is not None


@pytest.mark.parametrize("which", range(0, 24, 4))
def test_a_missing_row_costs_only_what_is_near_it_and_that_is_named(
    tmp_path: Path, which: int
) -> None:
    def damage(place: Place) -> None:
        with place.sql() as connection:
            rows = connection.execute("SELECT image, region FROM block").fetchall()
            connection.execute("DELETE FROM block WHERE image = ? AND region = ?", rows[which])

    place = make_large(tmp_path / "large")
    started, made = suffer(place, damage)
    assert started.refusal is not None and "should have" in started.refusal
    assert len(made.losses) == 1 and not made.unnamed
    assert made.rows is not None and made.rows.slot.size


def _superblock(**fields: Any) -> Damage:
    return _overwrite("cache", 0, replace(SUPERBLOCK, **fields).pack())


def _witness(commits: int, stable: int) -> Damage:
    return _overwrite("cache", WITNESS_OFFSET, Witness(commits, stable).pack())


DEVICE: dict[str, Damage] = {
    "superblock zeroed": _overwrite("cache", 0, bytes(4096)),
    "superblock noise": _overwrite("cache", 0, b"\xa5" * 4096),
    "magic": _overwrite("cache", 3, b"x"),
    "version": _overwrite("cache", 8, b"\x07"),
    "block size": _overwrite("cache", 13, b"\x01"),
    "slot count": _overwrite("cache", 16, b"\x31"),
    "uuid": _overwrite("cache", 30, b"\x31"),
    "fence bits": _overwrite("cache", 40, b"\x02"),
    "checksum": _overwrite("cache", 45, b"\x00\x01"),
    "another uuid": _superblock(uuid=uuid.UUID(int=6)),
    "another block size": _superblock(block_size=BLOCK // 2, slot_count=96),
    "fewer slots": _superblock(slot_count=20),
    "more slots": _superblock(slot_count=49),
    "first MiB zeroed": _overwrite("cache", 0, bytes(1 << 20)),
    "first MiB noise": _overwrite("cache", 0, random.Random(3).randbytes(1 << 20)),
    "cut short": _cut_to("cache", 1, -20 * BLOCK),
    "cut by a byte": _cut_to("cache", 1, -1),
    "witness zeroed": _overwrite("cache", WITNESS_OFFSET, bytes(512)),
    "witness flipped": _overwrite("cache", WITNESS_OFFSET + 9, b"\x77"),
    "witness of another time": _witness(1000, 999),
    "witness of long ago": _witness(1, 1),
}


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("damage", DEVICE)
def test_a_damaged_cache_device_is_refused_and_mended(
    place_of: Callable[[str], Place], kind: str, damage: str
) -> None:
    started, _ = suffer(place_of(kind), DEVICE[damage])
    assert started.refusal is not None


@pytest.mark.parametrize("kind", ["clean", "kept", "killed", "moved"])
@pytest.mark.parametrize("damage", ["superblock zeroed", "checksum", "uuid", "witness flipped"])
def test_a_superblock_alone_costs_no_dirty_page(
    place_of: Callable[[str], Place], kind: str, damage: str
) -> None:
    place = place_of(kind)
    _, made = suffer(place, DEVICE[damage])
    assert not made.losses and not made.unnamed
    if kind == "clean":
        assert place.start().clean > 40, "what was clean and certain is still warm"


@pytest.mark.parametrize("kind", ALL)
def test_a_fence_around_clean_data_is_found_and_ended(
    place_of: Callable[[str], Place], kind: str
) -> None:
    started, made = suffer(place_of(kind), _superblock(fence=Fence.CLEAN))
    assert started.refusal is None and started.clean == 0
    assert not made.losses
    # What was behind the fence has lived on without the database, and repair takes the fence away.
    assert made.images and not any(row.writing or row.ours_until_ns for row in made.images)


def test_a_fence_around_everything_starts_empty(place_of: Callable[[str], Place]) -> None:
    started, _ = suffer(place_of("clean"), _superblock(fence=Fence.ALL))
    assert started.refusal is None and started.clean == 0


@pytest.mark.parametrize("kind", ALL)
def test_database_and_superblock_gone_together_make_a_new_cache(
    place_of: Callable[[str], Place], kind: str
) -> None:
    def damage(place: Place) -> None:
        DEVICE["checksum"](place)
        place.database.write_bytes(b"no database")
        place.log.unlink(missing_ok=True)

    place = place_of(kind)
    _, made = suffer(place, damage)
    assert any("anew" in step for step in made.steps)
    assert made.unnamed
    data = (place.cache).read_bytes()[:4096]
    assert Superblock.unpack(data).uuid != SUPERBLOCK.uuid


def test_the_damaged_database_is_kept_aside(place_of: Callable[[str], Place]) -> None:
    place = place_of("killed")
    DATABASE["noise"](place)
    damaged = place.database.read_bytes()
    place.repair()
    assert Path(f"{place.database}.damaged").read_bytes() == damaged
    assert Path(f"{place.database}.damaged-wal").exists()
