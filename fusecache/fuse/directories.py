"""Directories: those that are open, and their listings."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field

import pyfuse3

from fusecache.engine.block_cache import BlockCache
from fusecache.fuse.inodes import Inodes, Node
from fusecache.fuse.told import Told
from fusecache.store.tree import Found, Tree

_LISTING_PART = 64
_LISTING_ANSWER = 4 * _LISTING_PART
"""Entries after which an answer is long enough; the kernel asks on. It may have room for 1 MiB, and
the way through the lane takes some 200 KiB without privilege (see laned.py)."""


@dataclass(slots=True)
class Listing:
    """An open directory: its names as of the first read."""

    node: Node
    names: list[bytes] = field(default_factory=list)


class Directories:
    """Open directories, by the number of their handle.

    Args:
        numbers: gives the next handle's.
    """

    def __init__(
        self, cache: BlockCache, tree: Tree, inodes: Inodes, told: Told, numbers: Iterator[int]
    ) -> None:
        self._tree = tree
        self._inodes = inodes
        self._numbers = numbers
        self._metadata = cache.threads.metadata
        self._told = told
        self._listings: dict[int, Listing] = {}

    def open(self, node: Node) -> int:
        """The number of a new handle. Names are read at the first ``read``."""
        number = next(self._numbers)
        self._listings[number] = Listing(node)
        return number

    def close(self, number: int) -> None:
        """The listing ends."""
        del self._listings[number]

    async def sync(self, number: int) -> None:
        """Names are on the origin's stable storage."""
        await self._metadata(self._tree.sync_directory, self._listings[number].node.fd)

    async def read(self, number: int, start: int, token: pyfuse3.ReaddirToken) -> None:
        """Entries in a fixed order; the id of an entry is its place in it. None at all would mean
        the end, however many names are gone by now."""
        listing = self._listings[number]
        directory = listing.node.fd
        if start == 0:
            names = await self._metadata(self._tree.names, directory)
            listing.names = [b".", b"..", *names]
        replied = 0
        while start < len(listing.names) and replied < _LISTING_ANSWER:
            part = listing.names[start : start + _LISTING_PART]
            if start < 2:
                if not await self._reply_dot(listing, start, token):
                    return
                start += 1
                continue
            places = {name: start + at + 1 for at, name in enumerate(part)}
            found = await self._metadata(self._tree.find_all, directory, part)
            if not self._reply_part(found, places, token):
                return
            replied += len(found)
            start += len(part)

    async def _reply_dot(self, listing: Listing, place: int, token: pyfuse3.ReaddirToken) -> bool:
        """``.`` and ``..``, which the kernel does not count as look-ups."""
        st = await self._metadata(os.fstat, listing.node.fd)
        entry = self._told.entry(listing.node, st)
        return pyfuse3.readdir_reply(token, listing.names[place], entry, place + 1)

    def _reply_part(
        self,
        found: list[tuple[bytes, Found]],
        places: dict[bytes, int],
        token: pyfuse3.ReaddirToken,
    ) -> bool:
        """Replies entries until the buffer is full; whatever was not replied is let go."""
        full = False
        for name, entry in found:
            if full:
                os.close(entry.fd)
                continue
            node = self._inodes.add(entry)
            attributes = self._told.entry(node, entry.st)
            if not pyfuse3.readdir_reply(token, name, attributes, places[name]):
                self._inodes.forget(node.id, 1)
                full = True
        return not full
