"""``mount``: checks what can be checked first, then lets the daemon serve."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import click

from fusecache.cli import completion, config_file
from fusecache.cli.checks import check_mount
from fusecache.cli.paths import absolute
from fusecache.cli.settings import PATHS, checked, plan_of
from fusecache.config import LOG_LEVELS, LaneUse, MountConfig, WriteMode


@click.command(epilog="Example: fusecache mount /srv/images /mnt/cached --cache /dev/sdb")
@click.argument("origin", type=Path, required=False, shell_complete=completion.directories)
@click.argument("mountpoint", type=Path, required=False, shell_complete=completion.directories)
@click.option(
    "--cache",
    type=Path,
    shell_complete=completion.files,
    help="The SSD: a file or block device.",
)
@click.option("--size", help="Size of a cache file to create, like 20G.")
@click.option("--block-size", help="Block size of a cache to create: 4K to 1M. [64K]")
@click.option(
    "--write-mode",
    type=click.Choice([mode.value for mode in WriteMode]),
    help="through: writes go to origin and cache; around: past the cache; back: to the cache, "
    "and to the origin later. [through]",
)
@click.option(
    "--dirty-age",
    metavar="SECONDS",
    help="In write-back, data goes to the origin once it is this old. [30]",
)
@click.option(
    "--dirty-limit",
    metavar="PERCENT",
    help="Most of the cache that may be waiting for the origin; from half of it on younger data "
    "goes there, too. [50]",
)
@click.option(
    "--clean-rate",
    metavar="SIZE",
    help="Most bytes a second to the origin by the clock, like 50M. [no limit]",
)
@click.option(
    "--readahead",
    metavar="SIZE",
    help="Most that is fetched ahead of a guest that reads in order; 0: nothing. [2M]",
)
@click.option(
    "--db", type=Path, shell_complete=completion.files, help="Where the cache's database lies."
)
@click.option(
    "--config",
    type=Path,
    shell_complete=completion.files,
    help="A TOML file with the same names, and rules for images; options given here win.",
)
@click.option(
    "--metrics",
    metavar="ADDRESS:PORT",
    help="Serve metrics for Prometheus there; with a port alone on this host only. [off]",
)
@click.option(
    "--log-level",
    type=click.Choice(LOG_LEVELS),
    help="The least that is logged. [info]",
)
@click.option(
    "--lane",
    type=click.Choice([use.value for use in LaneUse]),
    help="Serve hits by compiled code: auto: where possible; on: or fail; off. [auto]",
)
@click.option(
    "-o", "options", multiple=True, metavar="OPT,...", help="FUSE mount options, like ro."
)
@click.option("-f", "--foreground", is_flag=True, help="Stay in front; log to standard error.")
def mount(config: Path | None, foreground: bool, **given: Any) -> None:
    """Show the images below ORIGIN at MOUNTPOINT and serve their blocks from the cache.

    Returns when the mount serves. A cache that is empty is formatted first. ORIGIN and MOUNTPOINT
    may also stand in the configuration file.
    """
    start(config, foreground, {name.replace("_", "-"): value for name, value in given.items()})


def start(config: Path | None, foreground: bool, given: Mapping[str, Any]) -> None:
    """Mounts as options and file say; raises FusecacheError if it does not serve."""
    whole = {
        # The daemon, which reads its file again, lives in another directory.
        name: checked(name, value, f"--{name}") if name in PATHS and value is not None else value
        for name, value in given.items()
    }
    plan_again = partial(_plan, None if config is None else absolute(config), foreground, whole)
    plan = plan_again()
    check_mount(plan)
    from fusecache.cli import daemon  # numpy and pyfuse3 take their time: only when needed

    daemon.start(plan, plan_again)


def _plan(config: Path | None, foreground: bool, given: Mapping[str, Any]) -> MountConfig:
    if config is None:
        return plan_of(given, foreground=foreground)
    found = config_file.read(config)
    found.check()
    return plan_of(
        given, foreground=foreground, config=config, file=found.values, rules=found.rules
    )
