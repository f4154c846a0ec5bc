"""``status``: what every mount has cached, and how it does."""

import json
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
    _show(mounts, silent, as_json=as_json, details=bool(images))
    if everything and not as_json:
        _show_dead({d.mountpoint for d in running} | {d.mountpoint for d in silent})
    if silent:
        raise ControlError(". ".join(daemon.plight for daemon in silent) + ".")
    if everything and not mounts:
        if client.others_mounts():
            raise ControlError(client.none_running())
        if not as_json:
            click.echo(client.none_running())


def _show(
    mounts: list[dict[str, Any]], silent: list[Silent], *, as_json: bool, details: bool
) -> None:
    """What the daemons said, and which did not."""
    if as_json:
        more = [
            {"mountpoint": protocol.readable(str(daemon.mountpoint))[0], "pid": daemon.pid}
            for daemon in silent
        ]
        said: dict[str, Any] = {"mounts": mounts}
        click.echo(json.dumps(said | ({"not_answering": more} if more else {}), indent=2))
        return
    if mounts:
        from rich.console import Console  # takes its time to load

        from fusecache.observe import report

        console = Console(highlight=False)
        report.show({"mounts": mounts}, console, details=details)

    for daemon in silent:
        name = protocol.readable(str(daemon.mountpoint))[0]
        click.echo(f"{name}  (pid {daemon.pid}, not answering)")


def _show_dead(known: set[Path]) -> None:
    """Mounts that were left by a killed daemon, and how to bring them back."""
    theirs = client.others_mounts()
    for mounted in mountinfo.ours():
        if mounted.path in known or mounted.path in theirs:
            continue
        if standing.judge(mounted).state is State.DEAD:
            click.echo(
                f"{protocol.readable(str(mounted.path))[0]}  (dead: its daemon is gone). The same "
                "fusecache mount command as before brings it back, with all that was cached."
            )


def readable(mount: dict[str, Any]) -> dict[str, Any]:
    """Names that are not UTF-8 percent-escaped, with a flag beside each: ``path_escaped``."""
    for part in (mount, mount["cache"], *mount["images"]):
        for key, value in list(part.items()):
            if isinstance(value, str):
                part[key], escaped = protocol.readable(value)
                if escaped:
                    part[f"{key}_escaped"] = True
    return mount
