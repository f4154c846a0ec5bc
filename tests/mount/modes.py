"""Tests that hold in write-through and in write-back alike."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from tests.support.daemon import Mount
from tests.support.place import Place

_Test = TypeVar("_Test", bound=Callable[..., None])
_LARGE = 64 << 20


def both_modes(test: _Test) -> _Test:
    """Runs a test of a shared mount in both; the origin is only compared after ``home``."""
    test.modes = ("through", "back")  # type: ignore[attr-defined]  # read by pytest_generate_tests
    return test


def home(place: Place, name: str) -> bytes:
    """What the origin has of an image, after a flush where that is needed."""
    if place.mount.options.get("write_mode") == "back":
        done = place.mount.run("flush", f"{place.name}/{name}", "-m", place.mount.mountpoint)
        assert done.returncode == 0, done.stderr
    return (place.origin / name).read_bytes()


def contents(directory: Path) -> dict[str, tuple[int, str]]:
    """Size and digest of every regular file; of large ones, which are sparse, the size only."""
    found = {}
    for above, _, names in os.walk(directory):
        for name in names:
            path = Path(above, name)
            if path.is_file() and not path.is_symlink():
                size = path.stat().st_size
                digest = "" if size > _LARGE else hashlib.sha1(path.read_bytes()).hexdigest()
                found[str(path.relative_to(directory))] = (size, digest)
    return found


def stop_and_compare(mount: Mount) -> None:
    """Unmounts; then the origin has every byte that guests saw."""
    seen = contents(mount.mountpoint)
    mount.stop()
    assert contents(mount.origin) == seen
