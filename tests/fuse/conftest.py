"""The handlers over a real cache and real files, without a kernel."""

import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyfuse3
import pytest
from pyfuse3 import ROOT_INODE, RequestContext

from fusecache.config import Tuning, WriteMode
from fusecache.engine.block_cache import BlockCache
from fusecache.fuse.operations import Operations
from fusecache.store.tree import Tree
from tests.support.files import cache_on_files

BLOCK = 65536
NOBODY = RequestContext()


@dataclass
class Served:
    """What is served, and the origin it comes from."""

    operations: Operations
    cache: BlockCache
    tree: Tree
    origin: Path

    async def inode(self, name: str) -> int:
        """As the kernel looks it up."""
        entry = await self.operations.lookup(ROOT_INODE, os.fsencode(name), NOBODY)
        return entry.st_ino

    async def open(self, inode: int, flags: int = os.O_RDWR) -> int:
        """The number of a new handle."""
        return (await self.operations.open(inode, flags, NOBODY)).fh

    async def chmod(self, inode: int, mode: int) -> None:
        """As the kernel asks for it."""
        await self._set(inode, "mode", mode)

    async def truncate(self, inode: int, size: int) -> None:
        """The same, of a file that is not open."""
        await self._set(inode, "size", size)

    async def _set(self, inode: int, name: str, value: int) -> None:
        asked = pyfuse3.EntryAttributes()
        setattr(asked, f"st_{name}", value)
        names = ("size", "atime", "mtime", "ctime", "mode", "uid", "gid")
        fields: Any = SimpleNamespace(**{f"update_{each}": each == name for each in names})
        await self.operations.setattr(inode, asked, fields, None, NOBODY)


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    """In write-back."""
    origin = tmp_path / "origin"
    origin.mkdir()
    tree = Tree(origin)
    try:
        async with cache_on_files(
            tmp_path,
            BLOCK,
            origin=origin,
            write_mode=WriteMode.BACK,
            tuning=Tuning(settle_age=0.1),
        ) as cache:
            operations = Operations(cache, tree)
            yield Served(operations, cache, tree, origin)
            for number in list(operations.handles):
                await operations.release(number)
            operations.inodes.close()
    finally:
        tree.close()
