"""``check``, ``dump`` and ``repair`` as they are typed, around real mounts."""

import contextlib
import hashlib
import json
import os
import shutil
import sqlite3
from pathlib import Path

import pytest

from fusecache.store.tables import Tables
from tests.e2e.helpers import nothing_left, refused
from tests.support.daemon import BLOCK, Mount
from tests.support.stamps import check_stamps, stamped

pytestmark = pytest.mark.mount

BLOCKS = 8


@pytest.fixture
def served(mount: Mount) -> Mount:
    """A cache that has served two images and was stopped cleanly."""
    for number in (1, 2):
        image = mount.origin / f"vm{number}.img"
        image.write_bytes(stamped(number, 0, BLOCKS * BLOCK, 1))
    mount.start()
    _read(mount)
    mount.stop()
    return mount


def _read(mount: Mount) -> None:
    for number in (1, 2):
        check_stamps((mount.mountpoint / f"vm{number}.img").read_bytes(), number, 0)


def _killed_while_writing(mount: Mount) -> None:
    mount.start()
    guest = os.open(mount.mountpoint / "vm1.img", os.O_RDWR)
    os.pwrite(guest, stamped(1, 0, BLOCK, 2), 0)
    os.fsync(guest)
    mount.kill()
    with contextlib.suppress(OSError):
        os.close(guest)
    assert mount.run("umount", mount.mountpoint).returncode == 0


def _database(mount: Mount) -> Path:
    return Path(f"{mount.cache}.sqlite")


def _files(mount: Mount) -> dict[str, str]:
    files = [mount.cache, *mount.base.glob("cache.img.sqlite*")]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def _mended(mount: Mount, *words: str) -> str:
    """The whole way: refused, found, announced, repaired, served. What repair announced."""
    sentence = refused(mount.run("mount", *mount.arguments()), *words)
    assert f"fusecache check {mount.cache}" in sentence
    assert f"fusecache repair {mount.cache}" in sentence
    before = _files(mount)
    checked = mount.run("check", mount.cache)
    assert checked.returncode == 1 and "inconsistenc" in checked.stdout, checked
    told = mount.run("repair", mount.cache)
    assert told.returncode == 1 and "--yes" in told.stdout, told
    assert _files(mount) == before, "check or repair without --yes changed something"
    done = mount.run("repair", mount.cache, "--yes")
    assert done.returncode == 0, done.stderr
    checked = mount.run("check", mount.cache)
    assert (checked.returncode, checked.stdout) == (0, f"{mount.cache}: nothing is wrong\n")
    mount.start()
    _read(mount)
    mount.stop()
    nothing_left(mount)
    return told.stdout


def test_nothing_is_wrong_with_a_sound_cache_and_repair_leaves_it_alone(served: Mount) -> None:
    before = _files(served)
    for verb in ("check", "repair"):
        done = served.run(verb, served.cache)
        assert done.returncode == 0 and "nothing is wrong" in done.stdout, (done, verb)
    assert _files(served) == before


def test_a_cache_that_is_mounted_is_left_alone(served: Mount) -> None:
    served.start()
    for verb in ("check", "dump", "repair"):
        refused(served.run(verb, served.cache), str(served.mountpoint), str(served.pid))
    served.stop()


def test_a_killed_daemon_is_not_damage(served: Mount) -> None:
    _killed_while_writing(served)
    done = served.run("check", served.cache)
    assert done.returncode == 0, done.stdout
    assert "killed" in served.run("dump", served.cache).stdout


def test_a_missing_write_ahead_log_is_refused_and_mended(served: Mount) -> None:
    _killed_while_writing(served)
    Path(f"{_database(served)}-wal").unlink()
    _mended(served, "older than the cache device", "no write-ahead log")


def test_a_database_put_back_from_a_copy_is_refused_and_mended(served: Mount) -> None:
    copy = served.base / "copy"
    shutil.copyfile(_database(served), copy)
    served.start()
    _read(served)
    served.stop()
    shutil.copyfile(copy, _database(served))
    _mended(served, "older than the cache device")


