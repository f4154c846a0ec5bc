"""``mount-helper``: what ``/sbin/mount.fusecache`` runs, for mount(8) and ``/etc/fstab``.

Called as mount(8) says under "external helpers": SPEC DIR [-sfnv] [-N NAMESPACE] [-o OPTIONS]
[-t TYPE]. Options with the names of ours are ours; those for mount(8), systemd and the boot are
left to them; all others go to FUSE.
"""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from fusecache.cli import mount
from fusecache.cli.settings import SETTINGS, nearest
from fusecache.errors import FusecacheError, MountError, UsageError
from fusecache.observe import sentences

_OURS = {name: None for name in SETTINGS if name not in ("origin", "mountpoint", "options")} | {
    "config": None
}
_NOT_FOR_FUSE = {
    "auto", "comment", "defaults", "fail", "group", "loud", "_netdev", "noauto", "nofail",
    "nogroup", "noowner", "nouser", "nousers", "owner", "rw", "silent", "user", "users",
}  # fmt: skip
_OF_FUSE = {
    "attr_timeout", "context", "defcontext", "entry_timeout", "fscontext", "fsname", "gid",
    "max_read", "negative_timeout", "rootcontext", "rootmode", "subtype", "uid", "umask",
}  # fmt: skip
"""Options of the kernel and libfuse that have a value."""
_FAILED = 32
"""See mount(8): the mount failed."""
_WRONG_USAGE = 1


@click.command("mount-helper", hidden=True)
@click.argument("spec", type=Path)
@click.argument("directory", type=Path)
@click.option("-o", "options", multiple=True)
@click.option("-f", "fake", is_flag=True, help="Check the options, and do no more.")
@click.option("-s", "sloppy", is_flag=True)
@click.option("-n", "no_mtab", is_flag=True)
@click.option("-v", "verbose", is_flag=True)
@click.option("-t", "fstype")
@click.option("-N", "namespace")
def mount_helper(
    spec: Path,
    directory: Path,
    options: tuple[str, ...],
    fake: bool,
    namespace: str | None,
    **_: Any,
) -> None:
    """Mount as mount(8) asks: SPEC is the origin. Exits as mount(8) does."""
    try:
        if namespace is not None:
            raise UsageError("A mount in another namespace is not possible: leave -N out.")
        given, config = _given(opt for group in options for opt in _split(group))
        if not fake:
            mount.start(config, False, {"origin": spec, "mountpoint": directory} | given)
    except FusecacheError as exc:
        sys.stderr.buffer.write(sentences.line(f"mount.fusecache: {exc}"))
        click.get_current_context().exit(_WRONG_USAGE if isinstance(exc, UsageError) else _FAILED)
    except SystemExit as exc:  # the daemon failed, and has said why
        if exc.code:
            click.get_current_context().exit(_WRONG_USAGE if exc.code == 2 else _FAILED)


def _split(group: str) -> list[str]:
    """At commas, but for those in double quotes, as mount(8) has them."""
    parts, quoted = [""], False
    for character in group:
        if character == '"':
            quoted = not quoted
        elif character == "," and not quoted:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def _given(options: Iterable[str]) -> tuple[dict[str, Any], Path | None]:
    """What is ours, by the settings' names, with the rest as ``options``; and the file."""
    given: dict[str, Any] = {}
    rest: list[str] = []
    config: Path | None = None
    for option in options:
        key, equals, value = option.partition("=")
        name = key.replace("_", "-") if not key.startswith("_") else key
        if name == "config":
            config = Path(value)
        elif name in _OURS:
            if not equals or not value:
                raise UsageError(f"The option {key} needs a value: write {key}=...")
            given[name] = value
        elif key in ("remount", "bind", "move"):
            raise MountError(
                f"{key} is not possible: change the configuration and use fusecache reload, or "
                "unmount and mount."
            )
        elif key in _NOT_FOR_FUSE or key.startswith(("x-", "X-")):
            continue
        elif equals and key not in _OF_FUSE:
            raise UsageError(f"There is no option {key}{nearest(name, _OURS)}")
        else:
            rest.append(option)
    return {**given, "options": tuple(rest)}, config
