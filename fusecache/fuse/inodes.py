"""Inodes: node ids are ours and never used twice; each holds an O_PATH descriptor."""

import contextlib
import os
import queue
import stat
import threading
from typing import TYPE_CHECKING

from fusecache.store.tree import Found

if TYPE_CHECKING:
    from fusecache.lane._lane import Lane

ROOT_ID = 1


class Node:
    """An inode the kernel knows."""

    __slots__ = (
        "asked",
        "buffered_writers",
        "fd",
        "fmt",
        "id",
        "identity",
        "local",
        "lookups",
        "told_mtime_ns",
    )

    def __init__(self, node_id: int, found: Found) -> None:
        self.id = node_id
        self.fd = found.fd
        self.identity = found.identity
        self.local = found.local
        self.fmt = stat.S_IFMT(found.st.st_mode)
        self.lookups = 0
        self.asked = False
        """The kernel has asked for the attributes since the last read; see Operations.read."""
        self.buffered_writers = 0
        """Handles that write, not directly."""
        self.told_mtime_ns = found.st.st_mtime_ns
        """See ``Told``."""

    @property
    def regular(self) -> bool:
        """Whether it is a regular file: only those are opened."""
        return self.fmt == stat.S_IFREG

    @property
    def directory(self) -> bool:
        """Whether names can be looked up in it."""
        return self.fmt == stat.S_IFDIR


class _Closer:
    """Closes descriptors in a thread of its own, one after another."""

    def __init__(self) -> None:
        self._waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="closer", daemon=True)

    def close(self, fd: int) -> None:
        """Takes it over; returns at once."""
        if not self._thread.is_alive():
            self._thread.start()
        self._waiting.put(fd)

    def _run(self) -> None:
        while True:
            with contextlib.suppress(OSError):  # the descriptor is gone in any case
                os.close(self._waiting.get())


class Inodes:
    """All nodes, by id and by identity; hard links share one."""

    def __init__(self, root: Found) -> None:
        self._by_id: dict[int, Node] = {}
        self._by_identity: dict[bytes, Node] = {}
        self._next_id = ROOT_ID
        self._lane: Lane | None = None
        self._closer = _Closer()
        self.add(root)

    def tell(self, lane: "Lane") -> None:
        """The lane hears of every directory: it can look names up by their descriptors."""
        self._lane = lane
        for node in self._by_id.values():
            if node.directory:
                lane.open_directory(node.id, node.fd)

    def __getitem__(self, node_id: int) -> Node:
        """The node. KeyError for an id the kernel cannot have: a bug, answered with EIO."""
        return self._by_id[node_id]

    def get(self, node_id: int) -> Node | None:
        """The node, if there is one."""
        return self._by_id.get(node_id)

    def find(self, identity: bytes) -> Node | None:
        """The node of an inode, if the kernel knows it."""
        return self._by_identity.get(identity)

    def add(self, found: Found) -> Node:
        """Takes over ``found.fd`` and counts one look-up."""
        node = self._by_identity.get(found.identity)
        if node is None:
            node = Node(self._next_id, found)
            self._next_id += 1
            self._by_id[node.id] = node
            self._by_identity[node.identity] = node
            if self._lane is not None and node.directory:
                self._lane.open_directory(node.id, node.fd)
        else:
            # In place of the old one: after a rename by others it knows the new path.
            os.dup2(found.fd, node.fd, inheritable=False)
            os.close(found.fd)
        node.lookups += 1
        return node

    def forget(self, node_id: int, lookups: int) -> None:
        """The kernel dropped that many look-ups; at none the node goes."""
        node = self._by_id[node_id]
        node.lookups -= lookups
        if node.lookups <= 0 and node.id != ROOT_ID:
            del self._by_id[node.id]
            if self._by_identity.get(node.identity) is node:
                del self._by_identity[node.identity]
            if self._lane is not None:
                self._lane.drop_attributes(node.id)
                if node.directory:
                    self._lane.close_directory(node.id)
            self._let_go(node)

    def _let_go(self, node: Node) -> None:
        """Closes its descriptor. If it is the last of a file without a name, the origin then frees
        all of it, and what is in memory: for a large image everybody would wait for that. Of a file
        on a network nobody can tell without asking there."""
        if node.regular and (not node.local or os.fstat(node.fd).st_nlink == 0):
            self._closer.close(node.fd)
        else:
            os.close(node.fd)

    def close(self) -> None:
        """Closes every descriptor."""
        for node in self._by_id.values():
            os.close(node.fd)
        self._by_id.clear()
        self._by_identity.clear()
