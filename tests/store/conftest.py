"""Loop devices and filesystems for the tests of the storage layer, which run as root."""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


@pytest.fixture
def loop_device(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Makes block devices of a size in bytes; they are gone after the test."""
    made: list[str] = []

    def make(size: int) -> Path:
        backing = tmp_path / f"loop{len(made)}.img"
        with backing.open("wb") as file:
            file.truncate(size)
        done = subprocess.run(
            ["losetup", "-f", "--show", str(backing)], capture_output=True, text=True, check=True
        )
        made.append(done.stdout.strip())
        return Path(made[-1])

    try:
        yield make
    finally:
        for device in made:
            subprocess.run(["losetup", "-d", device], check=True)


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Callable[[Path], None]]:
    """Mounts a tmpfs on a directory until the test ends."""
    mounted: list[Path] = []

    def mount(path: Path) -> None:
        path.mkdir(exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1M", "tmpfs", path], check=True)
        mounted.append(path)

    try:
        yield mount
    finally:
        for path in reversed(mounted):
            subprocess.run(["umount", "-l", path], check=True)
