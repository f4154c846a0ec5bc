"""Requests that the lane hands to Python: data that is not simply a hit, what pyfuse3 has no words
for, the two questions that are asked all the time, opens and closes."""

import errno
import struct
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import trio
from pyfuse3 import FUSEError

from fusecache import lane as lanes
from fusecache.engine.block_cache import BlockCache
from fusecache.engine.writes import Write
from fusecache.fuse.attributes import packed_attributes, packed_entry, packed_open
from fusecache.fuse.files import Handle
from fusecache.fuse.guard import answer
from fusecache.fuse.operations import Operations

if TYPE_CHECKING:
    from fusecache.lane._lane import Lane

_WRITTEN = struct.Struct("<II")
"""``struct fuse_write_out``: bytes, padding."""
_FOUND = struct.Struct("<Q")
"""``struct fuse_lseek_out``."""
_NUMBER = struct.Struct("<Q")
"""What ``struct fuse_entry_out`` and ``fuse_open_out`` begin with: node or handle."""
_DATA_ONLY = 1
"""``FUSE_FSYNC_FDATASYNC``."""

_LEFT_BEHIND = (lanes.LOOKUP, lanes.GETATTR, lanes.READ)
"""At a forced end. What changes something is done whole: an open that truncates, too."""

_NAMES = {
    lanes.LOOKUP: "lookup",
    lanes.GETATTR: "getattr",
    lanes.OPEN: "open",
    lanes.READ: "read",
    lanes.WRITE: "write",
    lanes.RELEASE: "release",
    lanes.FSYNC: "fsync",
    lanes.FLUSH: "flush",
    lanes.FALLOCATE: "fallocate",
    lanes.LSEEK: "lseek",
}

Request = tuple[int, int, int, int, int, int, bytes | None]
"""See ``Lane.take``."""


