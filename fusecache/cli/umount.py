"""``umount``: flushes while the mount still serves, then unmounts and waits for the end."""

import os
import select
from pathlib import Path
from typing import Any

import click

from fusecache.cli.paths import mount_path
from fusecache.cli.progress import Progress, kept_text, left_text
from fusecache.control import client
from fusecache.control.client import Daemon
from fusecache.errors import ControlError, MountError
from fusecache.fuse import mounts


@click.command(epilog="Example: fusecache umount /mnt/cached")
@click.argument("mountpoint", type=Path)
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
    running = client.daemons()
    here = [daemon for daemon in running if daemon.mountpoint == path]
    if here:
        # One that is mounted comes before one that only flushes on.
        _end(min(here, key=lambda daemon: not daemon.mounted), keep_dirty, force)
        return
    if mounts.mount_at(path) is None:
        raise MountError(f"Nothing is mounted at {path}.")
    if (pid := client.silent_holder(path, running)) is not None:
        raise MountError(
            f"{path} is served by process {pid}, which does not answer. End it with kill -9 {pid}, "
            f"then: fusecache umount {path}"
        )
    mounts.clear_dead_mount(path)
    click.echo(f"fusecache: the daemon of {path} was dead; the mount is detached", err=True)


def _end(daemon: Daemon, keep_dirty: bool, force: bool) -> None:
    kept: dict[str, Any] | None = None
    with Progress() as line:

        def progress(news: dict[str, Any]) -> None:
            nonlocal kept
            kept = news.get("kept", kept)
            if "left" in news:
                line.show(f"umount: {left_text(news['left'], news['of'])}")

        request = {"verb": "umount", "force": force, "keep_dirty": keep_dirty}
        try:
            client.ask(daemon.socket_path, request, progress=progress)
        except ControlError:
            if mounts.mount_at(daemon.mountpoint) is not None:
                raise  # else it was too busy ending to answer
        _wait_for_end(daemon, line)
    if kept is not None:
        click.echo(kept_text(kept))


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
