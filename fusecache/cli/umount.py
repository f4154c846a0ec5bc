"""``umount``: flushes while the mount still serves, then unmounts and waits for the end."""

import os
import select
import time
from functools import partial
from pathlib import Path
from typing import Any

import click

from fusecache.cli import completion
from fusecache.cli.paths import mount_path
from fusecache.cli.progress import Progress, interruptible, kept_text
from fusecache.control import client
from fusecache.control.client import Daemon
from fusecache.errors import ControlError, MountError
from fusecache.fuse import mounts

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
    if mounts.mount_at(path) is None:
        raise MountError(f"Nothing is mounted at {path}.")
    if silent is not None:
        raise MountError(
            f"{path} is served by process {silent}, which does not answer. If it stays so, end it "
            f"with kill -9 {silent}, "
            f"then: fusecache umount {path}"
        )
    mounts.clear_dead_mount(path)
    click.echo(f"fusecache: the daemon of {path} was dead; the mount is detached", err=True)


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
            if mounts.mount_at(daemon.mountpoint) is not None:
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
    if mounts.mount_at(path) is None:
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
