"""A fusecache whose origin misbehaves when a test says so: ``python -m tests.e2e.faulty``.

The directory that FUSECACHE_FAULTS names says how, from one call to the next:

``fail-write``   while it is there, writes to the origin fail with EIO
``slow-write``   holds the seconds that every write to the origin takes longer
``hang-write``   while it is there, writes to the origin do not return, and make ``reached``
``hang-sync``    while it is there, syncs of the origin do not return
``fail-read``    while it is there, reads of the cache device fail with EIO
``hang-space``, ``hang-create``, ``hang-copy``, ``hang-restore``
                 while it is there, the command waits, and has made ``reached``, before it takes
                 space for a cache, makes a database, copies one to look at, fills a mended one
"""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.support.daemon import Mount

COMMAND = [sys.executable, "-m", "tests.e2e.faulty"]
_VARIABLE = "FUSECACHE_FAULTS"


class FaultyMount(Mount):
    """A mount in write-back, with such an origin; nothing is written back by the clock."""

    def __init__(self, base: Path, size: str = "64M", **options: str) -> None:
        super().__init__(base, size, **{"write_mode": "back", "dirty_age": "3600"} | options)
        self.faults = base / "faults"
        self.faults.mkdir(exist_ok=True)

    @property
    def environment(self) -> dict[str, str]:
        """For processes that are started past ``run``."""
        return {
            **os.environ,
            "FUSECACHE_RUNTIME_DIR": str(self.runtime),
            _VARIABLE: str(self.faults),
        }

    def run(self, *args: object, **kwargs: Any) -> subprocess.CompletedProcess[str]:
        """As ``Mount.run``, with the faults."""
        return subprocess.run(
            [*COMMAND, *map(str, args)],
            capture_output=True,
            text=True,
            timeout=kwargs.get("timeout", 60),
            cwd=Path(__file__).parents[2],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            check=False,
        )

    @contextlib.contextmanager
    def fault(self, kind: str, value: str = "") -> Iterator[None]:
        """The fault exists as long as the body runs."""
        file = self.faults / kind
        file.write_text(value)
        try:
            yield
        finally:
            file.unlink(missing_ok=True)

    def cleanup(self) -> None:
        """As ``Mount.cleanup``, with no fault any more."""
        for file in self.faults.glob("*"):
            file.unlink()
        super().cleanup()


def _inject() -> None:
    from fusecache.errors import CacheDeviceError, OriginError
    from fusecache.store.cache_device import CacheDevice
    from fusecache.store.origin import OriginImage

    faults = Path(os.environ[_VARIABLE])
    write = OriginImage.write

    def faulty(self: OriginImage, *args: Any, **kwargs: Any) -> Any:
        while (faults / "hang-write").exists():
            (faults / "reached").touch()
            time.sleep(0.01)
        if (faults / "fail-write").exists():
            raise OriginError(5, "injected")
        with contextlib.suppress(FileNotFoundError):
            time.sleep(float((faults / "slow-write").read_text()))
        return write(self, *args, **kwargs)

    sync = OriginImage.sync

    def hanging(self: OriginImage, *args: Any, **kwargs: Any) -> Any:
        while (faults / "hang-sync").exists():
            time.sleep(0.01)
        return sync(self, *args, **kwargs)

    read, try_read = CacheDevice.read, CacheDevice.try_read

    def unreadable(self: CacheDevice, *args: Any) -> bytes:
        if (faults / "fail-read").exists():
            raise CacheDeviceError("reading the cache: injected")
        return read(self, *args)

    def not_cached(self: CacheDevice, *args: Any) -> bool:
        return not (faults / "fail-read").exists() and try_read(self, *args)

    _inject_waits(faults)
    CacheDevice.read = unreadable  # type: ignore[assignment,method-assign]  # on purpose
    CacheDevice.try_read = not_cached  # type: ignore[assignment,method-assign]  # on purpose
    OriginImage.write = faulty  # type: ignore[method-assign]  # on purpose
    OriginImage.sync = hanging  # type: ignore[method-assign]  # on purpose


def _inject_waits(faults: Path) -> None:
    from fusecache.store import cache_device, salvage
    from fusecache.store.block_map import BlockMap

    def waiting(owner: Any, name: str, fault: str) -> None:
        inner = getattr(owner, name)

        def wait(*args: Any, **kwargs: Any) -> Any:
            while (faults / fault).exists():
                (faults / "reached").touch()
                time.sleep(0.01)
            return inner(*args, **kwargs)

        setattr(owner, name, wait)

    waiting(cache_device, "take_space", "hang-space")
    waiting(salvage, "_copy", "hang-copy")
    waiting(BlockMap, "create", "hang-create")
    waiting(BlockMap, "restore", "hang-restore")


if __name__ == "__main__":
    _inject()
    from fusecache.cli.main import main

    main()
