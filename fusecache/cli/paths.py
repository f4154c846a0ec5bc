"""Paths as they are given on the command line, made absolute without touching a mount."""

import os
from pathlib import Path

from fusecache.fuse import mounts

_MOST_LINKS = 40


def absolute(path: Path) -> Path:
    """The path without symbolic links or dots, whether it exists or not."""
    return Path(os.path.realpath(path))


def mount_path(path: Path) -> Path:
    """As ``absolute``, for a mount point: nothing mounted there is touched, it may be wedged."""
    plain = os.path.abspath(path)
    for _ in range(_MOST_LINKS):
        parent, name = os.path.split(plain)
        resolved = Path(os.path.realpath(parent), name)
        if mounts.mount_at(resolved) is not None or not resolved.is_symlink():
            return resolved
        plain = os.path.join(resolved.parent, os.readlink(resolved))
        plain = os.path.normpath(plain)
    return Path(plain)
