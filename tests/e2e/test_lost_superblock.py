"""A cache whose first blocks were overwritten: its database says what would be lost with it."""

import os
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.dirty import dirty_mount, on_origin, served
from tests.e2e.helpers import refused, run
from tests.support.daemon import Mount

pytestmark = pytest.mark.mount

SIZE = 32 << 20
LOST = "256.0 KiB of 1 image (vm1.img: 256.0 KiB)"


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where databases of devices lie meanwhile."""
    monkeypatch.setenv("FUSECACHE_STATE_DIR", str(tmp_path / "state"))
    return tmp_path / "state"


@pytest.fixture
def on_device(mount: Mount, state: Path) -> Iterator[Mount]:
    """A cache on a block device that has dirty data of one image, and no daemon."""
    backing = mount.base / "ssd"
    backing.touch()
    os.truncate(backing, SIZE)
    mount.cache, mount.size = Path(run("losetup", "--find", "--show", backing).strip()), "32M"
    try:
        dirty_mount(mount, "vm1.img")
        mount.stop("--keep-dirty")
        yield mount
        mount.cleanup()
    finally:
        run("losetup", "--detach", mount.cache)


@pytest.fixture
def on_file(mount: Mount) -> Mount:
    """The same in a file."""
    dirty_mount(mount, "vm1.img")
    mount.stop("--keep-dirty")
    return mount


def _overwrite(mount: Mount, data: bytes) -> None:
    with open(mount.cache, "r+b", buffering=0) as cache:
        cache.write(data)


def _database(state: Path) -> Path:
    (found,) = state.glob("*.sqlite")
    return found


def _hint(said: str, verb: str) -> list[str]:
    """The command in a message, as a shell reads it."""
    assert f"fusecache {verb} " in said, said
    command = said.split(f"fusecache {verb} ")[1]
    for end in (";", ". ", ".\n", "\n"):
        command = command.split(end)[0]
    return [verb, *shlex.split(command)]


def _saved(mount: Mount) -> None:
    """What was dirty is served, and comes to the origin."""
    mount.start()
    assert served(mount, "vm1.img", 1) == 2
    mount.stop()
    assert on_origin(mount, "vm1.img", 1) == 2


def _mended_by(mount: Mount, said: str) -> subprocess.CompletedProcess[str]:
    """The hints of a message, followed to the end."""
    told = mount.run(*_hint(said, "repair"))
    assert told.returncode == 1 and "kept, and dirty: 256.0 KiB" in told.stdout, told
    assert "/dev/null" not in told.stdout
    done = mount.run(*_hint(told.stdout, "repair"))
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize("wiped", [4096, 8192, 1 << 20])
def test_a_device_whose_first_blocks_were_zeroed_is_not_formatted(
    on_device: Mount, state: Path, wiped: int
) -> None:
    database = _database(state)
    _overwrite(on_device, bytes(wiped))
    refused(on_device.run("format", on_device.cache), LOST, str(database))
    refused(on_device.run("format", on_device.cache, "--force"), LOST, "--discard-dirty")
    said = refused(on_device.run("mount", *on_device.arguments()), LOST, str(database))
    if wiped == 4096:
        assert "superblock" in said and "damaged" in said
        checked = on_device.run(*_hint(said, "check"))
        assert checked.returncode == 1 and "dirty, and only here: 256.0 KiB" in checked.stdout
    _mended_by(on_device, said)
    assert _database(state) == database
    _saved(on_device)


def test_a_device_with_a_flipped_bit_in_its_superblock(on_device: Mount, state: Path) -> None:
    with open(on_device.cache, "r+b", buffering=0) as cache:
        cache.seek(20)
        cache.write(b"\xff")
    refused(on_device.run("format", on_device.cache, "--force"), "Nobody can tell", str(state))
    said = refused(on_device.run("mount", *on_device.arguments()), "superblock is damaged")
    _mended_by(on_device, said)
    _saved(on_device)


def test_repair_of_a_device_without_its_database_names_those_it_may_be(
    on_device: Mount, state: Path
) -> None:
    database = _database(state)
    other = state / "00000000-0000-0000-0000-000000000000.sqlite"
    other.write_bytes(b"This is a letter.")
    _overwrite(on_device, bytes(4096))
    for verb in ("repair", "check", "dump"):
        for flags in ([], ["--yes"]) if verb == "repair" else ([],):
            said = refused(on_device.run(verb, on_device.cache, *flags), LOST, str(database))
            assert str(other) not in said
            assert _hint(said, verb) == [verb, str(on_device.cache), "--db", str(database)]
    _mended_by(on_device, refused(on_device.run("mount", *on_device.arguments())))
    _saved(on_device)


def test_the_database_of_a_mounted_cache_is_no_candidate(
    on_device: Mount, state: Path, tmp_path: Path
) -> None:
    database = _database(state)
    spare = tmp_path / "spare"
    spare.write_bytes(b"x" + bytes(SIZE - 1))
    device = run("losetup", "--find", "--show", spare).strip()
    try:
        refused(on_device.run("format", device, "--force"), str(database), LOST)
        on_device.start()
        refused(on_device.run("repair", device, "--db", database), "in use")
        assert on_device.run("format", device, "--force").returncode == 0
        on_device.stop()
    finally:
        run("losetup", "--detach", device)


def test_a_device_may_be_formatted_all_the_same_and_its_old_database_goes(
    on_device: Mount, state: Path
) -> None:
    database = _database(state)
    _overwrite(on_device, bytes(4096))
    done = on_device.run("format", on_device.cache, "--force", "--discard-dirty")
    assert done.returncode == 0, done.stderr
    assert _database(state) != database


def test_a_file_whose_first_block_was_zeroed(on_file: Mount) -> None:
    _overwrite(on_file, bytes(4096))
    refused(on_file.run("format", on_file.cache, "--force"), LOST, "repair", "--discard-dirty")
    said = refused(on_file.run("mount", *on_file.arguments()), LOST, "superblock")
    assert _hint(said, "repair") == ["repair", str(on_file.cache)]
    _mended_by(on_file, said)
    _saved(on_file)


def test_hints_name_a_database_that_lies_elsewhere(mount: Mount) -> None:
    place = mount.base / "my maps" / "map.sqlite"
    place.parent.mkdir()
    mount.options["db"] = str(place)
    dirty_mount(mount, "vm1.img")
    done = mount.run("umount", mount.mountpoint, "--keep-dirty")
    flush = ["flush", "--cache", str(mount.cache), "--db", str(place)]
    assert _hint(done.stdout, "flush") == flush
    assert f"fusecache {shlex.join(flush)}" in mount.log()
    said = refused(mount.run("format", mount.cache, "--db", place, "--force"), LOST)
    assert _hint(said, "flush") == flush
    other = mount.base / "other"
    other.mkdir()
    args = [other, *mount.arguments()[1:]]
    assert _hint(refused(mount.run("mount", *args), "waits for"), "flush") == flush
    away = (mount.origin / "vm1.img").rename(mount.base / "vm1.img")
    said = refused(mount.run(*flush), "was not flushed", "256.0 KiB")
    assert _hint(said, "evict") == [
        "evict", str(mount.origin / "vm1.img"), *flush[1:], "--discard-dirty"
    ]  # fmt: skip
    away.rename(mount.origin / "vm1.img")
    with open(place, "r+b") as database:
        database.write(b"x" * 100)
    said = refused(mount.run("mount", *mount.arguments()), "damaged")
    for verb in ("check", "repair"):
        assert _hint(said, verb) == [verb, str(mount.cache), "--db", str(place)]
    checked = mount.run(*_hint(said, "check"))
    assert _hint(checked.stdout, "repair") == _hint(said, "repair")
