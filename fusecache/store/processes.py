"""Which processes have to do with a mount, as far as /proc shows them to this user.

Links in /proc are read and never followed: what they point to may hang.
"""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fusecache.store import mountinfo

_PROC = Path("/proc")
_SHOWN = 5
_LINE = 120


@dataclass(frozen=True, slots=True)
class Holders:
    """Who has a FUSE connection open: while one has, the kernel does not end it."""

    living: tuple[int, ...]
    killed: tuple[int, ...]
    """Killed, but held by the kernel in a call that cannot be interrupted."""
    unsure: tuple[int, ...]
    """Living fusecaches of which nobody can tell which connection they have."""


def holders(device: str, noted: Callable[[int], Path | None]) -> Holders:
    """Who has the connection of a mount.

    Args:
        device: the mount's, major:minor.
        noted: the mount point that a daemon has noted. Older kernels (Debian's 6.1) do not say in
            fdinfo which connection a descriptor belongs to; there the note has to.
    """
    found: dict[str, list[int]] = {"living": [], "killed": [], "unsure": []}
    for pid in _processes():
        numbers = _connections(pid)
        if numbers is not None and (kind := _hold(pid, numbers, device, noted(pid))):
            found["killed" if killed(pid) else kind].append(pid)
    return Holders(*(tuple(found[kind]) for kind in ("living", "killed", "unsure")))


def _hold(pid: int, numbers: set[str], device: str, point: Path | None) -> str | None:
    """How a process with FUSE connections of these numbers, and which has noted this mount point,
    has the one of ``device``, should it live; None if it has not."""
    if numbers and device.split(":")[1] not in numbers:
        return None
    if point is not None:
        # A note counts more than a number. One whose mount was taken out of the tree has its
        # connection open until its last data is home, and the next mount may have its number.
        with contextlib.suppress(OSError):
            mounted = mountinfo.mount_at(point, pid)
            return "living" if mounted is not None and mounted.device == device else None
    if numbers:
        return "living"
    # Other FUSE filesystems write no note, and are no daemon of a fusecache mount.
    return "unsure" if is_fusecache(pid) else None


def killed(pid: int) -> bool:
    """Whether a process is dead, or killed and about to end."""
    with contextlib.suppress(OSError):
        fields = _fields(_PROC / str(pid) / "status")
        pending = int(fields["ShdPnd"], 16) | int(fields["SigPnd"], 16)
        return fields["State"][0] in "ZX" or bool(pending >> (signal.SIGKILL - 1) & 1)
    return True


def is_fusecache(pid: int | None) -> bool:
    """Whether a process runs this program."""
    try:
        return b"fusecache" in (_PROC / str(pid) / "cmdline").read_bytes()
    except OSError:
        return False


def shown(pid: int) -> str:
    """`` (its command line)`` for people, as much of it as a sentence can take; or nothing."""
    try:
        words = (_PROC / str(pid) / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return ""
    line = " ".join(word.decode(errors="replace") for word in words if word)
    return f" ({line[:_LINE]}{'...' * (len(line) > _LINE)})" if line else ""


def users_of(path: Path) -> list[str]:
    """What keeps a mount from being unmounted: processes that stand in it or have something of it
    open, and mounts below it; a few of them, for people."""
    users = [
        f"the mount at {entry.path}" for entry in mountinfo.entries() if path in entry.path.parents
    ]
    namespace = _link(_PROC / "self/ns/mnt")
    for pid in _processes():
        place = _PROC / str(pid)
        # In another mount namespace the same path is another mount.
        if _link(place / "ns/mnt") == namespace and (what := _use(place, path)) is not None:
            users.append(f"pid {pid}{_command(place)} ({what})")
    more = [f"{len(users) - _SHOWN} more"] if len(users) > _SHOWN else []
    return users[:_SHOWN] + more


def _use(place: Path, path: Path) -> str | None:
    for name, what in (("cwd", "its directory"), ("root", "its root"), ("exe", "its program")):
        if _below(place / name, path):
            return what
    with contextlib.suppress(OSError):
        if any(_below(fd, path) for fd in (place / "fd").iterdir()):
            return "an open file or directory"
    return None


def _below(link: Path, path: Path) -> bool:
    return Path(_link(link)).is_relative_to(path)


def _processes() -> Iterator[int]:
    with contextlib.suppress(OSError):
        for entry in sorted(_PROC.glob("[0-9]*"), key=lambda entry: int(entry.name)):
            yield int(entry.name)


def _connections(pid: int) -> set[str] | None:
    """The numbers of the FUSE connections that a process has open; empty if it has one that the
    kernel does not number, None if it has none."""
    place = _PROC / str(pid)
    numbers = _connections_in(place)
    if numbers is None and killed(pid):
        # Its first thread may have ended, while another one holds the files.
        for thread in (place / "task").glob("*"):
            numbers = _connections_in(thread) if numbers is None else numbers
    return numbers


def _connections_in(place: Path) -> set[str] | None:
    numbers: set[str] | None = None
    with contextlib.suppress(OSError):
        for fd in (place / "fd").iterdir():
            if _link(fd) == "/dev/fuse":
                number = _fields(place / "fdinfo" / fd.name).get("fuse_connection")
                numbers = (numbers or set()) | ({number} if number else set())
    return numbers


def _fields(path: Path) -> dict[str, str]:
    """``name: value`` in lines, as in /proc/PID/status."""
    lines = path.read_text(errors="replace").splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def _link(path: Path) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


def _command(place: Path) -> str:
    with contextlib.suppress(OSError):
        return " " + (place / "comm").read_text(errors="replace").strip()
    return ""
