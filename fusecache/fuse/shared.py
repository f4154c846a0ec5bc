"""SharedStat: many callers that ask for one inode's attributes at once share a call.

When the kernel's attributes run out, every read under way asks for them: hundreds of requests
once a second, each worth a thread. Nobody gets an answer that was begun before they asked, so
nobody sees a size from before a write that was acknowledged.
"""

import os
from collections.abc import Awaitable, Callable

import trio


class _Calls:
    """The calls for one inode."""

    __slots__ = ("begun", "last", "lock", "result", "users")

    def __init__(self) -> None:
        self.lock = trio.Lock()
        self.users = 0
        self.begun = 0
        self.last = 0
        self.result: os.stat_result | None = None


class SharedStat:
    """Attributes of descriptors, one call at a time for each inode.

    Args:
        stat: gives the attributes of a descriptor.
    """

    def __init__(self, stat: Callable[[int], Awaitable[os.stat_result]]) -> None:
        self._stat = stat
        self._calls: dict[int, _Calls] = {}

    async def __call__(self, inode: int, fd: int) -> os.stat_result:
        """The attributes of ``fd``, which is ``inode``'s. Raises OSError."""
        calls = self._calls.setdefault(inode, _Calls())
        calls.users += 1
        try:
            before = calls.begun
            async with calls.lock:
                if calls.result is not None and calls.last > before:
                    return calls.result
                calls.begun += 1
                number = calls.begun
                result = await self._stat(fd)
                calls.last, calls.result = number, result
                return result
        finally:
            calls.users -= 1
            if not calls.users:
                del self._calls[inode]
