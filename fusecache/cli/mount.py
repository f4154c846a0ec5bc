"""``mount`` and ``umount``: checks what can be checked first, then lets the daemon serve."""

import os
import select
import tomllib
from pathlib import Path
from typing import Any

import click

from fusecache.cli.checks import check_mount
from fusecache.cli.paths import absolute, mount_path
from fusecache.config import MountConfig, WriteMode, check_block_size, parse_size
from fusecache.control import client
from fusecache.errors import ControlError, MountError, UsageError
from fusecache.fuse import mounts

_CONFIG_KEYS = {"size", "block-size", "write-mode", "db", "options", "cache"}


@click.command(epilog="Example: fusecache mount /srv/images /mnt/cached --cache /dev/sdb")
@click.argument("origin", type=Path)
@click.argument("mountpoint", type=Path)
@click.option("--cache", type=Path, help="The SSD: a file or block device.")
@click.option("--size", help="Size of a cache file to create, like 20G.")
@click.option("--block-size", help="Block size of a cache to create: 4K to 1M. [64K]")
@click.option(
    "--write-mode",
    type=click.Choice([mode.value for mode in WriteMode]),
    help="through: writes go to origin and cache; around: past the cache. [through]",
)
@click.option("--db", type=Path, help="Where the cache's database lies.")
@click.option(
    "--config",
    type=Path,
    help="A TOML file with the same names; options given here win.",
)
@click.option(
    "-o", "options", multiple=True, metavar="OPT,...", help="FUSE mount options, like ro."
)
@click.option("-f", "--foreground", is_flag=True, help="Stay in front; log to standard error.")
def mount(
    origin: Path,
    mountpoint: Path,
    config: Path | None,
    foreground: bool,
    **given: Any,
) -> None:
    """Show the images below ORIGIN at MOUNTPOINT and serve their blocks from the cache.

    Returns when the mount serves. A cache that is empty is formatted first.
    """
    chosen = _settings(given, config)
    where = mount_path(mountpoint)
    plan = MountConfig(
        origin=absolute(origin),
        mountpoint=where,
        cache=absolute(chosen["cache"]),
        size=None if chosen["size"] is None else parse_size(chosen["size"]),
        block_size=(
            None
            if chosen["block-size"] is None
            else check_block_size(parse_size(chosen["block-size"]))
        ),
        write_mode=WriteMode(chosen["write-mode"] or WriteMode.THROUGH),
        database=None if chosen["db"] is None else absolute(chosen["db"]),
        options=tuple(opt for group in chosen["options"] for opt in group.split(",") if opt),
        foreground=foreground,
    )
    check_mount(plan)
    from fusecache.cli import daemon  # numpy and pyfuse3 take their time: only when needed

    daemon.start(plan)


def _settings(given: dict[str, Any], config: Path | None) -> dict[str, Any]:
    """Command line over configuration file."""
    chosen = {name.replace("_", "-"): value for name, value in given.items()}
    read = {} if config is None else _read_config(config)
    for name, value in read.items():
        if chosen.get(name) in (None, ()):
            chosen[name] = value
    if chosen["cache"] is None:
        raise UsageError("Say where the cache is: --cache PATH (a file or block device).")
    return chosen


def _read_config(path: Path) -> dict[str, Any]:
    try:
        read = tomllib.loads(path.read_text())
    except OSError as exc:
        raise UsageError(f"Cannot read {path}: {exc.strerror}.") from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise UsageError(f"{path} is not TOML: {exc}.") from exc
    for name, value in read.items():
        if name not in _CONFIG_KEYS:
            known = ", ".join(sorted(_CONFIG_KEYS))
            raise UsageError(f"{path}: there is no setting '{name}'; there are: {known}.")
        if name == "options" and isinstance(value, str):
            read[name] = [value]
        elif name != "options" and not isinstance(value, str):
            raise UsageError(f"{path}: '{name}' must be a string, like \"64K\".")
        elif name == "options" and not all(isinstance(option, str) for option in value):
            raise UsageError(f"{path}: 'options' must be a list of strings.")
        if name == "write-mode" and value not in set(WriteMode):
            raise UsageError(f"{path}: 'write-mode' must be one of: {', '.join(WriteMode)}.")
    return read


@click.command(epilog="Example: fusecache umount /mnt/cached")
@click.argument("mountpoint", type=Path)
@click.option("--force", is_flag=True, help="Even while files are open; they fail from then on.")
def umount(mountpoint: Path, force: bool) -> None:
    """Flush everything, then unmount. Refuses while files are open."""
    path = mount_path(mountpoint)
    for daemon in client.daemons():
        if daemon.mountpoint == path:
            try:
                client.ask(daemon.socket_path, {"verb": "umount", "force": force})
            except ControlError:
                if mounts.mount_at(path) is not None:
                    raise  # else it was too busy ending to answer
            _wait_for_end(daemon.pid)
            return
    if mounts.mount_at(path) is None:
        raise MountError(f"Nothing is mounted at {path}.")
    if (pid := client.silent_holder(path)) is not None:
        raise MountError(
            f"{path} is served by process {pid}, which does not answer. End it with kill -9 {pid}, "
            f"then: fusecache umount {path}"
        )
    mounts.clear_dead_mount(path)
    click.echo(f"fusecache: the daemon of {path} was dead; the mount is detached", err=True)


def _wait_for_end(pid: int) -> None:
    """Returns when the daemon has closed its cache and ended."""
    try:
        watched = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        select.select([watched], [], [])
    finally:
        os.close(watched)
