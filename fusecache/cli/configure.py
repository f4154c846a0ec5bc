"""``config``, ``reload`` and ``log-level``: what a mount is told by its operator, now or later."""

from pathlib import Path
from typing import Any

import click

from fusecache.cli import completion, config_file
from fusecache.cli.paths import absolute, mount_path
from fusecache.config import LOG_LEVELS
from fusecache.control import client
from fusecache.control.client import Daemon
from fusecache.errors import ControlError, UsageError
from fusecache.observe import sentences

_ANSWER = 30.0
"""Seconds; reading a file of which a path hangs is given up by the daemon before."""


@click.group(epilog="Example: fusecache config check /etc/fusecache/vms.toml")
def config() -> None:
    """Look at configuration files."""


@config.command(epilog="Example: fusecache config check /etc/fusecache/vms.toml")
@click.argument("file", type=Path, shell_complete=completion.files)
def check(file: Path) -> None:
    """Say everything that is wrong with FILE, or that nothing is.

    The file alone is judged: whether its paths exist is found out when it is mounted.
    """
    found = config_file.read(absolute(file))
    for sentence in found.wrong:
        click.echo(sentences.line(f"fusecache: {file}: {sentence}"), err=True, nl=False)
    if found.wrong:
        click.get_current_context().exit(1)
    lacking = config_file.missing(found)
    click.echo(f"{file} is in order" + (f"; {', '.join(lacking)}" if lacking else ""))


@click.command(epilog="Example: fusecache reload /mnt/cached")
@click.argument("mountpoint", type=Path, required=False, shell_complete=completion.running_mounts)
@click.option("--pid", type=int, help="The mount of this daemon, for service managers.")
def reload(mountpoint: Path | None, pid: int | None) -> None:
    """Apply what has changed in the configuration file of a mount, as far as that can be done
    while it runs, and say what needs a restart. A file that cannot be used changes nothing.
    """
    daemon = _one(mountpoint, pid)
    answer = client.ask(daemon.socket_path, {"verb": "reload"}, timeout=_ANSWER)
    for change in answer["applied"]:
        click.echo(change)
    for sentence in answer["refused"]:
        click.echo(sentences.line(f"fusecache: {sentence}"), err=True, nl=False)
    if not answer["applied"] and not answer["refused"]:
        click.echo("nothing has changed")


@click.command("log-level", epilog="Example: fusecache log-level debug /mnt/cached")
@click.argument("level", type=click.Choice(LOG_LEVELS))
@click.argument("mountpoint", type=Path, required=False, shell_complete=completion.running_mounts)
def log_level(level: str, mountpoint: Path | None) -> None:
    """Log more or less from now on, until the next start."""
    request: dict[str, Any] = {"verb": "log-level", "level": level}
    answer = client.ask(_one(mountpoint, None).socket_path, request, timeout=_ANSWER)
    click.echo(f"log level: {answer['before']} -> {answer['level']}")


def _one(mountpoint: Path | None, pid: int | None) -> Daemon:
    """The one daemon that is meant."""
    if mountpoint is not None and pid is not None:
        raise UsageError("Say which mount by its mount point or by --pid, not both.")
    running, silent = client.choose(None if mountpoint is None else mount_path(mountpoint))
    if pid is not None:
        running = [daemon for daemon in running if daemon.pid == pid]
        if not running:
            client.refuse([daemon for daemon in silent if daemon.pid == pid])
            raise ControlError(f"No fusecache daemon has the pid {pid}.")
    else:
        client.refuse(silent)
    if len(running) > 1:
        places = ", ".join(str(daemon.mountpoint) for daemon in running)
        raise ControlError(f"There are several mounts ({places}): name the one that is meant.")
    return running[0]
