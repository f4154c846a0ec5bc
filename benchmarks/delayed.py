"""An origin that is as far away as shared storage: every read, write and sync takes a while longer.

The bare filesystem with a pause, in a thread, before each of them; attributes are never kept.
Run by ``writes.py``.
"""

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import bare
import pyfuse3
import trio

T = TypeVar("T")


class Delayed(bare.Bare):
    """``delay`` in seconds."""

    def __init__(self, origin: Path, delay: float) -> None:
        super().__init__(origin, timeout=0.0, writable=True, xattrs=False)
        self._delay = delay

    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        here = os.fstatvfs(self.fds[pyfuse3.ROOT_INODE])
        told = pyfuse3.StatvfsData()
        for name in (
            *("f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail"),
            *("f_files", "f_ffree", "f_favail", "f_namemax"),
        ):
            setattr(told, name, getattr(here, name))
        return told

    async def _late(self, work: Callable[[], T]) -> T:
        def call() -> T:
            time.sleep(self._delay)
            return work()

        return await trio.to_thread.run_sync(call)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        return await self._late(lambda: os.pread(self.fds[fh], size, off))

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        return await self._late(lambda: os.pwrite(self.fds[fh], buf, off))

    async def fsync(self, fh: int, datasync: bool) -> None:
        await self._late(lambda: os.fsync(self.fds[fh]))


def main() -> None:
    """Serves until unmounted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("origin", type=Path)
    parser.add_argument("mountpoint", type=Path)
    parser.add_argument("--delay", type=float, default=0.001, help="in seconds")
    chosen = parser.parse_args()
    bare.serve(Delayed(chosen.origin, chosen.delay), chosen.mountpoint, "fsname=delayed")


if __name__ == "__main__":
    main()
