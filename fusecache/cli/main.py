"""``fusecache``: the group of all verbs, and what an error looks like.

Exit codes: 0 done, 1 failed (why, on standard error), 2 wrong usage.
"""

import os
import sys
from importlib import import_module

import click

from fusecache import __version__
from fusecache.errors import FusecacheError, UsageError
from fusecache.observe import sentences
from fusecache.observe.logs import is_journal

_VERBS = {
    "mount": "mount:mount",
    "umount": "umount:umount",
    "evict": "images:evict",
    "flush": "images:flush",
    "set": "images:set_image",
    "status": "status:status",
    "top": "top:top",
    "format": "format:format_cache",
    "check": "inspect:check",
    "dump": "inspect:dump",
    "repair": "inspect:repair",
    "config": "configure:config",
    "reload": "configure:reload",
    "log-level": "configure:log_level",
    "install-units": "units:install_units",
    "doctor": "doctor:doctor",
    "mount-helper": "mount_helper:mount_helper",
    "libvirt-hook": "libvirt_hook:libvirt_hook",
}
"""Where each verb is: module below ``fusecache.cli``, and name in it."""


class Verbs(click.Group):
    """Loads a verb when it is asked for: numpy, SQLite and rich take longer to load than most verbs
    to run, and ``status`` and ``evict`` need none or one of them (0.3 s all, 0.1 s without)."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All of them, in the order in which help shows them."""
        return list(_VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """None if there is no such verb."""
        if cmd_name not in _VERBS:
            return None
        module, _, name = _VERBS[cmd_name].partition(":")
        command: click.Command = getattr(import_module(f"fusecache.cli.{module}"), name)
        return command


@click.group(
    cls=Verbs,
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


def main() -> None:
    """The entry point: every error becomes one line on standard error."""
    try:
        code = cli.main(prog_name="fusecache", standalone_mode=False)
        sys.stdout.flush()
    except FusecacheError as exc:
        _fail(str(exc), 2 if isinstance(exc, UsageError) else 1)
    except click.UsageError as exc:
        command = exc.ctx.command_path if exc.ctx is not None else "fusecache"
        said = " ".join(exc.format_message().split())  # some have lines
        _fail(f"{said}{_dashed(exc)} See: {command} --help", 2)
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


def _dashed(exc: click.UsageError) -> str:
    """What to do if what was taken for options is an image whose name begins with a dash."""
    if not isinstance(exc, click.NoSuchOption) or exc.ctx is None:
        return ""
    if all(param.name != "images" for param in exc.ctx.command.params):
        return ""
    begun = exc.option_name
    word = next((word for word in sys.argv if word.startswith(begun) and word != begun), "")
    return "" if word.startswith("--") or not word else f" An image of that name is ./{word}."


def _fail(sentence: str, code: int) -> None:
    start = "<3>" if is_journal(sys.stderr) else "fusecache: "
    sys.stderr.buffer.write(sentences.line(f"{start}{sentence}"))
    sys.stderr.flush()
    sys.exit(code)
