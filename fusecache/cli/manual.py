"""The manual, fusecache(8) and a page for each verb, made from what ``--help`` says.

In the macros of man(7). The same text in both places cannot differ from one to the other.
"""

import inspect
import re
from collections.abc import Iterable, Iterator

import click

from fusecache import __version__

_SECTION = 8
_STATUS = (
    ("0", "Done."),
    ("1", "Failed; a line on standard error says why and what to do."),
    ("2", "Wrong usage."),
)
_ENVIRONMENT = (
    ("FUSECACHE_RUNTIME_DIR", "Where control sockets lie, instead of the directory below."),
    ("FUSECACHE_STATE_DIR", "Where databases of block devices lie, instead of the one below."),
    ("XDG_RUNTIME_DIR", "A plain user's control sockets lie in the directory fusecache there."),
    ("XDG_STATE_HOME", "A plain user's databases of block devices lie below it."),
    ("NO_COLOR", "If it is set, nothing is coloured. In a pipe nothing is in any case."),
)
_FILES = (
    ("/etc/fusecache/NAME.toml", "The configuration of the unit fusecache@NAME."),
    ("/run/fusecache/PID.sock", "The control socket of a daemon; root alone may use it."),
    ("/var/lib/fusecache/UUID.sqlite", "The block map of a cache that is a block device."),
    ("PATH.sqlite", "The block map of a cache that is the file PATH, beside it."),
    ("/run/fusecache/fusecache.log", "The log, if there is neither a journal nor a system log."),
)


def pages(group: click.Group, program: str = "fusecache") -> dict[str, str]:
    """Every page by its file's name, like ``fusecache-mount.8``."""
    verbs = dict(_commands(group, program))
    made = {f"{program}.{_SECTION}": _page(group, program, verbs)}
    for name, command in verbs.items():
        below = {n: c for n, c in verbs.items() if n.startswith(f"{name} ")}
        made[f"{_dashed(name)}.{_SECTION}"] = _page(command, name, below)
    return made


def _commands(group: click.Group, name: str) -> Iterator[tuple[str, click.Command]]:
    """All verbs with their whole names, also those of verbs, but not the hidden ones."""
    context = click.Context(group)
    for verb in group.list_commands(context):
        command = group.get_command(context, verb)
        if command is not None and not command.hidden:
            yield f"{name} {verb}", command
            if isinstance(command, click.Group):
                yield from _commands(command, f"{name} {verb}")


def _page(command: click.Command, name: str, below: dict[str, click.Command]) -> str:
    context = click.Context(command, info_name=name)
    program = name.split(" ", 1)[0]
    whole = name == program
    lines = [
        f'.TH "{_dashed(name).upper()}" "{_SECTION}" "" "{program} {__version__}" "{program}"',
        '.SH "NAME"',
        f"{_text(_dashed(name))} \\- {_text(_short(command))}",
        '.SH "SYNOPSIS"',
        f"\\fB{_text(name)}\\fR {_text(' '.join(command.collect_usage_pieces(context)))}",
        '.SH "DESCRIPTION"',
        *_paragraphs(command.help or ""),
    ]
    if below:
        lines += ['.SH "COMMANDS"']
        for verb, sub in below.items():
            lines += [".TP", f"\\fB{_text(verb)}\\fR", _text(_short(sub)) + "."]
    options = [p for p in command.get_params(context) if isinstance(p, click.Option)]
    records = [option.get_help_record(context) for option in options]
    lines += ['.SH "OPTIONS"', *_listed(record for record in records if record is not None)]
    if example := (command.epilog or "").removeprefix("Example: "):
        lines += ['.SH "EXAMPLE"', ".EX", _text(example), ".EE"]
    lines += ['.SH "EXIT STATUS"', *_listed(_STATUS)]
    if whole:
        lines += ['.SH "ENVIRONMENT"', *_listed(_ENVIRONMENT), '.SH "FILES"', *_listed(_FILES)]
    others = sorted(_dashed(verb) for verb in below) if whole else [program]
    seen = " ,\n".join(f".BR {_text(other)} ({_SECTION})" for other in others)
    return "\n".join([*lines, '.SH "SEE ALSO"', seen]) + "\n"


def _listed(entries: Iterable[tuple[str, str]]) -> Iterator[str]:
    for term, text in entries:
        yield from (".TP", f"\\fB{_text(term)}\\fR", _text(text))


def _paragraphs(text: str) -> Iterator[str]:
    for number, paragraph in enumerate(inspect.cleandoc(text).split("\n\n")):
        if number:
            yield ".PP"
        yield _text(" ".join(paragraph.split()))


def _short(command: click.Command) -> str:
    """The first sentence, without its full stop."""
    first = " ".join(inspect.cleandoc(command.help or "").split("\n\n")[0].split())
    return re.split(r"(?<=[a-z)])\. ", first)[0].rstrip(".")


def _dashed(name: str) -> str:
    return name.replace(" ", "-")


def _text(text: str) -> str:
    """Characters that mean something to roff, made to mean themselves."""
    text = text.replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq").replace("`", "\\(ga")
    return f"\\&{text}" if text.startswith(".") else text
