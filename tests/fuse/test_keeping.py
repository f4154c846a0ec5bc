"""Whether the kernel may keep the pages it has of an image that is opened."""

import os

import pytest
import trio

from fusecache.fuse.inodes import Node
from fusecache.fuse.privileges import Privileges
from tests.fuse.conftest import BLOCK, NOBODY, Served


async def test_an_open_that_waits_is_told_what_it_found_itself(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next one, while the image is open for writing, finds the pages true: the first one has
    to have dropped them (P3)."""
    (served.origin / "vm.img").write_bytes(bytes(BLOCK))
    node = await served.inode("vm.img")
    waiting, go_on = trio.Event(), trio.Event()

    async def wait(self: Privileges, node: Node) -> None:
        waiting.set()
        await go_on.wait()

    kept: list[bool] = []

    async def first() -> None:
        info = await served.operations.open(node, os.O_WRONLY, NOBODY)
        kept.append(info.keep_cache)

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            with monkeypatch.context() as patch:
                patch.setattr(Privileges, "drop", wait)
                nursery.start_soon(first)
                await waiting.wait()
            info = await served.operations.open(node, os.O_RDONLY, NOBODY)
            go_on.set()
    assert info.keep_cache and kept == [False]
