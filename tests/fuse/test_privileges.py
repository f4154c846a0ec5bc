"""Nobody's program that can be written to has privileges, whatever comes at the same time."""

import errno
import os
import stat
import threading
from pathlib import Path
from typing import Any

import pytest
import trio
from pyfuse3 import FUSEError

from tests.fuse.conftest import Served

SETUID = 0o4755
PLAIN = 0o755


def mode_of(path: Path) -> int:
    """As the origin has it."""
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def image(served: Served) -> Path:
    """A program without privileges."""
    path = served.origin / "vm.img"
    path.write_bytes(bytes(8192))
    path.chmod(PLAIN)
    return path


@pytest.mark.parametrize("when", ["before", "after"])
async def test_set_at_any_moment_of_an_open_they_are_gone_when_it_is_answered(
    served: Served, image: Path, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inode = await served.inode("vm.img")
    really_open = served.cache.open

    async def opened(*args: Any, **kwargs: Any) -> Any:
        if when == "before":
            await served.chmod(inode, SETUID)
        made = await really_open(*args, **kwargs)
        if when == "after":
            await served.chmod(inode, SETUID)
        return made

    monkeypatch.setattr(served.cache, "open", opened)
    await served.open(inode)
    assert mode_of(image) == PLAIN


async def test_an_open_while_they_are_being_set_takes_them_away(
    served: Served, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an image that nobody knew: then the two do not wait for each other."""
    inode = await served.inode("vm.img")
    begun, go_on = trio.Event(), threading.Event()
    really_chmod = served.tree.chmod

    def chmod(fd: int, mode: int) -> None:
        if mode & stat.S_ISUID:
            trio.from_thread.run_sync(begun.set)
            assert go_on.wait(10)
        really_chmod(fd, mode)

    monkeypatch.setattr(served.tree, "chmod", chmod)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(served.chmod, inode, SETUID)
        await begun.wait()
        try:
            await served.open(inode)
        finally:
            go_on.set()
    assert mode_of(image) == PLAIN


async def test_they_come_back_only_when_it_is_closed(served: Served, image: Path) -> None:
    image.chmod(SETUID)
    inode = await served.inode("vm.img")
    reader = await served.open(inode, os.O_RDONLY)
    assert mode_of(image) == SETUID
    writer = await served.open(inode)
    assert mode_of(image) == PLAIN
    await served.chmod(inode, SETUID)
    assert mode_of(image) == PLAIN
    await served.operations.release(writer)
    await served.chmod(inode, SETUID)
    assert mode_of(image) == SETUID
    await served.operations.release(reader)


async def test_an_image_that_keeps_them_is_not_opened_for_writing(
    served: Served, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image.chmod(SETUID)
    inode = await served.inode("vm.img")

    def refuses(fd: int, mode: int) -> None:
        raise PermissionError(errno.EPERM, "not ours")

    monkeypatch.setattr(served.tree, "chmod", refuses)
    with pytest.raises(FUSEError) as refused:
        await served.open(inode)
    assert refused.value.errno == errno.EPERM
    assert not served.operations.handles
    (known,) = served.cache.images.all()
    assert known.writers == 0
