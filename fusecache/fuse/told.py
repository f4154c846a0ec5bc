"""Told: what the kernel is told of nodes."""

import os
from typing import TYPE_CHECKING

from pyfuse3 import EntryAttributes

from fusecache.engine.block_cache import BlockCache
from fusecache.fuse.attributes import entry_of, packed_attributes
from fusecache.fuse.inodes import Node
from fusecache.store.origin import Attributes

if TYPE_CHECKING:
    from fusecache.lane._lane import Lane


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
        self._truth = cache.truth
        self._timeout = cache.tuning.attribute_timeout
        self.lane: Lane | None = None
        """What answers questions in front of us, if anything does."""

    def now(self, node: Node) -> os.stat_result | None:
        """The origin's attributes from memory alone; None if that is not certain, or they tell of a
        change by others that has to be looked into."""
        if not node.local:
            return None
        st = os.fstat(node.fd)
        if node.regular and self._truth.notices(node.identity, Attributes.of(st)):
            return None
        return st

    def entry(self, node: Node, st: os.stat_result) -> EntryAttributes:
        """The attributes of a node, which are ``st`` on the origin."""
        if not (node.buffered_writers and self._attached(node)):
            self.time(node, st.st_mtime_ns)
        entry = entry_of(node.id, st, self._timeout)
        entry.st_mtime_ns = node.told_mtime_ns
        return entry

    def time(self, node: Node, mtime_ns: int) -> None:
        """The kernel is told of this time of modification."""
        if node.told_mtime_ns != mtime_ns:
            node.told_mtime_ns = mtime_ns
            if node.regular:  # nothing depends on what was told of others
                self.anew(node)

    def again(self, node: Node, entry: EntryAttributes) -> bytes:
        """The answer to a question for attributes, of what could be answered at once. The lane may
        give it again, by itself, as long as the origin's are the same: all else that it depends on
        is who has the image open, which calls ``anew``, and what a writeback is about to record."""
        answer = packed_attributes(entry)
        if self.lane is not None and self._truth.lasts(node.identity):
            self.lane.keep_attributes(node.id, node.fd, answer)
        return answer

    def in_advance(self, node: Node, st: os.stat_result) -> None:
        """The lane may tell these attributes before we were asked for them. But not a time that the
        kernel has not heard of yet: it would be taken for the one it was told last."""
        if st.st_mtime_ns == node.told_mtime_ns:
            self.again(node, self.entry(node, st))

    def anew(self, node: Node) -> None:
        """The next question is ours to answer."""
        if self.lane is not None:
            self.lane.drop_attributes(node.id)

    def _attached(self, node: Node) -> bool:
        """An evicted image may be written elsewhere."""
        image = self._images.find(node.identity)
        return image is not None and not image.detached