def test_a_damaged_superblock_is_made_again_and_the_cache_stays_warm(served: Mount) -> None:
    with open(served.cache, "r+b") as file:
        file.seek(20)
        file.write(b"\xff")
    told = _mended(served, "superblock is damaged")
    assert "cannot be saved" not in told
    served.start()
    assert [image["cached_blocks"] for image in served.status()["images"]] == [BLOCKS, BLOCKS]
    served.stop()


def test_a_missing_database_is_made_anew_and_says_what_nobody_knows(served: Mount) -> None:
    _database(served).unlink()
    assert "nobody can say" in _mended(served, "is missing")


def test_a_damaged_row_is_refused_and_mended(served: Mount) -> None:
    with contextlib.closing(sqlite3.connect(_database(served))) as connection, connection:
        connection.execute("UPDATE block SET slots = CAST(x'07' || substr(slots, 2) AS BLOB)")
    told = _mended(served, "wrong checksum")
    assert "'vm1.img'" in told and "'vm2.img'" in told


def test_dirty_ranges_that_cannot_be_saved_are_told_by_image_and_byte(served: Mount) -> None:
    with contextlib.closing(sqlite3.connect(_database(served), isolation_level=None)) as connection:
        tables = Tables(connection)
        tables.now = tables.meta()
        (number,) = [row.id for row in tables.images() if row.path == b"vm2.img"]
        columns = tables.columns(number, 0)
        columns.dirty[3] = 0x6
        columns.slots[3] = 1 << 30
        tables.put_columns(number, 0, columns)
        tables.put_meta()
    first, last = 3 * BLOCK + 4096, 3 * BLOCK + 3 * 4096 - 1
    assert f"'vm2.img', 8.0 KiB at bytes {first}-{last}" in _mended(served, "slot")


def test_dump_shows_every_block_as_a_line_of_json(mount: Mount) -> None:
    name = b"not\xffutf8.img"
    with open(os.path.join(os.fsencode(mount.origin), name), "wb") as image:
        image.write(stamped(1, 0, 3 * BLOCK, 1))
    mount.start()
    with open(os.path.join(os.fsencode(mount.mountpoint), name), "rb") as guest:
        guest.read()
    mount.stop()
    done = mount.run("dump", mount.cache, "--json")
    header, image_line, *blocks = [json.loads(line) for line in done.stdout.splitlines()]
    assert (header["slots_used"], header["left"], header["findings"]) == (3, "clean", [])
    assert (image_line["path"], image_line["path_escaped"]) == ("not%FFutf8.img", True)
    assert (image_line["cached_bytes"], image_line["dirty_bytes"]) == (3 * BLOCK, 0)
    assert [(line["block"], line["valid"], line["dirty"]) for line in blocks] == [
        (n, 0xFFFF, 0) for n in range(3)
    ]
    assert len({line["slot"] for line in blocks}) == 3
    summary = mount.run("dump", mount.cache).stdout
    assert "stopped cleanly" in summary and "'not%FFutf8.img': cached 192.0 KiB" in summary


def test_dump_shows_what_can_be_read_of_a_damaged_cache(served: Mount) -> None:
    with contextlib.closing(sqlite3.connect(_database(served))) as connection, connection:
        connection.execute("UPDATE block SET crc = crc + 1 WHERE image = 1")
    with open(served.cache, "r+b") as file:
        file.write(bytes(4096))
    lines = [
        json.loads(line) for line in served.run("dump", served.cache, "--json").stdout.splitlines()
    ]
    assert len(lines[0]["findings"]) >= 2
    assert len([line for line in lines if line.get("image") == 2 and "slot" in line]) == BLOCKS


def test_what_is_no_cache_is_not_made_one(mount: Mount) -> None:
    other = mount.base / "letter"
    other.write_text("This is a letter.\n" * 200_000)
    before = other.read_bytes()
    refused(mount.run("repair", other, "--yes"), "fusecache format")
    assert other.read_bytes() == before
    for verb in ("check", "dump", "repair"):
        refused(mount.run(verb, mount.base / "none"), "does not exist")


def test_the_database_of_another_cache_is_not_touched(served: Mount) -> None:
    other = served.base / "other"
    assert served.run("format", other, "--size", "64M").returncode == 0
    database = Path(f"{other}.sqlite")
    before = database.read_bytes()
    refused(served.run("repair", served.cache, "--db", database, "--yes"), "another cache", "--db")
    assert database.read_bytes() == before
