"""Told: what the kernel is told of nodes."""

import os

from pyfuse3 import EntryAttributes

from fusecache.engine.block_cache import BlockCache
from fusecache.fuse.attributes import entry_of
from fusecache.fuse.inodes import Node


class Told:
    """The origin's attributes, but for one: while somebody writes an image through the kernel's
    pages, its time of modification stays as it was told last.

    libfuse has the kernel drop all pages of a file when that time is told anew, which every write
    of ours changes. A page that a buffered write has filled is no longer locked while that WRITE
    is under way; were it dropped then, what is read ahead for somebody else could bring it back as
    it was before. Changes by others are not looked for as long as an image is open for writing.
    """

    def __init__(self, cache: BlockCache) -> None:
        self._images = cache.images
        self._timeout = cache.tuning.attribute_timeout

    def entry(self, node: Node, st: os.stat_result) -> EntryAttributes:
        """The attributes of a node, which are ``st`` on the origin."""
        if not (node.buffered_writers and self._attached(node)):
            node.told_mtime_ns = st.st_mtime_ns
        entry = entry_of(node.id, st, self._timeout)
        entry.st_mtime_ns = node.told_mtime_ns
        return entry

    def _attached(self, node: Node) -> bool:
        """An evicted image may be written elsewhere."""
        image = self._images.find(node.identity)
        return image is not None and not image.detached
