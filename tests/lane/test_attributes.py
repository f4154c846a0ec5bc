"""Questions for attributes that the lane answers as Python did last."""

import os
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fusecache.fuse.attributes import entry_of, packed_attributes
from fusecache.fuse.inodes import ROOT_ID as ROOT
from tests.lane.rig import GETATTR, NODE, STATFS, Rig

QUESTION = bytes(16)
TABLE = 65536
"""Nodes of which as many lie between them have one place."""
MOMENT = 200_000
"""ns; see attributes.c."""


class Image:
    """A file of the origin, and what Python tells of it."""

    def __init__(self, rig: Rig, path: Path) -> None:
        self._rig = rig
        self.path = path
        path.write_bytes(bytes(5000))
        self.fd = os.open(path, os.O_PATH)

    def answer(self, node: int = NODE) -> bytes:
        """Now."""
        return packed_attributes(entry_of(node, os.fstat(self.fd), 1.0))

    def tell(self, node: int = NODE) -> bytes:
        """Python has told it of that node."""
        answer = self.answer(node)
        self._rig.lane.keep_attributes(node, self.fd, answer)
        return answer


@pytest.fixture
def image(rig: Rig, tmp_path: Path) -> Image:
    """One that nobody has told of."""
    return Image(rig, tmp_path / "image")


def ask(rig: Rig, node: int = NODE) -> int:
    """Sends the question; returns its number."""
    return rig.send(GETATTR, QUESTION, node=node)


def is_pythons(rig: Rig, node: int = NODE) -> None:
    """The lane does not answer it."""
    unique = ask(rig, node)
    (taken,) = rig.take()
    assert taken == (unique, GETATTR, node, 0, 0, 0, None)
    assert not rig.nothing_came()
    rig.lane.reply(unique, 5, b"")
    assert rig.answer_to(unique) == (5, b"")


def test_what_was_told_is_told_again(rig: Rig, image: Image) -> None:
    is_pythons(rig)
    told = image.tell()
    for _ in range(3):
        assert rig.answer_to(ask(rig)) == (0, told)
    assert rig.lane.counters()["told"] == 3
    assert not rig.lane.take()


def _link(path: Path) -> None:
    path.with_name("link").hardlink_to(path)


