"""Files: images that are open, by the number of their handle."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio
from pyfuse3 import FileInfo, FUSEError

from fusecache.engine.block_cache import BlockCache
from fusecache.engine.image import Image
from fusecache.fuse.guard import undone_on_failure
from fusecache.fuse.inodes import Node
from fusecache.fuse.privileges import Privileges
from fusecache.fuse.told import Told
from fusecache.store.tree import Tree

if TYPE_CHECKING:
    from fusecache.lane._lane import Lane


@dataclass(slots=True)
class Handle:
    """An open file."""

    image: Image
    node: Node
    write: bool
    buffered: bool
    """Writes through the kernel's pages."""
    pid: int


class Files:
    """Opens and closes images.

    Args:
        invalidate: makes the kernel forget pages and attributes of an inode; blocks.
        numbers: gives the next handle's.
    """

    def __init__(
        self,
        cache: BlockCache,
        tree: Tree,
        told: Told,
        privileges: Privileges,
        invalidate: Callable[[bytes], None],
        numbers: Iterator[int],
    ) -> None:
        self._cache = cache
        self._tree = tree
        self._told = told
        self._privileges = privileges
        self._invalidate = invalidate
        self._numbers = numbers
        self.handles: dict[int, Handle] = {}
        self.lane: Lane | None = None
        """What answers hits in front of us, if anything does."""

    async def open(self, node: Node, flags: int, pid: int) -> FileInfo:
        """Regular files only. O_TRUNC is a truncate like any other (R6)."""
        if not node.regular:
            raise FUSEError(errno.EPERM)
        truncates = bool(flags & os.O_TRUNC)
        write = truncates or flags & os.O_ACCMODE != os.O_RDONLY
        image, true = await self._open_image(node, write=write)
        if truncates:
            async with undone_on_failure(self._close, node, image, write=True):
                await self._cache.truncate(image, 0)
        buffered = write and not flags & os.O_DIRECT
        number = self._add(Handle(image, node, write, buffered, pid))
        return FileInfo(fh=number, keep_cache=true and not image.detached)

    async def _open_image(self, node: Node, *, write: bool) -> tuple[Image, bool]:
        """The image, and whether the kernel's pages of it are true."""
        path = self._tree.path_of(node.fd)  # from memory: never asks the origin
        image = await self._cache.open(node.identity, path, node.fd, write=write)
        true = image.kernel_true  # as this open has found it: the next one may be told otherwise
        if write:
            async with undone_on_failure(self._close, node, image, write=True):
                await self._privileges.drop(node)  # only now: from here on nobody sets them
        return image, true

    def _add(self, handle: Handle) -> int:
        number = next(self._numbers)
        self.handles[number] = handle
        handle.node.buffered_writers += handle.buffered
        if self.lane is not None:
            if handle.image.gate is not None:
                gate = handle.image.gate.number
                self.lane.open(number, handle.node.id, gate, handle.write)
            self._tell_of_open(handle.node)
        return number

    def _tell_of_open(self, node: Node) -> None:
        self._told.anew(node)
        with suppress(OSError):
            st = self._told.now(node)
            if st is not None:
                self._told.in_advance(node, st)

    async def truncate(self, node: Node, size: int, number: int | None) -> None:
        """By the handle of that number, if one is given that may; else as who opens it for that."""
        handle = None if number is None else self.handles.get(number)
        if handle is not None and handle.write:
            await self._cache.truncate(handle.image, size)
            return
        image, _ = await self._open_image(node, write=True)
        try:
            await self._cache.truncate(image, size)
        finally:
            with trio.CancelScope(shield=True):
                await self._close(node, image, write=True)

    async def before_close(self, number: int) -> None:
        """A close(2): what others do after it must be seen as a change of its own (P3)."""
        handle = self.handles[number]
        if handle.write:
            await self._cache.closing.before_close(handle.image)

    async def close(self, number: int) -> None:
        """The last close of a handle."""
        handle = self._end(number)
        await self._close(handle.node, handle.image, write=handle.write)
        if handle.image.gone and not handle.image.handles:
            # Else the kernel would free all its pages (0.1 s for 1 GiB) when it is answered, and
            # the event loop wait for that.
            await self._cache.threads.kernel(self._invalidate, handle.node.identity)

    def close_at_once(self, number: int) -> bool:
        """``close`` of who only reads, which mostly waits for nothing; False: it does."""
        handle = self.handles[number]
        if handle.write or not self._cache.closing.close_reader(handle.image):
            return False
        self._end(number)
        self._told.anew(handle.node)
        return True

    def _end(self, number: int) -> Handle:
        handle = self.handles.pop(number)
        handle.node.buffered_writers -= handle.buffered
        if self.lane is not None:
            self.lane.close(number)
        return handle

    async def _close(self, node: Node, image: Image, *, write: bool) -> None:
        try:
            await self._cache.close(image, write=write)
        finally:  # until then it was told of as an image that is open
            self._told.anew(node)
