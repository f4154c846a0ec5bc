"""A fusecache whose parts fail or hang when a test says so: ``python -m tests.support.injected``.

The directory that FUSECACHE_FAULTS names says what happens, from one call to the next:

``fail``             holds ``Class.method``: that method raises KeyError
``block``            holds ``Class.method``: while it is there, that method does not return, nor the
                     event loop if that is where it is called
``hang-INODE``       while it is there, reads of that origin file wait
``stall-INODE``      while it is there, reads, writes, truncates and syncs of that file wait
``unreadable-INODE`` while it is there, reads of that origin file fail with EIO
"""

import contextlib
import functools
import inspect
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fusecache.fuse.mounts import CONNECTIONS
from fusecache.store.mountinfo import mount_at
from tests.support.daemon import Mount

_VARIABLE = "FUSECACHE_FAULTS"


class InjectedMount(Mount):
    """A mount whose daemon has these faults."""

    def __init__(self, base: Path, size: str = "64M", **options: str) -> None:
        super().__init__(base, size, **options)
        self.faults = base / "faults"
        self.faults.mkdir(exist_ok=True)

    def run(self, *args: object, **kwargs: Any) -> subprocess.CompletedProcess[str]:
        """As ``Mount.run``; a daemon that is started has the faults."""
        if args[0] != "mount":
            return super().run(*args, **kwargs)
        return subprocess.run(
            [sys.executable, "-m", "tests.support.injected", *map(str, args)],
            capture_output=True,
            text=True,
            timeout=60,
            cwd=Path(__file__).parents[2],
            env={
                **os.environ,
                "FUSECACHE_RUNTIME_DIR": str(self.runtime),
                _VARIABLE: str(self.faults),
            },
            stdin=subprocess.DEVNULL,
            check=False,
        )

    def cleanup(self) -> None:
        """As ``Mount.cleanup``, after releasing whoever waits in the kernel for an answer: a
        daemon with a thread among them could not even be killed."""
        found = mount_at(self.mountpoint)
        if found is not None:
            with contextlib.suppress(OSError):
                (CONNECTIONS / found.device.split(":")[1] / "abort").write_text("1")
        super().cleanup()

    def fault(self, kind: str, path: Path) -> Path:
        """Begins a fault of the origin file at ``path``; unlink what is returned to end it."""
        file = self.faults / f"{kind}-{path.stat().st_ino}"
        file.touch()
        return file

    def fail(self, point: str | None) -> None:
        """Makes the method ``point`` raise KeyError from now on; None ends that."""
        file = self.faults / "fail"
        if point is None:
            file.unlink(missing_ok=True)
        else:
            file.with_suffix(".new").write_text(point)
            file.with_suffix(".new").rename(file)


def _faults() -> Path:
    return Path(os.environ[_VARIABLE])


def _maybe_fail(point: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        while (_faults() / "block").read_text() == point:
            time.sleep(0.01)
    try:
        if (_faults() / "fail").read_text() == point:
            raise KeyError("injected")
    except FileNotFoundError:
        pass


def _wrap(owner: type, name: str) -> None:
    inner: Callable[..., Any] = getattr(owner, name)
    point = f"{owner.__name__}.{name}"

    @functools.wraps(inner)
    def plain(*args: Any, **kwargs: Any) -> Any:
        _maybe_fail(point)
        return inner(*args, **kwargs)

    @functools.wraps(inner)
    async def awaited(*args: Any, **kwargs: Any) -> Any:
        _maybe_fail(point)
        return await inner(*args, **kwargs)

    setattr(owner, name, awaited if inspect.iscoroutinefunction(inner) else plain)


def _inject() -> None:
    from fusecache.engine import trouble
    from fusecache.engine.block_cache import BlockCache
    from fusecache.engine.closing import Closing
    from fusecache.engine.hit_path import HitPath
    from fusecache.engine.truth import Truth
    from fusecache.errors import OriginError
    from fusecache.fuse import laned
    from fusecache.fuse.directories import Directories
    from fusecache.fuse.inodes import Inodes
    from fusecache.store.origin import OriginImage
    from fusecache.store.tree import Tree

    trouble._HANGS, trouble._QUIET = 2.0, 1.0  # seconds that no test need wait for
    for name in ("find", "names", "create", "mkdir", "mknod", "symlink", "link", "unlink", "rmdir",
                 "rename", "chmod", "readlink", "getxattr", "setxattr", "listxattr",
                 "removexattr", "statvfs", "sync_directory"):  # fmt: skip
        _wrap(Tree, name)
    for name in ("open", "close", "read_slowly", "write_slowly", "fsync", "truncate"):
        _wrap(BlockCache, name)
    _wrap(Truth, "notices")
    _wrap(Closing, "before_close")
    for name in ("try_read", "try_write"):
        _wrap(HitPath, name)
    _wrap(Inodes, "forget")
    for name in ("open", "close"):
        _wrap(Directories, name)
    laned._PAIR_BYTES = 104 << 10  # as little as the kernel gives to who is not privileged
    read = OriginImage.read

    def faulty(self: OriginImage, offset: int, length: int) -> bytes:
        inode = os.fstat(self._read_fd).st_ino
        while (_faults() / f"hang-{inode}").exists():
            time.sleep(0.01)
        if (_faults() / f"unreadable-{inode}").exists():
            raise OriginError(5, "injected")
        return read(self, offset, length)

    OriginImage.read = faulty  # type: ignore[method-assign]  # on purpose
    for name in ("read", "write", "truncate", "extend", "sync"):
        _stalling(OriginImage, name)


def _stalling(owner: type, name: str) -> None:
    inner: Callable[..., Any] = getattr(owner, name)

    @functools.wraps(inner)
    def waiting(self: Any, *args: Any, **kwargs: Any) -> Any:
        stall = _faults() / f"stall-{os.fstat(self._any()).st_ino}"
        while stall.exists():
            time.sleep(0.01)
        return inner(self, *args, **kwargs)

    setattr(owner, name, waiting)


if __name__ == "__main__":
    _inject()
    from fusecache.cli.main import main

    main()
