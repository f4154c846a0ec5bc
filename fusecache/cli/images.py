"""``evict``, ``flush`` and ``status``: what is asked of running daemons."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import Progress

from fusecache.cli import offline
from fusecache.cli.paths import absolute, mount_path
from fusecache.control import client, protocol
from fusecache.control.client import Daemon
from fusecache.errors import ControlError, UsageError
from fusecache.observe import report

_mount_option = click.option(
    "-m",
    "--mountpoint",
    type=Path,
    help="Which mount is meant, if several run.",
)
_cache_options = (
    click.option("--cache", type=Path, help="A cache that no daemon has open."),
    click.option("--db", type=Path, help="With --cache: its database."),
)


def _with_cache(command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(_cache_options):
        command = option(command)
    return command


@click.command(epilog="Example: fusecache evict vm2.img")
@click.argument("images", nargs=-1, metavar="IMAGE...")
@click.option("--all", "everything", is_flag=True, help="Every image of the mount.")
@_mount_option
@_with_cache
def evict(
    images: tuple[str, ...],
    everything: bool,
    mountpoint: Path | None,
    cache: Path | None,
    db: Path | None,
) -> None:
    """Flush an image and drop its blocks alone, before its VM migrates.

    An image that is open goes on uncached until it is closed.
    """
    if bool(images) == everything:
        raise UsageError("Name the images to evict, or say --all.")
    answers = _work("evict", images, mountpoint, cache, db)
    blocks = sum(answer["blocks"] for answer in answers)
    count = sum(answer["images"] for answer in answers)
    click.echo(f"evicted {count} image{'s' * (count != 1)}, {blocks} blocks")


@click.command(epilog="Example: fusecache flush vm2.img")
@click.argument("images", nargs=-1, metavar="[IMAGE...]")
@_mount_option
@_with_cache
def flush(
    images: tuple[str, ...], mountpoint: Path | None, cache: Path | None, db: Path | None
) -> None:
    """Bring everything written to the images, or to all, onto the origin's stable storage."""
    answers = _work("flush", images, mountpoint, cache, db)
    count = sum(answer["images"] for answer in answers)
    click.echo(f"flushed {count} image{'s' * (count != 1)}")


def _work(
    verb: str,
    images: tuple[str, ...],
    mountpoint: Path | None,
    cache: Path | None,
    db: Path | None,
) -> list[dict[str, Any]]:
    """By the running daemons, or on a cache that none has open."""
    if cache is None:
        if db is not None:
            raise UsageError("--db goes with --cache, for a cache that no daemon has open.")
        return _for_images(verb, images, mountpoint)
    if mountpoint is not None:
        raise UsageError(
            "Say -m for a cache that is mounted, or --cache for one that no daemon has open."
        )
    database = None if db is None else absolute(db)
    work = offline.evict if verb == "evict" else offline.flush
    return [work(absolute(cache), database, images)]


def _for_images(
    verb: str, images: tuple[str, ...], mountpoint: Path | None
) -> list[dict[str, Any]]:
    """Sends a verb to the daemons that have the images, with progress on a terminal."""
    running = client.choose(None if mountpoint is None else mount_path(mountpoint))
    work: dict[Daemon, list[str]] = {}
    for name in images:
        daemon, path = client.locate(name, running)
        work.setdefault(daemon, []).append(path)
    if not images:
        if len(running) > 1:
            places = ", ".join(str(daemon.mountpoint) for daemon in running)
            raise ControlError(f"There are several mounts ({places}): choose one with -m.")
        work = {running[0]: []}
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(verb, total=None)
        return [
            client.ask(
                daemon.socket_path,
                {"verb": verb, "images": paths},
                progress=lambda p: progress.update(task, completed=p["done"], total=p["of"]),
            )
            for daemon, paths in work.items()
        ]


@click.command(epilog="Example: fusecache status --json")
@click.argument("images", nargs=-1, metavar="[IMAGE...]")
@click.option("--json", "as_json", is_flag=True, help="Everything, for programs.")
@_mount_option
def status(images: tuple[str, ...], as_json: bool, mountpoint: Path | None) -> None:
    """Show what is cached and where reads and writes were served."""
    if mountpoint is None and not images:
        running = client.daemons()
        wanted: dict[Daemon, list[str]] = {daemon: [] for daemon in running}
    else:
        running = client.choose(None if mountpoint is None else mount_path(mountpoint))
        wanted = {} if images else {daemon: [] for daemon in running}
        for name in images:
            daemon, path = client.locate(name, running)
            wanted.setdefault(daemon, []).append(path)
    mounts = [
        _printable(client.ask(daemon.socket_path, {"verb": "status", "images": paths}, timeout=30))
        for daemon, paths in wanted.items()
    ]
    if as_json:
        click.echo(json.dumps({"mounts": mounts}, indent=2))
    elif not mounts:
        click.echo("No fusecache daemon is running. Start one with: fusecache mount")
    else:
        console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
        report.show({"mounts": mounts}, console)


def _printable(mount: dict[str, Any]) -> dict[str, Any]:
    """Names that are not UTF-8 percent-escaped, with a flag beside each: ``path_escaped``."""
    for part in (mount, mount["cache"], *mount["images"]):
        for key, value in list(part.items()):
            if isinstance(value, str):
                part[key], escaped = protocol.readable(value)
                if escaped:
                    part[f"{key}_escaped"] = True
    return mount
