"""Direct reads and writes: O_DIRECT wants aligned buffers, and anonymous mappings are aligned."""

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def opened(path: Path | bytes, flags: int, mode: int = 0o600) -> Iterator[int]:
    """A descriptor that is closed at the end, whatever happens."""
    fd = os.open(path, flags | os.O_CLOEXEC, mode)
    try:
        yield fd
    finally:
        os.close(fd)


def read_direct(fd: int, offset: int, length: int) -> bytes:
    """One ``preadv`` into an aligned buffer."""
    with mmap.mmap(-1, length) as buffer:
        got = os.preadv(fd, [buffer], offset)
        return bytes(buffer[:got])


def write_direct(fd: int, offset: int, data: bytes) -> int:
    """One ``pwritev`` from an aligned buffer."""
    with mmap.mmap(-1, len(data)) as buffer:
        buffer[:] = data
        return os.pwritev(fd, [buffer], offset)
