"""What is mounted where, as the kernel says in mountinfo; see proc(5).

Nothing here touches what is mounted: it may hang.
"""

import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from fusecache.store.links import followed

SUBTYPE = "fusecache"
FSTYPE = f"fuse.{SUBTYPE}"


@dataclass(frozen=True, slots=True)
class MountPoint:
    """One line of mountinfo."""

    path: Path
    device: str
    """major:minor; the minor is the FUSE connection's number"""
    fstype: str
    root: Path
    """Which directory of the filesystem is mounted there."""
    user: int | None
    """Who mounted a FUSE filesystem; None for all others."""


def entries(process: int | str = "self") -> Iterator[MountPoint]:
    """All mounts that a process sees, later ones above earlier ones.

    Raises:
        OSError: there is no such process, or it is not ours to ask.
    """
    for line in Path(f"/proc/{process}/mountinfo").read_bytes().splitlines():
        fields = line.split(b" ")
        dash = fields.index(b"-")
        yield MountPoint(
            name(fields[4]),
            fields[2].decode(),
            fields[dash + 1].decode(),
            name(fields[3]),
            _user(fields[dash + 3]),
        )


def name(field: bytes) -> Path:
    """Names have octal escapes."""
    return Path(os.fsdecode(field.decode("unicode_escape").encode("latin-1")))


def _user(options: bytes) -> int | None:
    for option in options.split(b","):
        key, _, value = option.partition(b"=")
        if key == b"user_id":
            return int(value)
    return None


def mount_at(path: Path, process: int | str = "self") -> MountPoint | None:
    """The topmost mount exactly at ``path``."""
    found = None
    for entry in entries(process):
        if entry.path == path:
            found = entry
    return found


def of_device(number: int) -> list[MountPoint]:
    """Every mount of a filesystem, by its device number."""
    wanted = f"{os.major(number)}:{os.minor(number)}"
    return [entry for entry in entries() if entry.device == wanted]


def around(path: Path) -> MountPoint:
    """The mount that an absolute path without links lies on."""
    found = MountPoint(Path("/"), "", "", Path("/"), None)
    for entry in entries():
        deeper = len(entry.path.parts) >= len(found.path.parts)
        if deeper and (entry.path == path or entry.path in path.parents):
            found = entry
    return found


def ours() -> list[MountPoint]:
    """Every mount of a fusecache, also those of other users."""
    return [entry for entry in entries() if entry.fstype == FSTYPE]


def location(path: Path) -> tuple[str, Path]:
    """The filesystem (major:minor) of an absolute path without links, and where in it the path
    is: the same for two paths that bind mounts make one."""
    found, length = ("", path), -1
    for entry in entries():
        top = entry.path
        if len(top.parts) >= length and (top == path or top in path.parents):
            found = (entry.device, entry.root / path.relative_to(top))
            length = len(top.parts)
    return found


def follow(path: str, past: Collection[str] = ()) -> tuple[str, str | None]:
    """An absolute path without links or dots, as far as the first fusecache mount on its way.

    Args:
        past: mount points that are known to answer; it goes on below them.

    Returns:
        The path, and None; or a mount point, and what is left of the path below it (``""`` for the
        mount point itself), which nobody has looked at.
    """
    stops = {str(entry.path) for entry in ours()} - set(past)
    found = followed(path, stops)
    for stop in sorted(stops):  # an outer one first
        if Path(found).is_relative_to(stop):
            left = os.path.relpath(found, stop)
            return stop, "" if left == "." else left
    return found, None
