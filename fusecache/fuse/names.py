"""Names: how the origin's change, and what that is to the images behind them."""

import os
import stat
from contextlib import AsyncExitStack

from fusecache.engine.block_cache import BlockCache
from fusecache.engine.discards import Removal
from fusecache.fuse.inodes import Node
from fusecache.store.syscalls import RENAME_EXCHANGE
from fusecache.store.tree import Found, Tree


class Names:
    """Gives, takes and changes names of what is there already."""

    def __init__(self, cache: BlockCache, tree: Tree) -> None:
        self._cache = cache
        self._tree = tree
        self._metadata = cache.threads.metadata

    async def link(self, node: Node, parent: Node, name: bytes) -> Found:
        """One more name; the image stays the same."""
        async with self._cache.truth.own_change(node.identity, node.fd):
            await self._metadata(self._tree.link, node.fd, parent.fd, name)
        return await self._metadata(self._tree.find, parent.fd, name)

    async def unlink(self, parent: Node, name: bytes) -> None:
        """Origin first, origin sync, then the rows, then the answer (R6)."""
        found = await self._metadata(self._tree.find, parent.fd, name)
        try:
            async with AsyncExitStack() as stack:
                removal = await self._losing_a_name(stack, found)
                await self._metadata(self._tree.unlink, parent.fd, name)
                if removal is not None:
                    removal.happened = _nameless(found)
                    await self._metadata(self._tree.sync_directory, parent.fd)
        finally:
            os.close(found.fd)

    async def rename(
        self, old: Node, name_old: bytes, new: Node, name_new: bytes, flags: int
    ) -> None:
        """What is renamed keeps its blocks; what loses its last name loses them (R6)."""
        async with AsyncExitStack() as stack:
            moved = await self._metadata(self._tree.find, old.fd, name_old)
            stack.callback(os.close, moved.fd)
            replaced = await self._find_or_none(new, name_new)
            if replaced is not None:
                stack.callback(os.close, replaced.fd)
            removal = await self._changing_names(stack, moved, replaced, flags)
            both = [moved, replaced] if replaced and flags & RENAME_EXCHANGE else [moved]
            before = [self._tree.path_of(found.fd) for found in both]
            names = (old.fd, name_old, new.fd, name_new, flags)
            await self._metadata(self._tree.rename, *names)
            if removal is not None and replaced is not None:
                removal.happened = _nameless(replaced)
            await self._moved(both, before)
            if removal is not None:
                await self._metadata(self._tree.sync_directory, new.fd)

    async def _changing_names(
        self, stack: AsyncExitStack, moved: Found, replaced: Found | None, flags: int
    ) -> Removal | None:
        """Enters what goes around a rename; gives the removal of a known image that it replaces."""
        removal: Removal | None = None
        # In one order for all: two renames must not wait for each other.
        for found in sorted(filter(None, (moved, replaced)), key=lambda f: f.identity):
            if found is replaced and replaced.identity == moved.identity:
                continue
            if found is moved or flags & RENAME_EXCHANGE:
                change = self._cache.truth.own_change(found.identity, found.fd)
                await stack.enter_async_context(change)
            elif not flags:
                removal = await self._losing_a_name(stack, found)
        return removal

    async def _losing_a_name(self, stack: AsyncExitStack, found: Found) -> Removal | None:
        """Enters what goes around the removal of a name; gives that of a known image's last one."""
        if not stat.S_ISREG(found.st.st_mode):
            return None
        if found.st.st_nlink == 1:
            return await stack.enter_async_context(self._cache.removing(found.identity))
        await stack.enter_async_context(self._cache.truth.own_change(found.identity, found.fd))
        return None

    async def _moved(self, moved: list[Found], before: list[bytes]) -> None:
        after = [self._tree.path_of(found.fd) for found in moved]
        for found, path in zip(moved, after, strict=True):
            if stat.S_ISREG(found.st.st_mode):
                await self._cache.names.moved(found.identity, path)
        if any(stat.S_ISDIR(found.st.st_mode) for found in moved):
            await self._cache.names.moved_below(dict(zip(before, after, strict=True)))

    async def _find_or_none(self, parent: Node, name: bytes) -> Found | None:
        try:
            return await self._metadata(self._tree.find, parent.fd, name)
        except FileNotFoundError:
            return None


def _nameless(found: Found) -> bool:
    """Whether a file whose last name was just removed has none that somebody gave it meanwhile. A
    network's filesystem may keep the number of names as it was while the file is open."""
    try:
        return not found.local or os.fstat(found.fd).st_nlink == 0
    except OSError:
        return True