CHANGES: dict[str, Callable[[Path], object]] = {
    "size": lambda path: os.truncate(path, 5001),
    "data": lambda path: path.write_bytes(bytes(5000)),
    "mode": lambda path: path.chmod(0o640),
    "owner": lambda path: os.chown(path, 77, -1),
    "group": lambda path: os.chown(path, -1, 77),
    "links": _link,
    "last link": Path.unlink,
    "time": lambda path: os.utime(path, ns=(1, 2)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_is_pythons(rig: Rig, image: Image, change: str) -> None:
    os.utime(image.path, ns=(1000, 1001))
    told = image.tell()
    assert rig.answer_to(ask(rig)) == (0, told)
    CHANGES[change](image.path)
    is_pythons(rig)
    is_pythons(rig)
    if change == "time":  # but for the time of the change it is as before
        os.utime(image.path, ns=(1000, 1001))
        is_pythons(rig)
    told = image.tell()
    assert rig.answer_to(ask(rig)) == (0, told)


def test_what_is_not_the_files_own_is_never_told(rig: Rig, image: Image) -> None:
    """As the time of modification of what is open for buffered writing."""
    entry = entry_of(NODE, os.fstat(image.fd), 1.0)
    entry.st_mtime_ns += 1
    rig.lane.keep_attributes(NODE, image.fd, packed_attributes(entry))
    is_pythons(rig)


def test_it_is_told_of_that_node_alone(rig: Rig, image: Image, tmp_path: Path) -> None:
    told = image.tell()
    is_pythons(rig, NODE + 1)
    is_pythons(rig, NODE + TABLE)
    rig.lane.drop_attributes(NODE + TABLE)
    rig.lane.drop_attributes(NODE + 1)
    assert rig.answer_to(ask(rig)) == (0, told)
    other = Image(rig, tmp_path / "other").tell(NODE + TABLE)
    assert rig.answer_to(ask(rig, NODE + TABLE)) == (0, other)
    is_pythons(rig)


def test_what_python_takes_back_is_its_own(rig: Rig, image: Image) -> None:
    image.tell()
    rig.lane.drop_attributes(NODE)
    is_pythons(rig)
    told = image.tell()
    assert rig.answer_to(ask(rig)) == (0, told)


def test_a_descriptor_that_cannot_be_asked_is_pythons(rig: Rig, image: Image) -> None:
    image.tell()
    os.close(image.fd)
    is_pythons(rig)


@pytest.mark.parametrize("length", [0, 103, 105, 4096])
def test_an_answer_has_its_length(rig: Rig, image: Image, length: int) -> None:
    with pytest.raises(ValueError, match="no answer"):
        rig.lane.keep_attributes(NODE, image.fd, bytes(length))
    is_pythons(rig)


# -- directories -----------------------------------------------------------------------------------


@pytest.fixture
def directory(image: Image) -> Iterator[int]:
    """A descriptor of the one in which the image is."""
    fd = os.open(image.path.parent, os.O_PATH)
    yield fd
    os.close(fd)


def test_those_of_a_directory_are_told_as_they_are(rig: Rig, image: Image, directory: int) -> None:
    """Nothing else goes into them, and whoever uses it changes them all the time."""

    def now(timeout: float = 1.0) -> bytes:
        return packed_attributes(entry_of(NODE, os.fstat(directory), timeout))

    is_pythons(rig)
    told = now(timeout=2.5)
    rig.lane.keep_attributes(NODE, directory, told)
    assert rig.answer_to(ask(rig)) == (0, told)
    for change in (
        lambda path: (path / "new").mkdir(),
        lambda path: path.chmod(0o710),
        lambda path: os.utime(path, ns=(1, 2)),
    ):
        change(image.path.parent)
        before, told = told, now(timeout=2.5)
        assert told != before
        assert rig.answer_to(ask(rig)) == (0, told)
    rig.lane.drop_attributes(NODE)
    is_pythons(rig)


_SPACE = struct.Struct("<QQQQQIIII24x")


def _space(path: Path) -> bytes:
    """``struct fuse_statfs_out``."""
    st = os.statvfs(path)
    return _SPACE.pack(
        *(st.f_blocks, st.f_bfree, st.f_bavail, st.f_files, st.f_ffree),
        *(st.f_bsize, st.f_namemax, st.f_frsize, 0),
    )


def _is_pyfuse3s(rig: Rig, node: int) -> None:
    rig.send(STATFS, node=node)
    assert rig.pyfuse3.recv(4096)
    assert not rig.nothing_came()


def test_space_is_that_of_the_root(rig: Rig, image: Image) -> None:
    """As soon as its attributes were told: it is an origin that hangs nobody."""
    other = Path("/proc")  # another filesystem
    fds = [os.open(path, os.O_PATH) for path in (image.path.parent, other)]
    for node in (ROOT, NODE):
        _is_pyfuse3s(rig, node)
    rig.lane.keep_attributes(ROOT + TABLE, fds[1], image.answer(ROOT + TABLE))
    _is_pyfuse3s(rig, ROOT)
    for node, fd in zip((ROOT, NODE), fds, strict=True):
        rig.lane.keep_attributes(node, fd, image.answer(node))
    for _ in range(20):  # others write here as well
        before = _space(image.path)
        found = rig.answer_to(rig.send(STATFS, node=ROOT))
        if before == _space(image.path):
            break
    assert found == (0, before)
    _is_pyfuse3s(rig, NODE)
    for fd in fds:
        os.close(fd)
    _is_pyfuse3s(rig, ROOT)
    rig.lane.drop_attributes(ROOT)
    _is_pyfuse3s(rig, ROOT)


# -- reads -----------------------------------------------------------------------------------------


def test_a_read_after_the_answer_waits_a_moment(rig: Rig, image: Image) -> None:
    """Or the kernel, which asks again before the next one, would throw each answer away."""
    rig.fill(1, 0)
    rig.open(1, 1)
    told = image.tell()
    for _ in range(20):
        began = time.monotonic_ns()
        assert rig.answer_to(ask(rig)) == (0, told)
        rig.read(0, 4096)
        assert time.monotonic_ns() - began >= MOMENT
