"""``umount``: flushes while the mount still serves, then unmounts and waits for the end."""

import os
import pwd
import select
import time
from functools import partial
from pathlib import Path
from typing import Any

import click

from fusecache.cli import completion, standing
from fusecache.cli.paths import mount_path
from fusecache.cli.progress import Progress, interruptible, kept_text
from fusecache.cli.standing import State
from fusecache.control import client, protocol
from fusecache.control.client import Daemon
from fusecache.errors import ControlError, MountError
from fusecache.store import mountinfo
from fusecache.store.mountinfo import MountPoint

_NOTICES = 3.0
"""Seconds in which a daemon sees that its client has gone."""


@click.command(epilog="Example: fusecache umount /mnt/cached")
@click.argument("mountpoint", type=Path, shell_complete=completion.all_mounts)
@click.option(
    "--keep-dirty",
    is_flag=True,
    help="Leave on the cache what is not on the origin yet; the next mount has it.",
)
@click.option("--force", is_flag=True, help="Even while files are open; they fail from then on.")
def umount(mountpoint: Path, keep_dirty: bool, force: bool) -> None:
    """Flush everything, then unmount. Refuses while files are open.

    If not everything can be brought to the origin, the mount stays and goes on serving.
    """
    path = mount_path(mountpoint)
    running, silent = client.around(path)
    here = [daemon for daemon in running if daemon.mountpoint == path]
    if here:
        # One that is mounted comes before one that only flushes on.
        _end(min(here, key=lambda daemon: not daemon.mounted), keep_dirty, force)
        return
    mounted = mountinfo.mount_at(path)
    if mounted is None:
        raise MountError(f"Nothing is mounted at {path}.")
    if silent is not None:
        raise MountError(
            f"{path} is served by process {silent.pid}, which "
            f"{client.does_not_answer(silent.pid)}. {_end_it(silent.pid, path)}"
        )
    _clear_dead_mount(mounted)
    click.echo(f"fusecache: the daemon of {path} was dead; the mount is detached", err=True)


def _end_it(pid: int | None, path: Path) -> str:
    """What to do about a daemon that does not answer."""
    return f"If it stays so, end it with kill -9 {pid}, then: fusecache umount {path}"


def _clear_dead_mount(mounted: MountPoint) -> None:
    """Detaches what is mounted if it is a fusecache's and dead.

    Raises:
        MountError: it is not, and how it can be unmounted.
    """
    path = mounted.path
    if mounted.fstype not in (mountinfo.FSTYPE, "fuse"):
        raise MountError(
            f"{path} is busy: a {mounted.fstype} filesystem is mounted there, no fusecache. "
            f"To unmount it: umount {path}"
        )
    if path in client.others_mounts():
        raise MountError(
            f"The mount at {path} is {_name_of(mounted.user)}'s: only root or that user may "
            f"unmount it, with fusecache umount {path}"
        )
    found = standing.judge(mounted)
    if found.state is State.WORKS:
        raise MountError(
            f"{path} works, but its daemon does not listen in {protocol.runtime_directory()}: set "
            "FUSECACHE_RUNTIME_DIR as it was set at the mount, or use umount "
            f"{path}, after which the daemon flushes and ends by itself."
        )
    if found.state is State.HANGS:
        raise MountError(f"{found.plight}. {_end_it(found.pid, path)}")
    if found.state is State.UNKNOWN:
        raise MountError(f"{found.plight}. If surely nobody uses it: umount -l {path}")
    standing.clear(found)


def _name_of(user: int | None) -> str:
    try:
        return f"user {pwd.getpwuid(-1 if user is None else user).pw_name}"
    except KeyError:
        return f"user {user}"


def _end(daemon: Daemon, keep_dirty: bool, force: bool) -> None:
    kept: dict[str, Any] | None = None
    with interruptible(partial(_how_it_is, daemon)), Progress() as line:

        def progress(news: dict[str, Any]) -> None:
            nonlocal kept
            kept = news.get("kept", kept)
            if "left" in news:
                line.write_back("umount", news["left"], news["of"])

        request = {"verb": "umount", "force": force, "keep_dirty": keep_dirty}
        try:
            client.ask(daemon.socket_path, request, progress=progress)
        except ControlError:
            if mountinfo.mount_at(daemon.mountpoint) is not None:
                raise  # else it was too busy ending to answer
        _wait_for_end(daemon, line)
    if kept is not None:
        click.echo(kept_text(kept))


def _how_it_is(daemon: Daemon) -> str:
    """After an interrupt: the daemon gives up what it does for a client that has gone."""
    path, deadline = daemon.mountpoint, time.monotonic() + _NOTICES
    while time.monotonic() < deadline:
        try:
            state = client.ask(daemon.socket_path, {"verb": "who"}, timeout=_NOTICES)["state"]
        except ControlError:
            break  # it has ended, or is about to
        if state == "serving":
            return (
                f"{path} stays mounted and serves; what is not on the origin yet stays on the "
                "cache."
            )
        if state == "flushing":
            return f"{path} is unmounted; its daemon goes on to bring the rest to the origin."
        time.sleep(0.05)
    if mountinfo.mount_at(path) is None:
        return f"{path} is unmounted."
    return f"whether {path} stays mounted says: fusecache status"


def _wait_for_end(daemon: Daemon, line: Progress) -> None:
    """Returns when the daemon has closed its cache and ended."""
    try:
        watched = os.pidfd_open(daemon.pid)
    except ProcessLookupError:
        return
    try:
        line.show("umount: closing the cache")
        select.select([watched], [], [])
    finally:
        os.close(watched)
