"""Paths as they are given on the command line, made absolute without touching a mount that does not
answer."""

import os
from pathlib import Path

from fusecache.errors import MountError
from fusecache.fuse import mounts
from fusecache.fuse.mounts import Answer
from fusecache.store import mountinfo
from fusecache.store.links import MOST_LINKS


def absolute(path: Path) -> Path:
    """The path without symbolic links or dots, whether it exists or not.

    Raises:
        MountError: it lies on a fusecache mount that does not answer, and would hang who looks.
    """
    whole = str(path) if path.is_absolute() else os.path.join(os.getcwd(), path)
    answering: set[str] = set()
    while True:
        place, left = mountinfo.follow(whole, answering)
        if left is None:
            return Path(place)
        if mounts.ask(Path(place)) is not Answer.WORKS:
            raise MountError(
                f"{path} lies on the fusecache mount {place}, which does not answer: fusecache "
                "doctor says why."
            )
        answering.add(place)


def mount_path(path: Path) -> Path:
    """As ``absolute``, for a mount point: nothing mounted there is touched, it may be wedged."""
    plain = os.path.abspath(path)
    for _ in range(MOST_LINKS):
        parent, name = os.path.split(plain)
        resolved = absolute(Path(parent)) / name
        if mountinfo.mount_at(resolved) is not None or not resolved.is_symlink():
            return resolved
        plain = os.path.join(resolved.parent, os.readlink(resolved))
        plain = os.path.normpath(plain)
    return Path(plain)
