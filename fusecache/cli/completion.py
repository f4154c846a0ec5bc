"""What the shell offers for a word that was begun: mounts and images, asked of the daemons alone.

Nothing below a mount is touched, it may hang; a daemon that does not answer at once is left out.
"""

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

import click
from click.shell_completion import CompletionItem, get_completion_class

from fusecache.cli.paths import mount_path
from fusecache.control import client
from fusecache.control.client import Daemon
from fusecache.errors import FusecacheError
from fusecache.store import mountinfo

SHELLS = ("bash", "zsh", "fish")
_ANSWER = 0.5
"""Seconds a daemon has: somebody waits with a finger on the key."""
_MOST = 500
_Words = list[CompletionItem]


def script(command: click.Command, shell: str) -> str:
    """What one of ``SHELLS`` has to read once to know the words of ``fusecache``."""
    kind = get_completion_class(shell)
    assert kind is not None, shell
    made = kind(command, {}, "fusecache", "_FUSECACHE_COMPLETE")
    return made.source_template % made.source_vars()


def files(context: click.Context, param: click.Parameter, begun: str) -> _Words:
    """The shell completes a path by itself."""
    return [CompletionItem(begun, type="file")]


def directories(context: click.Context, param: click.Parameter, begun: str) -> _Words:
    """The same, of directories."""
    return [CompletionItem(begun, type="dir")]


def running_mounts(context: click.Context, param: click.Parameter, begun: str) -> _Words:
    """Where daemons serve."""
    return _words((str(daemon.mountpoint) for daemon in _daemons()), begun)


def all_mounts(context: click.Context, param: click.Parameter, begun: str) -> _Words:
    """The same, and dead ones."""
    dead = {str(entry.path) for entry in mountinfo.ours()}
    return _words(sorted(dead | {str(daemon.mountpoint) for daemon in _daemons()}), begun)


def images(context: click.Context, param: click.Parameter, begun: str) -> _Words:
    """Images that are known to a daemon, as its mount names them from here: below the mount point
    if that was begun to be written, else relative. Of those that were named before, none."""
    chosen: Path | None = context.params.get("mountpoint")
    try:
        place = None if chosen is None else mount_path(chosen)
    except FusecacheError:
        return []
    taken = set(context.params.get("images") or ())
    names: list[str] = []
    for daemon in _daemons():
        if place in (None, daemon.mountpoint):
            names += (_shown(daemon, path, begun) for path in _paths(daemon))
    return _words(sorted(set(names) - taken), begun)


def _daemons() -> list[Daemon]:
    with contextlib.suppress(OSError, FusecacheError):
        return client.daemons(_ANSWER)
    return []


def _paths(daemon: Daemon) -> list[str]:
    request = {"verb": "status", "most": _MOST}
    with contextlib.suppress(OSError, FusecacheError, KeyError):
        status = client.ask(daemon.socket_path, request, timeout=_ANSWER)
        return [image["path"] for image in status["images"]]
    return []


def _shown(daemon: Daemon, path: str, begun: str) -> str:
    """As ``client.locate`` takes it."""
    if begun.startswith("/"):
        root = daemon.origin if Path(begun).is_relative_to(daemon.origin) else daemon.mountpoint
        return os.path.join(root, path)
    with contextlib.suppress(OSError):
        here = Path(os.getcwd())
        for root in (daemon.mountpoint, daemon.origin):
            if here.is_relative_to(root):
                return os.path.relpath(os.path.join(root, path), here)
    return path


def _words(names: Iterable[str], begun: str) -> _Words:
    """Those that go on as begun; what is not UTF-8 cannot be offered."""
    offered = []
    for name in names:
        with contextlib.suppress(UnicodeEncodeError):
            name.encode()
            if name.startswith(begun):
                offered.append(CompletionItem(name))
    return offered
