"""``status``: what every mount has cached, and how it does."""

import json
from pathlib import Path
from typing import Any

import click

from fusecache.cli import completion
from fusecache.cli.images import mount_option
from fusecache.cli.paths import mount_path
from fusecache.control import client, protocol
from fusecache.control.client import Daemon


@click.command(epilog="Example: fusecache status --json")
@click.argument("images", nargs=-1, metavar="[IMAGE...]", shell_complete=completion.images)
@click.option("--json", "as_json", is_flag=True, help="Everything, for programs.")
@mount_option
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
        readable(client.ask(daemon.socket_path, {"verb": "status", "images": paths}, timeout=30))
        for daemon, paths in wanted.items()
    ]
    if as_json:
        click.echo(json.dumps({"mounts": mounts}, indent=2))
    elif not mounts:
        click.echo("No fusecache daemon is running. Start one with: fusecache mount")
    else:
        from rich.console import Console  # takes its time to load

        from fusecache.observe import report

        console = Console(highlight=False)
        report.show({"mounts": mounts}, console, details=bool(images))


def readable(mount: dict[str, Any]) -> dict[str, Any]:
    """Names that are not UTF-8 percent-escaped, with a flag beside each: ``path_escaped``."""
    for part in (mount, mount["cache"], *mount["images"]):
        for key, value in list(part.items()):
            if isinstance(value, str):
                part[key], escaped = protocol.readable(value)
                if escaped:
                    part[f"{key}_escaped"] = True
    return mount
