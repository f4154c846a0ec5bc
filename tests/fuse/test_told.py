"""What the lane may tell again of a node, and until when."""

import os

import pytest
import trio

from tests.fuse.conftest import BLOCK, Served


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


@pytest.fixture
def lane(served: Served) -> Lane:
    """In front of what is served, as far as it is told of attributes."""
    made = Lane()
    served.operations.told.lane = made  # type: ignore[assignment]
    return made


async def _asked(served: Served, inode: int) -> bytes:
    """As the lane's requests do."""
    entry = served.operations.attributes_at_once(inode)
    assert entry is not None
    return served.operations.told.again(served.operations.inodes[inode], entry)


async def test_what_is_told_is_kept_until_somebody_opens_or_closes(
    served: Served, lane: Lane
) -> None:
    (served.origin / "vm.img").write_bytes(bytes(BLOCK))
    inode = await served.inode("vm.img")
    assert not lane.kept
    assert await _asked(served, inode) == lane.kept[inode]
    handle = await served.open(inode, os.O_RDONLY)
    assert await _asked(served, inode) == lane.kept[inode]
    await served.operations.release(handle)
    assert not lane.kept


async def test_it_is_dropped_after_the_end_of_a_close(served: Served, lane: Lane) -> None:
    """A close waits; what is told meanwhile is told of an image that is open still."""
    (served.origin / "vm.img").write_bytes(bytes(BLOCK))
    inode = await served.inode("vm.img")
    handle = await served.open(inode)
    image = served.operations.handles[handle].image
    async with trio.open_nursery() as nursery, image.opening:
        nursery.start_soon(served.operations.release, handle)
        await trio.testing.wait_all_tasks_blocked()
        await _asked(served, inode)
        assert lane.kept
    assert not lane.kept


async def test_a_truncate_without_a_handle_is_an_open_and_a_close(
    served: Served, lane: Lane
) -> None:
    (served.origin / "vm.img").write_bytes(bytes(BLOCK))
    inode = await served.inode("vm.img")
    await _asked(served, inode)
    await served.truncate(inode, 100)
    assert not lane.kept


async def test_nothing_is_kept_before_a_writeback_is_recorded(served: Served, lane: Lane) -> None:
    (served.origin / "vm.img").write_bytes(bytes(BLOCK))
    inode = await served.inode("vm.img")
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


async def test_only_a_local_origin_answers_at_once(served: Served, lane: Lane) -> None:
    (served.origin / "vm.img").write_bytes(bytes(BLOCK))
    inode = await served.inode("vm.img")
    await _asked(served, inode)
    lane.kept.clear()
    served.operations.inodes[inode].local = False
    assert served.operations.attributes_at_once(inode) is None
    await served.operations.attributes(inode)
    assert not lane.kept
