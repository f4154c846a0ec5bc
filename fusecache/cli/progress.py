"""How long work looks: one line on a terminal that changes, nothing in a pipe; and its end by
Ctrl-C, which says how things are then."""

import contextlib
import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Self

import click

from fusecache.config import format_size
from fusecache.errors import GivenUpError
from fusecache.observe.times import time_text

_WINDOW = 10.0
"""Seconds of which the rate is."""
_SOON = 1.0
"""Seconds before which there is none."""
_BAR = 10
_INTERVAL = 0.1


class Meter:
    """How much of some work is done, how fast it goes, how long the rest takes at that rate."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int]] = deque()
        self._of = 0

    def text(self, how: str, done: int, of: int, now: float, unit: str = "") -> str:
        """``[##--------] 25% of 3.1 GiB taken, 45.3 MiB/s, 53 s left``.

        Args:
            how: what was done to it; may be empty.
            of: all there is to do; never less than it was before, if that grew meanwhile.
            now: seconds.
            unit: what is counted; bytes if empty.
        """
        self._of = max(self._of, of, 1)
        done = max(0, min(done + self._of - of, self._of))
        while len(self._samples) > 1 and now - self._samples[1][0] >= _WINDOW:
            self._samples.popleft()
        self._samples.append((now, done))
        share = done / self._of
        bar = f"[{'#' * int(share * _BAR):-<{_BAR}}] {100 * share:.0f}% of "
        of_all = f"{_amount(self._of, unit)} {how}".rstrip()
        return bar + ", ".join([of_all, *self._pace(done, now, unit)])

    def _pace(self, done: int, now: float, unit: str) -> list[str]:
        """Rate and time left, once they can be told."""
        then, before = self._samples[0]
        if now - then < _SOON or done <= before:
            return []
        rate = (done - before) / (now - then)
        return [f"{_amount(rate, unit)}/s", f"{time_text((self._of - done) / rate)} left"]


def _amount(count: float, unit: str) -> str:
    return f"{count:.0f} {unit}" if unit else format_size(count)


class Progress:
    """One line on standard error, if that is a terminal; gone when the work is done."""

    def __init__(self) -> None:
        self._shown = ""
        self._meter = Meter()
        self._what = ""
        self._at = float("-inf")
        self.live = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.show("")

    def show(self, text: str) -> None:
        """Replaces the line. What does not fit into the terminal is cut off."""
        if not self.live:
            return
        text = text[: shutil.get_terminal_size().columns - 1]
        if text != self._shown:
            self._shown = text
            sys.stderr.write(f"\r\x1b[K{text}")
            sys.stderr.flush()

    def follow(
        self, verb: str, how: str, done: int, of: int, unit: str = "", more: str = ""
    ) -> None:
        """Shows how far the work is; rate and time left follow from the calls before."""
        now, what = time.monotonic(), f"{verb} {how}"
        if not self.live or (what == self._what and now - self._at < _INTERVAL):
            return
        if what != self._what:
            self._what, self._meter = what, Meter()
        self._at = now
        self.show(f"{verb}: {self._meter.text(how, done, of, now, unit)}{more}")

    def write_back(self, verb: str, left: int, of: int, more: str = "") -> None:
        """``follow`` for what goes to the origin; ``of`` is how much there was in the beginning."""
        if left <= 0:
            self.show(f"{verb}: syncing{more}")
        else:
            of = max(left, of)
            self.follow(verb, "", of - left, of, more=more)


@contextlib.contextmanager
def interruptible(how_it_is: str | Callable[[], str]) -> Iterator[None]:
    """Ctrl-C in the body ends the command with a sentence that says how things are then.

    Raises:
        GivenUpError: in place of the interrupt.
    """
    try:
        yield
    except (KeyboardInterrupt, click.Abort):
        said = how_it_is if isinstance(how_it_is, str) else how_it_is()
        raise GivenUpError(f"interrupted: {said}") from None


def left_text(left: int, of: int) -> str:
    """``1.2 GiB left to write back (38%)``; ``of`` is how much there was in the beginning."""
    if left <= 0:
        return "syncing"
    done = 100 * (1 - left / max(left, of))
    return f"{format_size(left)} left to write back ({done:.0f}%)"


def count_text(count: int) -> str:
    """``1 image``, ``2 images``."""
    return f"{count} image{'s' * (count != 1)}"


def amount_text(kept: dict[str, Any]) -> str:
    """``1.2 GiB of 3 images``."""
    return f"{format_size(kept['bytes'])} of {count_text(kept['images'])}"


def kept_text(kept: dict[str, Any]) -> str:
    """``1.2 GiB of 3 images stay on /dev/sdb: ...``, with what to do."""
    return (
        f"{amount_text(kept)} stay on {kept['cache']}: mount it again, or: "
        f"fusecache flush --cache {kept.get('named', kept['cache'])}"
    )
