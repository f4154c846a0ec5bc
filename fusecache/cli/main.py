"""``fusecache``: the group of all verbs, and what an error looks like.

Exit codes: 0 done, 1 failed (why, on standard error), 2 wrong usage.
"""

import os
import sys

import click

from fusecache import __version__
from fusecache.cli.cache import format_cache
from fusecache.cli.images import evict, flush, status
from fusecache.cli.mount import mount, umount
from fusecache.errors import FusecacheError, UsageError


@click.group(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Example: fusecache mount /srv/images /mnt/cached --cache /dev/sdb",
)
@click.version_option(__version__, prog_name="fusecache")
def cli() -> None:
    """Serve VM images from shared storage through an SSD cache in this host."""


for _verb in (mount, umount, evict, flush, status, format_cache):
    cli.add_command(_verb)


def main() -> None:
    """The entry point: domain errors become one line on standard error."""
    try:
        cli.main(prog_name="fusecache", standalone_mode=True)
    except FusecacheError as exc:
        click.echo(f"fusecache: {exc}", err=True)
        sys.exit(2 if isinstance(exc, UsageError) else 1)
    except BrokenPipeError:
        # The reader of our output went away, as head(1) does.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
