"""Removed images: what frees all of one holds up nobody else."""

import os
import threading
import time

import pyfuse3
import pytest
from pyfuse3 import ROOT_INODE

from tests.fuse.conftest import BLOCK, NOBODY, Served


@pytest.fixture
async def inode(served: Served) -> int:
    """Of an image."""
    (served.origin / "vm.img").write_bytes(bytes(BLOCK))
    return await served.inode("vm.img")


@pytest.fixture
def dropped(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The threads in which the kernel is made to forget pages."""
    made: list[str] = []

    def invalidate(inode: int, attr_only: bool) -> None:
        made.append(threading.current_thread().name)

    monkeypatch.setattr(pyfuse3, "invalidate_inode", invalidate)
    return made


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> dict[int, str]:
    """By descriptor the thread that closed it last."""
    made: dict[int, str] = {}
    close = os.close

    def noted(fd: int) -> None:
        close(fd)
        made[fd] = threading.current_thread().name

    monkeypatch.setattr(os, "close", noted)
    return made


async def test_the_kernel_drops_its_pages_before_it_hears_of_the_last_close(
    served: Served, inode: int, dropped: list[str]
) -> None:
    """Else it frees them while it is given the answer, in the event loop."""
    first, second = await served.open(inode), await served.open(inode, os.O_RDONLY)
    await served.operations.unlink(ROOT_INODE, b"vm.img", NOBODY)
    await served.operations.release(first)
    assert dropped == []
    await served.operations.release(second)
    assert len(dropped) == 1 and dropped[0] != threading.current_thread().name


async def test_the_pages_of_an_image_that_has_a_name_stay(
    served: Served, inode: int, dropped: list[str]
) -> None:
    await served.operations.release(await served.open(inode))
    assert dropped == []


async def test_who_is_the_last_to_hold_a_removed_file_lets_go_in_a_thread(
    served: Served, inode: int, closed: dict[int, str]
) -> None:
    """The origin frees it then."""
    fd = served.operations.inodes[inode].fd
    await served.operations.unlink(ROOT_INODE, b"vm.img", NOBODY)
    closed.clear()
    await served.operations.forget([(inode, 1)])
    deadline = time.monotonic() + 20
    while fd not in closed:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert closed[fd] == "closer"


async def test_a_file_that_has_a_name_is_let_go_at_once(
    served: Served, inode: int, closed: dict[int, str]
) -> None:
    fd = served.operations.inodes[inode].fd
    closed.clear()
    await served.operations.forget([(inode, 1)])
    assert closed[fd] == threading.current_thread().name
