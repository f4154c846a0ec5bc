"""Mounting without libfuse: the kernel's own descriptor of a mount, for the lane."""

import os
import socket
import stat
import subprocess
from collections.abc import Iterable
from pathlib import Path

from fusecache.errors import MountError
from fusecache.store import syscalls
from fusecache.store.mountinfo import SUBTYPE

_FLAGS = {
    "ro": (syscalls.MS_RDONLY, True),
    "rw": (syscalls.MS_RDONLY, False),
    "suid": (syscalls.MS_NOSUID, False),
    "nosuid": (syscalls.MS_NOSUID, True),
    "dev": (syscalls.MS_NODEV, False),
    "nodev": (syscalls.MS_NODEV, True),
    "exec": (syscalls.MS_NOEXEC, False),
    "noexec": (syscalls.MS_NOEXEC, True),
    "sync": (syscalls.MS_SYNCHRONOUS, True),
    "async": (syscalls.MS_SYNCHRONOUS, False),
    "dirsync": (syscalls.MS_DIRSYNC, True),
    "atime": (syscalls.MS_NOATIME, False),
    "noatime": (syscalls.MS_NOATIME, True),
    "nodiratime": (syscalls.MS_NODIRATIME, True),
}
_KERNEL = ("default_permissions", "allow_other", "max_read=")
_NAMES = ("fsname=", "subtype=")


def unknown(options: Iterable[str]) -> list[str]:
    """Options that only libfuse has an answer to."""
    return [
        option
        for option in options
        if option not in _FLAGS and not option.startswith((*_KERNEL, *_NAMES))
    ]


def mount(mountpoint: Path, options: Iterable[str]) -> int:
    """Mounts and returns the descriptor of ``/dev/fuse`` that requests come from.

    Raises:
        MountError: it cannot be mounted.
    """
    if os.geteuid() != 0:
        return _by_fusermount(mountpoint, options)
    try:
        return _directly(mountpoint, list(options))
    except OSError as exc:
        raise MountError(f"Mounting at {mountpoint} failed: {exc.strerror}.") from exc


def _directly(mountpoint: Path, options: list[str]) -> int:
    flags = syscalls.MS_NOSUID | syscalls.MS_NODEV
    data, source = [], SUBTYPE
    for option in options:
        if option in _FLAGS:
            flag, on = _FLAGS[option]
            flags = flags | flag if on else flags & ~flag
        elif option.startswith("fsname="):
            source = option.removeprefix("fsname=")
        elif option.startswith(_KERNEL):
            data.append(option)
    kind = stat.S_IFMT(mountpoint.stat().st_mode)
    fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    try:
        words = [f"fd={fd},rootmode={kind:o},user_id={os.getuid()},group_id={os.getgid()}", *data]
        syscalls.mount(
            os.fsencode(source),
            os.fsencode(mountpoint),
            f"fuse.{SUBTYPE}".encode(),
            flags,
            os.fsencode(",".join(words)),
        )
    except BaseException:
        os.close(fd)
        raise
    return fd


def _by_fusermount(mountpoint: Path, options: Iterable[str]) -> int:
    """fusermount3 mounts and sends the descriptor; its own words go to standard error."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        command = ["fusermount3", "-o", ",".join(options), "--", str(mountpoint)]
        environment = {**os.environ, "_FUSE_COMMFD": str(theirs.fileno())}
        try:
            done = subprocess.run(
                command, env=environment, pass_fds=(theirs.fileno(),), check=False
            )
        except OSError as exc:
            raise MountError(
                f"fusermount3 cannot be started ({exc.strerror}): install the package fuse3."
            ) from exc
        theirs.close()
        if done.returncode == 0:
            _, descriptors, _, _ = socket.recv_fds(ours, 1, 1)
            if descriptors:
                os.set_inheritable(descriptors[0], False)
                return descriptors[0]
    hint = ""
    if "allow_other" in options:
        hint = " For allow_other, /etc/fuse.conf needs the line user_allow_other."
    raise MountError(
        f"Mounting at {mountpoint} failed; see the line of fusermount3 above for the reason.{hint}"
    )
