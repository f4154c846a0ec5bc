"""How long work looks: one line on a terminal that changes, nothing in a pipe."""

import sys
from types import TracebackType
from typing import Any, Self

from fusecache.config import format_size


class Progress:
    """One line on standard error, if that is a terminal; gone when the work is done."""

    def __init__(self) -> None:
        self._shown = ""
        self.live = sys.stderr.isatty()

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
        """Replaces the line."""
        if self.live and text != self._shown:
            self._shown = text
            sys.stderr.write(f"\r\x1b[K{text}")
            sys.stderr.flush()


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
        f"fusecache flush --cache {kept['cache']}"
    )