class Requests:
    """Takes them from the lane and answers them."""

    def __init__(self, lane: "Lane", operations: Operations, cache: BlockCache) -> None:
        self._lane = lane
        self._reply = lane.reply
        self._operations = operations
        self._handles = operations.handles
        self._cache = cache
        self._state = cache.state
        self._files = operations.files
        # Of nodes, and how handles begin and end; the others are of data, by a handle.
        self._apart: dict[int, Callable[[Request], Awaitable[bytes]]] = {
            lanes.LOOKUP: self._lookup,
            lanes.GETATTR: self._getattr,
            lanes.OPEN: self._open,
            lanes.FLUSH: self._flush,
            lanes.RELEASE: self._release,
        }
        self._slowly: dict[int, Callable[[Handle, Request], Awaitable[bytes | memoryview]]] = {
            lanes.READ: self._read,
            lanes.WRITE: self._write,
            lanes.FSYNC: self._fsync,
            lanes.FALLOCATE: self._fallocate,
            lanes.LSEEK: self._lseek,
        }

    async def serve(self) -> None:
        """Until the kernel has no more; what is under way is answered first."""
        async with trio.open_nursery() as nursery:
            while not self._lane.ended:
                await trio.lowlevel.wait_readable(self._lane.queue)
                self._take(nursery)
            self._take(nursery)  # the last closes may be among them

    def _take(self, nursery: trio.Nursery) -> None:
        writes: list[tuple[Request, Write]] = []
        closes = False
        for request in self._lane.take():
            if request[1] in self._apart:
                if not self._tell_at_once(request):
                    nursery.start_soon(self._ask, request, closes)
                    closes |= request[1] == lanes.RELEASE
            elif not self._at_once(request, writes):
                nursery.start_soon(self._answer, request)
        for request in self._written_together(writes):
            nursery.start_soon(self._answer, request)

    def _at_once(self, request: Request, writes: list[tuple[Request, Write]]) -> bool:
        """Answers a hit; adds a write that is none to ``writes``. False for all else."""
        unique, opcode, number, offset, length, _, data = request
        try:
            if opcode == lanes.READ:
                hit = self._cache.try_read(self._handles[number].image, offset, length)
                if hit is None:
                    return False
                self._reply(unique, 0, hit)
                return True
            if data is None:
                return False
            image = self._handles[number].image
            if not self._cache.try_write(image, offset, data):
                writes.append((request, (image, offset, data)))
                return True
        except Exception as exc:
            self._reply(unique, answer(self._state, exc, _NAMES[opcode]).errno, b"")
            return True
        self._reply(unique, 0, _WRITTEN.pack(length, 0))
        return True

    def _written_together(self, writes: list[tuple[Request, Write]]) -> list[Request]:
        """Answers the writes that need no wait; returns the others."""
        if not writes:
            return []
        try:
            done = self._cache.write_at_once([write for _, write in writes])
        except Exception as exc:
            failed = answer(self._state, exc, "write").errno
            for request, _ in writes:
                self._reply(request[0], failed, b"")
            return []
        left = []
        for (request, _), is_done in zip(writes, done, strict=True):
            if is_done:
                self._reply(request[0], 0, _WRITTEN.pack(request[4], 0))
            else:
                left.append(request)
        return left

    async def _answer(self, request: Request) -> None:
        unique, opcode = request[:2]
        error, data = 0, b""  # type: int, bytes | memoryview
        try:
            with trio.CancelScope(shield=opcode not in _LEFT_BEHIND):
                data = await self._slowly[opcode](self._handles[request[2]], request)
        except Exception as exc:
            error = answer(self._state, exc, _NAMES.get(opcode, "a request")).errno
        self._reply(unique, error, data)

    def _tell_at_once(self, request: Request) -> bool:
        """Answers a question from memory, or a close; False if that is not certain, or waits."""
        _, opcode, number, _, _, found, _ = request
        error, data, done = 0, b"", False
        try:
            if opcode == lanes.GETATTR:
                entry = self._operations.attributes_at_once(number)
                if entry is not None:
                    data = self._operations.told.again(self._operations.inodes[number], entry)
            elif opcode == lanes.LOOKUP and found:
                entry = self._operations.look_up_at_once(number, found - 1)
                data = b"" if entry is None else packed_entry(entry)
            elif opcode == lanes.RELEASE:
                done = self._files.close_at_once(number)
        except Exception as exc:
            error = answer(self._state, exc, _NAMES[opcode]).errno
        if not (data or error or done):
            return False
        self._tell(request, error, data)
        return True

    async def _ask(self, request: Request, after_closes: bool) -> None:
        opcode = request[1]
        error, data = 0, b""
        if opcode == lanes.OPEN and after_closes:
            # Tasks begin in any order. Whoever opens an image again that was evicted meanwhile, and
            # that its last user has just closed, must not come before him and find it so.
            await trio.lowlevel.checkpoint()
        try:
            with trio.CancelScope(shield=opcode not in _LEFT_BEHIND):
                data = await self._apart[opcode](request)
        except Exception as exc:
            error = answer(self._state, exc, _NAMES[opcode]).errno
        if self._tell(request, error, data) and opcode == lanes.OPEN and not error:
            await self._close_again(data)

    def _tell(self, request: Request, error: int, data: bytes) -> bool:
        """Returns whether nobody has heard it."""
        unique, opcode = request[:2]
        unheard = bool(self._reply(unique, error, data))
        if unheard and opcode == lanes.LOOKUP and not error:  # the kernel will not forget it
            (node,) = _NUMBER.unpack_from(data)
            self._operations.inodes.forget(node, 1)
        return unheard

    async def _close_again(self, opened: bytes) -> None:
        """The kernel, which has not heard of an open, sends no release."""
        (handle,) = _NUMBER.unpack_from(opened)
        try:
            with trio.CancelScope(shield=True):
                await self._files.close(handle)
        except Exception as exc:
            answer(self._state, exc, "release")

    async def _lookup(self, request: Request) -> bytes:
        name, found = request[6], request[5]
        assert name is not None
        fd = found - 1 if found else None
        return packed_entry(await self._operations.look_up(request[2], name, fd))

    async def _getattr(self, request: Request) -> bytes:
        return packed_attributes(await self._operations.attributes(request[2]))

    async def _open(self, request: Request) -> bytes:
        _, _, node, _, pid, flags, _ = request
        return packed_open(await self._files.open(self._operations.inodes[node], flags, pid))

    async def _flush(self, request: Request) -> bytes:
        await self._files.before_close(request[2])
        return b""

    async def _release(self, request: Request) -> bytes:
        await self._files.close(request[2])
        return b""

    async def _read(self, handle: Handle, request: Request) -> memoryview:
        return await self._cache.read_slowly(handle.image, request[3], request[4])

    async def _write(self, handle: Handle, request: Request) -> bytes:
        data = request[6]
        assert data is not None
        return _WRITTEN.pack(await self._cache.write_slowly(handle.image, request[3], data), 0)

    async def _fsync(self, handle: Handle, request: Request) -> bytes:
        if failed := request[4]:
            await self._cache.lane_sync_failed(failed)
        await self._cache.fsync(handle.image, metadata=not request[5] & _DATA_ONLY)
        return b""

    async def _fallocate(self, handle: Handle, request: Request) -> bytes:
        if not handle.write:
            raise FUSEError(errno.EBADF)
        await self._cache.allocate(handle.image, request[5], request[3], request[4])
        return b""

    async def _lseek(self, handle: Handle, request: Request) -> bytes:
        return _FOUND.pack(await self._cache.seek(handle.image, request[3], request[5]))
