"""Mount points as the kernel sees them: found in mountinfo, unmounted, cleared of the dead.

Nothing here touches a mounted tree from this process: it may be wedged.
"""

import contextlib
import errno
import logging
import os
import stat
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fusecache.errors import MountError
from fusecache.store import probe, syscalls

log = logging.getLogger(__name__)

CONNECTIONS = Path("/sys/fs/fuse/connections")
SUBTYPE = "fusecache"


@dataclass(frozen=True, slots=True)
class MountPoint:
    """One line of mountinfo."""

    path: Path
    device: str
    """major:minor; the minor is the FUSE connection's number"""
    fstype: str


def _mountinfo() -> Iterator[list[bytes]]:
    """The fields of every line, see proc(5); names have octal escapes."""
    for line in Path("/proc/self/mountinfo").read_bytes().splitlines():
        yield line.split(b" ")


def _name(field: bytes) -> Path:
    return Path(os.fsdecode(field.decode("unicode_escape").encode("latin-1")))


def mount_at(path: Path) -> MountPoint | None:
    """The topmost mount exactly at ``path``, by mountinfo."""
    found = None
    for fields in _mountinfo():
        if _name(fields[4]) == path:
            fstype = fields[fields.index(b"-") + 1].decode()
            found = MountPoint(path, fields[2].decode(), fstype)
    return found


def around(path: Path) -> MountPoint:
    """The mount that an absolute path without links lies on, by mountinfo; nothing is touched."""
    found = MountPoint(Path("/"), "", "")
    for fields in _mountinfo():
        top = _name(fields[4])
        if len(top.parts) >= len(found.path.parts) and (top == path or top in path.parents):
            found = MountPoint(top, fields[2].decode(), fields[fields.index(b"-") + 1].decode())
    return found


def points_of(fstype: str) -> list[Path]:
    """Where filesystems of a type are mounted, by mountinfo."""
    return [
        _name(fields[4])
        for fields in _mountinfo()
        if fields[fields.index(b"-") + 1] == fstype.encode()
    ]


def points_of_fstab() -> list[Path]:
    """Where /etc/fstab wants something mounted at boot below the root, see fstab(5)."""
    points = []
    with contextlib.suppress(OSError):
        for line in Path("/etc/fstab").read_bytes().splitlines():
            fields = line.split()
            if len(fields) < 4 or fields[0].startswith(b"#"):
                continue
            with contextlib.suppress(ValueError):  # an escape that is none
                point = _name(fields[1])
                if len(point.parts) > 1 and b"noauto" not in fields[3].split(b","):
                    points.append(point)
    return points


def location(path: Path) -> tuple[str, Path]:
    """The filesystem (major:minor) of an absolute path without links, and where in it the path
    is: the same for two paths that bind mounts make one. By mountinfo alone."""
    found, length = ("", path), -1
    for fields in _mountinfo():
        top = _name(fields[4])
        if len(top.parts) >= length and (top == path or top in path.parents):
            found = (fields[2].decode(), _name(fields[3]) / path.relative_to(top))
            length = len(top.parts)
    return found


def check_device() -> None:
    """Raises MountError if this process cannot use ``/dev/fuse``."""
    device = Path("/dev/fuse")
    try:
        if not stat.S_ISCHR(device.stat().st_mode):
            raise MountError("/dev/fuse is not a device: load the kernel module with modprobe fuse")
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except PermissionError as exc:
        raise MountError(
            "/dev/fuse may not be opened: ask for read and write access to it (in a container, "
            "pass the device in)."
        ) from exc
    except OSError as exc:
        raise MountError(
            "/dev/fuse is missing: load the kernel module with modprobe fuse (in a container, "
            "pass the device in)."
        ) from exc


def clear_dead_mount(path: Path) -> None:
    """Detaches a fusecache mount whose daemon is gone and that no known daemon answers for.

    A connection that is wedged (its daemon killed, but held by the kernel) is aborted first, so
    that whoever waits for it is released.

    Raises:
        MountError: something else is mounted there, it is alive, or it cannot be detached.
    """
    mounted = mount_at(path)
    if mounted is None:
        return
    if mounted.fstype not in (f"fuse.{SUBTYPE}", "fuse"):
        raise MountError(
            f"{path} is busy: a {mounted.fstype} filesystem is mounted there. "
            "Unmount it or choose another mount point."
        )
    if answers(path):
        raise MountError(
            f"{path} is busy: a FUSE filesystem is mounted there and works. "
            f"Unmount it with umount {path}, or choose another mount point."
        )
    with contextlib.suppress(OSError):
        (CONNECTIONS / mounted.device.split(":")[1] / "abort").write_text("1")
    unmount(path, detach=True)
    log.info("detached the dead mount at %s", path)


def answers(path: Path) -> bool:
    """Whether a stat of the mount succeeds soon; asked by a process that may be left behind."""
    try:
        return "error" not in probe.ask("alive", str(path))
    except probe.NoAnswer:
        return False


def unmount(path: Path, *, detach: bool) -> None:
    """Unmounts; ``detach`` takes it out of the tree even while it is busy.

    Raises:
        MountError: busy, or not permitted.
    """
    if os.geteuid() == 0:
        try:
            syscalls.umount(os.fsencode(path), detach=detach)
        except OSError as exc:
            if exc.errno == errno.EINVAL:
                return  # not mounted any more
            reason = "it is in use" if exc.errno == errno.EBUSY else str(exc.strerror)
            raise MountError(f"{path} cannot be unmounted: {reason}.") from exc
        return
    command = ["fusermount3", "-u", *(["-z"] if detach else []), "--", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise MountError(f"{path} cannot be unmounted: {done.stderr.strip()}")
