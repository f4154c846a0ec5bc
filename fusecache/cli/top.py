"""``top``: what ``status`` says, live in the terminal."""

import os
import select
import signal
import sys
import termios
import threading
import time
import tty
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
from rich.console import Console
from rich.live import Live

from fusecache.cli.images import mount_option
from fusecache.cli.paths import mount_path
from fusecache.cli.status import readable
from fusecache.control import client
from fusecache.errors import ControlError
from fusecache.observe.live import SORTS, Look, View, frame

_MOST_IMAGES = 500
_ANSWER = 5.0
"""Seconds a daemon has to answer."""
_KEYS = 0.1
"""Seconds between two looks for a key or news."""


@click.command(epilog="Example: fusecache top --sort dirty")
@click.option(
    "--interval",
    type=click.FloatRange(0.1, 3600),
    default=1.0,
    metavar="SECONDS",
    help="How often it looks. [1]",
)
@click.option(
    "--sort", type=click.Choice(list(SORTS)), default="reads", help="What comes first. [reads]"
)
@click.option("--count", type=click.IntRange(1), metavar="N", help="Print N tables and end.")
@click.option("--once", is_flag=True, help="Print one table and end, as without a terminal.")
@mount_option
def top(
    interval: float, sort: str, count: int | None, once: bool, mountpoint: Path | None
) -> None:  # fmt: skip
    """Watch what is served from where. q ends it, s sorts by something else, r turns the order."""
    watch = Watch(None if mountpoint is None else mount_path(mountpoint))
    client.choose(watch.mountpoint)  # refuses at once if there is none that answers
    view = View(sort)
    live = sys.stdin.isatty() and sys.stdout.isatty()
    if once or count is not None or not live:
        _print(watch, view, interval, 1 if once or count is None else count)
    else:
        _show(watch, view, interval)


class Watch:
    """Asks the daemons, and remembers which there were."""

    def __init__(self, mountpoint: Path | None) -> None:
        self.mountpoint = mountpoint
        self._known: dict[Path, str] = {}
        """By mount point: the sentence about its daemon once it is gone."""

    def look(self) -> Look:
        """All daemons now; takes as long as the slowest needs to answer."""
        seen = Look()
        silent = dict(self._known)
        running, hung = client.survey()
        for other in hung:
            if self.mountpoint in (None, other.mountpoint):
                silent.setdefault(other.mountpoint, f"{other.plight}.")
        for daemon in running:
            if self.mountpoint not in (None, daemon.mountpoint):
                continue
            request = {"verb": "status", "most": _MOST_IMAGES, "history": True}
            try:
                answer = client.ask(daemon.socket_path, request, timeout=_ANSWER)
            except ControlError as exc:
                seen.gone.append(str(exc))
                silent.pop(daemon.mountpoint, None)
                continue
            if "rates" not in answer:
                seen.gone.append(
                    f"The daemon of {daemon.mountpoint} (pid {daemon.pid}) is of an older version "
                    "and does not tell enough: mount it anew."
                )
            else:
                seen.mounts.append(readable(answer))
                self._known[daemon.mountpoint] = (
                    f"The daemon of {daemon.mountpoint} (pid {daemon.pid}) does not answer since "
                    f"{time.strftime('%H:%M:%S')}. If it is gone, start it again: fusecache mount"
                )
            silent.pop(daemon.mountpoint, None)
        seen.gone += silent.values()
        return seen


def _print(watch: Watch, view: View, interval: float, count: int) -> None:
    """Plain tables, one after the other.

    Raises:
        ControlError: a daemon was gone at the end.
    """
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    for number in range(count):
        if number:
            time.sleep(interval)
            console.print()
        seen = watch.look()
        console.print(frame(seen, view, console.width, None, time.strftime("%H:%M:%S")))
        sys.stdout.flush()
    if seen.gone:
        raise ControlError(seen.gone[0])


def _show(watch: Watch, view: View, interval: float) -> None:
    """The whole terminal, until a key or a signal ends it."""
    console = Console(highlight=False)
    poller = _Poller(watch, interval)
    seen = watch.look()
    poller.start()
    try:
        with _keys() as fd, Live(console=console, screen=True, auto_refresh=False) as screen:
            shown = None
            while True:
                seen = poller.newest or seen
                size = console.size
                if (now := (time.strftime("%H:%M:%S"), size, repr(view))) != shown:
                    shown = now
                    picture = frame(seen, view, size.width, size.height, now[0])
                    screen.update(picture, refresh=True)
                if not all(map(view.key, _pressed(fd))):
                    break
    except KeyboardInterrupt:
        pass
    finally:
        poller.end.set()


class _Poller(threading.Thread):
    """Looks again and again, so that a daemon that is slow to answer keeps no key waiting."""

    def __init__(self, watch: Watch, interval: float) -> None:
        super().__init__(daemon=True)
        self._watch = watch
        self._interval = interval
        self.newest: Look | None = None
        self.end = threading.Event()

    def run(self) -> None:
        """Until ``end``."""
        while not self.end.wait(self._interval):
            try:
                self.newest = self._watch.look()
            except OSError as exc:
                self.newest = Look(gone=[f"Nothing can be asked: {exc.strerror}."])


@contextmanager
def _keys() -> Iterator[int]:
    """Standard input gives single keys, unseen, until the end, however that comes."""
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)

    def ended(number: int, _: object) -> None:
        raise KeyboardInterrupt

    handlers = {number: signal.signal(number, ended) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        tty.setcbreak(fd)
        yield fd
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _pressed(fd: int) -> list[str]:
    """Keys that were pressed in the next moment; a terminal that went away is Ctrl-D."""
    if not select.select([fd], [], [], _KEYS)[0]:
        return []
    try:
        data = os.read(fd, 64).decode("utf-8", "replace")
    except OSError:
        return ["\x04"]
    if not data:
        return ["\x04"]
    return [data] if data.startswith("\x1b") else list(data)
