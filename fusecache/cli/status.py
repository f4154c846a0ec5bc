"""``status``: what every mount has cached, and how it does."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from fusecache.cli import completion, standing
from fusecache.cli.images import mount_option
from fusecache.cli.paths import mount_path
from fusecache.cli.standing import State
from fusecache.control import client, protocol
from fusecache.control.client import Daemon, Silent
from fusecache.errors import ControlError
from fusecache.store import mountinfo


@click.command(epilog="Example: fusecache status --json")
@click.argument("images", nargs=-1, metavar="[IMAGE...]", shell_complete=completion.images)
@click.option("--json", "as_json", is_flag=True, help="Everything, for programs.")
@mount_option
def status(images: tuple[str, ...], as_json: bool, mountpoint: Path | None) -> None:
    """Show what is cached and where reads and writes were served."""
    everything = mountpoint is None and not images
    if everything:
        running, silent = client.survey()
    else:
        running, silent = client.choose(None if mountpoint is None else mount_path(mountpoint))
    wanted: dict[Daemon, list[str]] = {} if images else {daemon: [] for daemon in running}
    for name in images:
        daemon, path = client.locate(name, running, silent)
        wanted.setdefault(daemon, []).append(path)
    mounts = [
        readable(client.ask(daemon.socket_path, {"verb": "status", "images": paths}, timeout=30))
        for daemon, paths in wanted.items()
    ]
    silent = silent if everything else []
    known = {daemon.mountpoint for daemon in running} | {daemon.mountpoint for daemon in silent}
    dead = list(_dead(known)) if everything else []
    _show(mounts, silent, dead, as_json=as_json, details=bool(images))
    if silent or dead:
        plights = [daemon.plight for daemon in silent] + [_plight(path) for path in dead]
        raise ControlError(". ".join(plights) + ".")
    if everything and not mounts:
        if client.others_mounts():
            raise ControlError(client.none_running())
        if not as_json:
            click.echo(client.none_running())


def _show(
    mounts: list[dict[str, Any]],
    silent: list[Silent],
    dead: list[Path],
    *,
    as_json: bool,
    details: bool,
) -> None:
    """What the daemons said, which did not, and which mounts have none."""
    if as_json:
        said: dict[str, Any] = {"mounts": mounts}
        if silent:
            said["not_answering"] = [
                {"mountpoint": _name(daemon.mountpoint), "pid": daemon.pid} for daemon in silent
            ]
        if dead:
            said["dead"] = [{"mountpoint": _name(path)} for path in dead]
        click.echo(json.dumps(said, indent=2))
        return
    if mounts:
        from rich.console import Console  # takes its time to load

        from fusecache.observe import report

        console = Console(highlight=False)
        report.show({"mounts": mounts}, console, details=details)

    for daemon in silent:
        click.echo(f"{_name(daemon.mountpoint)}  (pid {daemon.pid}, not answering)")
    for path in dead:
        click.echo(f"{_name(path)}  (dead)")


def _dead(known: set[Path]) -> Iterator[Path]:
    """Mounts that were left by a killed daemon."""
    theirs = client.others_mounts()
    for mounted in mountinfo.ours():
        if mounted.path in known or mounted.path in theirs:
            continue
        if standing.judge(mounted).state is State.DEAD:
            yield mounted.path


def _plight(dead: Path) -> str:
    return (
        f"{_name(dead)} is dead, its daemon is gone: the same fusecache mount command as before "
        "brings it back, with all that was cached"
    )


def _name(path: Path) -> str:
    return protocol.readable(str(path))[0]


def readable(mount: dict[str, Any]) -> dict[str, Any]:
    """Names that are not UTF-8 percent-escaped, with a flag beside each: ``path_escaped``."""
    for part in (mount, mount["cache"], *mount["images"]):
        for key, value in list(part.items()):
            if isinstance(value, str):
                part[key], escaped = protocol.readable(value)
                if escaped:
                    part[f"{key}_escaped"] = True
    return mount
