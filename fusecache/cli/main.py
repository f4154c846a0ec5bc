"""``fusecache``: the group of all verbs, and what an error looks like.

Exit codes: 0 done, 1 failed (why, on standard error), 2 wrong usage.
"""

import os
import sys

import click

from fusecache import __version__
from fusecache.cli.configure import config, log_level, reload
from fusecache.cli.doctor import doctor
from fusecache.cli.format import format_cache
from fusecache.cli.images import evict, flush, set_image
from fusecache.cli.inspect import check, dump, repair
from fusecache.cli.libvirt_hook import libvirt_hook
from fusecache.cli.mount import mount
from fusecache.cli.mount_helper import mount_helper
from fusecache.cli.status import status
from fusecache.cli.top import top
from fusecache.cli.umount import umount
from fusecache.cli.units import install_units
from fusecache.errors import FusecacheError, UsageError
from fusecache.observe.logs import is_journal


@click.group(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Example: fusecache mount /srv/images /mnt/cached --cache /dev/sdb",
    invoke_without_command=True,
)
@click.version_option(__version__, prog_name="fusecache")
@click.pass_context
def cli(context: click.Context) -> None:
    """Serve VM images from shared storage through an SSD cache in this host."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


for _verb in (mount, umount, evict, flush, set_image, status, format_cache, check, dump, repair):
    cli.add_command(_verb)
cli.add_command(top)
for _verb in (config, reload, log_level, install_units, mount_helper, libvirt_hook, doctor):
    cli.add_command(_verb)


def main() -> None:
    """The entry point: every error becomes one line on standard error."""
    try:
        code = cli.main(prog_name="fusecache", standalone_mode=False)
        sys.stdout.flush()
    except FusecacheError as exc:
        _fail(str(exc), 2 if isinstance(exc, UsageError) else 1)
    except click.UsageError as exc:
        command = exc.ctx.command_path if exc.ctx is not None else "fusecache"
        _fail(f"{exc.format_message()} See: {command} --help", 2)
    except click.ClickException as exc:
        _fail(exc.format_message(), 1)
    except (click.Abort, KeyboardInterrupt):
        _fail("interrupted", 1)
    except BrokenPipeError:
        # The reader of our output went away, as head(1) does.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as exc:
        _fail(f"{exc.strerror}: {exc.filename}" if exc.filename else str(exc), 1)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(sentence: str, code: int) -> None:
    # Names need not be UTF-8; they must not turn an error into a traceback.
    start = "<3>" if is_journal(sys.stderr) else "fusecache: "
    sys.stderr.buffer.write(f"{start}{sentence}\n".encode("utf-8", "backslashreplace"))
    sys.stderr.flush()
    sys.exit(code)
