"""Look-ups of names that the origin's kernel has in memory."""

import os
import stat
from pathlib import Path
from typing import Any

import pytest

from tests.lane.rig import LOOKUP, NODE, Rig, until

ENOENT = 2
DIRECTORY = 9


@pytest.fixture
def directory(rig: Rig, tmp_path: Path) -> Path:
    """One that the lane knows."""
    path = tmp_path / "origin"
    path.mkdir()
    fd = os.open(path, os.O_PATH)
    rig.lane.open_directory(DIRECTORY, fd)
    return path


def ask(rig: Rig, name: bytes, node: int = DIRECTORY) -> int:
    """Sends the question; returns its number."""
    return rig.send(LOOKUP, name + b"\0", node=node)


def left(rig: Rig, name: bytes, node: int = DIRECTORY) -> int:
    """What Python gets of a name that the lane does not answer: a descriptor, or -1."""
    unique = ask(rig, name, node)
    (taken,) = rig.take()
    assert taken == (unique, LOOKUP, node, 0, len(name), taken[5], name)
    assert not rig.nothing_came()
    return int(taken[5]) - 1


def opened(rig: Rig, name: bytes) -> os.stat_result:
    """What the lane has found."""
    fd = left(rig, name)
    assert fd >= 0
    try:
        flags = Path(f"/proc/self/fdinfo/{fd}").read_text().split("flags:")[1].split()[0]
        assert int(flags, 8) & (os.O_PATH | os.O_CLOEXEC) == os.O_PATH | os.O_CLOEXEC
        return os.fstat(fd)
    finally:
        os.close(fd)


def test_what_is_not_there_is_answered(rig: Rig, directory: Path) -> None:
    for number in range(3):
        name = f"missing-{number}"
        assert not (directory / name).exists()  # now the kernel knows
        assert rig.answer_to(ask(rig, name.encode())) == (ENOENT, b"")
    assert rig.lane.counters()["missing"] == 3
    assert not rig.lane.take()


def test_what_the_kernel_has_to_ask_for_is_pythons(rig: Rig, directory: Path) -> None:
    assert left(rig, b"never-heard-of") == -1


def test_what_is_there_is_opened_for_python(rig: Rig, directory: Path) -> None:
    (directory / "image").touch()
    (directory / "link").symlink_to("image")
    (directory / "below").mkdir()
    for name in ("image", "link", "below"):
        expected = (directory / name).lstat()
        found = opened(rig, name.encode())
        assert (found.st_ino, found.st_mode) == (expected.st_ino, expected.st_mode)
    assert stat.S_ISLNK((directory / "link").lstat().st_mode)
    assert rig.lane.counters()["found"] == 3


def test_what_comes_and_goes_is_seen_at_once(rig: Rig, directory: Path) -> None:
    path = directory / "image"
    for _ in range(20):
        path.touch()
        assert opened(rig, b"image").st_ino == path.stat().st_ino
        path.unlink()
        assert not path.exists()
        assert rig.answer_to(ask(rig, b"image")) == (ENOENT, b"")


@pytest.mark.parametrize("name", [b"..", b"below/..", b"/", b"/etc", b"below/image"])
def test_a_name_does_not_lead_out_of_its_directory(rig: Rig, directory: Path, name: bytes) -> None:
    (directory / "below").mkdir()
    (directory / "below" / "image").touch()
    assert left(rig, name) == -1


def test_another_filesystem_is_pythons(rig: Rig) -> None:
    """It may be one that has to be asked for attributes."""
    fd = os.open("/", os.O_PATH)
    rig.lane.open_directory(DIRECTORY, fd)
    assert Path("/proc/self").exists()
    assert left(rig, b"proc") == -1
    os.close(fd)


def test_a_name_that_cannot_be_is_pythons(rig: Rig, directory: Path) -> None:
    assert left(rig, b"x" * 300) == -1


def test_a_directory_that_nobody_has_told_of_is_pythons(rig: Rig, directory: Path) -> None:
    assert not (directory / "missing").exists()
    assert left(rig, b"missing", NODE) == -1
    rig.lane.close_directory(DIRECTORY + 1)
    assert rig.answer_to(ask(rig, b"missing")) == (ENOENT, b"")
    rig.lane.close_directory(DIRECTORY)
    assert left(rig, b"missing") == -1


def test_a_descriptor_too_large_to_remember_is_not_used(rig: Rig, directory: Path) -> None:
    """It would be taken for another one."""
    assert not (directory / "missing").exists()
    other = os.open(directory, os.O_PATH)
    for fd in (0xFFFE, 0xFFFF, 0x10000 + other, 2**31, 2**32 - 1):
        rig.lane.open_directory(DIRECTORY + 1, fd)
        assert left(rig, b"missing", DIRECTORY + 1) == -1
    os.close(other)


def test_what_nobody_has_taken_is_closed_at_the_end(rig: Rig, directory: Path) -> None:
    (directory / "image").touch()
    for _ in range(5):
        ask(rig, b"image")
    until(lambda: rig.lane.counters()["queued"] == 5, "the questions to wait for Python")
    assert _held(directory / "image") == 5
    rig.close()
    assert _held(directory / "image") == 0


def _held(path: Path) -> int:
    """Descriptors of a file that this process has."""
    found = 0
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found += os.readlink(entry) == str(path)
        except FileNotFoundError:
            continue
    return found


def test_answers_go_to_who_has_asked(rig: Rig, directory: Path) -> None:
    """Many at once, in both ways."""
    wanted: dict[int, Any] = {}
    for number in range(60):
        name = f"name-{number}"
        if number % 2:
            (directory / name).touch()
        assert (directory / name).exists() == bool(number % 2)
        unique = ask(rig, name.encode())
        wanted[unique] = (directory / name).stat().st_ino if number % 2 else None
    while any(value is None for value in wanted.values()):
        unique, error, data = rig.answer()
        assert (wanted.pop(unique), error, data) == (None, ENOENT, b"")
    until(lambda: rig.lane.counters()["queued"] == 30, "the others to wait for Python")
    for taken in rig.take():
        fd = taken[5] - 1
        assert os.fstat(fd).st_ino == wanted.pop(taken[0])
        os.close(fd)
    assert not wanted
