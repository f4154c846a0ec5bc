"""The yardstick: the least a pyfuse3 filesystem can do, ``os.pread``, ``os.pwrite`` and
``os.fdatasync`` in its handlers.

One directory of regular files, no cache, no threads. Run by ``reads.py`` and ``writes.py``.
"""

import argparse
import errno
import os
import stat
from pathlib import Path

import pyfuse3
import trio

_MAX_BACKGROUND = 32768


class Bare(pyfuse3.Operations):
    """See the module.

    Args:
        timeout: seconds the kernel may keep names and attributes.
        writable: whether files are opened for writing, too.
        xattrs: answer questions for extended attributes with "there is none", as whoever passes
            them on has to. Else the first answer, "not known here", is also the last: the kernel
            asks no more before a write.
    """

    ahead_kib = 1024
    """What the kernel reads ahead for buffered readers."""

    def __init__(self, origin: Path, timeout: float, *, writable: bool, xattrs: bool) -> None:
        super().__init__()
        self._timeout = timeout
        self._xattrs = xattrs
        self.fds = {pyfuse3.ROOT_INODE: os.open(origin, os.O_RDONLY)}
        self._inodes: dict[bytes, int] = {}
        for number, path in enumerate(sorted(origin.iterdir()), pyfuse3.ROOT_INODE + 1):
            if path.is_file():
                self.fds[number] = os.open(path, os.O_RDWR if writable else os.O_RDONLY)
                self._inodes[os.fsencode(path.name)] = number
        self.serving = trio.Event()

    def init(self) -> None:
        self.serving.set()

    def _entry(self, inode: int) -> pyfuse3.EntryAttributes:
        st = os.fstat(self.fds[inode])
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        entry.entry_timeout = entry.attr_timeout = self._timeout
        for name in ("st_mode", "st_nlink", "st_uid", "st_gid", "st_size", "st_blocks"):
            setattr(entry, name, getattr(st, name))
        for name in ("st_atime_ns", "st_mtime_ns", "st_ctime_ns"):
            setattr(entry, name, getattr(st, name))
        return entry

    async def lookup(
        self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        if name not in self._inodes:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return self._entry(self._inodes[name])

    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        return self._entry(inode)

    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        if not stat.S_ISREG(os.fstat(self.fds[inode]).st_mode):
            raise pyfuse3.FUSEError(errno.EISDIR)
        return pyfuse3.FileInfo(fh=inode, keep_cache=True)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        return os.pread(self.fds[fh], size, off)

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        return os.pwrite(self.fds[fh], buf, off)

    async def fsync(self, fh: int, datasync: bool) -> None:
        os.fdatasync(self.fds[fh])

    async def getxattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        raise pyfuse3.FUSEError(errno.ENODATA if self._xattrs else errno.ENOSYS)


def _raise_limits(mountpoint: Path, ahead_kib: int) -> None:
    """As fusecache does, so that the kernel lets both have equally many requests, as large."""
    minor = os.minor(mountpoint.stat().st_dev)
    connection = Path(f"/sys/fs/fuse/connections/{minor}")
    (connection / "max_background").write_text(str(_MAX_BACKGROUND))
    (connection / "congestion_threshold").write_text(str(_MAX_BACKGROUND * 3 // 4))
    Path(f"/sys/class/bdi/0:{minor}/read_ahead_kb").write_text(str(ahead_kib))


async def _serve(operations: Bare, mountpoint: Path) -> None:
    async def prepare() -> None:
        await operations.serving.wait()
        await trio.to_thread.run_sync(_raise_limits, mountpoint, operations.ahead_kib)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(prepare)
        await pyfuse3.main()


def serve(operations: Bare, mountpoint: Path, *options: str) -> None:
    """Mounts and serves until unmounted."""
    chosen = {"default_permissions", *options}
    if os.geteuid() == 0:
        chosen.add("allow_other")  # as fusecache does
    pyfuse3.init(operations, str(mountpoint), chosen)
    try:
        trio.run(_serve, operations, mountpoint)
    finally:
        pyfuse3.close(unmount=True)


def main() -> None:
    """Serves until unmounted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("origin", type=Path)
    parser.add_argument("mountpoint", type=Path)
    parser.add_argument("--timeout", type=float, default=1.0)
    parser.add_argument("--write", action="store_true", help="files can be written, too")
    parser.add_argument("--xattrs", action="store_true", help="extended attributes are there")
    chosen = parser.parse_args()
    operations = Bare(chosen.origin, chosen.timeout, writable=chosen.write, xattrs=chosen.xattrs)
    serve(operations, chosen.mountpoint, "fsname=bare", *([] if chosen.write else ["ro"]))


if __name__ == "__main__":
    main()
