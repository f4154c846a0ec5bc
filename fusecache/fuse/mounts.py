"""Mounts of FUSE: asked whether they answer, ended, and taken out of the tree.

Nothing here touches a mounted tree from this process: it may be wedged.
"""

import contextlib
import enum
import errno
import os
import stat
import subprocess
from pathlib import Path

from fusecache.errors import OF_THE_KERNEL, MountError
from fusecache.store import mountinfo, probe, processes, syscalls
from fusecache.store.mountinfo import MountPoint

CONNECTIONS = Path("/sys/fs/fuse/connections")


def points_of_fstab() -> list[Path]:
    """Where /etc/fstab wants something mounted at boot below the root, see fstab(5)."""
    points = []
    with contextlib.suppress(OSError):
        for line in Path("/etc/fstab").read_bytes().splitlines():
            fields = line.split()
            if len(fields) < 4 or fields[0].startswith(b"#"):
                continue
            with contextlib.suppress(ValueError):  # an escape that is none
                point = mountinfo.name(fields[1])
                if len(point.parts) > 1 and b"noauto" not in fields[3].split(b","):
                    points.append(point)
    return points


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


class Answer(enum.Enum):
    """What a mount says when it is asked."""

    WORKS = enum.auto()
    DISCONNECTED = enum.auto()
    """The kernel has ended the connection."""
    SILENT = enum.auto()
    """Somebody has the connection and does not answer."""
    UNKNOWN = enum.auto()
    """The mount itself could not be asked: it is hidden, or not ours to ask."""


def ask(path: Path) -> Answer:
    """Stats the mount in a process of its own, which may be left behind."""
    try:
        said = probe.ask("alive", str(path))
    except probe.NoAnswer:
        return Answer.SILENT
    number = said.get("errno")
    if "error" in said and number is None:
        return Answer.UNKNOWN  # the question could not be asked
    if number in OF_THE_KERNEL:
        return Answer.DISCONNECTED
    if number in (errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR):
        return Answer.UNKNOWN
    return Answer.WORKS  # an error, too, is an answer: of the origin


def abort(mounted: MountPoint) -> None:
    """Ends a connection, as far as we may, so that whoever waits for an answer is released."""
    with contextlib.suppress(OSError):
        (CONNECTIONS / mounted.device.split(":")[1] / "abort").write_text("1")


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
            if exc.errno == errno.EBUSY:
                raise MountError(_busy(path)) from exc
            raise MountError(f"{path} cannot be unmounted: {exc.strerror}.") from exc
        return
    command = ["fusermount3", "-u", *(["-z"] if detach else []), "--", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        if os.strerror(errno.EBUSY) in done.stderr:
            raise MountError(_busy(path))
        raise MountError(f"{path} cannot be unmounted: {done.stderr.strip()}")


def _busy(path: Path) -> str:
    users = processes.users_of(path)
    if not users:
        return f"{path} cannot be unmounted: it is in use, by whom cannot be seen."
    return (
        f"{path} cannot be unmounted: it is in use by {', '.join(users)}. End that, or use --force."
    )
