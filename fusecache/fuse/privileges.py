"""Privileges: a program that can be written to runs with nobody's."""

import os
import stat

from fusecache.engine.block_cache import BlockCache
from fusecache.fuse.inodes import Node
from fusecache.fuse.shared import SharedStat
from fusecache.store.tree import Tree


def without_privileges(mode: int) -> int:
    """A mode as a write by somebody else leaves it: without set-user-ID, and without set-group-ID
    where that has an effect (inode(7))."""
    if mode & stat.S_IXGRP:
        mode &= ~stat.S_ISGID
    return mode & ~stat.S_ISUID


class Privileges:
    """Takes them from images that are open for writing. Other filesystems drop them with each
    write; but then the kernel would ask before each write whether there are any (the lane answers
    INIT so that it does not)."""

    def __init__(self, cache: BlockCache, tree: Tree, shared: SharedStat) -> None:
        self._cache = cache
        self._tree = tree
        self._stat = shared
        self._metadata = cache.threads.metadata

    def written(self, node: Node) -> bool:
        """Whether it is open for writing, or is about to be."""
        image = self._cache.images.find(node.identity)
        return image is not None and image.writers > 0

    def allowed(self, node: Node, mode: int) -> int:
        """What a mode that was asked for becomes."""
        return without_privileges(mode) if self.written(node) else mode

    async def drop(self, node: Node) -> None:
        """Takes those that it has."""
        st = os.fstat(node.fd) if node.local else await self._stat(node.id, node.fd)
        mode = without_privileges(st.st_mode)
        if mode != st.st_mode:
            async with self._cache.truth.own_change(node.identity, node.fd):
                await self._metadata(self._tree.chmod, node.fd, mode)
