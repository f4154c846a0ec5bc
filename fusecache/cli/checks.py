"""What is refused before anything is touched: every sentence says what to do."""

import os
from pathlib import Path

import click

from fusecache.cli import standing
from fusecache.cli.standing import State
from fusecache.config import MountConfig
from fusecache.control import client, protocol
from fusecache.errors import MountError, UsageError
from fusecache.fuse import mounts
from fusecache.store import mountinfo

_WHY_NOT = {
    False: "ask for access to it",
    True: "if it is NFS, its server squashes root (root_squash). Export with no_root_squash, or "
    "run fusecache as the images' owner",
}
"""By whether we are root."""


def check_mount(plan: MountConfig) -> None:
    """Everything about a mount that can be refused before anything is opened.

    A dead mount at the mount point is detached, once all the rest is in order.

    Raises:
        FusecacheError: with what to do.
    """
    _check_origin(plan.origin)
    _check_nesting(plan)
    _check_cache(plan)
    _check_options(plan.options)
    mounts.check_device()
    protocol.make_runtime_directory()
    _check_mountpoint(plan.mountpoint)


def _check_origin(origin: Path) -> None:
    if not os.path.lexists(origin):
        raise MountError(f"The origin {origin} does not exist: is its storage mounted?")
    if not origin.is_dir():
        raise MountError(f"The origin {origin} is not a directory: name the images' directory.")
    if not os.access(origin, os.R_OK | os.X_OK):
        raise MountError(f"The origin {origin} may not be read: {_WHY_NOT[os.geteuid() == 0]}.")
    _check_mounted(origin)


def _check_mounted(origin: Path) -> None:
    """A directory whose storage is not mounted shows no images, which is worse than no mount."""
    for path in mounts.points_of_fstab():
        if (path == origin or path in origin.parents) and mountinfo.mount_at(path) is None:
            raise MountError(
                f"The origin {origin} is not mounted: /etc/fstab has a line for {path}. "
                f"Mount it: mount {path}"
            )


def _check_nesting(plan: MountConfig) -> None:
    if _inside(plan.mountpoint, plan.origin) or _inside(plan.origin, plan.mountpoint):
        raise MountError(
            f"Origin {plan.origin} and mount point {plan.mountpoint} lie one inside the other: "
            "choose a mount point elsewhere."
        )
    for what, path in (("cache", plan.cache), ("database", plan.database)):
        if path is None:
            continue
        if _inside(path, plan.origin):
            raise MountError(
                f"The {what} {path} lies inside the origin {plan.origin}: "
                "choose a place outside, on the SSD."
            )
        if _inside(path, plan.mountpoint):
            raise MountError(
                f"The {what} {path} lies below the mount point {plan.mountpoint}: "
                "choose another place."
            )
        check_place(what, path)


def check_place(what: str, path: Path | None) -> None:
    """Refuses a cache or database on a fusecache mount: it would lie on that one's origin.

    Raises:
        MountError: it does.
    """
    if path is None:
        return
    found = mountinfo.around(path)
    if found.fstype == mountinfo.FSTYPE:
        raise MountError(
            f"The {what} {path} lies on a fusecache mount, {found.path}, and so on the origin of "
            "that: choose a place on the SSD."
        )


def _inside(path: Path, directory: Path) -> bool:
    """Whether ``path`` is ``directory`` or below it, also by way of a bind mount."""
    if path == directory or directory in path.parents:
        return True
    return any(
        device == other and (place == root or root in place.parents)
        for device, place in _locations(path)
        for other, root in _locations(directory)
    )


def _locations(path: Path) -> tuple[tuple[str, Path], tuple[str, Path]]:
    """Where the path is, and where the directory is that a mount on it covers."""
    device, parent = mountinfo.location(path.parent)
    return mountinfo.location(path), (device, parent / path.name)


def _check_cache(plan: MountConfig) -> None:
    if plan.cache.is_dir():
        raise MountError(
            f"The cache {plan.cache} is a directory: name a file in it or a block device."
        )
    if Path("/dev") in plan.cache.parents and not os.path.lexists(plan.cache):
        raise MountError(f"The cache {plan.cache} does not exist: is the device there?")
    if plan.size is None and not os.path.lexists(plan.cache):
        raise UsageError(
            f"The cache {plan.cache} does not exist: give --size to create it as a file, "
            "like --size 20G."
        )


def _check_options(options: tuple[str, ...]) -> None:
    if "allow_other" not in options or os.geteuid() == 0:
        return
    try:
        lines = Path("/etc/fuse.conf").read_text().splitlines()
    except OSError:
        return  # fusermount3 will say
    if "user_allow_other" not in (line.strip() for line in lines):
        raise MountError(
            "The option allow_other is not permitted to a plain user: leave it out, or have root "
            "write the line user_allow_other into /etc/fuse.conf."
        )


def _check_mountpoint(path: Path) -> None:
    if mountinfo.mount_at(path) is not None:
        _free_mountpoint(path)
    if not path.exists():
        raise MountError(f"The mount point {path} does not exist: mkdir -p {path}")
    if not path.is_dir():
        raise MountError(f"The mount point {path} is not a directory: choose an empty directory.")
    if any(path.iterdir()):
        raise MountError(f"The mount point {path} is not empty: choose an empty directory.")


def _free_mountpoint(path: Path) -> None:
    """Whatever is mounted there must be a dead fusecache; it is detached."""
    running, silent = client.around(path)
    for daemon in running:
        if daemon.mountpoint == path and daemon.mounted:
            raise MountError(
                f"{path} is busy: fusecache pid {daemon.pid} serves {daemon.origin} there. "
                f"To end it: fusecache umount {path}"
            )
    if silent is not None:
        raise MountError(
            f"{path} is busy: its daemon, process {silent.pid}, "
            f"{client.does_not_answer(silent.pid)}. If it stays so, end it with kill -9 "
            f"{silent.pid}, then mount again."
        )
    _clear_dead_mount(path)
    click.echo(f"fusecache: detached the dead mount at {path}", err=True)


def _clear_dead_mount(path: Path) -> None:
    mounted = mountinfo.mount_at(path)
    if mounted is None:
        return
    if mounted.fstype not in (mountinfo.FSTYPE, "fuse"):
        raise MountError(
            f"{path} is busy: a {mounted.fstype} filesystem is mounted there. "
            "Unmount it or choose another mount point."
        )
    found = standing.judge(mounted)
    if found.state is State.WORKS:
        raise MountError(
            f"{path} is busy: a FUSE filesystem is mounted there and works. "
            f"Unmount it with umount {path}, or choose another mount point."
        )
    if found.state is State.HANGS:
        raise MountError(
            f"{found.plight}. If it stays so, end it with kill -9 {found.pid}, then mount again."
        )
    if found.state is State.UNKNOWN:
        raise MountError(
            f"{found.plight}. Choose another mount point, or if surely nobody uses that mount: "
            f"umount -l {path}"
        )
    standing.clear(found)
