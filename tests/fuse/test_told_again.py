"""What the lane may tell again of a node, and until when."""

import os
from pathlib import Path

import pytest
import trio
from pyfuse3 import ROOT_INODE

from fusecache.engine.image import Image
from fusecache.engine.truth import Truth
from fusecache.store.origin import Attributes
from tests.fuse.conftest import BLOCK, NOBODY, Served


class Lane:
    """Remembers what it was told, as the compiled one does."""

    def __init__(self) -> None:
        self.kept: dict[int, bytes] = {}

    def keep_attributes(self, node: int, fd: int, answer: bytes) -> None:
        """See ``_lane.pyi``."""
        assert os.fstat(fd)
        self.kept[node] = answer

    def drop_attributes(self, node: int) -> None:
        """See ``_lane.pyi``."""
        self.kept.pop(node, None)

    def open_directory(self, node: int, fd: int) -> None:
        """Nothing that counts here, as the next three."""

    def open(self, handle: int, node: int, gate: int, writes: bool) -> None:
        """See ``open_directory``."""

    def close(self, handle: int) -> None:
        """See ``open_directory``."""

    def make_room(self) -> None:
        """See ``open_directory``."""


@pytest.fixture
def lane(served: Served) -> Lane:
    """In front of what is served, as far as it is told of attributes."""
    made = Lane()
    served.operations.tell(made)  # type: ignore[arg-type]  # a part of one
    return made


@pytest.fixture
def path(served: Served) -> Path:
    """An image on the origin."""
    made = served.origin / "vm.img"
    made.write_bytes(bytes(BLOCK))
    return made


@pytest.fixture
async def inode(served: Served, lane: Lane, path: Path) -> int:
    """Its node, of which nothing was told but by the look-up."""
    return await served.inode(path.name)


async def _asked(served: Served, inode: int) -> bytes:
    """As the lane's requests do."""
    entry = served.operations.attributes_at_once(inode)
    assert entry is not None
    return served.operations.told.again(served.operations.inodes[inode], entry)


async def test_what_is_told_is_kept_until_a_close(served: Served, lane: Lane, inode: int) -> None:
    assert not lane.kept
    answer = await _asked(served, inode)
    assert lane.kept == {inode: answer}
    handle = await served.open(inode, os.O_RDONLY)
    assert lane.kept == {inode: answer}  # it would be told of it now
    await served.operations.release(handle)
    assert not lane.kept


async def test_what_was_told_before_an_open_is_not_kept_beyond_it(
    served: Served, lane: Lane, monkeypatch: pytest.MonkeyPatch, path: Path, inode: int
) -> None:
    """Others change the image after the open has looked, and somebody asks before it is open: then
    nobody reads it yet, so that nobody looks at what is told."""
    check = Truth.check

    async def change(self: Truth, image: Image, seen: Attributes) -> bool:
        true = await check(self, image, seen)
        path.write_bytes(bytes(2 * BLOCK))
        await _asked(served, inode)
        assert lane.kept
        return true

    with monkeypatch.context() as patch:
        patch.setattr(Truth, "check", change)
        handle = await served.open(inode, os.O_RDONLY)
    assert not lane.kept
    assert served.operations.attributes_at_once(inode) is None
    await served.operations.release(handle)


async def test_a_time_that_the_kernel_has_not_heard_of_is_not_told_in_advance(
    served: Served, lane: Lane, path: Path, inode: int
) -> None:
    """It would be the one that stays while somebody writes through the kernel's pages, which the
    kernel would drop when it hears of it (see ``Told``)."""
    told = path.stat().st_mtime_ns
    os.utime(path, ns=(1, 2))
    reader = await served.open(inode, os.O_RDONLY)
    assert not lane.kept
    writer = await served.open(inode, os.O_RDWR)
    assert not lane.kept
    assert (await served.operations.getattr(inode, NOBODY)).st_mtime_ns == told
    for handle in (writer, reader):
        await served.operations.release(handle)


async def test_another_time_takes_back_what_was_told(
    served: Served, lane: Lane, path: Path, inode: int
) -> None:
    """A look-up may be answered that has seen an older one."""
    older = path.stat()
    os.utime(path, ns=(1, 2))
    await _asked(served, inode)
    assert lane.kept
    served.operations.told.entry(served.operations.inodes[inode], older)
    assert not lane.kept


async def test_what_changes_in_a_directory_takes_nothing_back(served: Served, lane: Lane) -> None:
    """The lane tells of it as it is."""
    answer = await _asked(served, ROOT_INODE)
    await served.operations.mkdir(ROOT_INODE, b"new", 0o755, NOBODY)
    assert await _asked(served, ROOT_INODE) != answer
    os.utime(served.origin, ns=(1, 2))
    assert (await served.operations.getattr(ROOT_INODE, NOBODY)).st_mtime_ns == 2
    assert list(lane.kept) == [ROOT_INODE]


async def test_it_is_dropped_after_the_end_of_a_close(
    served: Served, lane: Lane, inode: int
) -> None:
    """A close waits; what is told meanwhile is told of an image that is open still."""
    handle = await served.open(inode)
    image = served.operations.handles[handle].image
    async with trio.open_nursery() as nursery, image.opening:
        nursery.start_soon(served.operations.release, handle)
        await trio.testing.wait_all_tasks_blocked()
        await _asked(served, inode)
        assert lane.kept
    assert not lane.kept


async def test_a_truncate_without_a_handle_is_an_open_and_a_close(
    served: Served, lane: Lane, inode: int
) -> None:
    await _asked(served, inode)
    await served.truncate(inode, 100)
    assert not lane.kept


async def test_nothing_is_kept_before_a_writeback_is_recorded(
    served: Served, lane: Lane, inode: int
) -> None:
    handle = await served.open(inode)
    image = served.operations.handles[handle].image
    await _asked(served, inode)
    lane.kept.clear()
    image.own_pending = True
    await _asked(served, inode)
    assert not lane.kept
    image.own_pending = False
    await _asked(served, inode)
    assert lane.kept


async def test_only_a_local_origin_answers_at_once(served: Served, lane: Lane, inode: int) -> None:
    await _asked(served, inode)
    lane.kept.clear()
    served.operations.inodes[inode].local = False
    assert served.operations.attributes_at_once(inode) is None
    await served.operations.attributes(inode)
    assert not lane.kept
