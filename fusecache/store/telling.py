"""How long work in the store tells how far it is."""

from typing import Protocol


class Tell(Protocol):
    """Hears of progress."""

    def __call__(self, how: str, done: int, of: int, unit: str = "") -> None:
        """``done`` of ``of`` units were dealt with.

        Args:
            how: what was done to them, like ``read``.
            unit: what is counted, like ``regions``; bytes if empty.
        """
        ...


def silent(how: str, done: int, of: int, unit: str = "") -> None:
    """Nobody listens."""
