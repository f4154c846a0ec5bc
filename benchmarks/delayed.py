"""An origin that is as far away as shared storage: every read, write and sync takes a while longer.

The bare filesystem with a pause, in a thread, before each of them; attributes are kept for 3 s, as
NFS does.
With a rate, all data goes over one link besides, which carries one transfer at a time.
Run by ``writes.py`` and ``far.py``.
"""

import argparse
import math
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
    """``delay`` in seconds, ``rate`` in bytes a second."""

    ahead_kib = 128  # as Linux mounts NFS, unless it was told otherwise

    def __init__(self, origin: Path, delay: float, rate: float) -> None:
        super().__init__(origin, timeout=3.0, writable=True, xattrs=False)
        self._delay = delay
        self._rate = rate
        self._link_free_at = 0.0
        """On the monotonic clock, when all that was asked for until now has been carried."""

    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        here = os.fstatvfs(self.fds[pyfuse3.ROOT_INODE])
        told = pyfuse3.StatvfsData()
        for name in (
            *("f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail"),
            *("f_files", "f_ffree", "f_favail", "f_namemax"),
        ):
            setattr(told, name, getattr(here, name))
        return told

    async def _late(self, work: Callable[[], T], size: int = 0) -> T:
        now = time.monotonic()
        self._link_free_at = max(now, self._link_free_at) + size / self._rate
        pause = self._delay + self._link_free_at - now

        def call() -> T:
            time.sleep(pause)
            return work()

        return await trio.to_thread.run_sync(call)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        return await self._late(lambda: os.pread(self.fds[fh], size, off), size)

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        return await self._late(lambda: os.pwrite(self.fds[fh], buf, off), len(buf))

    async def fsync(self, fh: int, datasync: bool) -> None:
        await self._late(lambda: os.fsync(self.fds[fh]))


def main() -> None:
    """Serves until unmounted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("origin", type=Path)
    parser.add_argument("mountpoint", type=Path)
    parser.add_argument("--delay", type=float, default=0.001, help="in seconds")
    parser.add_argument(
        "--rate", type=float, default=math.inf, help="bytes a second; default: no limit"
    )
    chosen = parser.parse_args()
    operations = Delayed(chosen.origin, chosen.delay, chosen.rate)
    bare.serve(operations, chosen.mountpoint, "fsname=delayed")


if __name__ == "__main__":
    main()
